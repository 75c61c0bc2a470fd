//! The small prompt: reads lines from the console, and runs commands and programs. The terminal does the line editing.

use std::io::{self, Write};
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::termios::{OptionalActions, SpecialCodeIndex, tcgetattr, tcsetattr};

use super::commands::Shell;
use super::session::PROMPT;
use super::{Watch, words};

/// Size of the line buffer: more than the terminal returns at once (N_TTY_BUF_SIZE).
const MAX_LINE: usize = 4096;

/// Reads and executes lines until the end of the input.
pub(super) fn run(watch: Watch) {
    without_suspend(io::stdin());
    // Ctrl-C is for the program that runs: programs start with the default action of the signal and end; the prompt does not.
    let Ok(interrupts) = watch(&[libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP]) else {
        eprintln!("rvmm: cannot take over signals");
        return;
    };
    let mut shell = Shell::new(interrupts);
    println!("help lists the commands; poweroff ends the machine.");
    let mut buffer = [0; MAX_LINE];
    loop {
        print!("{PROMPT}");
        let _ = io::stdout().flush();
        match rustix::io::read(io::stdin(), &mut buffer) {
            Ok(0) => break println!(),
            Ok(count) => execute(&mut shell, buffer.get(..count).unwrap_or_default()),
            Err(Errno::INTR) => println!(),
            Err(_) => break,
        }
    }
}

fn execute(shell: &mut Shell, typed: &[u8]) {
    for line in String::from_utf8_lossy(typed).lines() {
        let result = match words::split(line) {
            Ok(words) => shell.run(&words),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = result {
            eprintln!("{error}");
        }
    }
}

/// Disables Ctrl-Z: there is no job control, so nothing could continue a program that it has stopped.
fn without_suspend(terminal: impl AsFd) {
    if let Ok(mut mode) = tcgetattr(&terminal) {
        // _POSIX_VDISABLE
        mode.special_codes[SpecialCodeIndex::VSUSP] = 0;
        let _ = tcsetattr(&terminal, OptionalActions::Now, &mode);
    }
}
