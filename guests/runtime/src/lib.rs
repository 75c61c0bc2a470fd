//! The runtime of all guests: entry code, traps that can be caught, a console, SBI calls, the device tree, and both
//! kinds of interrupt controller. A guest is `guest!(run)` and a function that makes checks and reports them.
//!
//! In boot order: [`entry`] (assembly, stacks) -> [`board`] (reads the device tree) -> the guest's function ->
//! [`report`] (one line per check) -> [`sbi::power_off`].

#![no_std]

pub mod aia;
pub mod board;
pub mod console;
pub mod csr;
pub mod entry;
pub mod fdt;
pub mod irqchip;
pub mod memory;
pub mod mmio;
pub mod paging;
pub mod plic;
pub mod report;
pub mod rtc;
pub mod sbi;
pub mod smp;
pub mod time;
pub mod trap;
pub mod uart;
pub mod virtio;

pub use board::Board;
pub use report::Failure;

/// Sets the main function of the guest's boot hart: `fn(&'static Board)`. When it returns, the guest powers off.
#[macro_export]
macro_rules! guest {
    ($run:path) => {
        // SAFETY: the only symbol of this name in a guest; the runtime declares it with this signature.
        #[unsafe(no_mangle)]
        fn guest_main(board: &'static $crate::Board) {
            $run(board)
        }
    };
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    println!("FAIL panic: {info}");
    sbi::power_off_with_failure()
}
