//! The exercises of the labs' pages: each command of the English page accepts the solution of `guests/labs/solutions`, and
//! neither the lab's own guest, nor one that does nothing, nor the solution of the page's other exercise.

#![cfg(feature = "labs")]
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;
#[path = "house/page.rs"]
mod page;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use ::rvmm::labs::{LABS, Lab};
use harness::{Launch, guest, leave_out, one_host, rvmm};
use page::exercises;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The exercises of a lab's page.
fn of(lab: &str) -> Vec<(usize, String)> {
    let path = root().join(format!("docs/labs/{lab}.md"));
    let page = fs::read_to_string(&path);
    exercises(&page.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

/// The name of the files of an exercise's solution, without extension.
fn name(lab: &str, number: usize) -> String {
    format!("{}_{number}", lab.replace('-', "_"))
}

/// Ok if the command accepts a student's files; otherwise its output and the guest's. It runs in a folder with only these
/// files, with this rvmm first in PATH.
fn accepts(command: &str, files: &[(&str, &[u8])]) -> Result<(), String> {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).expect("a file");
    }
    let program = Path::new(env!("CARGO_BIN_EXE_rvmm")).parent().expect("a folder");
    let mut path = program.as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut session = Launch::new("sh")
        .args(&["-c", command])
        .env("PATH", &PathBuf::from(path))
        .folder(folder.path())
        .no_input()
        .start();
    if session.exit_code() == 0 {
        return Ok(());
    }
    let kept = fs::read(folder.path().join("out")).unwrap_or_default();
    Err(format!(
        "{}{}{}",
        session.all_errors(),
        String::from_utf8_lossy(&session.output()),
        String::from_utf8_lossy(&kept)
    ))
}

/// The reason why an exercise cannot be solved on this host, which its command reports as well.
fn obstacle(name: &str) -> Option<&'static str> {
    let (sign, why) = match name {
        "h_2_0_2" => ("Sv39", "this host has no Sv48"),
        "rvm_1_1" => ("calls of SBI 0.1 reach rvmm", "this host's kernel has SBI 0.1"),
        _ => return None,
    };
    let mut doctor = rvmm(&["doctor"]).no_input().start();
    assert_eq!(doctor.exit_code(), 0, "{}", doctor.all_errors());
    String::from_utf8_lossy(&doctor.output()).contains(sign).then_some(why)
}

/// The solution of an exercise, and its kernel if it has one.
fn solution(lab: &str, number: usize) -> (Vec<u8>, Vec<u8>) {
    let name = name(lab, number);
    let mine = fs::read(guest(&format!("labs/{name}"))).expect("a solution");
    let kernel = root().join(format!("target/guests/labs/{name}_kernel"));
    (mine, fs::read(kernel).unwrap_or_default())
}

/// Runs each exercise of a lab with its solution, and with wrong ones.
fn judge(lab: &str, irqchip: &str) {
    let Some(_) = one_host(irqchip) else { return };
    let own = Lab::find(lab).and_then(Lab::payload).expect("a lab with a guest");
    let nothing = Lab::find("h_1_0").and_then(Lab::payload).expect("two instructions");
    let exercises = of(lab);
    for (number, command) in &exercises {
        if let Some(why) = obstacle(&name(lab, *number)) {
            leave_out(&format!("exercise {number} of {lab}: {why}"));
            continue;
        }
        let is_content = |mine: &[u8], kernel: &[u8]| {
            accepts(command, &[("mine.bin", mine), ("kernel.bin", kernel)])
        };
        let (mine, kernel) = solution(lab, *number);
        if let Err(said) = is_content(&mine, &kernel) {
            panic!("{lab} {number} refuses its solution:\n{command}\n{said}");
        }
        assert!(
            is_content(own, own).is_err(),
            "{lab} {number} takes the lab's own guest:\n{command}"
        );
        // In h_1_0 the lab's own guest does nothing.
        let takes_nothing = own != nothing && is_content(nothing, nothing).is_ok();
        assert!(!takes_nothing, "{lab} {number} takes a guest that does nothing:\n{command}");
        for other in exercises.iter().map(|(other, _)| *other).filter(|other| other != number) {
            let (other_mine, _) = solution(lab, other);
            let takes_other = is_content(&other_mine, &kernel).is_ok();
            assert!(!takes_other, "{lab} {number} takes the solution of {other}:\n{command}");
        }
    }
}

#[test]
fn every_exercise_has_a_solution_and_every_solution_an_exercise() {
    let wanted: BTreeSet<String> = LABS
        .iter()
        .flat_map(|lab| of(lab.name).into_iter().map(|(number, _)| name(lab.name, number)))
        // Its solution is a kernel that the student builds.
        .filter(|name| name != "linux_smp_2")
        .collect();
    let files = fs::read_dir(root().join("guests/labs/solutions")).expect("the solutions");
    let found: BTreeSet<String> = files
        .map(|file| file.expect("a file").path())
        .map(|path| path.file_stem().expect("a name").to_string_lossy().into_owned())
        .filter(|name| !name.ends_with("_kernel"))
        .collect();
    assert_eq!(wanted, found);
    assert!(wanted.len() >= 2 * LABS.len() - 1, "{wanted:?}");
}

#[test]
fn the_exercises_of_h_1_0_accept_only_solutions() {
    judge("h_1_0", "aia");
}

#[test]
fn the_exercises_of_simple_hv_accept_only_solutions() {
    judge("simple_hv", "plic");
}

#[test]
fn the_exercises_of_h_2_0_accept_only_solutions() {
    judge("h_2_0", "aia");
}

#[test]
fn the_exercises_of_h_3_0_accept_only_solutions() {
    judge("h_3_0", "plic");
}

#[test]
fn the_exercises_of_h_4_0_accept_only_solutions() {
    judge("h_4_0", "aia");
}

#[test]
fn the_exercises_of_rvm_1_accept_only_solutions() {
    judge("rvm-1", "plic");
}

#[test]
fn the_exercises_of_rvm_2_accept_only_solutions() {
    judge("rvm-2", "plic");
}

#[test]
fn the_exercises_of_smp_accept_only_solutions() {
    judge("smp", "aia");
}

#[test]
fn the_exercises_of_two_vms_accept_only_solutions() {
    judge("two-vms", "plic");
}

#[test]
fn the_exercises_of_dtb_accept_only_solutions() {
    judge("dtb", "aia");
}

#[test]
fn the_first_exercise_of_linux_smp_is_solved_by_its_command_line() {
    let Some(_) = one_host("plic") else { return };
    let path = root().join("guests/labs/solutions/linux_smp_1.cmdline");
    let cmdline = fs::read_to_string(path).expect("a command line");
    let command = &of("linux-smp")[0].1;
    for part in ["CMDLINE", "/boot/Image"] {
        assert_eq!(command.matches(part).count(), 1, "{command}");
    }
    let kernel = harness::kernel();
    let command = command
        .replace("CMDLINE", cmdline.trim())
        .replace("/boot/Image", kernel.to_str().expect("a plain path"));
    if let Err(said) = accepts(&command, &[]) {
        panic!("{command}\n{said}");
    }
}
