//! Lines with a descriptor attached (SCM_RIGHTS of unix(7)).

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Reads a socket, and keeps the descriptor that came last. Further ones are closed.
pub(super) struct WithDescriptor<'a> {
    pub(super) stream: &'a UnixStream,
    /// The descriptor that came with the bytes read so far.
    pub(super) attached: Option<OwnedFd>,
}

impl Read for WithDescriptor<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(buffer)];
        // What does not fit into `space` is closed by the kernel.
        let received = recvmsg(self.stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.attached = descriptors.last().or(self.attached.take());
            }
        }
        Ok(received.bytes)
    }
}

/// Sends the first bytes of a line with a descriptor attached; returns their number.
pub(super) fn send(
    stream: &UnixStream,
    bytes: &[u8],
    descriptor: BorrowedFd<'_>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("there is no space for a descriptor"));
    }
    let sent = sendmsg(stream.as_fd(), &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(sent)
}
