//! Assembles the labs' guests (guests/labs) into flat files that `src/labs` takes into the program: with binutils for RISC-V,
//! on any machine.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Guests, where each is loaded, and whether the prelude stands in front of it.
const GUESTS: [(&str, &str, bool); 11] = [
    ("h_1_0", "0x80200000", false),
    ("simple_hv", "0x80200000", false),
    ("h_2_0", "0x80200000", true),
    ("h_3_0", "0x80200000", true),
    ("h_4_0", "0x80200000", true),
    ("origin", "0x40001000", false),
    ("rvm_1", "0x90000000", true),
    ("rvm_2", "0x90000000", true),
    ("smp", "0x80200000", true),
    ("dtb", "0x80200000", true),
    ("two_vms", "0x80200000", true),
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    if !cfg!(feature = "labs") {
        return Ok(());
    }
    println!("cargo::rerun-if-changed=guests/labs/prelude.S");
    let prefix = prefix()?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for (name, base, has_prelude) in GUESTS {
        let file = |ending: &str| out.join(format!("{name}.{ending}"));
        let source = format!("guests/labs/{name}.S");
        println!("cargo::rerun-if-changed={source}");
        let mut sources = vec!["guests/labs/prelude.S", source.as_str()];
        if !has_prelude {
            sources.remove(0);
        }
        run(&prefix, "as", &["-march=rv64imac_zicsr_zifencei", "-o"], &[&file("o")], &sources)?;
        let base = format!("-Ttext={base}");
        run(
            &prefix,
            "ld",
            &["-e", "0", "-N", "--no-relax", &base, "-o"],
            &[&file("elf"), &file("o")],
            &[],
        )?;
        run(
            &prefix,
            "objcopy",
            &["-O", "binary", "-j", ".text"],
            &[&file("elf"), &file("bin")],
            &[],
        )?;
    }
    Ok(())
}

/// What the names of the tools begin with: nothing where the machine is a RISC-V one.
fn prefix() -> Result<String, Box<dyn Error>> {
    let candidates = ["riscv64-linux-gnu-", "riscv64-unknown-linux-gnu-", "riscv64-unknown-elf-"];
    let native = env::var("HOST")?.starts_with("riscv64").then_some("");
    let works = |prefix: &&str| {
        let asked = Command::new(format!("{prefix}as")).arg("--version").output();
        asked.is_ok_and(|answer| answer.status.success())
    };
    let found = native.into_iter().chain(candidates).find(works);
    found.map(Into::into).ok_or_else(|| {
        "No assembler for RISC-V (the labs' guests need one; in Debian: apt install binutils-riscv64-linux-gnu, or scripts/setup)".into()
    })
}

fn run(
    prefix: &str,
    tool: &str,
    flags: &[&str],
    files: &[&Path],
    sources: &[&str],
) -> Result<(), Box<dyn Error>> {
    let mut command = Command::new(format!("{prefix}{tool}"));
    let answer = command.args(flags).args(files).args(sources).output()?;
    if answer.status.success() {
        return Ok(());
    }
    Err(format!("{command:?} failed:\n{}", String::from_utf8_lossy(&answer.stderr)).into())
}
