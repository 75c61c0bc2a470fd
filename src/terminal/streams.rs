//! A console on two plain descriptors: a file, pipes, a socket pair, a terminal that rvmm does not control.

use std::io;
use std::os::fd::OwnedFd;

use rvmm_devices::{ConsoleBackend, Port, Ports};

use super::descriptor::{Descriptor, Direction};

/// Either direction may be missing. A direction that has ended stays ended; its descriptor is closed with the console.
#[derive(Debug, Default)]
pub(super) struct Streams {
    input: Option<Stream>,
    output: Option<Stream>,
}

#[derive(Debug)]
struct Stream {
    descriptor: Descriptor,
    has_ended: bool,
}

impl Streams {
    /// # Errors
    /// See [`Descriptor::new`].
    pub(super) fn new(input: Option<OwnedFd>, output: Option<OwnedFd>) -> io::Result<Self> {
        let stream = |fd: OwnedFd, direction| {
            let descriptor = Descriptor::new(fd, direction)?;
            io::Result::Ok(Stream { descriptor, has_ended: false })
        };
        Ok(Self {
            input: input.map(|fd| stream(fd, Direction::Input)).transpose()?,
            output: output.map(|fd| stream(fd, Direction::Output)).transpose()?,
        })
    }

    /// Marks both directions as not ended, after an error that was temporary.
    pub(super) fn reopen(&mut self) {
        for stream in [&mut self.input, &mut self.output].into_iter().flatten() {
            stream.has_ended = false;
        }
    }

    /// Writes a text of rvmm's to the user; drops the part that does not fit now.
    pub(super) fn show(&mut self, mut text: &[u8]) {
        while !text.is_empty() {
            match self.write(text) {
                Ok(shown) if shown > 0 => text = text.get(shown..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return,
            }
        }
    }
}

impl Stream {
    fn port(&self) -> Port {
        if self.has_ended { Port::Closed } else { self.descriptor.port() }
    }
}

impl ConsoleBackend for Streams {
    fn ports(&self) -> Ports {
        let port = |stream: &Option<Stream>| stream.as_ref().map_or(Port::Closed, Stream::port);
        Ports { input: port(&self.input), output: port(&self.output), event_fd: None }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(input) = self.input.as_mut().filter(|input| !input.has_ended) else {
            return Ok(0);
        };
        let result = input.descriptor.read(buffer);
        input.has_ended = match &result {
            Ok(count) => *count == 0,
            Err(error) => !super::is_temporary(error),
        };
        result
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(output) = self.output.as_mut().filter(|output| !output.has_ended) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        let result = output.descriptor.write(bytes);
        output.has_ended = result.as_ref().is_err_and(super::is_hang_up);
        result
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use rustix::pipe::pipe;

    use super::*;

    #[test]
    fn bytes_go_through_in_both_directions_until_the_ends_are_closed() {
        let (guest_in, user_out) = pipe().unwrap();
        let (user_in, guest_out) = pipe().unwrap();
        let (mut user_out, mut user_in) = (File::from(user_out), File::from(user_in));
        let mut console = Streams::new(Some(guest_in), Some(guest_out)).unwrap();
        let ports = console.ports();
        assert!(matches!((ports.input, ports.output), (Port::Poll(_), Port::Poll(_))));

        let mut buffer = [0; 16];
        assert_eq!(console.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        user_out.write_all(b"typed\x01x").unwrap();
        assert_eq!(
            console.read(&mut buffer).unwrap(),
            7,
            "on a pipe, Ctrl-A is passed to the guest"
        );
        assert_eq!(console.write(b"shown").unwrap(), 5);
        user_in.read_exact(&mut buffer[..5]).unwrap();
        assert_eq!(&buffer[..5], b"shown");

        drop(user_out);
        assert_eq!(console.read(&mut buffer).unwrap(), 0);
        assert_eq!(console.ports().input, Port::Closed);
        drop(user_in);
        assert_eq!(console.write(b"lost").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(console.ports().output, Port::Closed);
    }

    #[test]
    fn a_full_disk_is_not_the_end_of_the_output() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut console = Streams::new(None, Some(full.into())).unwrap();
        assert_eq!(console.write(b"lost").unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(console.ports().output, Port::Always);
        assert_eq!(console.ports().input, Port::Closed);
    }

    #[test]
    fn a_text_that_does_not_fit_is_cut_and_does_not_block() {
        let (_reader, writer) = pipe().unwrap();
        let mut console = Streams::new(None, Some(writer)).unwrap();
        console.show(&vec![b'x'; 1 << 20]);
        assert_eq!(console.write(b"x").unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
