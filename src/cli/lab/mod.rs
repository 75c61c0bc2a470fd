//! The verbs `lab` and `mkpflash`.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use log::LevelFilter;

use super::{Task, exit_code, logging, output, run};
use crate::error::{EXIT_GUEST, EXIT_OK, EXIT_USAGE, Error};
use crate::host::{write_file, write_padded};
use crate::labs::steps::Step;
use crate::labs::{self, LABS, Lab, LabOptions, Outcome, Variant};

mod stdout;
mod verb;

use stdout::Stdout;
use verb::LabArgs;
pub(super) use verb::LabVerb;

/// The task of a command line with one of these verbs.
#[derive(Debug)]
pub(super) enum LabTask {
    /// Run labs. Boxed: the other task is small.
    Run(Box<LabArgs>, LevelFilter),
    /// Create the image of a flash.
    MakeFlash { program: PathBuf, output: PathBuf },
}

/// The task of a verb; the error is the mistake as one line.
pub(super) fn task(verb: LabVerb, env_level: Option<OsString>) -> Result<Task, String> {
    Ok(match verb {
        LabVerb::Lab(args) if args.list => Task::Show(list()),
        LabVerb::Lab(args) => {
            let level = run::level(args.log, env_level)?;
            Task::Lab(LabTask::Run(args, level))
        }
        LabVerb::Mkpflash { program, output } => Task::Lab(LabTask::MakeFlash { program, output }),
    })
}

/// Runs the task, and returns the exit code.
pub(super) fn perform(task: LabTask) -> u8 {
    match task {
        LabTask::Run(args, level) => run_labs(*args, level),
        LabTask::MakeFlash { program, output } => exit_code(make_flash(&program, &output)),
    }
}

/// Every lab, for `--list`.
fn list() -> String {
    let mut text = String::from("Labs (rvmm lab NAME):\n");
    for lab in LABS {
        // Writing into a String cannot fail.
        let _ = writeln!(text, "\n  {:<10} {}", lab.name, lab.question);
        for variant in lab.variants.iter().filter(|variant| !variant.summary.is_empty()) {
            let _ = writeln!(text, "      --variant {:<12} {}", variant.name, variant.summary);
        }
    }
    text
}

/// Runs the selected labs, and returns the exit code.
fn run_labs(args: LabArgs, level: LevelFilter) -> u8 {
    logging::start(level);
    let plan = match plan(&args) {
        Ok(plan) => plan,
        Err(mistake) => {
            output::print_message(&mistake);
            return EXIT_USAGE;
        }
    };
    if let Some(path) = &args.save {
        return exit_code(save(&plan, path));
    }
    if args.picture {
        return picture(&plan);
    }
    let options = LabOptions {
        payload: args.payload,
        kernel: args.kernel,
        explain: args.explain,
        limit_s: args.limit.into(),
    };
    let mut worst = EXIT_OK;
    for (lab, variant) in plan {
        if args.explain || args.check {
            let line = format!("== {}{}: {}\n", lab.name, suffix(lab, variant), lab.question);
            worst = worst.max(output::show(&line));
        }
        if args.explain {
            let steps = numbered(labs::steps::steps(lab, variant));
            worst = worst.max(output::show(&format!("{}\n\n{steps}\n", lab.story)));
        }
        worst = worst.max(run_one(lab, variant, &options, args.check));
    }
    worst
}

/// Prints the picture of the lab, if exactly one is selected.
fn picture(plan: &[(&Lab, &Variant)]) -> u8 {
    let [(lab, variant)] = plan else {
        output::print_message("Cannot print the pictures of all labs at once (name one)");
        return EXIT_USAGE;
    };
    match labs::picture::picture(lab, variant) {
        Some(svg) => output::show(&svg),
        None => {
            output::print_message(&format!("Lab {} has no picture", lab.name));
            EXIT_USAGE
        }
    }
}

/// The steps of a lab, a line each.
fn numbered(steps: &[Step]) -> String {
    let mut text = String::new();
    for (number, step) in (1..).zip(steps) {
        let (from, to) = (step.from.name(), step.to.name());
        let way = if from == to { from.into() } else { format!("{from} -> {to}") };
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{number:>3}. {way:<9} {}", step.text);
    }
    text
}

fn run_one(lab: &Lab, variant: &Variant, options: &LabOptions, is_check: bool) -> u8 {
    let name = format!("{}{}", lab.name, suffix(lab, variant));
    let stdout = Stdout::default();
    let outcome = labs::run(lab, variant, options, Box::new(stdout.clone()));
    let code = match outcome {
        Ok(Outcome::Passed) if is_check => output::show(&format!("lab {name}: passed\n")),
        Ok(Outcome::Passed) => EXIT_OK,
        Ok(Outcome::Skipped(why)) => output::show(&format!("lab {name}: skipped: {why}\n")),
        Ok(Outcome::Failed(why)) => {
            output::print_message(&format!("Lab {name} failed: {why}"));
            EXIT_GUEST
        }
        Err(error) => {
            output::print_message(&output::chain(&error));
            error.exit_code()
        }
    };
    code.max(stdout.end())
}

