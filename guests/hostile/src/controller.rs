//! Hostile accesses to the interrupt controller, PLIC or AIA.

use runtime::irqchip::Irqchip;
use runtime::{Board, Failure, aia, ensure, ensure_eq, mmio, trap, uart};

use super::WORDS;

pub(crate) fn control_registers(board: &'static Board) -> (usize, usize) {
    match &board.irqchip {
        Irqchip::Plic(plic) => (plic.base, plic.size),
        Irqchip::Aia(aia) => (aia.aplic, 0x4000),
        Irqchip::None => (0x0c00_0000, 0),
    }
}

/// Resets the registers that raise, enable or configure an interrupt.
pub(crate) fn put_back(board: &'static Board) {
    match &board.irqchip {
        Irqchip::Plic(plic) => {
            for source in 1..=plic.sources {
                mmio::write32(plic.priority(source), 0);
            }
            for cpu in board.cpus() {
                plic.init(cpu.hart);
            }
        }
        Irqchip::Aia(aia) => {
            for source in 1..=aia.sources {
                mmio::write32(aia.register(aia::reg::CLRIENUM), source);
                mmio::write32(aia.register(aia::reg::SOURCECFG + 4 * (source as usize - 1)), 0);
                mmio::write32(aia.register(aia::reg::TARGET + 4 * (source as usize - 1)), source);
            }
        }
        Irqchip::None => {}
    }
    board.irqchip.init(board.boot_hart);
    while board.irqchip.claim(board.boot_hart) != 0 {}
}

/// Every word of the registers (every 64th of the large empty ranges), read and written with junk.
pub(crate) fn every_register(board: &'static Board) -> Result<(), Failure> {
    let (base, size) = control_registers(board);
    let dense = (0..0x4000.min(size)).step_by(4);
    let sparse = (0x4000.min(size)..size).step_by(0x1004 & !3);
    for offset in dense.chain(sparse) {
        let _ = mmio::read32(base + offset);
    }
    for word in WORDS {
        for offset in [
            0, 4, 8, 0x28, 0x17c, 0x180, 0xffc, 0x1000, 0x100c, 0x1bfc, 0x1bc0, 0x1bc4, 0x1bc8,
            0x1bcc,
        ]
        .into_iter()
        .chain((0x1c00..0x2100).step_by(4))
        .chain([
            0x2100, 0x2ffc, 0x3000, 0x3004, 0x3ffc, 0x20_0000, 0x20_1000, 0x20_1008, 0x20_2000,
            0x5f_fffc,
        ]) {
            if offset < size {
                mmio::write32(base + offset, word);
                let _ = mmio::read32(base + offset);
            }
        }
    }
    put_back(board);
    Ok(())
}

pub(crate) fn wrong_widths(board: &'static Board) -> Result<(), Failure> {
    let (base, size) = control_registers(board);
    for offset in [
        0, 0x28, 0x1000, 0x1c00, 0x2000, 0x2080, 0x3000, 0x20_0000, 0x20_1000, 0x20_1004, 0x20_1008,
    ] {
        if offset >= size {
            continue;
        }
        let at = base + offset;
        mmio::write8(at, 0xff);
        mmio::write8(at + 3, 0xff);
        mmio::write16(at + 2, 0xffff);
        ensure_eq!(mmio::read8(at), 0, "a byte at {offset:#x}");
        ensure_eq!(mmio::read16(at + 2), 0, "a halfword at {offset:#x}");
        if at % 8 == 0 {
            mmio::write64(at, u64::MAX);
            ensure_eq!(mmio::read64(at), 0, "a doubleword at {offset:#x}");
        }
    }
    put_back(board);
    Ok(())
}

