//! Checks the state at boot and the device tree, prints, and powers off.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use runtime::{Board, Failure, csr_read, ensure, ensure_eq, entry, println, report, time};

runtime::guest!(run);

fn run(board: &'static Board) {
    println!(
        "hello from hart {}: {} harts, RAM {:#x}+{:#x}, {}, bootargs '{}'",
        board.boot_hart,
        board.cpus().len(),
        board.ram.0,
        board.ram.1,
        board.irqchip.name(),
        board.bootargs
    );
    report::run(
        "hello",
        board,
        &[
            ("boot state", boot_state),
            ("device tree", device_tree),
            ("floating point", floating_point),
            ("time", time_runs),
        ],
    );
}

/// Linux: Documentation/arch/riscv/boot.rst. Translation is off, interrupts are off, the tree is in a1 and 8-byte aligned.
fn boot_state(board: &'static Board) -> Result<(), Failure> {
    ensure_eq!(csr_read!("satp"), 0, "satp");
    ensure_eq!(csr_read!("sie"), 0, "sie");
    ensure_eq!(entry::fdt_address() % 8, 0, "alignment of the tree");
    ensure!(
        board.cpus().iter().any(|cpu| cpu.hart == board.boot_hart),
        "the boot hart is not in the tree"
    );
    Ok(())
}

fn device_tree(board: &'static Board) -> Result<(), Failure> {
    let fdt = entry::fdt_address()..entry::fdt_address() + board.fdt.len();
    let image = entry::image();
    let ram = board.ram.0..board.ram.0 + board.ram.1;
    ensure!(
        fdt.end <= image.start || fdt.start >= image.end,
        "the tree {fdt:#x?} lies in the image {image:#x?}"
    );
    ensure!(
        ram.contains(&fdt.start) && fdt.end <= ram.end,
        "the tree {fdt:#x?} lies outside RAM {ram:#x?}"
    );
    ensure!(fdt.len() <= 2 << 20, "the tree has {} bytes", fdt.len());
    ensure!(
        ram.contains(&image.start) && image.end <= ram.end,
        "the image {image:#x?} lies outside RAM {ram:#x?}"
    );
    ensure!(board.timebase_hz > 0, "no timebase-frequency");
    for compatible in ["ns16550a", "google,goldfish-rtc", "syscon"] {
        ensure!(board.fdt.compatible(compatible).is_some(), "no {compatible} in the tree");
    }
    let uart =
        board.fdt.compatible("ns16550a").and_then(|n| Some((n.reg(0)?.0, n.cell("interrupts")?)));
    ensure_eq!(uart, Some((0x1000_0000, 10)), "address and interrupt of the UART");
    Ok(())
}

fn floating_point(_: &'static Board) -> Result<(), Failure> {
    let product = core::hint::black_box(1.5f64) * core::hint::black_box(-4.0);
    ensure_eq!(product.to_bits(), (-6.0f64).to_bits(), "1.5 * -4");
    Ok(())
}

fn time_runs(_: &'static Board) -> Result<(), Failure> {
    let start = time::now();
    ensure!(time::wait_until(|| time::now() != start), "time stands still");
    Ok(())
}
