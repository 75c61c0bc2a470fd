//! Lines of the report, as text and as JSON.

use std::fmt::Write;

use serde::Serialize;

use crate::cli::output::push_escaped;

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    /// It is available.
    Ok,
    /// It is missing.
    Missing,
    /// It is worth knowing.
    Note,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    /// The subject of the check; stable, for programs.
    pub(super) topic: &'static str,
    /// The result.
    pub(super) status: Status,
    /// True if rvmm cannot run without it.
    pub(super) required: bool,
    /// The finding.
    pub(super) found: String,
    /// Advice, if there is something to do.
    pub(super) advice: Option<String>,
}

impl Check {
    /// It is available.
    pub(super) fn ok(topic: &'static str, found: impl Into<String>) -> Self {
        Self { topic, status: Status::Ok, required: false, found: found.into(), advice: None }
    }

    /// It is worth knowing.
    pub(super) fn note(topic: &'static str, found: impl Into<String>) -> Self {
        Self { status: Status::Note, ..Self::ok(topic, found) }
    }

    /// It is missing, and a feature is not available.
    pub(super) fn missing(topic: &'static str, found: impl Into<String>) -> Self {
        Self { status: Status::Missing, ..Self::ok(topic, found) }
    }

    /// The same check, without which rvmm cannot run.
    pub(super) fn required(self) -> Self {
        Self { required: true, ..self }
    }

    /// The same check, with advice.
    pub(super) fn advise(self, advice: impl Into<String>) -> Self {
        Self { advice: Some(advice.into()), ..self }
    }

    fn prevents(&self) -> bool {
        self.required && self.status == Status::Missing
    }
}

/// The whole report.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// The version of rvmm.
    rvmm: &'static str,
    /// True if rvmm can run machines here.
    can_run: bool,
    /// The lines.
    checks: Vec<Check>,
}

impl Report {
    pub(super) fn new(checks: Vec<Check>) -> Self {
        let can_run = !checks.iter().any(Check::prevents);
        Self { rvmm: env!("CARGO_PKG_VERSION"), can_run, checks }
    }

    pub(super) fn can_run(&self) -> bool {
        self.can_run
    }

    /// One line per check, one more for its advice, and the verdict.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        for check in &self.checks {
            let status = match check.status {
                Status::Ok => "ok",
                Status::Missing => "missing",
                Status::Note => "note",
            };
            // Writing into a String cannot fail.
            let _ = write!(text, "{status:<8} {:<14} ", check.topic);
            push_escaped(&mut text, &check.found);
            text.push('\n');
            if let Some(advice) = &check.advice {
                let _ = writeln!(text, "{:<23} -> {advice}", "");
            }
        }
        text.push('\n');
        text.push_str(&self.verdict());
        text
    }

    fn verdict(&self) -> String {
        let missing: Vec<_> =
            self.checks.iter().filter(|check| check.prevents()).map(|check| check.topic).collect();
        if missing.is_empty() {
            "rvmm can run machines here.\n".into()
        } else {
            format!("rvmm cannot run machines here: see {}.\n", missing.join(", "))
        }
    }

    /// The report as one JSON object, with a line end.
    pub(super) fn json(&self) -> String {
        // Plain data with text keys always serializes.
        let mut json = serde_json::to_string_pretty(self).unwrap_or_default();
        json.push('\n');
        json
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report::new(vec![
            Check::ok("kernel", "Linux 6.12\n\u{1b}[31m"),
            Check::missing("tun", "no /dev/net/tun").advise("sudo modprobe tun"),
        ])
    }

    #[test]
    fn each_check_is_a_line_and_its_advice_another() {
        let text = report().text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "ok       kernel         Linux 6.12\\n\\u{1b}[31m");
        assert_eq!(lines[1], "missing  tun            no /dev/net/tun");
        assert_eq!(lines[2].trim(), "-> sudo modprobe tun");
        assert_eq!(lines.last(), Some(&"rvmm can run machines here."));
    }

    #[test]
    fn only_what_is_required_keeps_rvmm_from_running() {
        assert!(report().can_run());
        let without = Report::new(vec![Check::missing("kvm", "no /dev/kvm").required()]);
        assert!(!without.can_run());
        assert!(without.text().ends_with("cannot run machines here: see kvm.\n"));
        assert!(Report::new(vec![Check::ok("kvm", "there").required()]).can_run());
    }

    #[test]
    fn json_has_the_same_content() {
        let json: serde_json::Value = serde_json::from_str(&report().json()).expect("JSON");
        assert_eq!(json["can_run"], true);
        assert_eq!(json["checks"][1]["status"], "missing");
        assert_eq!(json["checks"][1]["topic"], "tun");
        assert_eq!(json["checks"][1]["advice"], "sudo modprobe tun");
        assert_eq!(json["checks"][0]["advice"], serde_json::Value::Null);
    }
}
