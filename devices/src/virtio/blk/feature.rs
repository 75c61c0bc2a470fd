//! Feature bits of a disk (virtio 1.3, section 5.2.3), and the sets offered with every disk and with a writable one.

pub(super) const SEG_MAX: u64 = 1 << 2;
pub(super) const RO: u64 = 1 << 5;
pub(super) const BLK_SIZE: u64 = 1 << 6;
pub(super) const FLUSH: u64 = 1 << 9;
pub(super) const CONFIG_WCE: u64 = 1 << 11;
pub(super) const MQ: u64 = 1 << 12;
pub(super) const DISCARD: u64 = 1 << 13;
pub(super) const WRITE_ZEROES: u64 = 1 << 14;
pub(super) const ALWAYS: u64 = SEG_MAX | BLK_SIZE | FLUSH;
pub(super) const WRITABLE: u64 = CONFIG_WCE | DISCARD | WRITE_ZEROES;
