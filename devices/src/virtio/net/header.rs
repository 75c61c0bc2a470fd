//! The header before each frame (virtio 1.3, section 5.1.6), and its validation.
//!
//! A header asks the receiver to complete the frame: to fill in a checksum, or to segment it. No header passes that was not
//! negotiated or that points outside the frame. Left out: UFO and USO, hash reports, RSC.
use serde::{Deserialize, Serialize};

/// Bytes of a header.
pub const HEADER: usize = 12;

/// [`HEADER`] as a length in a chain.
pub(super) const HEADER_LEN: u32 = 12;

/// Bytes of the largest frame: an IP packet of 64 KiB and its Ethernet header (virtio 1.3, section 5.1.6.3.1).
pub const MAX_FRAME: u32 = 65_550;

/// Bytes of the smallest frame: an Ethernet header.
pub const MIN_FRAME: u32 = 14;

/// Feature bits (virtio 1.3, section 5.1.3).
pub mod bit {
    /// `VIRTIO_NET_F_CSUM`: the device completes checksums.
    pub const CSUM: u64 = 1 << 0;
    /// `VIRTIO_NET_F_GUEST_CSUM`: the driver completes checksums.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// `VIRTIO_NET_F_CTRL_GUEST_OFFLOADS`: the driver can change its offloads while it runs.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// `VIRTIO_NET_F_MTU`
    pub const MTU: u64 = 1 << 3;
    /// `VIRTIO_NET_F_MAC`
    pub const MAC: u64 = 1 << 5;
    /// `VIRTIO_NET_F_GUEST_TSO4`: the driver accepts TSO over IPv4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// `VIRTIO_NET_F_GUEST_TSO6`: the driver accepts TSO over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// `VIRTIO_NET_F_GUEST_ECN`: the driver accepts TSO with ECN.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// `VIRTIO_NET_F_HOST_TSO4`: the device accepts TSO over IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// `VIRTIO_NET_F_HOST_TSO6`: the device accepts TSO over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// `VIRTIO_NET_F_HOST_ECN`: the device accepts TSO with ECN.
    pub const HOST_ECN: u64 = 1 << 13;
    /// `VIRTIO_NET_F_MRG_RXBUF`: a frame may fill several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// `VIRTIO_NET_F_STATUS`
    pub const STATUS: u64 = 1 << 16;
    /// `VIRTIO_NET_F_CTRL_VQ`
    pub const CTRL_VQ: u64 = 1 << 17;
    /// `VIRTIO_NET_F_CTRL_RX`
    pub const CTRL_RX: u64 = 1 << 18;
    /// `VIRTIO_NET_F_MQ`: several queue pairs.
    pub const MQ: u64 = 1 << 22;
    /// Offloads that `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET` may name if they were negotiated.
    pub const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;
}

mod flag {
    pub(super) const NEEDS_CSUM: u8 = 1;
    pub(super) const DATA_VALID: u8 = 2;
}

mod gso {
    pub(super) const NONE: u8 = 0;
    pub(super) const TCPV4: u8 = 1;
    pub(super) const TCPV6: u8 = 4;
    pub(super) const ECN: u8 = 0x80;
}

/// Work on a frame that is left to its receiver. None by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offloads {
    /// Checksums.
    pub csum: bool,
    /// TCP segmentation over IPv4.
    pub tso4: bool,
    /// TCP segmentation over IPv6.
    pub tso6: bool,
    /// TCP segmentation with ECN.
    pub ecn: bool,
}

impl Offloads {
    /// Offloads that these features permit in frames to the device.
    pub(super) fn of_device(features: u64) -> Self {
        let has = |bit| features & bit != 0;
        Self::new(has(bit::CSUM), has(bit::HOST_TSO4), has(bit::HOST_TSO6), has(bit::HOST_ECN))
    }

    /// Offloads that these features permit in frames to the driver.
    pub(super) fn of_driver(features: u64) -> Self {
        let has = |bit| features & bit != 0;
        Self::new(
            has(bit::GUEST_CSUM),
            has(bit::GUEST_TSO4),
            has(bit::GUEST_TSO6),
            has(bit::GUEST_ECN),
        )
    }

