//! A peer before there is a device: the handshake that reads its capabilities.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::session::Session;
use super::{Daemon, PeerError, Service};
use crate::host::{Host, HostError};
use crate::virtio::feature;

/// Time-out for a peer's handshake, when the machine is built and after a reconnect.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// The way in which a peer is reached.
pub(super) enum Origin {
    Socket(PathBuf),
    Started(Box<dyn Daemon>, Service),
}

/// A peer that has completed the handshake, and has no device yet.
pub(super) struct Peer {
    /// Closed before the program behind it is killed: most exit by themselves then.
    pub(super) session: Session,
    pub(super) origin: Origin,
}

impl Peer {
    /// Connects to the socket at `path`, and completes the handshake.
    pub(super) fn connect(host: &dyn Host, path: PathBuf, asked: usize) -> Result<Self, HostError> {
        let shown = path.display().to_string();
        let stream = host.connect(&path).map_err(|error| {
            HostError::os(
                format!(
                    "Cannot connect to {shown} (start the program that serves the device first)"
                ),
                error,
            )
        })?;
        let session = handshake(stream, asked).map_err(|error| unsuitable(&shown, &error))?;
        Ok(Self { origin: Origin::Socket(path), session })
    }

    /// Starts a program that serves the device, and completes the handshake.
    pub(super) fn start(host: &dyn Host, service: &Service) -> Result<Self, HostError> {
        let (stream, mut daemon) = host.serve(service)?;
        match handshake(stream, 0) {
            Ok(session) => Ok(Self { origin: Origin::Started(daemon, service.clone()), session }),
            Err(error) => {
                let said = daemon.last_output();
                let said = if said.is_empty() { error.to_string() } else { said };
                Err(HostError::invalid(format!(
                    "{} cannot serve the device: {said}",
                    daemon.name()
                )))
            }
        }
    }

    pub(super) fn shown(&self) -> String {
        match &self.origin {
            Origin::Socket(path) => path.display().to_string(),
            Origin::Started(daemon, _) => daemon.name().to_owned(),
        }
    }
}

fn handshake(stream: UnixStream, asked: usize) -> Result<Session, PeerError> {
    let mut session = Session::begin(stream, asked)?;
    session.complete(deadline(HANDSHAKE_TIMEOUT))?;
    if session.features() & feature::VERSION_1 == 0 {
        return Err(PeerError::Unsuitable("it does not support virtio 1"));
    }
    if session.config().len() < asked {
        return Err(PeerError::Unsuitable("it does not provide the configuration space"));
    }
    Ok(session)
}

pub(super) fn unsuitable(shown: &str, error: &PeerError) -> HostError {
    HostError::invalid(format!(
        "Cannot use {shown}: {error} (is it the vhost-user socket of this kind of device?)"
    ))
}

pub(super) fn deadline(limit: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(limit).unwrap_or(now)
}