pub(crate) fn absent(board: &'static Board) -> Result<(), Failure> {
    match &board.irqchip {
        Irqchip::Plic(plic) => {
            let there = 2 * board.cpus().len();
            for context in [there, there + 1, 500, 1023] {
                for at in [
                    plic.enables(context, 1),
                    plic.threshold(context),
                    plic.claim_register(context),
                ] {
                    if at < plic.base + plic.size {
                        mmio::write32(at, 0xffff_ffff);
                        ensure_eq!(mmio::read32(at), 0, "context {context} at {at:#x}");
                    }
                }
            }
            // Sources after the last one, and source 0.
            for source in [0, plic.sources + 1, 512, 1023] {
                mmio::write32(plic.priority(source), 7);
                ensure_eq!(mmio::read32(plic.priority(source)), 0, "priority of source {source}");
            }
            let context = plic.context(board.boot_hart);
            mmio::write32(plic.enables(context, 1), 0xffff_ffff);
            ensure_eq!(mmio::read32(plic.enables(context, 1)) & 1, 0, "source 0 is enabled");
            mmio::write32(plic.enables(context, 1000), 0xffff_ffff);
            ensure_eq!(mmio::read32(plic.enables(context, 1000)), 0, "source 1000 is enabled");
            mmio::write32(plic.pending(1), 0xffff_ffff);
            ensure_eq!(mmio::read32(plic.pending(1)), 0, "pending bits that were written");
            mmio::write32(plic.priority(1), 0xffff_ffff);
            ensure!(
                mmio::read32(plic.priority(1)) <= 7,
                "priority {:#x}",
                mmio::read32(plic.priority(1))
            );
        }
        Irqchip::Aia(aia) => {
            // Sources that target nonexistent harts, guests and identities.
            for target in [
                0x3fff << 18 | 1,
                63 << 12 | 1,
                0x7ff,
                0xffff_ffff,
                (board.cpus().len() as u32) << 18 | 5,
            ] {
                mmio::write32(aia.register(aia::reg::SOURCECFG + 4 * 19), 4);
                mmio::write32(aia.register(aia::reg::TARGET + 4 * 19), target);
                mmio::write32(aia.register(aia::reg::SETIENUM), 20);
                mmio::write32(aia.register(aia::reg::SETIPNUM), 20);
                mmio::write32(aia.register(0x3000), target);
            }
            for source in [0, aia.sources + 1, 1023, 0xffff_ffff] {
                mmio::write32(aia.register(aia::reg::SETIENUM), source);
                mmio::write32(aia.register(aia::reg::SETIPNUM), source);
                mmio::write32(aia.register(aia::reg::CLRIENUM), source);
            }
            let (imsics, size) = aia.imsics;
            for at in
                [imsics, imsics + 4, imsics + 8, imsics + 0xffc, imsics + size, imsics + 0xff_f000]
            {
                for id in [0, aia.ids + 1, 2047, 0xffff_ffff] {
                    mmio::write32(at, id);
                }
                // A guest interrupt file of the host is hardware, which may refuse other widths.
                let _ = trap::expect(|| _ = mmio::read32(at));
                let _ = trap::expect(|| _ = mmio::read64(at & !7));
                let _ = trap::expect(|| _ = mmio::read8(at));
            }
            for select in [0, 1, 0x6f, 0x71, 0x73, 0x7f, 0x81, 0xff, 0x100, usize::MAX] {
                let _ = trap::expect(|| {
                    aia::write_imsic(select, usize::MAX);
                    let _ = aia::read_imsic(select);
                });
            }
        }
        Irqchip::None => {}
    }
    put_back(board);
    Ok(())
}

pub(crate) fn claims(board: &'static Board) -> Result<(), Failure> {
    let hart = board.boot_hart;
    for _ in 0..1000 {
        ensure_eq!(board.irqchip.claim(hart), 0, "a claim of nothing");
    }
    for source in [1, uart::IRQ, 31, 32, 95] {
        board.irqchip.complete(source, hart);
    }
    if let Irqchip::Plic(plic) = &board.irqchip {
        for id in WORDS.into_iter().chain([96, 1023, 1024]) {
            mmio::write32(plic.claim_register(plic.context(hart)), id);
        }
    }
    ensure_eq!(board.irqchip.claim(hart), 0, "a claim after completions of nothing");
    Ok(())
}
