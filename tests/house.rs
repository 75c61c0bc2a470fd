//! Ring 1: the house rules that can be checked automatically. Each rule is a function from a file to complaints; the tests
//! here also apply every rule to a made-up file with a violation, and to one without.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

#[path = "house/file.rs"]
mod file;
#[path = "house/page.rs"]
mod page;
#[path = "house/rooms.rs"]
mod rooms;
#[path = "house/rules.rs"]
mod rules;

use std::path::Path;
use std::sync::OnceLock;

use file::{File, all_files};
use rules::Rule;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file of the repository, read once for all tests.
fn files() -> &'static [File] {
    static FILES: OnceLock<Vec<File>> = OnceLock::new();
    FILES.get_or_init(|| all_files(root()))
}

/// Applies a rule to every file of the repository.
fn holds(rule: Rule) {
    let complaints: Vec<String> = files().iter().flat_map(rule).collect();
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

/// Number of complaints of the rule about a made-up file.
fn complaints(rule: Rule, path: &str, text: &str) -> usize {
    rule(&File::new(path, text)).len()
}

#[track_caller]
fn refuses(rule: Rule, path: &str, text: &str) {
    assert!(complaints(rule, path, text) > 0, "no complaint about {path}: {text:.200}");
}

#[track_caller]
fn accepts(rule: Rule, path: &str, text: &str) {
    assert_eq!(rule(&File::new(path, text)), Vec::<String>::new());
}

#[test]
fn the_repository_is_read_at_all() {
    let files = files();
    for path in [
        "src/lib.rs",
        "boot/src/lib.rs",
        "devices/src/lib.rs",
        "init/src/lib.rs",
        "Cargo.toml",
        "tests/house.rs",
    ] {
        assert!(files.iter().any(|file| file.path == path), "{path} is not among the files");
    }
    assert!(
        !files.iter().any(|file| file.path.contains("target/")),
        "built files are among the files"
    );
}

#[test]
fn files_have_400_lines_of_production_code_at_most() {
    holds(rules::size);
    let long = "fn a() {}\n".repeat(401);
    refuses(rules::size, "src/long.rs", &long);
    let tests = "#[cfg(test)]\nmod tests {\n".to_owned() + &"    // x\n".repeat(500) + "}\n";
    accepts(rules::size, "src/long.rs", &("fn a() {}\n".repeat(400) + &tests));
    refuses(rules::size, "src/long.rs", &("#[cfg(test)]\nmod tests;\n".to_owned() + &long));
    accepts(rules::size, "src/vcpu/tests/long.rs", &long);
}

#[test]
fn files_begin_with_a_description() {
    holds(rules::first_line);
    refuses(rules::first_line, "src/a.rs", "use std::io;\n//! Late\n");
    refuses(rules::first_line, "src/a.rs", "//!\n//! Late\n");
    accepts(rules::first_line, "src/a.rs", "//! What it is.\n");
}

#[test]
fn dependencies_have_one_direction() {
    holds(rooms::arrows);
    refuses(rooms::arrows, "boot/src/a.rs", "use rvmm_devices::Bus;\n");
    refuses(rooms::arrows, "devices/src/a.rs", "fn f() { rvmm_boot::place(); }\n");
    refuses(rooms::arrows, "devices/src/a.rs", "use rvmm::machine::Machine;\n");
    refuses(rooms::arrows, "init/src/a.rs", "use rvmm_devices::Bus;\n");
    refuses(rooms::arrows, "init/src/a.rs", "use rvmm::signals::watch;\n");
    refuses(rooms::arrows, "src/vcpu/a.rs", "fn f() { rvmm_init::main(watch) }\n");
    refuses(rooms::arrows, "src/vcpu/a.rs", "use crate::kvm::KvmHart;\n");
    refuses(rooms::arrows, "src/vcpu/a.rs", "fn f() -> crate::kvm::Kvm {}\n");
    refuses(rooms::arrows, "src/vcpu/a.rs", "use crate::kvm;\n");
    refuses(rooms::arrows, "src/vcpu/a.rs", "use crate::{memory::GuestRam, cli::Cli};\n");
    refuses(rooms::arrows, "src/vcpu/a.rs", "use crate::{\n    memory::{A, B},\n    cli,\n};\n");
    refuses(rooms::arrows, "src/config.rs", "use crate::machine::Machine;\n");
    refuses(rooms::arrows, "src/vcpu/a.rs", "use rvmm_boot::place;\n");
    refuses(rooms::arrows, "src/attic/a.rs", "fn f() {}\n");
    accepts(rooms::arrows, "src/machine/a.rs", "use crate::kvm::KvmVm;\nuse rvmm_boot::place;\n");
    accepts(rooms::arrows, "init/src/a.rs", "use rvmm_boot::Cpio;\n");
    accepts(
        rooms::arrows,
        "src/vcpu/a.rs",
        "use crate::{\n    memory::{cli, B},\n};\nlet x = y;\n",
    );
    accepts(rooms::arrows, "src/vcpu/tests/a.rs", "use crate::kvm::KvmHart;\n");
    accepts(
        rooms::arrows,
        "boot/src/a.rs",
        "// not like rvmm_devices\nlet s = \"rvmm_devices\";\n",
    );
}

#[test]
fn rooms_do_not_form_a_circle() {
    assert_eq!(rooms::circles(), [""; 0]);
}

#[test]
fn an_external_crate_is_used_in_one_place() {
    holds(rules::crates);
    refuses(rules::crates, "src/machine/build.rs", "use kvm_ioctls::Kvm;\n");
    refuses(rules::crates, "src/machine/build.rs", "let x = kvm_bindings::KVM_API_VERSION;\n");
    refuses(rules::crates, "src/config.rs", "use clap::Parser;\n");
    refuses(rules::crates, "src/machine/build.rs", "use event_manager::EventManager;\n");
    refuses(rules::crates, "src/machine/build.rs", "use vm_fdt::FdtWriter;\n");
    refuses(rules::crates, "src/machine/build.rs", "use linux_loader::loader::Load;\n");
    refuses(rules::crates, "src/machine/build.rs", "let e = elf::ElfBytes::new();\n");
    refuses(rules::crates, "devices/src/plic.rs", "use vm_superio::Serial;\n");
    accepts(rules::crates, "src/kvm/vm.rs", "use kvm_ioctls::{Kvm, VmFd};\nuse kvm_bindings::*;\n");
    accepts(rules::crates, "src/io_loop.rs", "use event_manager::EventManager;\n");
    accepts(rules::crates, "boot/src/elf.rs", "use elf::ElfBytes;\n");
    accepts(rules::crates, "src/a.rs", "/// Like [`clap::Parser`], but not.\nstruct Myself;\n");
}

#[test]
fn names_have_a_meaning() {
    holds(rules::names);
    for path in
        ["src/util.rs", "src/common/mod.rs", "devices/src/misc.rs", "src/vcpu/exit_handler.rs"]
    {
        refuses(rules::names, path, "//! x\n");
    }
    for definition in [
        "struct DeviceManager;",
        "fn helper() {}",
        "pub(crate) fn exit_handler() {}",
        "enum VmInfo {}",
        "mod wrapper {",
        "trait LegacyDevice {}",
        "type CommonThing = u8;",
    ] {
        refuses(rules::names, "src/a.rs", &format!("{definition}\n"));
    }
    accepts(
        rules::names,
        "src/a.rs",
        "use event_manager::EventManager;\nfn f() { info!(\"x\"); }\n",
    );
    accepts(rules::names, "src/a.rs", "fn information() {}\nstruct Managers;\n");
    accepts(rules::names, "src/a.rs", "#[test]\nfn the_legacy_call_is_refused() {}\n");
}

#[test]
fn unsafe_code_is_rare_and_justified() {
    holds(rules::unsafe_code);
    refuses(rules::unsafe_code, "src/kvm/a.rs", "fn f() {\n    unsafe { g() }\n}\n");
    refuses(rules::unsafe_code, "src/kvm/a.rs", "unsafe impl Send for A {}\n");
    refuses(rules::unsafe_code, "src/machine/a.rs", "// SAFETY: sound\nunsafe { g() }\n");
    refuses(rules::unsafe_code, "devices/src/a.rs", "// SAFETY: sound\nunsafe { g() }\n");
    refuses(rules::unsafe_code, "init/src/a.rs", "// SAFETY: sound\nunsafe { g() }\n");
    accepts(rules::unsafe_code, "src/kvm/a.rs", "// SAFETY: sound\nunsafe { g() }\n");
    accepts(
        rules::unsafe_code,
        "src/kvm/a.rs",
        "// SAFETY: sound, and\n// why\nlet x =\n    unsafe { g() };\n",
    );
    accepts(rules::unsafe_code, "src/a.rs", "// unsafe { g() }\n");
}

#[test]
fn the_architecture_is_checked_in_one_place() {
    holds(rules::architecture);
    refuses(rules::architecture, "src/main.rs", "#[cfg(target_arch = \"riscv64\")]\nfn f() {}\n");
    refuses(
        rules::architecture,
        "src/lib.rs",
        "#[cfg(target_arch = \"riscv64\")]\npub mod vcpu;\n",
    );
    accepts(rules::architecture, "src/lib.rs", "#[cfg(target_arch = \"riscv64\")]\npub mod kvm;\n");
}

#[test]
fn nothing_is_left_for_later() {
    holds(rules::unfinished);
    for (before, after) in [
        ("// TO", "DO: x"),
        ("// FIX", "ME"),
        ("    unimple", "mented!()"),
        ("    to", "do!()"),
        ("#[ig", "nore]"),
    ] {
        refuses(rules::unfinished, "src/a.rs", &format!("{before}{after}\n"));
    }
    refuses(rules::unfinished, "scripts/a", &format!("# TO{}\n", "DO"));
    accepts(rules::unfinished, "src/a.rs", "// what is to do, is done\n");
    let reason = format!("#[ig{} = \"waits for what has another owner\"]\n", "nore");
    accepts(rules::unfinished, "src/a.rs", &reason);
}

#[test]
fn scripts_have_a_description_and_stop_at_errors() {
    holds(rules::scripts);
    let head = "#!/usr/bin/env bash\n# Does it.\n";
    refuses(rules::scripts, "scripts/a", head);
    refuses(rules::scripts, "scripts/a", "#!/usr/bin/env bash\nset -euo pipefail\n");
    refuses(rules::scripts, "scripts/a", "#!/usr/bin/env bash\n#\nset -euo pipefail\n");
    refuses(rules::scripts, ".ci/run", head);
    accepts(rules::scripts, "scripts/a", &format!("{head}set -euo pipefail\n"));
    accepts(rules::scripts, "scripts/sourced.sh", "# Sourced.\n");
}

#[test]
fn no_file_contains_a_path_of_a_developers_machine() {
    holds(rules::paths);
    for folder in ["home", "Users", "work"] {
        refuses(rules::paths, "scripts/a", &format!("cd /{folder}/somebody\n"));
    }
    accepts(rules::paths, "scripts/a", "cd \"$HOME\"; ls ~/.cache; wc lines-of/work\n");
}

#[test]
fn links_in_the_documentation_exist() {
    holds(rules::links);
    refuses(rules::links, "README.md", "see [here](src/nowhere.rs)\n");
    refuses(rules::links, "docs/a.md", "see [here](nowhere.md)\n");
    refuses(rules::links, "README.md", "run `scripts/nothing`\n");
    accepts(
        rules::links,
        "README.md",
        "[a](src/lib.rs) [b](https://example.org/x) [c](#part) `scripts/guests`\n",
    );
    accepts(rules::links, "docs/a.md", "[a](../src/lib.rs#L3)\n");
}

/// The differences between the two languages of a lab's page in text that is typed or printed.
fn differences(english: &str, chinese: &str) -> Vec<String> {
    let (theirs, ours) = (page::blocks(chinese), page::blocks(english));
    let pairs = ours.iter().zip(&theirs).filter(|((_, ours), (_, theirs))| ours != theirs);
    let mut all: Vec<_> =
        pairs.map(|((at, _), (to, _))| format!("line {} is not line {}", at + 1, to + 1)).collect();
    if ours.len() != theirs.len() {
        all.push(format!("{} blocks are not {}", ours.len(), theirs.len()));
    }
    let numbers = |page: &str| {
        let commands = page::exercises(page).len();
        let titles = page.lines().skip_while(|line| !matches!(*line, "## Exercises" | "## 练习"));
        let titles = titles.filter(|line| line.starts_with(|c: char| c.is_ascii_digit())).count();
        (commands, titles)
    };
    for (page, (commands, titles)) in [("English", numbers(english)), ("Chinese", numbers(chinese))]
    {
        if commands == 0 || commands != titles {
            all.push(format!("{page}: {titles} exercises, {commands} commands"));
        }
    }
    all
}

#[test]
fn the_pages_of_a_lab_have_the_same_commands_in_both_languages() {
    let find = |path: &str| files().iter().find(|file| file.path == path);
    let mut count = 0;
    for english in files() {
        let Some(name) = english.path.strip_prefix("docs/labs/") else { continue };
        if name.contains('/') || name == "README.md" {
            continue;
        }
        let path = format!("docs/labs/zh/{name}");
        let chinese = find(&path).unwrap_or_else(|| panic!("{path} is missing"));
        let differences = differences(&english.text, &chinese.text);
        assert!(differences.is_empty(), "{name}, {path}: {}", differences.join("; "));
        count += 1;
    }
    assert!(count > 10, "{count} pages");
}

#[test]
fn a_page_whose_translation_has_another_command_is_found() {
    let of = |heading: &str, command: &str, more: &str| {
        format!(
            "# x\n\n```\n$ run\n```\n\n## {heading}\n\n1. x\n\n   ```\n   {command}\n       more\n   ```\n{more}"
        )
    };
    let english = of("Exercises", "grade", "");
    assert_eq!(differences(&english, &of("练习", "grade", "")), Vec::<String>::new());
    assert_eq!(differences(&english, &of("练习", "upgrade", "")), ["line 12 is not line 12"]);
    assert_eq!(differences(&english, &of("练习", "grade", "2. y\n")).len(), 1);
    assert_eq!(differences(&english, &of("练习", "grade", "```\nx\n```\n")).len(), 2);
    assert_eq!(page::exercises(&english)[0].1, "grade\n    more\n");
}

#[test]
fn a_test_that_cannot_run_is_reported_as_skipped() {
    holds(rules::skipped);
    let test = |body: &str| format!("#[test]\nfn a_b_c() {{\n    {body}\n}}\nfn f() {{}}\n");
    refuses(rules::skipped, "src/a.rs", &test("if !g() {\n        return;\n    }"));
    refuses(rules::skipped, "tests/a.rs", &test("let Some(x) = g() else { return };"));
    refuses(rules::skipped, "tests/a.rs", &test("// skip\n    if g() { return }"));
    refuses(rules::skipped, "src/a.rs", &format!("fn f() {{ eprintln!(\"{}: x\") }}\n", "skipped"));
    accepts(rules::skipped, "src/a.rs", &test("if !g() {\n        return skip(\"x\");\n    }"));
    accepts(rules::skipped, "tests/a.rs", &test("let Some(_) = host() else { return };"));
    accepts(rules::skipped, "tests/a.rs", &test("if host().is_none() {\n        return;\n    }"));
    accepts(rules::skipped, "src/a.rs", "fn f() {\n    return;\n}\n");
    let tool = |says: &str| format!("fn g() -> bool {{\n    {says};\n    false\n}}\n");
    let asks = test("if !g() {\n        return;\n    }");
    accepts(rules::skipped, "src/a.rs", &(tool("skip(\"x\")") + &asks));
    refuses(rules::skipped, "src/a.rs", &(tool("eprintln!(\"x\")") + &asks));
}

#[test]
fn tests_are_sentences() {
    holds(rules::sentences);
    refuses(rules::sentences, "src/a.rs", "#[test]\nfn works() {}\n");
    refuses(rules::sentences, "src/a.rs", "#[test]\n#[should_panic]\nfn test_it() {}\n");
    accepts(rules::sentences, "src/a.rs", "#[test]\nfn a_read_past_the_end_is_refused() {}\n");
}