fn suffix(lab: &Lab, variant: &Variant) -> String {
    if lab.variants.len() == 1 { String::new() } else { format!(" ({})", variant.name) }
}

/// The labs and variants that the command line names.
fn plan(args: &LabArgs) -> Result<Vec<(&'static Lab, &'static Variant)>, String> {
    let names = || LABS.iter().map(|lab| lab.name).collect::<Vec<_>>().join(", ");
    let Some(name) = args.name.as_deref() else {
        return Err(format!(
            "The lab's name is missing (write rvmm lab NAME, with NAME one of {}; rvmm lab --list shows more)",
            names()
        ));
    };
    if name == "all" {
        if args.payload.is_some() || args.variant.is_some() {
            return Err("Cannot use --payload and --variant with all labs (name one)".into());
        }
        return Ok(LABS
            .iter()
            .flat_map(|lab| lab.variants.iter().map(move |variant| (lab, variant)))
            .collect());
    }
    let lab = Lab::find(name).ok_or_else(|| {
        format!("There is no lab {} (use one of {}, or all)", crate::config::quoted(name), names())
    })?;
    if let (Some(_), Some(_)) = (&args.kernel, lab.payload()) {
        return Err(format!("Lab {name} boots no kernel (use --payload FILE for another guest)"));
    }
    let variant = lab.variant(args.variant.as_deref()).ok_or_else(|| {
        let known = lab.variants.iter().map(|variant| variant.name).collect::<Vec<_>>().join(", ");
        format!("Lab {name} has no such variant (it has {known})")
    })?;
    Ok(vec![(lab, variant)])
}

/// Writes the guest of the one lab that is named.
fn save(plan: &[(&Lab, &Variant)], path: &Path) -> Result<(), Error> {
    let payload = match plan {
        [(lab, _)] => lab.payload(),
        _ => None,
    };
    let payload = payload.ok_or_else(|| {
        Error::Config("Cannot save the guest: name one lab that has a guest of rvmm's own".into())
    })?;
    write_file(path, payload).map_err(|source| Error::File {
        verb: "write",
        path: path.into(),
        source,
    })
}

/// Writes a flash image with the program in `program` to `to`, as long as a whole bank.
fn make_flash(program: &Path, to: &Path) -> Result<(), Error> {
    let failed = |verb, path: &Path| {
        let path = PathBuf::from(path);
        move |source| Error::File { verb, path, source }
    };
    let bytes = labs::read(program)?;
    let image = labs::pflash::image(&bytes).map_err(|reason| {
        Error::Config(format!("Cannot create a flash image of {}: {reason}", program.display()))
    })?;
    write_padded(to, &image, labs::pflash::SIZE as u64).map_err(failed("write", to))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(name: Option<&str>, variant: Option<&str>) -> LabArgs {
        LabArgs {
            name: name.map(Into::into),
            variant: variant.map(Into::into),
            ..LabArgs::default()
        }
    }

    #[test]
    fn all_means_every_variant_of_every_lab() {
        let all = plan(&args(Some("all"), None)).unwrap();
        assert_eq!(all.len(), LABS.iter().map(|lab| lab.variants.len()).sum::<usize>());
    }

    #[test]
    fn a_picture_is_of_one_lab_and_every_lab_has_one() {
        assert_eq!(picture(&plan(&args(Some("all"), None)).unwrap()), EXIT_USAGE);
        let has_one = |lab: &Lab| labs::picture::picture(lab, &lab.variants[0]).is_some();
        assert!(LABS.iter().all(has_one));
    }

    #[test]
    fn steps_are_numbered_and_name_both_modes() {
        let lab = Lab::find("h_1_0").unwrap();
        let text = numbered(labs::steps::steps(lab, &lab.variants[0]));
        assert!(text.starts_with("  1. U -> HS   KVM_RUN"), "{text}");
        assert!(text.contains("\n  3. VU        li a7, 8\n"), "{text}");
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        for (name, variant) in [(None, None), (Some("h_9_0"), None), (Some("h_2_0"), Some("fast"))]
        {
            let mistake = plan(&args(name, variant)).err().unwrap();
            assert!(mistake.contains("h_1_0") || mistake.contains("lazy"), "{mistake}");
        }
    }

    #[test]
    fn a_kernel_is_for_a_lab_that_boots_one() {
        let with = |name| LabArgs { kernel: Some("Image".into()), ..args(Some(name), None) };
        assert!(plan(&with("h_1_0")).err().unwrap().contains("--payload"));
        assert!(plan(&with("linux-smp")).is_ok() && plan(&with("all")).is_ok());
    }

    #[test]
    fn a_flash_is_a_whole_bank_with_the_program_after_its_header() {
        let folder = tempfile::tempdir().unwrap();
        let (program, image) = (folder.path().join("app"), folder.path().join("flash"));
        std::fs::write(&program, b"program").unwrap();
        make_flash(&program, &image).unwrap();
        let bytes = std::fs::read(&image).unwrap();
        assert_eq!(
            (bytes.len(), &bytes[..4], &bytes[16..23]),
            (32 << 20, &b"pfld"[..], &b"program"[..])
        );
        assert!(make_flash(&folder.path().join("none"), &image).is_err());
    }
}