    /// Drops offloads whose prerequisites are missing (virtio 1.3, section 5.1.3.1).
    fn new(csum: bool, tso4: bool, tso6: bool, ecn: bool) -> Self {
        let (tso4, tso6) = (csum && tso4, csum && tso6);
        Self { csum, tso4, tso6, ecn: ecn && (tso4 || tso6) }
    }

    fn allow(self, gso_type: u8) -> bool {
        let kind = match gso_type & !gso::ECN {
            gso::TCPV4 => self.tso4,
            gso::TCPV6 => self.tso6,
            _ => false,
        };
        kind && (gso_type & gso::ECN == 0 || self.ecn)
    }
}

/// A header, read once from guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct FrameHeader {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    pub(super) num_buffers: u16,
}

impl FrameHeader {
    pub(super) fn parse(raw: [u8; HEADER]) -> Self {
        let [flags, gso_type, a0, a1, b0, b1, c0, c1, d0, d1, e0, e1] = raw;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([a0, a1]),
            gso_size: u16::from_le_bytes([b0, b1]),
            csum_start: u16::from_le_bytes([c0, c1]),
            csum_offset: u16::from_le_bytes([d0, d1]),
            num_buffers: u16::from_le_bytes([e0, e1]),
        }
    }

    pub(super) fn bytes(self) -> [u8; HEADER] {
        let [a0, a1] = self.hdr_len.to_le_bytes();
        let [b0, b1] = self.gso_size.to_le_bytes();
        let [c0, c1] = self.csum_start.to_le_bytes();
        let [d0, d1] = self.csum_offset.to_le_bytes();
        let [e0, e1] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, a0, a1, b0, b1, c0, c1, d0, d1, e0, e1]
    }

    /// True if the frame is to be segmented.
    pub(super) fn is_segmented(self) -> bool {
        self.gso_type != gso::NONE
    }

    /// The header for the host of a frame of `len` bytes from the guest; `None` if it is invalid.
    ///
    /// Flags that a driver does not set are cleared (section 5.1.6.2.2).
    pub(super) fn sent_by_guest(self, len: u32, offloads: Offloads) -> Option<Self> {
        let needs_csum = self.flags & flag::NEEDS_CSUM != 0;
        if u32::from(self.hdr_len) > len || needs_csum && !self.has_checksum_in(len) {
            return None;
        }
        let flags = self.flags & flag::NEEDS_CSUM;
        self.negotiated(flags, offloads).map(|header| Self { num_buffers: 0, ..header })
    }

    /// The header for the guest of a frame of `len` bytes from the host; `None` if it needs an offload that the guest does not
    /// accept: it was queued before the offloads changed.
    pub(super) fn sent_by_host(self, len: u32, offloads: Offloads) -> Option<Self> {
        let needs_csum = self.flags & flag::NEEDS_CSUM != 0;
        if needs_csum && !self.has_checksum_in(len) {
            return None;
        }
        let known = flag::NEEDS_CSUM | if offloads.csum { flag::DATA_VALID } else { 0 };
        self.negotiated(self.flags & known, offloads)
    }

    fn negotiated(self, flags: u8, offloads: Offloads) -> Option<Self> {
        let needs_csum = flags & flag::NEEDS_CSUM != 0;
        if needs_csum && !offloads.csum {
            return None;
        }
        // Each segment gets its own checksum, so a frame to be segmented has to ask for one.
        let is_whole = self.gso_size != 0 && needs_csum && offloads.allow(self.gso_type);
        if self.is_segmented() && !is_whole {
            return None;
        }
        let mut header = Self { flags, ..self };
        if !needs_csum {
            (header.csum_start, header.csum_offset) = (0, 0);
        }
        if !self.is_segmented() {
            (header.hdr_len, header.gso_size) = (0, 0);
        }
        Some(header)
    }

    /// True if the two bytes of the checksum are inside a frame of `len` bytes.
    fn has_checksum_in(self, len: u32) -> bool {
        u32::from(self.csum_start) + u32::from(self.csum_offset) + 2 <= len
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: Offloads = Offloads { csum: true, tso4: true, tso6: true, ecn: true };
    const CSUM: Offloads = Offloads { csum: true, tso4: false, tso6: false, ecn: false };

    fn segment() -> FrameHeader {
        FrameHeader {
            flags: flag::NEEDS_CSUM,
            gso_type: gso::TCPV4,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 0,
        }
    }

    #[test]
    fn a_segment_passes_where_it_was_negotiated() {
        assert_eq!(segment().sent_by_guest(9000, ALL), Some(segment()));
        assert_eq!(segment().sent_by_host(9000, ALL), Some(segment()));
        assert_eq!(segment().sent_by_guest(9000, CSUM), None);
        assert_eq!(segment().sent_by_host(9000, CSUM), None);
        let marked = FrameHeader { gso_type: gso::TCPV4 | gso::ECN, ..segment() };
        assert_eq!(marked.sent_by_guest(9000, ALL), Some(marked));
        assert_eq!(marked.sent_by_guest(9000, Offloads { ecn: false, ..ALL }), None);
        let six = FrameHeader { gso_type: gso::TCPV6, ..segment() };
        assert_eq!(six.sent_by_guest(9000, Offloads { tso6: false, ..ALL }), None);
    }

    #[test]
    fn a_segment_of_no_size_or_kind_or_checksum_does_not_pass() {
        let bad = [
            FrameHeader { gso_size: 0, ..segment() },
            FrameHeader { flags: 0, ..segment() },
            FrameHeader { gso_type: 3, ..segment() },
            FrameHeader { gso_type: 5, ..segment() },
            FrameHeader { gso_type: 0x7f, ..segment() },
            FrameHeader { gso_type: gso::ECN, ..segment() },
            FrameHeader { hdr_len: 9001, ..segment() },
        ];
        for header in bad {
            assert_eq!(header.sent_by_guest(9000, ALL), None, "{header:?}");
        }
    }

    #[test]
    fn a_checksum_lies_inside_its_frame_to_the_last_byte() {
        let header =
            FrameHeader { flags: 1, csum_start: 34, csum_offset: 16, ..FrameHeader::default() };
        assert!(header.sent_by_guest(52, CSUM).is_some());
        assert!(header.sent_by_guest(51, CSUM).is_none());
        let far = FrameHeader { flags: 1, csum_start: u16::MAX, csum_offset: u16::MAX, ..header };
        assert!(far.sent_by_guest(MAX_FRAME, CSUM).is_none());
        assert!(header.sent_by_guest(60, Offloads::default()).is_none());
    }

    #[test]
    fn what_has_no_meaning_in_a_header_is_cleared() {
        let odd =
            FrameHeader { flags: 0xfe, gso_size: 7, csum_start: 9999, ..FrameHeader::default() };
        assert_eq!(odd.sent_by_guest(60, ALL), Some(FrameHeader::default()));
        let valid = FrameHeader { flags: flag::DATA_VALID, ..FrameHeader::default() };
        assert_eq!(valid.sent_by_host(60, ALL), Some(valid));
        assert_eq!(valid.sent_by_host(60, Offloads::default()), Some(FrameHeader::default()));
    }

    #[test]
    fn offloads_that_depend_on_a_missing_one_are_missing_too() {
        assert_eq!(Offloads::of_device(bit::HOST_TSO4 | bit::HOST_ECN), Offloads::default());
        assert_eq!(Offloads::of_driver(bit::GUEST_CSUM | bit::GUEST_ECN), CSUM);
        assert_eq!(Offloads::of_driver(bit::GUEST_OFFLOADS), ALL);
    }

    proptest! {
        #[test]
        fn whatever_passes_was_negotiated_and_points_into_the_frame(
            raw: [u8; HEADER], len in MIN_FRAME..=MAX_FRAME,
            features: u64,
        ) {
            let header = FrameHeader::parse(raw);
            prop_assert_eq!(header.bytes(), raw);
            let offloads = Offloads::of_device(features);
            if let Some(passed) = header.sent_by_guest(len, offloads) {
                prop_assert!(passed.flags <= 1 && (passed.flags == 0 || offloads.csum));
                prop_assert!(u32::from(passed.hdr_len) <= len);
                prop_assert!(passed.flags == 0 || passed.has_checksum_in(len));
                prop_assert!(!passed.is_segmented() || passed.gso_size > 0 && offloads.allow(passed.gso_type));
                prop_assert_eq!(passed.sent_by_guest(len, offloads), Some(passed));
            }
        }
    }
}
