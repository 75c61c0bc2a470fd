//! Tap interfaces (Linux, Documentation/networking/tuntap.rst): network devices of the host whose frames rvmm reads and writes.
//! A descriptor that the parent process has opened, which may also be a macvtap or an ipvtap, is used by `tap/inherit.rs`.
//!
//! The kernel puts the virtio-net header before each frame (IFF_VNET_HDR), so frames are passed on unparsed. A tap
//! that existed before stays when it is closed; one that was created by opening it is deleted.
#![expect(
    unsafe_code,
    reason = "the ioctls of a tap, and readv and writev on guest memory, have no safe interface"
)]

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use libc::{c_int, c_uint, c_ulong, c_void};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink, recv, socket_with,
};
use rvmm_devices::HostError;
use rvmm_devices::virtio::net::{HEADER, NetBackend, Offloads};
use rvmm_devices::virtio::vhost_kernel::KernelQueues;
use rvmm_devices::virtio::{DmaMemory, GuestMemoryMmap, Segment};
use vm_memory::GuestMemoryBackend;

use super::node::{self, Place};
use super::vhost;

mod inherit;

/// The device node of taps.
const TUN: &str = node::TUN.path;

/// Whole Ethernet frames, without the kernel's own header, with that of virtio-net.
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Multicast group of messages about interfaces (<linux/rtnetlink.h>).
const RTMGRP_LINK: u32 = 1;

/// Limit of the messages that are read at once: a host can have very many interfaces.
const MOST_CHANGES: usize = 64;

/// A tap, open.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    name: String,
    identity: String,
    /// Readable when an interface of the host has changed; none if that is not available.
    changes: Option<OwnedFd>,
    /// The interface's address, if it passes on no frames to another.
    address: Option<[u8; 6]>,
}

impl Tap {
    /// Opens the tap of this name, or creates it.
    pub(super) fn open(name: &str) -> Result<Self, HostError> {
        Ok(Self { changes: changes(), ..Self::attach(name, 0)? })
    }

    /// Opens `count` queues of the tap of this name, or creates it.
    pub(super) fn open_queues(name: &str, count: u16) -> Result<Vec<Self>, HostError> {
        let mut queues: Vec<Self> = (0..count)
            .map(|_| Self::attach(name, libc::IFF_MULTI_QUEUE))
            .collect::<Result<_, _>>()?;
        queues.iter_mut().take(1).for_each(|first| first.changes = changes());
        Ok(queues)
    }

    fn attach(name: &str, more: c_int) -> Result<Self, HostError> {
        let mut request = request(name, FLAGS | more).ok_or_else(|| {
            HostError::invalid(format!(
                "Cannot use tap {name:?}: an interface's name has 1 to 15 letters, digits, '-', '_' and '.'"
            ))
        })?;
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd =
            open(TUN, flags, Mode::empty()).map_err(|error| no_tun(Place::here(), error.into()))?;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        check(result).map_err(|error| not_attached(name, more != 0, error))?;
        Self::prepare(fd, name.to_owned())
    }

    /// Sets the header's format to that of virtio 1, without offloads.
    fn prepare(fd: OwnedFd, name: String) -> Result<Self, HostError> {
        let host = fs::read_to_string("/etc/machine-id").unwrap_or_default();
        let identity = format!("{}/{name}", host.trim());
        // An inherited tap may be in another network namespace, so its link is not watched.
        let mut tap = Self { fd, name, identity, changes: None, address: None };
        tap.set_up()
            .map_err(|error| HostError::os(format!("Cannot set up tap {}", tap.name), error))?;
        Ok(tap)
    }

    fn set_up(&mut self) -> io::Result<()> {
        let size = c_int::try_from(HEADER).map_err(io::Error::other)?;
        for (ioctl, value) in [(libc::TUNSETVNETHDRSZ, size), (libc::TUNSETVNETLE, 1)] {
            // SAFETY: both read one int, which outlives the call.
            check(unsafe { libc::ioctl(self.fd.as_raw_fd(), ioctl, &raw const value) })?;
        }
        self.set_offloads(Offloads::default())
    }

    /// Converts an error of readv and writev to that of a backend.
    fn explain(&self, error: io::Error) -> io::Error {
        let name = &self.name;
        match error.raw_os_error() {
            // The interface was deleted.
            Some(libc::EBADFD) => {
                io::Error::new(ErrorKind::NotConnected, format!("tap {name} is gone"))
            }
            Some(libc::EIO) => {
                io::Error::other(format!("tap {name} is down (sudo ip link set {name} up)"))
            }
            _ => error,
        }
    }
}

impl NetBackend for Tap {
    fn identity(&self) -> &str {
        &self.identity
    }

