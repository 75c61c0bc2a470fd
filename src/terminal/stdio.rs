//! Standard input and output: rvmm's keys and the raw mode where the input is a terminal, plain streams where it is not.

use std::io::{self, IsTerminal, Write};
use std::mem;
use std::os::fd::AsFd;

use rvmm_devices::{ConsoleBackend, Port, Ports};

use super::StopRequest;
use super::foreground::{Standing, fail_in_background};
use super::keys::{self, Command, Keys};
use super::raw::{self, RawMode};
use super::streams::Streams;

/// The console of `--serial stdio`.
pub(super) struct Stdio {
    streams: Streams,
    /// Only on a terminal.
    keys: Option<Keys>,
    stop: StopRequest,
    /// Where the input is one.
    terminal: Option<Terminal>,
}

/// The terminal, and what is known of it.
struct Terminal {
    /// Put back when this is dropped.
    raw: RawMode,
    /// At the last look.
    standing: Standing,
    /// The user has been shown the key that shows the keys.
    is_introduced: bool,
}

impl Stdio {
    /// Takes standard input and output, and the terminal where there is one.
    ///
    /// # Errors
    /// `AlreadyExists` where another console has the terminal; else what the kernel says.
    pub(super) fn open(stop: StopRequest) -> io::Result<Self> {
        let (input, output) = (io::stdin(), io::stdout());
        let raw = input.is_terminal().then(|| RawMode::enter(input.as_fd())).transpose()?;
        let streams = Streams::new(
            Some(input.as_fd().try_clone_to_owned()?),
            Some(output.as_fd().try_clone_to_owned()?),
        )?;
        let terminal =
            raw.map(|raw| Terminal { raw, standing: Standing::Background, is_introduced: false });
        let keys = terminal.as_ref().map(|_| Keys::default());
        let mut console = Self { streams, keys, stop, terminal };
        console.look();
        Ok(console)
    }

    /// Sees whether there is input to be had.
    fn look(&mut self) -> Standing {
        let Some(terminal) = &mut self.terminal else { return Standing::Foreground };
        terminal.standing = terminal.raw.look();
        if terminal.standing == Standing::Foreground
            && !mem::replace(&mut terminal.is_introduced, true)
        {
            if io::stdout().is_terminal() {
                self.streams.show(keys::HINT);
            } else {
                // The output goes elsewhere and must not be disturbed.
                let _ = io::stderr().write_all(keys::HINT);
            }
        }
        terminal.standing
    }

    /// Takes what was typed, in the foreground; elsewhere there is nothing yet, or nothing any more.
    fn read_typed(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.terminal.is_none() {
            return self.streams.read(buffer);
        }
        fail_in_background();
        loop {
            match self.look() {
                Standing::Foreground => {}
                Standing::Background => return Err(io::ErrorKind::WouldBlock.into()),
                Standing::Gone => return Ok(0),
            }
            match self.streams.read(buffer) {
                // The background came in between, or a group that is orphaned is there: this is not the end.
                Err(error) if is_eio(&error) && self.look() == Standing::Background => {
                    self.streams.go_on();
                }
                result => return result,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Stop => (self.stop)(),
            Command::Suspend => raw::suspend_group(),
            Command::Help => self.streams.show(keys::HELP),
        }
    }
}

impl ConsoleBackend for Stdio {
    fn ports(&self) -> Ports {
        let ports = self.streams.ports();
        let Some(terminal) = &self.terminal else { return ports };
        let is_ours = terminal.standing == Standing::Foreground;
        let input = if is_ours { ports.input } else { Port::Closed };
        Ports { input, attention: Some(terminal.raw.attention()), ..ports }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.read_typed(buffer)?;
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
        let result = self.streams.write(bytes);
        // With `stty tostop` an orphaned group writes nothing in the background, and will again in the foreground.
        if result.as_ref().is_err_and(is_eio)
            && self.terminal.as_ref().is_some_and(|t| t.raw.look() == Standing::Background)
        {
            self.streams.go_on();
        }
        result
    }

    fn size(&self) -> Option<(u16, u16)> {
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
        Some((size.ws_col, size.ws_row))
    }

    fn attend(&mut self) {
        if let Some(terminal) = &self.terminal {
            terminal.raw.attend();
            self.look();
        }
    }
}

fn is_eio(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EIO)
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
        (Stdio { streams, keys: Some(Keys::default()), stop, terminal: None }, stops)
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
