//! A console that writes to any [`Write`]: for programs that embed rvmm.
//!
//! A `Write` may block and a hart must not, so a thread of its own calls it, and reads the output from a pipe: output is
//! buffered only in the pipe (64 KiB), through which a slow writer throttles the guest.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use rvmm_devices::{ConsoleBackend, Ports};

use super::streams::Streams;

/// Time-out of a console that is dropped, for its writer to take the rest.
const DRAIN: Duration = Duration::from_secs(1);

/// Limit of the bytes that the writer gets at once.
const CHUNK: usize = 4096;

/// The console of [`super::Console::from_writer`].
#[derive(Debug)]
pub(super) struct Writer {
    /// Closed first when this is dropped: the thread then reads the end of the file.
    pipe: Option<Streams>,
    /// Disconnected when the thread has written everything.
    done: Receiver<()>,
}

impl Writer {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host has no descriptors or threads left.
    pub(super) fn new(writer: Box<dyn Write + Send>) -> io::Result<Self> {
        let (reader, pipe) = pipe_with(PipeFlags::CLOEXEC)?;
        let (finished, done) = channel();
        thread::Builder::new().name("console".into()).spawn(move || {
            pass_on(reader.into(), writer);
            drop(finished);
        })?;
        Ok(Self { pipe: Some(Streams::new(None, Some(pipe))?), done })
    }
}

/// Copies until the console is dropped or the writer fails: then writes to the pipe fail, and the console counts the dropped bytes.
fn pass_on(mut pipe: File, mut writer: Box<dyn Write + Send>) {
    let mut buffer = [0; CHUNK];
    loop {
        let taken = match pipe.read(&mut buffer) {
            Ok(taken) if taken > 0 => buffer.get(..taken).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            _ => return,
        };
        if let Err(error) = writer.write_all(taken).and_then(|()| writer.flush()) {
            log::warn!(
                "The writer of a guest's console failed, its output is dropped from now on: {error}"
            );
            return;
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.pipe = None;
        // Nothing is ever sent: the call returns when the sender is dropped.
        let _ = self.done.recv_timeout(DRAIN);
    }
}

impl ConsoleBackend for Writer {
    fn ports(&self) -> Ports {
        self.pipe.as_ref().map_or_else(|| Streams::default().ports(), Streams::ports)
    }

    fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.pipe.as_mut() {
            Some(pipe) => pipe.write(bytes),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, sync_channel};
    use std::sync::{Arc, Mutex};

    use rvmm_devices::Port;

    use super::*;

    #[derive(Clone, Default)]
    struct SharedText(Arc<Mutex<Vec<u8>>>);

    impl Write for SharedText {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Blocks in its first write until it receives the result to return.
    struct Stuck {
        results: Receiver<io::Result<()>>,
    }

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.results.recv().unwrap_or(Ok(())).map(|()| bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn stuck() -> (Sender<io::Result<()>>, Writer) {
        let (sender, results) = channel();
        (sender, Writer::new(Box::new(Stuck { results })).unwrap())
    }

    #[test]
    fn everything_written_has_arrived_when_the_console_is_dropped() {
        let shared = SharedText::default();
        let mut console = Writer::new(Box::new(shared.clone())).unwrap();
        assert_eq!(console.ports().input, Port::Closed);
        for line in 0..100u8 {
            assert_eq!(console.write(&[line; 10]).unwrap(), 10);
        }
        drop(console);
        let expected: Vec<u8> = (0..100u8).flat_map(|line| [line; 10]).collect();
        assert_eq!(*shared.0.lock().unwrap(), expected);
    }

    #[test]
    fn a_writer_that_blocks_throttles_after_64_kib_and_never_blocks_the_caller() {
        let (sender, mut console) = stuck();
        let mut taken = 0;
        let refusal = loop {
            match console.write(&[0; CHUNK]) {
                Ok(count) => taken += count,
                Err(error) => break error,
            }
        };
        assert_eq!(refusal.kind(), io::ErrorKind::WouldBlock);
        assert!(taken <= 64 * 1024 + CHUNK, "{taken} bytes wait");
        assert!(matches!(console.ports().output, Port::Poll(_)));
        drop(sender);
    }

    #[test]
    fn a_writer_that_fails_ends_the_output() {
        let (sender, mut console) = stuck();
        assert_eq!(console.write(b"x").unwrap(), 1);
        sender.send(Err(io::ErrorKind::StorageFull.into())).unwrap();
        console.done.recv().unwrap_err();
        assert_eq!(console.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(console.ports().output, Port::Closed);
    }

    #[test]
    fn dropping_a_console_whose_writer_never_returns_takes_a_bounded_time() {
        let (sender, mut console) = stuck();
        console.write(b"x").unwrap();
        let (dropped, wait) = sync_channel(0);
        thread::spawn(move || {
            drop(console);
            dropped.send(()).unwrap();
        });
        wait.recv_timeout(Duration::from_secs(30))
            .expect("the writer is still stuck, the drop is not");
        drop(sender);
    }
}
