//! The command line: output, errors and exit codes. Runs on any machine.

#![allow(clippy::expect_used, clippy::panic, reason = "tests may panic: that is how a test fails")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Output, Stdio};

use rvmm_devices::testing::{leave_out, skip};

fn rvmm(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rvmm"));
    command.args(args).env_remove("RVMM_LOG").stdin(Stdio::null());
    command.output().expect("the program starts")
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("UTF-8")
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("UTF-8")
}

/// The output of a command that succeeds without warnings.
fn text(args: &[&str]) -> String {
    let output = rvmm(args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
    assert_eq!(stderr(&output), "", "{args:?}");
    stdout(&output).to_owned()
}

/// The message of a command that is refused as a usage error.
fn mistake(args: &[&str]) -> String {
    let output = rvmm(args);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
    assert_eq!(stdout(&output), "", "{args:?}");
    let message = stderr(&output);
    assert!(message.starts_with("rvmm: ") && message.ends_with('\n'), "{message:?}");
    assert_eq!(message.lines().count(), 1, "one line: {message:?}");
    message.to_owned()
}

/// Passes `input` to a program; `None`, with a message, if the program is not installed.
fn checked_by(program: &str, args: &[&str], input: &str) -> Option<Output> {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), input).expect("a temporary file");
    match Command::new(program).args(args).arg(file.path()).stdin(Stdio::null()).output() {
        Ok(output) => Some(output),
        Err(error) => {
            leave_out(&format!("{program} is not installed: {error}"));
            None
        }
    }
}

#[test]
fn help_goes_to_standard_output_and_has_examples() {
    let help = text(&["--help"]);
    assert!(help.contains("Usage: rvmm"));
    assert!(help.contains("rvmm --kernel Image --mem 512M\n"));
    assert!(help.contains("Exit codes:"));
    assert!(help.lines().all(|line| line.chars().count() <= 120));
    let short = text(&["-h"]);
    assert!(short.contains("--kernel <FILE>") && !short.contains("Examples:\n"));
    assert!(text(&["run", "--help"]).contains("--dump-dtb"));
    assert!(text(&["doctor", "--help"]).contains("--json"));
}

#[test]
fn the_version_is_one_line() {
    assert_eq!(text(&["--version"]), format!("rvmm {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(text(&["-V"]), text(&["--version"]));
}

#[test]
fn a_reader_that_closes_early_is_not_an_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_rvmm"))
        .arg("man")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
}

#[test]
fn a_full_disk_under_standard_output_is_reported() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
    let Ok(full) = full else {
        return skip("there is no /dev/full");
    };
    let output = Command::new(env!("CARGO_BIN_EXE_rvmm")).arg("--version").stdout(full).output();
    let output = output.expect("the program starts");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("standard output"));
}

#[test]
fn reading_only_one_line_of_a_long_text_gives_no_error() {
    for args in [
        &["man"][..],
        &["completions", "bash"],
        &["--help"],
        #[cfg(feature = "labs")]
        &["lab", "h_1_0", "--picture"],
    ] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_rvmm"))
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut out = BufReader::with_capacity(16, child.stdout.take().expect("a pipe"));
        out.read_line(&mut String::new()).expect("a line");
        drop(out);
        let output = child.wait_with_output().expect("an end");
        assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn a_pipe_that_does_not_block_gets_all_of_a_text() {
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    rustix::fs::fcntl_setfl(&writer, rustix::fs::OFlags::NONBLOCK).expect("a mode");
    let expected = text(&["completions", "bash"]);
    // The pipe is full before the program starts: it has to wait.
    let filler = vec![b'x'; 4096];
    let mut filled = 0;
    while let Ok(count) = rustix::io::write(&writer, &filler) {
        filled += count;
    }
    let mut child = Command::new(env!("CARGO_BIN_EXE_rvmm"))
        .args(["completions", "bash"])
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(child.try_wait().expect("a child").is_none(), "it did not wait");
    let mut read = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut read).expect("a text");
    let output = child.wait_with_output().expect("an end");
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
    assert!(read.get(filled..) == Some(expected.as_bytes()));
}

