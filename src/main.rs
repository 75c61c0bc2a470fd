//! The rvmm command: a thin layer over the crate. As process 1 of a guest it is the guest's init.

use std::env;
use std::process::ExitCode;

fn main() -> ExitCode {
    if rvmm_init::is_guest_init() {
        rvmm_init::main(|signals| Ok(Box::new(rvmm::signals::watch(signals)?)));
    }
    ExitCode::from(rvmm::cli::main(env::args_os()))
}
