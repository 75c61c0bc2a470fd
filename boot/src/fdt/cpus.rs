//! The `/cpus` node: the harts and their ISA extensions
//! (Documentation/devicetree/bindings/riscv/cpus.yaml and extensions.yaml).

use super::board::{Board, Cpu, Isa, MmuType};
use super::phandles::Phandles;
use super::writer::Writer;
use crate::error::BootError;

/// The single-letter extensions in the order of the ISA string, which is also the order of the categories of
/// the extensions that start with `z` (RISC-V unprivileged specification, chapter "ISA Extension Naming
/// Conventions").
const CANONICAL: &str = "iemafdqlcbkjtpvnh";

/// Writes `/cpus` with a node for every hart and a flat `cpu-map`.
pub(super) fn write(
    writer: &mut Writer,
    board: &Board,
    phandles: &Phandles,
) -> Result<(), BootError> {
    writer.node("cpus", |writer| {
        writer.u32("#address-cells", 1)?;
        writer.u32("#size-cells", 0)?;
        writer.u32("timebase-frequency", board.timebase_frequency)?;
        for (index, cpu) in board.cpus.iter().enumerate() {
            write_cpu(writer, cpu, phandles.cpu(index), phandles.intc(index))?;
        }
        writer.node("cpu-map", |writer| {
            writer.node("cluster0", |writer| {
                for index in 0..board.cpus.len() {
                    let core = format!("core{index}");
                    writer.node(&core, |writer| writer.u32("cpu", phandles.cpu(index)))?;
                }
                Ok(())
            })
        })
    })
}

fn write_cpu(writer: &mut Writer, cpu: &Cpu, phandle: u32, intc: u32) -> Result<(), BootError> {
    writer.node(&format!("cpu@{:x}", cpu.hartid), |writer| {
        writer.string("device_type", "cpu")?;
        writer.u32("reg", cpu.hartid)?;
        writer.string("status", "okay")?;
        writer.string("compatible", "riscv")?;
        let names = cpu.isa.names()?;
        writer.string("riscv,isa", &isa_string(&cpu.isa.base, &names))?;
        writer.string("riscv,isa-base", &cpu.isa.base)?;
        writer.strings("riscv,isa-extensions", &names)?;
        let mmu = match cpu.mmu {
            MmuType::None => "riscv,none",
            MmuType::Sv39 => "riscv,sv39",
            MmuType::Sv48 => "riscv,sv48",
            MmuType::Sv57 => "riscv,sv57",
        };
        writer.string("mmu-type", mmu)?;
        let blocks = [
            ("riscv,cbom-block-size", cpu.cbom_block_size),
            ("riscv,cboz-block-size", cpu.cboz_block_size),
            ("riscv,cbop-block-size", cpu.cbop_block_size),
        ];
        for (name, size) in blocks {
            if let Some(size) = size {
                writer.u32(name, size)?;
            }
        }
        writer.phandle(phandle)?;
        writer.node("interrupt-controller", |writer| {
            writer.u32("#address-cells", 0)?;
            writer.u32("#interrupt-cells", 1)?;
            writer.empty("interrupt-controller")?;
            writer.string("compatible", "riscv,cpu-intc")?;
            writer.phandle(intc)
        })
    })
}

impl Isa {
    /// The names of the extensions in canonical order, the letter of the base first, without duplicates.
    ///
    /// # Errors
    /// [`BootError::Board`] for a base or an extension that is invalid in an ISA string.
    pub fn names(&self) -> Result<Vec<String>, BootError> {
        let letter = match self.base.as_str() {
            "rv32i" | "rv64i" => "i",
            "rv32e" | "rv64e" => "e",
            other => {
                return Err(BootError::Board(format!("{other:?} is not a base instruction set")));
            }
        };
        let mut names: Vec<String> = self.extensions.clone();
        names.push(letter.into());
        if let Some(odd) = names.iter().find(|name| !is_extension(name)) {
            return Err(BootError::Board(format!("{odd:?} is not the name of an ISA extension")));
        }
        names.sort_by(|a, b| rank(a).cmp(&rank(b)));
        names.dedup();
        Ok(names)
    }

