//! Standard input and output: rvmm's keys and the raw mode where the input is a terminal, plain streams where it is not.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use rvmm_devices::{ConsoleBackend, Ports};

use super::StopRequest;
use super::keys::{self, Command, Keys};
use super::raw::RawMode;
use super::streams::Streams;

/// The console of `--serial stdio`.
pub(super) struct Stdio {
    streams: Streams,
    /// Only on a terminal.
    keys: Option<Keys>,
    stop: StopRequest,
    /// Put back when this is dropped.
    raw: Option<RawMode>,
}

impl Stdio {
    /// Takes standard input and output, and the terminal where there is one.
    ///
    /// # Errors
    /// `AlreadyExists` where another console has the terminal; else what the kernel says.
    pub(super) fn open(stop: StopRequest) -> io::Result<Self> {
        let (input, output) = (io::stdin(), io::stdout());
        let on_terminal = input.is_terminal();
        let raw = on_terminal.then(|| RawMode::enter(input.as_fd())).transpose()?;
        let streams = Streams::new(
            Some(input.as_fd().try_clone_to_owned()?),
            Some(output.as_fd().try_clone_to_owned()?),
        )?;
        let mut console = Self { streams, keys: on_terminal.then(Keys::default), stop, raw };
        if on_terminal && output.is_terminal() {
            console.streams.show(keys::HINT);
        } else if on_terminal {
            // The output goes elsewhere and must not be disturbed.
            let _ = io::stderr().write_all(keys::HINT);
        }
        Ok(console)
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Stop => (self.stop)(),
            Command::Help => self.streams.show(keys::HELP),
        }
    }
}

impl ConsoleBackend for Stdio {
    fn ports(&self) -> Ports {
        Ports { attention: self.raw.as_ref().map(RawMode::resized), ..self.streams.ports() }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.streams.read(buffer)?;
            let Some(keys) = self.keys.as_mut().filter(|_| count > 0) else { return Ok(count) };
            let (kept, command) = keys.filter(buffer.get_mut(..count).unwrap_or_default());
            if let Some(command) = command {
                self.obey(command);
            }
            // Zero would be the end of the input: where all bytes were rvmm's, there may be more, or nothing yet.
            if kept > 0 {
                return Ok(kept);
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.streams.write(bytes)
    }

    fn size(&self) -> Option<(u16, u16)> {
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
        Some((size.ws_col, size.ws_row))
    }

    fn attend(&mut self) {
        self.raw.iter().for_each(RawMode::note_resized);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use rustix::pipe::pipe;

    use super::*;

    fn console(input: OwnedFd, output: OwnedFd) -> (Stdio, Arc<AtomicU32>) {
        let stops = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&stops);
        let stop: StopRequest = Arc::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let streams = Streams::new(Some(input), Some(output)).unwrap();
        (Stdio { streams, keys: Some(Keys::default()), stop, raw: None }, stops)
    }

    #[test]
    fn keys_of_rvmm_never_reach_the_guest_and_never_look_like_the_end() {
        let (guest_in, user_out) = pipe().unwrap();
        let (user_in, guest_out) = pipe().unwrap();
        let (mut user_out, mut user_in) = (File::from(user_out), File::from(user_in));
        let (mut console, stops) = console(guest_in, guest_out);
        let mut buffer = [0; 64];

        user_out.write_all(b"\x01h").unwrap();
        assert_eq!(console.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let mut help = vec![0; keys::HELP.len()];
        io::Read::read_exact(&mut user_in, &mut help).unwrap();
        assert_eq!(help, keys::HELP);

        user_out.write_all(b"ls\x01xrm").unwrap();
        assert_eq!(console.read(&mut buffer).unwrap(), 2);
        assert_eq!(stops.load(Ordering::SeqCst), 1);
        drop(user_out);
        assert_eq!(console.read(&mut buffer).unwrap(), 0);
    }
}
