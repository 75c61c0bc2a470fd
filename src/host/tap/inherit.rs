//! A tap that the parent process has opened: /dev/net/tun, attached to an interface, or the /dev/tapN of a macvtap or an ipvtap (Linux,
//! drivers/net/tap.c), which is attached from the start.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use libc::c_int;
use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat, major, minor};
use rvmm_devices::HostError;

use super::super::inherited;
use super::{FLAGS, Tap, check, empty_request, name_of};

/// The major and minor number of /dev/net/tun (Documentation/admin-guide/devices.txt). Those of macvtaps are assigned dynamically.
const TUN_DEVICE: (u32, u32) = (10, 200);

impl Tap {
    /// Uses a duplicate of a descriptor that the parent process has opened. The original stays open for the next boot of the guest.
    pub(in crate::host) fn inherit(fd: RawFd) -> Result<Self, HostError> {
        let refused = |error| HostError::os(format!("Cannot use descriptor {fd}"), error);
        let own = duplicate(fd)?;
        let stat = fstat(&own).map_err(|error| refused(error.into()))?;
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
        let is_tun = is_device && (major(stat.st_rdev), minor(stat.st_rdev)) == TUN_DEVICE;
        let name = attached_to(&own, is_device, is_tun)
            .map_err(|what| HostError::invalid(format!("Cannot use descriptor {fd}: {what}")))?;
        // SAFETY: the descriptor was just found open. Programs that rvmm starts do not inherit it.
        let given = unsafe { BorrowedFd::borrow_raw(fd) };
        rustix::io::fcntl_setfd(given, rustix::io::FdFlags::CLOEXEC)
            .and_then(|()| fcntl_setfl(&own, fcntl_getfl(&own)? | OFlags::NONBLOCK))
            .map_err(|error| refused(error.into()))?;
        let address = (!is_tun).then(|| address_of(&own)).transpose().map_err(refused)?;
        Ok(Self { address, ..Self::prepare(own, name)? })
    }
}

fn duplicate(fd: RawFd) -> Result<OwnedFd, HostError> {
    inherited::duplicate(fd).map_err(|error| match error.raw_os_error() {
        Some(libc::EBADF) => HostError::invalid(format!(
            "Cannot use descriptor {fd}: it is not open (open a tap before rvmm starts, and let it inherit the descriptor)"
        )),
        _ => HostError::os(format!("Cannot use descriptor {fd}"), error),
    })
}

/// The name of the interface behind a tap, or the reason why a guest cannot use it.
fn attached_to(fd: &OwnedFd, is_device: bool, is_tun: bool) -> Result<String, &'static str> {
    const NO_TAP: &str = "it is not a tap (it has to be /dev/net/tun, attached with TUNSETIFF, or the /dev/tapN of a macvtap or ipvtap)";
    if !is_device {
        return Err(NO_TAP);
    }
    let mut request = empty_request();
    // SAFETY: TUNGETIFF writes one `ifreq`, which outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
    check(result).map_err(|error| match error.raw_os_error() {
        _ if is_tun => "it is not attached to an interface (use TUNSETIFF first)",
        Some(libc::ENOLINK) => "its interface was deleted (open the /dev/tapN of another one)",
        _ => NO_TAP,
    })?;
    // SAFETY: after TUNGETIFF the union holds the flags.
    let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    if flags & FLAGS != FLAGS {
        return Err(
            "it is attached without IFF_TAP, IFF_NO_PI or IFF_VNET_HDR (all three are needed)",
        );
    }
    Ok(name_of(&request))
}

