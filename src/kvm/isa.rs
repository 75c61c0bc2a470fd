//! KVM's numbers of ISA and SBI extensions, by the names that users and device trees use.
//!
//! The numbers are the kernel's ABI (`enum KVM_RISCV_ISA_EXT_ID` and `KVM_RISCV_SBI_EXT_ID` in its `uapi/asm/kvm.h`, as of
//! Linux 7.3) and never change; the published bindings lack the latest. Pure data: compiled and tested on every host.

use strsim::levenshtein;

/// ISA extensions by KVM's number: the index in the table is the number.
#[rustfmt::skip]
pub(super) const ISA_EXTENSIONS: &[&str] = &[
    /*  0 */ "a", "c", "d", "f", "h", "i", "m", "svpbmt", "sstc", "svinval",
    /* 10 */ "zihintpause", "zicbom", "zicboz", "zbb", "ssaia", "v", "svnapot", "zba", "zbs", "zicntr",
    /* 20 */ "zicsr", "zifencei", "zihpm", "smstateen", "zicond", "zbc", "zbkb", "zbkc", "zbkx", "zknd",
    /* 30 */ "zkne", "zknh", "zkr", "zksed", "zksh", "zkt", "zvbb", "zvbc", "zvkb", "zvkg",
    /* 40 */ "zvkned", "zvknha", "zvknhb", "zvksed", "zvksh", "zvkt", "zfh", "zfhmin", "zihintntl", "zvfh",
    /* 50 */ "zvfhmin", "zfa", "ztso", "zacas", "sscofpmf", "zimop", "zca", "zcb", "zcd", "zcf",
    /* 60 */ "zcmop", "zawrs", "smnpm", "ssnpm", "svade", "svadu", "svvptc", "zabha", "ziccrse", "zaamo",
    /* 70 */ "zalrsc", "zicbop", "zfbfmin", "zvfbfmin", "zvfbfwma", "zclsd", "zilsd", "zalasr", "zicfilp", "zicfiss",
];

/// SBI extensions by KVM's number, under KVM's names.
#[rustfmt::skip]
pub(super) const SBI_EXTENSIONS: &[&str] = &[
    /*  0 */ "v01", "time", "ipi", "rfence", "srst", "hsm", "pmu", "experimental", "vendor", "dbcn",
    /* 10 */ "sta", "susp", "fwft", "mpxy",
];

/// Extensions that depend on another one or are a part of it (ISA manual, chapter of each): where the first is switched
/// off, a device tree that still names the others would contradict itself.
#[rustfmt::skip]
const DEPENDENTS: &[(&str, &[&str])] = &[
    ("a", &["zaamo", "zalrsc"]),
    ("c", &["zca"]),
    ("d", &["v", "zcd"]),
    ("f", &["d", "zfh", "zfhmin", "zfa", "zfbfmin", "zcf"]),
    ("ssaia", &["sscofpmf"]),
    ("v", &["zvbb", "zvbc", "zvkb", "zvkg", "zvkned", "zvknha", "zvknhb", "zvksed", "zvksh", "zvkt",
            "zvfh", "zvfhmin", "zvfbfmin", "zvfbfwma"]),
    ("zaamo", &["a", "zacas", "zabha"]),
    ("zalrsc", &["a"]),
    ("zca", &["c", "zcb", "zcd", "zcf", "zcmop", "zclsd"]),
    ("zfhmin", &["zfh", "zvfh"]),
    ("zicsr", &["f", "zicntr", "zihpm"]),
    ("zilsd", &["zclsd"]),
    ("zimop", &["zcmop", "zicfiss"]),
    ("zvfbfmin", &["zvfbfwma"]),
    ("zvfhmin", &["zvfh"]),
];

/// KVM's number of an ISA extension.
pub(super) fn isa_number(name: &str) -> Option<u64> {
    position(ISA_EXTENSIONS, name)
}

/// KVM's number of an SBI extension.
pub(super) fn sbi_number(name: &str) -> Option<u64> {
    position(SBI_EXTENSIONS, name)
}

fn position(table: &[&str], name: &str) -> Option<u64> {
    table.iter().position(|entry| *entry == name).and_then(|at| u64::try_from(at).ok())
}

