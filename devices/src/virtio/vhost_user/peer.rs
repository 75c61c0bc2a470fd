//! A peer before there is a device: who it is and what it can do.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::session::Session;
use super::{Daemon, PeerError, Service};
use crate::host::{Host, HostError};
use crate::virtio::feature;

/// How long a peer may take to answer when a machine is built or it has come again.
pub(super) const GREETING: Duration = Duration::from_secs(30);

/// Where a peer comes from.
pub(super) enum Origin {
    Socket(PathBuf),
    Started(Box<dyn Daemon>),
}

/// A peer that has answered, and has no device yet.
pub(super) struct Peer {
    /// Closed before the program behind it is ended: most end by themselves then.
    pub(super) session: Session,
    pub(super) origin: Origin,
}

impl Peer {
    /// Connects to who listens on the socket at `path`, and asks for what it is.
    pub(super) fn connect(host: &dyn Host, path: PathBuf, asked: usize) -> Result<Self, HostError> {
        let shown = path.display().to_string();
        let stream = host.connect(&path).map_err(|error| {
            HostError::refused(
                format!(
                    "Cannot connect to {shown} (start the program that serves the device first)"
                ),
                error,
            )
        })?;
        let session = greet(stream, asked).map_err(|error| unfit(&shown, &error))?;
        Ok(Self { origin: Origin::Socket(path), session })
    }

    /// Starts a program that serves the device, and asks for what it is.
    pub(super) fn start(host: &dyn Host, service: &Service) -> Result<Self, HostError> {
        let (stream, mut daemon) = host.serve(service)?;
        match greet(stream, 0) {
            Ok(session) => Ok(Self { origin: Origin::Started(daemon), session }),
            Err(error) => {
                let said = daemon.last_words();
                let said = if said.is_empty() { error.to_string() } else { said };
                Err(HostError::mistake(format!(
                    "{} cannot serve the device: {said}",
                    daemon.name()
                )))
            }
        }
    }

    pub(super) fn shown(&self) -> String {
        match &self.origin {
            Origin::Socket(path) => path.display().to_string(),
            Origin::Started(daemon) => daemon.name().to_owned(),
        }
    }
}

fn greet(stream: UnixStream, asked: usize) -> Result<Session, PeerError> {
    let mut session = Session::begin(stream, asked)?;
    session.complete(deadline(GREETING))?;
    if session.features() & feature::VERSION_1 == 0 {
        return Err(PeerError::Unfit("it does not know virtio 1"));
    }
    if session.config().len() < asked {
        return Err(PeerError::Unfit("it does not tell the device's configuration"));
    }
    Ok(session)
}

pub(super) fn unfit(shown: &str, error: &PeerError) -> HostError {
    HostError::mistake(format!(
        "Cannot use {shown}: {error} (is it the vhost-user socket of this kind of device?)"
    ))
}

pub(super) fn deadline(limit: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(limit).unwrap_or(now)
}
