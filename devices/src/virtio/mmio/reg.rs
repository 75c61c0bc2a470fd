//! The registers: their offsets and names (virtio 1.3, section 4.2.2).

use super::{CONFIG, SIZE};

pub(super) const MAGIC_VALUE: u64 = 0x000;
pub(super) const VERSION: u64 = 0x004;
pub(super) const DEVICE_ID: u64 = 0x008;
pub(super) const VENDOR_ID: u64 = 0x00c;
pub(super) const DEVICE_FEATURES: u64 = 0x010;
pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
pub(super) const DRIVER_FEATURES: u64 = 0x020;
pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
pub(super) const QUEUE_SEL: u64 = 0x030;
pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
pub(super) const QUEUE_SIZE: u64 = 0x038;
pub(super) const QUEUE_READY: u64 = 0x044;
pub(super) const QUEUE_NOTIFY: u64 = 0x050;
pub(super) const INTERRUPT_STATUS: u64 = 0x060;
pub(super) const INTERRUPT_ACK: u64 = 0x064;
pub(super) const STATUS: u64 = 0x070;
pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
pub(super) const SHM_SEL: u64 = 0x0ac;
pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
pub(super) const SHM_LEN_HIGH: u64 = 0x0b4;
pub(super) const SHM_BASE_LOW: u64 = 0x0b8;
pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
pub(super) const QUEUE_RESET: u64 = 0x0c0;
pub(super) const CONFIG_GENERATION: u64 = 0x0fc;

/// Registers of version 1 only.
pub(super) const GUEST_PAGE_SIZE: u64 = 0x028;
pub(super) const QUEUE_ALIGN: u64 = 0x03c;
pub(super) const QUEUE_PFN: u64 = 0x040;

/// Names of the registers, as in the specification; the fields of the configuration space depend on the device.
pub(super) fn register_name(offset: u64, _: bool) -> Option<&'static str> {
    Some(match offset {
        MAGIC_VALUE => "MagicValue",
        VERSION => "Version",
        DEVICE_ID => "DeviceID",
        VENDOR_ID => "VendorID",
        DEVICE_FEATURES => "DeviceFeatures",
        DEVICE_FEATURES_SEL => "DeviceFeaturesSel",
        DRIVER_FEATURES => "DriverFeatures",
        DRIVER_FEATURES_SEL => "DriverFeaturesSel",
        QUEUE_SEL => "QueueSel",
        QUEUE_SIZE_MAX => "QueueSizeMax",
        QUEUE_SIZE => "QueueSize",
        QUEUE_READY => "QueueReady",
        QUEUE_NOTIFY => "QueueNotify",
        INTERRUPT_STATUS => "InterruptStatus",
        INTERRUPT_ACK => "InterruptACK",
        STATUS => "Status",
        QUEUE_DESC_LOW => "QueueDescLow",
        QUEUE_DESC_HIGH => "QueueDescHigh",
        QUEUE_DRIVER_LOW => "QueueDriverLow",
        QUEUE_DRIVER_HIGH => "QueueDriverHigh",
        QUEUE_DEVICE_LOW => "QueueDeviceLow",
        QUEUE_DEVICE_HIGH => "QueueDeviceHigh",
        SHM_SEL => "SHMSel",
        SHM_LEN_LOW => "SHMLenLow",
        SHM_LEN_HIGH => "SHMLenHigh",
        SHM_BASE_LOW => "SHMBaseLow",
        SHM_BASE_HIGH => "SHMBaseHigh",
        QUEUE_RESET => "QueueReset",
        CONFIG_GENERATION => "ConfigGeneration",
        GUEST_PAGE_SIZE => "GuestPageSize",
        QUEUE_ALIGN => "QueueAlign",
        QUEUE_PFN => "QueuePFN",
        CONFIG..SIZE => "Config",
        _ => return None,
    })
}
