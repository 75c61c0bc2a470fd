//! Assignment of devices to slots of the memory map.

use rvmm_devices::{DeviceConfig, Placement};

use crate::error::Error;
use crate::layout::SLOT_COUNT;

/// The slot of each device, in the order given; `None` for a device outside the slots.
///
/// A device that names a slot (`slot=N`) gets it. The others get the lowest free ones, in order.
///
/// # Errors
/// [`Error::Device`] for a slot that two devices name, and more devices than slots.
pub(super) fn assign(devices: &[DeviceConfig]) -> Result<Vec<Option<usize>>, Error> {
    let mut taken: [Option<&str>; SLOT_COUNT] = [None; SLOT_COUNT];
    for device in devices {
        let slot = named(device);
        let place = slot.and_then(|slot| taken.get_mut(slot).map(|place| (slot, place)));
        if let Some((slot, place)) = place
            && let Some(other) = place.replace(device.model().name)
        {
            return Err(Error::Device(format!(
                "Device {} cannot have slot={slot}: {other} has it (use another, or leave it out)",
                device.model().name
            )));
        }
    }
    let mut free =
        taken.iter().enumerate().filter(|(_, owner)| owner.is_none()).map(|(slot, _)| slot);
    let place = |device: &DeviceConfig| {
        let slot = named(device);
        if slot.is_some() || device.model().placement != Placement::Slot {
            return Ok(slot);
        }
        free.next().map(Some).ok_or_else(|| {
            Error::Device(format!(
                "Device {} does not fit: all {SLOT_COUNT} slots are taken",
                device.model().name
            ))
        })
    };
    devices.iter().map(place).collect()
}

/// The slot that a device names.
fn named(device: &DeviceConfig) -> Option<usize> {
    device.slot().map(|slot| slot.get().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(devices: &[&str]) -> Result<Vec<Option<usize>>, String> {
        let devices: Result<Vec<_>, _> = devices.iter().map(DeviceConfig::parse).collect();
        assign(&devices.map_err(|error| error.to_string())?).map_err(|error| error.to_string())
    }

    #[test]
    fn devices_take_free_slots_in_the_order_given_around_those_that_name_one() {
        let all = slots(&[
            "rng",
            "rng,slot=0",
            "serial",
            "blk,path=a,slot=7",
            "const,addr=64,value=1",
            "rng",
        ]);
        assert_eq!(all.unwrap(), [Some(1), Some(0), None, Some(7), None, Some(2)]);
        assert_eq!(slots(&["rng,slot=31"]).unwrap(), [Some(31)]);
        assert_eq!(slots(&[]).unwrap(), []);
    }

    #[test]
    fn a_slot_is_one_of_32_and_has_one_device() {
        for text in ["32", "-1", "", "x", "18446744073709551616"] {
            let error = slots(&[&format!("rng,slot={text}")]).unwrap_err();
            assert!(error.contains(text) && error.starts_with("Option slot="), "{error}");
        }
        let error = slots(&["rng,slot=7", "input,slot=0x7"]).unwrap_err();
        assert!(error.starts_with("Device input cannot have slot=7: rng has it"), "{error}");
        assert_eq!(slots(&["rng"; 32]).unwrap().last(), Some(&Some(31)));
        assert!(slots(&["rng"; 33]).unwrap_err().contains("all 32 slots are taken"));
        let full: Vec<_> = ["rng,slot=3"].into_iter().chain(["rng"; 32]).collect();
        assert!(slots(&full).unwrap_err().contains("all 32 slots are taken"));
    }
}
