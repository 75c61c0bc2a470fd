//! rvmm as a library: two machines in one process, each with its own console.
//!
//! `embed KERNEL` boots KERNEL twice in parallel, waits until both guests have powered off and prints the UART output of
//! each.

use std::error::Error;
use std::io::{PipeReader, Read, pipe};
use std::path::PathBuf;

use rvmm::config::VmConfig;
use rvmm::terminal::Console;
use rvmm::vmm::{Parts, Running, Vmm};

fn main() -> Result<(), Box<dyn Error>> {
    let kernel = std::env::args_os().nth(1).ok_or("usage: embed KERNEL")?;
    let machines = [launch("one", kernel.clone().into())?, launch("two", kernel.into())?];
    for (running, mut output) in machines {
        // The pipe ends when the machine drops its console, which is when the guest has stopped.
        let mut text = String::new();
        output.read_to_string(&mut text)?;
        let reason = running.wait()?;
        println!("{}\n-- {reason}", text.trim_end());
    }
    Ok(())
}

fn launch(name: &str, kernel: PathBuf) -> Result<(Running, PipeReader), Box<dyn Error>> {
    let mut config = VmConfig { name: name.into(), mem: 64 << 20, ..VmConfig::default() };
    config.boot.kernel = Some(kernel.into());
    let (reader, writer) = pipe()?;
    let console = Console::from_fds(None, Some(writer.into()))?;
    let parts = Parts { console: Some(console), ..Parts::default() };
    let running = Vmm::build_with(config.validate()?, parts)?.start()?;
    Ok((running, reader))
}