#[test]
fn every_output_to_a_full_disk_is_reported_in_one_line() {
    let Ok(full) = std::fs::OpenOptions::new().write(true).open("/dev/full") else {
        return skip("there is no /dev/full");
    };
    for args in [
        &["man"][..],
        &["completions", "zsh"],
        &["--list-devices"],
        #[cfg(feature = "labs")]
        &["lab", "--list"],
        #[cfg(feature = "labs")]
        &["lab", "h_1_0", "--picture"],
    ] {
        let full = full.try_clone().expect("a descriptor");
        let output = Command::new(env!("CARGO_BIN_EXE_rvmm")).args(args).stdout(full).output();
        let output = output.expect("the program starts");
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let said = stderr(&output);
        assert_eq!(said, "rvmm: Cannot write to standard output: No space left on device\n");
    }
    if cfg!(feature = "labs") {
        let mistake = mistake(&["lab", "h_1_0", "--save", "/dev/full"]);
        assert_eq!(mistake, "rvmm: Cannot write /dev/full: No space left on device\n");
    }
}

#[test]
fn mistakes_end_with_code_2_and_one_line_that_names_flag_and_value() {
    for (args, parts) in [
        (&["--kernle", "x"][..], &["--kernle", "--kernel"][..]),
        (&["--mem", "5Q", "--kernel", "x"], &["--mem", "5Q"]),
        (&["--mem", "0", "--kernel", "x"], &["--mem", "'0'"]),
        (&["--mem", "99999999999999999999", "--kernel", "x"], &["--mem", "64 bits"]),
        (&["--cpus", "0", "--kernel", "x"], &["--cpus", "'0'"]),
        (&["--irqchip", "gic", "--kernel", "x"], &["--irqchip", "gic"]),
        (&["--initrd", "a", "--no-initrd", "--kernel", "x"], &["--initrd", "--no-initrd"]),
        (&["--kernel", "a", "--kernel", "b"], &["--kernel", "twice"]),
        (&["--entry", "0x8000_0000"], &["--entry"]),
        (&["--affinity", "3=0", "--kernel", "x"], &["--affinity 3=0"]),
        (&["--device", "floppy", "--kernel", "x"], &["floppy", "serial"]),
        (&["--name", "two words", "--kernel", "x"], &["--name", "two words"]),
        (&["--sbi", "pmu", "--kernel", "x"], &["--sbi", "pmu"]),
        (&["--trace", "a,colour=red", "--kernel", "x"], &["--trace", "'colour=red'", "pc=on"]),
        (&["--trace", "a,ring=7", "--kernel", "x"], &["--trace", "ring=7", "64 to"]),
        (&["trace", "report", "/nowhere/a", "-o", "b"], &["/nowhere/a", "No such file"]),
        (&["trace", "report", "a"], &["--output"]),
        (&["walk", "here"], &["ADDRESS", "'here'"]),
        (&["Image"], &["Image", "--kernel"]),
        (&[], &["--kernel", "--help"]),
    ] {
        let message = mistake(args);
        for part in parts {
            assert!(message.contains(part), "{args:?} should say {part:?}: {message}");
        }
    }
}

#[test]
fn a_machine_that_does_not_run_is_not_found_and_stale_sockets_are_removed() {
    let folder = tempfile::tempdir().expect("a folder");
    let sockets = folder.path().join("rvmm");
    std::fs::create_dir(&sockets).expect("a folder");
    let dead = sockets.join("web-1.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).expect("a socket"));
    for args in [&["stat"][..], &["regs", "web"], &["walk", "0", "1", "--hart", "1"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rvmm"));
        let output = command.args(args).env("XDG_RUNTIME_DIR", folder.path()).output();
        let output = output.expect("it starts");
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let message = stderr(&output);
        assert!(
            message.starts_with("rvmm: No machine ") && message.lines().count() == 1,
            "{message}"
        );
    }
    assert!(!dead.exists());
}

#[test]
fn the_environment_is_checked_like_a_flag() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rvmm"));
    let output =
        command.args(["--kernel", "x"]).env("RVMM_LOG", "loud").output().expect("it starts");
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("RVMM_LOG='loud'"));
}