    fn address(&self) -> Option<[u8; 6]> {
        self.address
    }

    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let bits = [
            (offloads.csum, libc::TUN_F_CSUM),
            (offloads.tso4, libc::TUN_F_TSO4),
            (offloads.tso6, libc::TUN_F_TSO6),
            (offloads.ecn, libc::TUN_F_TSO_ECN),
        ];
        let taken = bits.iter().filter(|(is_on, _)| *is_on);
        let bits: c_uint = taken.fold(0, |bits, (_, bit)| bits | bit);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(bits)) })
    }

    fn set_in_use(&mut self, is_in_use: bool) -> io::Result<()> {
        let flag = if is_in_use { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let mut request = empty_request();
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flag).map_err(io::Error::other)?;
        // SAFETY: TUNSETQUEUE reads one `ifreq`, which outlives the call.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) })
    }

    fn link_fd(&self) -> Option<RawFd> {
        self.changes.as_ref().map(AsRawFd::as_raw_fd)
    }

    fn is_link_up(&mut self) -> bool {
        let Some(changes) = &self.changes else { return true };
        // The contents are of no use, and may be truncated.
        let mut scrap = [0; 4096];
        for _ in 0..MOST_CHANGES {
            if recv(changes, &mut scrap, RecvFlags::DONTWAIT).is_err_and(|e| e == Errno::AGAIN) {
                break;
            }
        }
        let Some(mut request) = request(&self.name, 0) else { return true };
        // SAFETY: SIOCGIFFLAGS reads and writes one `ifreq`, which outlives the call.
        let result =
            unsafe { libc::ioctl(changes.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) };
        // SAFETY: after SIOCGIFFLAGS, and before it, the union holds the flags.
        let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        match check(result) {
            Ok(()) => flags & libc::IFF_UP != 0,
            Err(error) => error.raw_os_error() != Some(libc::ENODEV),
        }
    }

    fn kernel_queues(
        &self,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn KernelQueues>, HostError> {
        let what = || format!("Cannot use tap {} with vhost", self.name);
        let tap = self.fd.try_clone().map_err(|error| HostError::os(what(), error))?;
        vhost::network(tap, memory)
    }

    fn send(&mut self, memory: &GuestMemoryMmap, head: &[u8], rest: &[Segment]) -> io::Result<()> {
        let mut list = Vec::with_capacity(rest.len() + 1);
        list.push(vector(head.as_ptr().cast_mut().cast(), head.len()));
        add(&mut list, memory, rest)?;
        let count = c_int::try_from(list.len()).map_err(io::Error::other)?;
        // SAFETY: each vector is all of `head` or a piece of guest RAM, which `memory` keeps mapped; the kernel only reads.
        let sent = unsafe { libc::writev(self.fd.as_raw_fd(), list.as_ptr(), count) };
        // There are no short writes: a tap takes a whole frame or none.
        if sent < 0 { Err(self.explain(io::Error::last_os_error())) } else { Ok(()) }
    }

    fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        header: &mut [u8; HEADER],
        first: &[Segment],
        rest: &mut [u8],
    ) -> io::Result<usize> {
        let mut list = Vec::with_capacity(first.len() + 2);
        list.push(vector(header.as_mut_ptr().cast(), header.len()));
        add(&mut list, memory, first)?;
        list.push(vector(rest.as_mut_ptr().cast(), rest.len()));
        let count = c_int::try_from(list.len()).map_err(io::Error::other)?;
        // SAFETY: each vector is all of `header` or of `rest`, which are borrowed for writing, or a piece of guest RAM, which
        // `memory` keeps mapped and into which rvmm has no reference.
        let got = unsafe { libc::readv(self.fd.as_raw_fd(), list.as_ptr(), count) };
        match usize::try_from(got) {
            Ok(got) => got.checked_sub(HEADER).ok_or_else(|| ErrorKind::InvalidData.into()),
            Err(_) => Err(self.explain(io::Error::last_os_error())),
        }
    }
}

/// A socket that receives a message at every change of an interface (rtnetlink(7), NETLINK_ROUTE, which is protocol 0).
fn changes() -> Option<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None).ok()?;
    bind(&socket, &netlink::SocketAddrNetlink::new(0, RTMGRP_LINK)).ok()?;
    Some(socket)
}

/// Adds pieces of guest RAM, each checked to be inside one region.
fn add(
    list: &mut Vec<libc::iovec>,
    memory: &GuestMemoryMmap,
    pieces: &[Segment],
) -> io::Result<()> {
    for piece in pieces {
        let slice = memory.get_slice(piece.addr, piece.len as usize).map_err(io::Error::other)?;
        let guard = slice.ptr_guard_mut();
        list.push(vector(guard.as_ptr().cast(), slice.len()));
    }
    Ok(())
}

fn vector(start: *mut c_void, len: usize) -> libc::iovec {
    libc::iovec { iov_base: start, iov_len: len }
}

/// An `ifreq` for the interface of this name; `None` if the name is invalid.
fn request(name: &str, flags: c_int) -> Option<libc::ifreq> {
    let good = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    let mut request = empty_request();
    // The last byte of the field stays zero.
    let fits = (1..request.ifr_name.len()).contains(&name.len());
    if !fits || !name.bytes().all(good) || matches!(name, "." | "..") {
        return None;
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).ok()?;
    Some(request)
}

fn empty_request() -> libc::ifreq {
    // SAFETY: `ifreq` is plain data that zero bits make.
    unsafe { std::mem::zeroed() }
}

fn name_of(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|c| u8::from_ne_bytes(c.to_ne_bytes()));
    let bytes: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn no_tun(place: Place, error: io::Error) -> HostError {
    let remedy = node::TUN.remedy(&error, place).map(|todo| format!(" ({todo})"));
    HostError::os(format!("Cannot open {TUN}{}", remedy.unwrap_or_default()), error)
}

fn not_attached(name: &str, has_queues: bool, error: io::Error) -> HostError {
    let queues = if has_queues { " multi_queue" } else { "" };
    let todo = match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            format!(" (create it with: sudo ip tuntap add {name} mode tap{queues} user $USER)")
        }
        Some(libc::EINVAL) if has_queues => {
            format!(
                " (an interface of this name has one queue or is not a tap: omit queues, or delete it and create it with: sudo ip tuntap add {name} mode tap multi_queue user $USER)"
            )
        }
        Some(libc::EBUSY) => {
            " (another program has it open: stop that program, or use another tap)".into()
        }
        Some(libc::EINVAL) => {
            " (an interface of this name is not a tap of one queue: use another name, or queues=2 for one created with multi_queue)"
                .into()
        }
        _ => String::new(),
    };
    HostError::os(format!("Cannot use tap {name}{todo}"), error)
}

#[cfg(test)]
pub(super) mod tests;