/// The names of the extensions whose bits are set in `word`, which covers the numbers from `first` on (a register of KVM's
/// `ISA_MULTI_EN`). A number that the table does not have is skipped: the kernel is newer than rvmm.
pub(super) fn names_in(word: u64, first: usize) -> impl Iterator<Item = &'static str> {
    (0..64usize)
        .filter(move |bit| word >> bit & 1 == 1)
        .filter_map(move |bit| ISA_EXTENSIONS.get(first.checked_add(bit)?).copied())
}

/// Returns `name` and all extensions that depend on it, `name` first.
pub(super) fn with_dependents(name: &str) -> Vec<&str> {
    let mut found = vec![name];
    let mut next = 0;
    while let Some(base) = found.get(next).copied() {
        for (_, dependents) in DEPENDENTS.iter().filter(|(of, _)| *of == base) {
            for dependent in *dependents {
                if !found.contains(dependent) {
                    found.push(dependent);
                }
            }
        }
        next += 1;
    }
    found
}

/// Up to five names of `table` that are similar to `name`, nearest first.
pub(super) fn near(table: &[&'static str], name: &str) -> Vec<&'static str> {
    let allowed = if name.len() < 4 { 1 } else { 2 };
    // Comparing takes time in proportion to the length, and no entry is as long.
    let start: String = name.chars().take(32).collect();
    let mut found: Vec<(usize, &str)> = table
        .iter()
        .map(|entry| (levenshtein(&start, entry), *entry))
        .filter(|(distance, entry)| {
            *distance <= allowed || (name.len() > 1 && entry.starts_with(name))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().take(5).map(|(_, entry)| entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_the_kernels() {
        let numbers = [0, 5, 6, 8, 11, 14, 15, 23, 32, 35, 45, 51, 54, 61, 65, 71, 77, 79];
        let names = "a i m sstc zicbom ssaia v smstateen zkr zkt zvkt zfa sscofpmf zawrs svadu zicbop zalasr zicfiss";
        for (name, number) in names.split(' ').zip(numbers) {
            assert_eq!(isa_number(name), Some(number), "{name}");
        }
        for (name, number) in [("v01", 0), ("pmu", 6), ("dbcn", 9), ("susp", 11), ("mpxy", 13)] {
            assert_eq!(sbi_number(name), Some(number), "{name}");
        }
        assert_eq!((ISA_EXTENSIONS.len(), SBI_EXTENSIONS.len()), (80, 14));
    }

    #[test]
    fn every_name_occurs_once_and_in_lower_case() {
        for table in [ISA_EXTENSIONS, SBI_EXTENSIONS] {
            for (at, name) in table.iter().enumerate() {
                assert_eq!(position(table, name), u64::try_from(at).ok(), "{name}");
                assert_eq!(name.to_lowercase(), *name);
            }
        }
    }

    #[test]
    fn every_dependency_names_extensions_that_exist() {
        for (base, dependents) in DEPENDENTS {
            assert!(isa_number(base).is_some(), "{base}");
            for dependent in *dependents {
                assert!(isa_number(dependent).is_some(), "{dependent}");
            }
        }
    }

    #[test]
    fn a_word_of_bits_becomes_names() {
        assert_eq!(names_in(0b10_0001, 0).collect::<Vec<_>>(), ["a", "i"]);
        assert_eq!(names_in(0b11, 64).collect::<Vec<_>>(), ["svade", "svadu"]);
    }

    #[test]
    fn bits_of_a_newer_kernel_are_skipped() {
        assert_eq!(names_in(u64::MAX, 64).count(), 16);
        assert_eq!(names_in(u64::MAX, 128).count(), 0);
    }

    #[test]
    fn dependents_are_found_over_several_levels() {
        let gone = with_dependents("f");
        for name in ["f", "d", "v", "zvfh", "zcd"] {
            assert!(gone.contains(&name), "{name}");
        }
        assert!(!gone.contains(&"zicsr"));
        assert_eq!(with_dependents("zba"), ["zba"]);
    }

    #[test]
    fn a_misspelt_name_finds_the_right_one() {
        assert!(near(ISA_EXTENSIONS, "zicbon").contains(&"zicbom"));
        assert!(near(ISA_EXTENSIONS, "zvk").contains(&"zvkb"));
        assert_eq!(near(SBI_EXTENSIONS, "dcbn"), ["dbcn"]);
        assert!(near(ISA_EXTENSIONS, "quite-another-thing").is_empty());
        assert!(near(ISA_EXTENSIONS, &"z".repeat(100_000)).is_empty());
        assert!(near(ISA_EXTENSIONS, "").len() <= 5);
    }
}