#[test]
fn a_word_that_is_not_utf_8_is_refused_without_a_panic() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    for args in [
        [&b"--name"[..], b"\xff"],
        [b"--mem", b"\xff"],
        [b"\xff", b"--kernel=x"],
        [b"--cmdline", b"\xff"],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rvmm"));
        let output = command.args(args.map(OsStr::from_bytes)).output().expect("it starts");
        assert_eq!(
            output.status.code(),
            Some(2),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn the_catalog_is_listed_without_a_kernel() {
    let list = text(&["--list-devices"]);
    assert!(list.contains("serial") && list.contains("rtc") && list.contains("offset="));
    assert_eq!(text(&["--device", "help"]), list);
}

#[test]
fn completion_scripts_parse_in_their_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let script = text(&["completions", shell]);
        assert!(script.contains("dump-dtb") && script.contains("doctor"), "{shell}");
        if let Some(output) = checked_by(shell, &["-n"], &script) {
            assert!(
                output.status.success(),
                "{shell}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
}

#[test]
fn the_manual_page_renders() {
    let page = text(&["man"]);
    assert!(page.contains(".TH rvmm 1"));
    if let Some(output) = checked_by("man", &["--warnings", "-l"], &page) {
        let rendered = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && rendered.contains("dump"), "{rendered}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "no warnings");
    }
}

#[test]
fn the_doctor_ends_with_a_verdict_that_its_exit_code_repeats() {
    let output = rvmm(&["doctor"]);
    let verdict = stdout(&output).lines().last().unwrap_or_default().to_owned();
    match output.status.code() {
        Some(0) => assert_eq!(verdict, "rvmm can run machines here."),
        Some(1) => assert!(verdict.starts_with("rvmm cannot run machines here: see "), "{verdict}"),
        other => panic!("{other:?}: {}", stderr(&output)),
    }
    let json = rvmm(&["doctor", "--json"]);
    assert_eq!(json.status.code(), output.status.code());
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(report["can_run"], output.status.code() == Some(0));
    assert!(report["checks"].as_array().is_some_and(|checks| checks.len() > 5));
}

#[test]
fn an_unsupported_architecture_is_reported() {
    if std::env::consts::ARCH == "riscv64" {
        return skip("this machine is a RISC-V one");
    }
    let output = rvmm(&["doctor"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("scripts/host"));
}

#[test]
fn the_users_files_are_checked_before_the_host() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let missing = folder.path().join("Image");
    let missing = missing.to_str().expect("UTF-8");
    assert!(mistake(&["--kernel", missing, "--mem", "512M"]).contains(missing));
    let text = folder.path().join("notes.txt");
    std::fs::write(&text, "not a kernel").expect("a file");
    assert!(mistake(&["--kernel", text.to_str().expect("UTF-8")]).contains("notes.txt"));
    assert!(mistake(&["--kernel", folder.path().to_str().expect("UTF-8")]).contains("folder"));
    assert!(mistake(&["--load", &format!("{missing}@0x8000_0000")]).contains(missing));
}

#[test]
fn an_unknown_extension_is_a_usage_error() {
    if std::env::consts::ARCH != "riscv64" {
        return skip("KVM's names are looked up on RISC-V only");
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("a.bin");
    std::fs::write(&file, [0x73, 0, 0, 0]).expect("a file");
    let load = format!("{}@0x8000_0000", file.display());
    let serial = ["--serial", "null", "--load", &load];
    for (flag, value, near) in [("--isa", "-zicbon", "zicbom"), ("--sbi", "-pmv", "pmu")] {
        let args: Vec<&str> = serial.into_iter().chain([flag, value]).collect();
        let message = mistake(&args);
        assert!(message.contains(flag) && message.contains(near), "{message}");
    }
}

#[test]
fn a_host_without_kvm_ends_a_good_command_line_with_code_1() {
    if std::env::consts::ARCH == "riscv64" {
        return skip("this machine is a RISC-V one");
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("a.bin");
    std::fs::write(&file, [0x73, 0, 0, 0]).expect("a file");
    let output = rvmm(&["--load", &format!("{}@0x8000_0000", file.display())]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).starts_with("rvmm: ") && stderr(&output).contains("RISC-V"));
    assert_eq!(stderr(&output).lines().count(), 1);
}

#[test]
fn a_dumped_configuration_is_read_from_standard_input() {
    let dumped = text(&["--kernel", "no such Image", "--disk", "a,,b.img", "--dump-config"]);
    assert!(dumped.contains("\"a,b.img\""), "{dumped}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_rvmm"));
    command.args(["--config", "-"]).env_remove("RVMM_LOG");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    child.stdin.take().expect("a pipe").write_all(dumped.as_bytes()).expect("written");
    let output = child.wait_with_output().expect("the program ends");
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("no such Image"), "{}", stderr(&output));
}
