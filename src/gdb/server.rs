//! The thread `gdb`: lets one debugger in at a time, through all lives of the guest.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use log::info;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::post::Post;
use super::session::{Ended, serve};
use super::wire::{Bell, Door, Wire};
use crate::config::{GdbAddress, GdbConfig};
use crate::error::Error;

/// How long nobody is let in after the host could not.
const DEAF: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// What the machine's thread tells. The first two wait until they were heard.
pub(super) enum News {
    /// A life begins; its harts have not started.
    Begin(Arc<Post>, SyncSender<()>),
    /// A life is over.
    Over(SyncSender<()>),
    /// The machine ends, with this exit code.
    End(u8),
}

/// What the thread works with.
pub(super) struct Office {
    door: Door,
    pub(super) bell: Arc<Bell>,
    pub(super) news: Receiver<News>,
    pub(super) life: Option<Arc<Post>>,
    pub(super) has_ended: bool,
    /// Whether the guest waits for the first debugger.
    waits: bool,
    /// Whether the door is not looked at for a while: the host could not let somebody in.
    is_deaf: bool,
}

/// The debugger's end of a machine. Dropping it sends a debugger away.
#[derive(Debug)]
pub(crate) struct Server {
    news: Sender<News>,
    bell: Arc<Bell>,
    at: GdbAddress,
    waits: bool,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens where `config` says.
    ///
    /// # Errors
    /// The port or the path is taken or cannot be; the host has no threads or descriptors left.
    pub(crate) fn open(config: &GdbConfig) -> Result<Self, Error> {
        let door = Door::open(&config.at)?;
        let at = door.address()?;
        let failed = |source: io::Error| Error::Host {
            what: "Cannot start the thread for a debugger".into(),
            source,
        };
        let bell = Arc::new(Bell::new().map_err(failed)?);
        let (tell, news) = channel();
        let waits = config.wait;
        let office = Office {
            door,
            bell: Arc::clone(&bell),
            news,
            life: None,
            has_ended: false,
            waits,
            is_deaf: false,
        };
        let thread = thread::Builder::new().name("gdb".into()).spawn(move || office.run());
        Ok(Self { news: tell, bell, at, waits, thread: Some(thread.map_err(failed)?) })
    }

    /// Where a debugger connects.
    pub(crate) fn address(&self) -> &GdbAddress {
        &self.at
    }

    /// Whether the guest waits for a debugger before its first instruction.
    pub(crate) fn waits(&self) -> bool {
        self.waits
    }

    /// A life begins. When this returns, its harts are held where a debugger is there or waited for.
    pub(crate) fn begin(&self, post: Arc<Post>) {
        self.tell(|heard| News::Begin(post, heard));
    }

    /// A life is over: nothing of it is kept when this returns.
    pub(crate) fn over(&self) {
        self.tell(News::Over);
    }

    /// The machine has ended with this exit code, which a debugger is told.
    pub(crate) fn end(mut self, code: u8) {
        self.close(code);
    }

    fn tell(&self, news: impl FnOnce(SyncSender<()>) -> News) {
        let (heard, wait) = sync_channel(1);
        if self.news.send(news(heard)).is_ok() {
            self.bell.ring();
            // Where the thread has died, it needs no telling.
            let _ = wait.recv();
        }
    }

    fn close(&mut self, code: u8) {
        let Some(thread) = self.thread.take() else { return };
        let _ = self.news.send(News::End(code));
        self.bell.ring();
        // What it had to do with the guest is over.
        let _ = thread.join();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close(1);
    }
}

impl Office {
    fn run(mut self) {
        while let Some((post, wire)) = self.await_debugger() {
            self.waits = false;
            let ended = serve(&mut self, &post, wire);
            drop(post);
            if ended == Ended::Closed || self.has_ended {
                return;
            }
        }
    }

    /// Waits for the next debugger while there is a guest; nothing when the machine has ended.
    fn await_debugger(&mut self) -> Option<(Arc<Post>, Wire)> {
        loop {
            let mut fds = vec![PollFd::new(&self.bell, PollFlags::IN)];
            if self.life.is_some() && !self.is_deaf {
                fds.push(PollFd::new(&self.door, PollFlags::IN));
            }
            let limit = self.is_deaf.then_some(&DEAF);
            match poll(&mut fds, limit) {
                Ok(0) => self.is_deaf = false,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log::error!("No debugger can connect any more: {error}");
                    return None;
                }
            }
            if !self.hear_news() {
                return None;
            }
            let Some(post) = self.life.clone().filter(|_| !self.is_deaf) else { continue };
            match self.door.accept() {
                Ok(Some(fd)) => return Some((post, Wire::new(fd, Arc::clone(&self.bell)))),
                Ok(None) => {}
                Err(error) => {
                    info!("A debugger cannot be let in: {error}");
                    self.is_deaf = true;
                }
            }
        }
    }

    /// Takes what the machine's thread has to say; false where the machine has ended.
    fn hear_news(&mut self) -> bool {
        self.bell.silence();
        while let Ok(news) = self.news.try_recv() {
            match news {
                News::Begin(post, heard) => {
                    if self.waits {
                        post.control.hold();
                    }
                    self.life = Some(post);
                    let _ = heard.send(());
                }
                News::Over(heard) => {
                    self.life = None;
                    let _ = heard.send(());
                }
                News::End(_) => return false,
            }
        }
        true
    }
}