    /// The ISA string, as in `riscv,isa`: `rv64imafdc_zicbom_svpbmt`.
    ///
    /// # Errors
    /// As [`Isa::names`].
    pub fn string(&self) -> Result<String, BootError> {
        Ok(isa_string(&self.base, &self.names()?))
    }
}

/// The ISA string of a base and the sorted names of the extensions.
fn isa_string(base: &str, names: &[String]) -> String {
    let mut string = base.to_string();
    // The base's letter is part of the base.
    for name in names.iter().filter(|name| !base.ends_with(name.as_str())) {
        if name.len() > 1 {
            string.push('_');
        }
        string.push_str(name);
    }
    string
}

/// True if Linux parses `name` as one extension: the letter of one, or a longer name with the prefix of
/// multi-letter extensions (arch/riscv/kernel/cpufeature.c, riscv_parse_isa_string).
fn is_extension(name: &str) -> bool {
    let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    match name.len() {
        1 => CANONICAL.contains(name),
        _ => plain && name.starts_with(['s', 'x', 'z']),
    }
}

/// Sort key of the canonical order: letters, `z` by category, `s`, `x`.
fn rank(name: &str) -> (u32, usize, &str) {
    let category = |letter| CANONICAL.find(letter).unwrap_or(CANONICAL.len());
    let mut letters = name.chars();
    match (letters.next(), letters.next()) {
        (Some(letter), None) => (0, category(letter), name),
        (Some('z'), Some(second)) => (1, category(second), name),
        (Some('s'), _) => (2, 0, name),
        _ => (3, 0, name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn isa(extensions: &[&str]) -> Isa {
        let extensions = extensions.iter().map(ToString::to_string).collect();
        Isa { base: "rv64i".into(), extensions }
    }

    #[test]
    fn letters_are_in_canonical_order_for_any_input() {
        assert_eq!(isa(&["c", "d", "f", "a", "m"]).string().unwrap(), "rv64imafdc");
        assert_eq!(isa(&["h", "v", "b", "c", "q"]).string().unwrap(), "rv64iqcbvh");
        assert_eq!(isa(&[]).string().unwrap(), "rv64i");
    }

    #[test]
    fn longer_names_are_sorted_by_category_and_then_alphabetically() {
        let isa = isa(&[
            "svpbmt",
            "zkt",
            "zba",
            "zicsr",
            "zicbom",
            "zawrs",
            "zifencei",
            "zfa",
            "ssaia",
            "sstc",
            "xventana",
            "zvbb",
            "zca",
            "m",
            "a",
            "c",
            "v",
            "ztso",
            "zbb",
            "smstateen",
        ]);
        assert_eq!(
            isa.string().unwrap(),
            "rv64imacv_zicbom_zicsr_zifencei_zawrs_zfa_zca_zba_zbb_zkt_ztso_zvbb_\
             smstateen_ssaia_sstc_svpbmt_xventana"
        );
    }

    #[test]
    fn the_list_of_extensions_starts_with_the_base_and_has_none_twice() {
        let names = isa(&["zicsr", "a", "m", "i", "m"]).names().unwrap();
        assert_eq!(names, ["i", "m", "a", "zicsr"]);
    }

    #[test]
    fn names_that_no_isa_string_can_hold_are_refused() {
        for odd in ["", "Zba", "s", "x", "zb_a", "qq", "y", "zicsr zba"] {
            let error = isa(&[odd]).names().unwrap_err().to_string();
            assert!(error.contains("is not the name of an ISA extension"), "{odd}: {error}");
        }
        let odd = Isa { base: "x86".into(), extensions: Vec::new() };
        assert!(odd.string().unwrap_err().to_string().contains("\"x86\" is not a base"));
    }
}
