//! The header of a vsock packet (virtio 1.3, section 5.10.6).

/// The host's address.
pub(super) const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`
pub(super) const STREAM: u16 = 1;

/// Operations.
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// Flags of SHUTDOWN: the directions that its sender has closed.
pub(super) mod shutdown {
    pub(in super::super) const RECEIVE: u32 = 1;
    pub(in super::super) const SEND: u32 = 2;
    pub(in super::super) const BOTH: u32 = 3;
}

/// A header; in guest memory little-endian and in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct PacketHeader {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes behind the header.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Size of the sender's receive buffer in bytes.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender's application has read since the connection began, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl PacketHeader {
    /// Bytes of a header.
    pub(super) const LEN: usize = 44;

    /// Offset of the payload, behind the header.
    pub(super) const END: u32 = 44;

    pub(super) fn parse(raw: &[u8; Self::LEN]) -> Self {
        let mut rest = raw.as_slice();
        Self {
            src_cid: take(&mut rest, 8),
            dst_cid: take(&mut rest, 8),
            src_port: take32(&mut rest),
            dst_port: take32(&mut rest),
            len: take32(&mut rest),
            kind: take16(&mut rest),
            op: take16(&mut rest),
            flags: take32(&mut rest),
            buf_alloc: take32(&mut rest),
            fwd_cnt: take32(&mut rest),
        }
    }

    pub(super) fn bytes(&self) -> [u8; Self::LEN] {
        let mut raw = [0; Self::LEN];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        raw.iter_mut().zip(fields.into_iter().flatten()).for_each(|(to, from)| *to = *from);
        raw
    }

    /// The RST in reply to this packet.
    pub(super) fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// Removes `width` (at most 8) little-endian bytes from the front.
fn take(rest: &mut &[u8], width: usize) -> u64 {
    let (front, back) = rest.split_at_checked(width).unwrap_or((rest, &[]));
    *rest = back;
    front.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[expect(clippy::cast_possible_truncation, reason = "four bytes were taken")]
fn take32(rest: &mut &[u8]) -> u32 {
    take(rest, 4) as u32
}

#[expect(clippy::cast_possible_truncation, reason = "two bytes were taken")]
fn take16(rest: &mut &[u8]) -> u16 {
    take(rest, 2) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_is_where_the_specification_has_it() {
        let raw: [u8; PacketHeader::LEN] =
            std::array::from_fn(|index| u8::try_from(index).unwrap());
        let header = PacketHeader::parse(&raw);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_cid, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!((header.src_port, header.dst_port), (0x1312_1110, 0x1716_1514));
        assert_eq!((header.len, header.kind, header.op), (0x1b1a_1918, 0x1d1c, 0x1f1e));
        assert_eq!((header.flags, header.buf_alloc), (0x2322_2120, 0x2726_2524));
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
        assert_eq!(header.bytes(), raw);
    }

    #[test]
    fn a_refusal_goes_back_to_where_the_packet_came_from() {
        let sent = PacketHeader {
            src_cid: 3,
            dst_cid: 2,
            src_port: 7,
            dst_port: 9,
            kind: 5,
            ..PacketHeader::default()
        };
        let back = sent.refusal();
        assert_eq!((back.src_cid, back.dst_cid, back.src_port, back.dst_port), (2, 3, 9, 7));
        assert_eq!((back.kind, back.op, back.len), (5, op::RST, 0));
    }
}
