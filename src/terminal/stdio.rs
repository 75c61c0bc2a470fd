//! Standard input and output: with rvmm's keys and raw mode if the input is a terminal, plain streams if not.

use std::io::{self, IsTerminal, Write};
use std::mem;
use std::os::fd::AsFd;

use rvmm_devices::{ConsoleBackend, Port, Ports};

use super::StopRequest;
use super::foreground::{JobState, fail_in_background};
use super::keys::{self, Command, Keys};
use super::raw::{self, RawMode};
use super::streams::Streams;

/// The console of `--serial stdio`.
pub(super) struct Stdio {
    streams: Streams,
    /// Only on a terminal.
    keys: Option<Keys>,
    stop: StopRequest,
    /// Only if the input is a terminal.
    terminal: Option<Terminal>,
}

/// The terminal and its state.
struct Terminal {
    /// Restores the terminal when dropped.
    raw: RawMode,
    /// The state at the last update.
    state: JobState,
    /// The hint about the help key has been shown.
    has_shown_hint: bool,
}

impl Stdio {
    /// Takes standard input and output, and the terminal if the input is one.
    ///
    /// # Errors
    /// `AlreadyExists` if another console has the terminal; else the error of the system call.
    pub(super) fn open(stop: StopRequest) -> io::Result<Self> {
        let (input, output) = (io::stdin(), io::stdout());
        let raw = input.is_terminal().then(|| RawMode::enter(input.as_fd())).transpose()?;
        let streams = Streams::new(
            Some(input.as_fd().try_clone_to_owned()?),
            Some(output.as_fd().try_clone_to_owned()?),
        )?;
        let terminal =
            raw.map(|raw| Terminal { raw, state: JobState::Background, has_shown_hint: false });
        let keys = terminal.as_ref().map(|_| Keys::default());
        let mut console = Self { streams, keys, stop, terminal };
        console.update();
        Ok(console)
    }

    /// Updates the state of the terminal, which decides if there may be input.
    fn update(&mut self) -> JobState {
        let Some(terminal) = &mut self.terminal else { return JobState::Foreground };
        terminal.state = terminal.raw.update();
        if terminal.state == JobState::Foreground
            && !mem::replace(&mut terminal.has_shown_hint, true)
        {
            if io::stdout().is_terminal() {
                self.streams.show(keys::HINT);
            } else {
                // The output is redirected, so the hint must not be part of it.
                let _ = io::stderr().write_all(keys::HINT);
            }
        }
        terminal.state
    }

    /// Reads in the foreground; `WouldBlock` in the background, zero if the terminal is gone.
    fn read_typed(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.terminal.is_none() {
            return self.streams.read(buffer);
        }
        fail_in_background();
        loop {
            match self.update() {
                JobState::Foreground => {}
                JobState::Background => return Err(io::ErrorKind::WouldBlock.into()),
                JobState::Gone => return Ok(0),
            }
            match self.streams.read(buffer) {
                // EIO is not the end of the input if the process has just moved to the background, or its group is orphaned there.
                Err(error) if is_eio(&error) && self.update() == JobState::Background => {
                    self.streams.reopen();
                }
                result => return result,
            }
        }
    }

    fn execute(&mut self, command: Command) {
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
        let may_read = terminal.state == JobState::Foreground;
        let input = if may_read { ports.input } else { Port::Closed };
        Ports { input, event_fd: Some(terminal.raw.event_fd()), ..ports }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.read_typed(buffer)?;
            let Some(keys) = self.keys.as_mut().filter(|_| count > 0) else { return Ok(count) };
            let (kept, command) = keys.filter(buffer.get_mut(..count).unwrap_or_default());
            if let Some(command) = command {
                self.execute(command);
            }
            // Zero means the end of the input: if all bytes were rvmm's, read again.
            if kept > 0 {
                return Ok(kept);
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let result = self.streams.write(bytes);
        // With `stty tostop`, writes of an orphaned group fail in the background, but not in the foreground later.
        if result.as_ref().is_err_and(is_eio)
            && self.terminal.as_ref().is_some_and(|t| t.raw.update() == JobState::Background)
        {
            self.streams.reopen();
        }
        result
    }

    fn size(&self) -> Option<(u16, u16)> {
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
        Some((size.ws_col, size.ws_row))
    }

    fn process_event(&mut self) {
        if let Some(terminal) = &self.terminal {
            terminal.raw.process_event();
            self.update();
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