/// The address of the interface behind a tap.
fn address_of(fd: &OwnedFd) -> io::Result<[u8; 6]> {
    let mut request = empty_request();
    // SAFETY: SIOCGIFHWADDR writes one `ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) })?;
    // SAFETY: after SIOCGIFHWADDR the union holds an address.
    let bytes = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    let mut address = [0; 6];
    for (to, from) in address.iter_mut().zip(bytes) {
        *to = u8::from_ne_bytes(from.to_ne_bytes());
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::Path;
    use std::process::Command;
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    use rvmm_devices::testing::skip;
    use rvmm_devices::virtio::net::{HEADER, NetBackend};
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::super::tests::{Cable, frame, in_a_namespace};
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    fn ip(line: &str) -> bool {
        let status = Command::new("ip").args(line.split(' ')).status();
        status.is_ok_and(|status| status.success())
    }

    /// The device of the macvtap mv0, opened. Its minor number is the first free one.
    fn open_macvtap(folder: &Path) -> Option<File> {
        let devices = fs::read_to_string("/proc/devices").unwrap();
        let major = devices.lines().find_map(|line| line.trim().strip_suffix(" macvtap"))?;
        let major = major.parse().unwrap();
        (1..64).find_map(|minor| {
            let path = folder.join(format!("tap{minor}"));
            let mode = Mode::RUSR | Mode::WUSR;
            mknodat(CWD, &path, FileType::CharacterDevice, mode, makedev(major, minor)).unwrap();
            let file = File::options().read(true).write(true).open(&path).ok()?;
            let name = attached_to(&OwnedFd::from(file.try_clone().unwrap()), true, false);
            (name.as_deref() == Ok("mv0")).then_some(file)
        })
    }

    #[test]
    fn a_macvtap_is_taken_over_with_its_address_and_exchanges_frames() {
        in_a_namespace(|| {
            let folder = tempfile::tempdir().unwrap();
            // The kernel names the other end of the pair veth0.
            let is_made = ip("link add v0 type veth")
                && ip("link add link v0 mv0 address 02:00:00:00:00:07 type macvtap");
            let Some(file) = is_made.then(|| open_macvtap(folder.path())).flatten() else {
                return skip("there is no macvtap: no kernel module, or no command ip");
            };
            let (cable, _lower, _own) = (Cable::to("veth0"), Cable::to("v0"), Cable::to("mv0"));
            for _ in 0..2 {
                let mut tap = Tap::inherit(file.as_raw_fd()).unwrap();
                assert!(tap.identity().ends_with("/mv0"), "{}", tap.identity());
                assert_eq!(tap.address(), Some(MAC));
                let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
                let head = [&[0; HEADER][..], &frame(60)].concat();
                let got = until_received(
                    cable.as_fd(),
                    || {
                        tap.send(&memory, &head, &[]).unwrap();
                    },
                    // None if there are only the kernel's own frames.
                    || cable.receive(),
                );
                assert_eq!(got, frame(60));

                let mut sent = frame(100);
                sent[..6].copy_from_slice(&MAC);
                // SAFETY: the tap is open as long as it is borrowed here.
                let fd = unsafe { BorrowedFd::borrow_raw(tap.fd()) };
                let got = until_received(
                    fd,
                    || cable.send(&sent),
                    || {
                        let (mut header, mut rest) = ([0; HEADER], vec![0; 2000]);
                        let len = tap.receive(&memory, &mut header, &[], &mut rest).unwrap();
                        rest.truncate(len);
                        (rest[12..14] == sent[12..14]).then_some(rest)
                    },
                );
                assert_eq!(got, sent);
            }
            assert!(ip("link del mv0"));
            let (what, _) = Tap::inherit(file.as_raw_fd()).unwrap_err().into_parts();
            assert!(what.contains("its interface was deleted"), "{what}");
        });
    }

    /// Sends until the frame is received: the kernel drops frames of an interface until its carrier has been noticed, which a
    /// worker of its own does.
    fn until_received(
        fd: BorrowedFd<'_>,
        mut send: impl FnMut(),
        mut receive: impl FnMut() -> Option<Vec<u8>>,
    ) -> Vec<u8> {
        for _ in 0..600 {
            send();
            while poll_in(fd) {
                if let Some(frame) = receive() {
                    return frame;
                }
            }
        }
        panic!("the frame does not arrive");
    }

    fn poll_in(fd: BorrowedFd<'_>) -> bool {
        let limit = Timespec::try_from(Duration::from_millis(100)).ok();
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], limit.as_ref()).is_ok_and(|ready| ready > 0)
    }
}
