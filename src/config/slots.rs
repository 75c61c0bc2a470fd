//! Assignment of devices to slots of the memory map.

use rvmm_devices::{Model, Options, Placement};

use crate::error::Error;
use crate::layout::SLOT_COUNT;

/// Number of slots up to the last one that a configuration uses.
///
/// # Errors
/// As for [`assign`], and [`Error::Device`] for a text that does not parse.
pub(crate) fn reach(devices: &[String]) -> Result<usize, Error> {
    let devices: Result<Vec<_>, _> = devices.iter().map(|text| Options::parse(text)).collect();
    let devices = devices.map_err(|error| Error::Device(error.to_string()))?;
    Ok(assign(&devices)?.into_iter().flatten().max().map_or(0, |last| last + 1))
}

/// The slot of each device, in the order given; `None` for a device outside the slots.
///
/// A device that names a slot (`slot=N`) gets it. The others get the lowest free ones, in order.
///
/// # Errors
/// [`Error::Device`] for a model that does not exist, an invalid slot number, a slot that two devices name, and more
/// devices than slots.
pub(crate) fn assign(devices: &[Options]) -> Result<Vec<Option<usize>>, Error> {
    let mut taken: [Option<&str>; SLOT_COUNT] = [None; SLOT_COUNT];
    let mut named = Vec::with_capacity(devices.len());
    for options in devices {
        let slot = named_slot(options)?;
        let place = slot.and_then(|slot| taken.get_mut(slot).map(|place| (slot, place)));
        if let Some((slot, place)) = place
            && let Some(other) = place.replace(options.name())
        {
            return Err(Error::Device(format!(
                "Device {} cannot have slot={slot}: {other} has it (use another, or leave it out)",
                options.name()
            )));
        }
        named.push(slot);
    }
    let mut free =
        taken.iter().enumerate().filter(|(_, owner)| owner.is_none()).map(|(slot, _)| slot);
    let place = |(options, slot): (&Options, Option<usize>)| {
        if slot.is_some() || !is_slotted(options)? {
            return Ok(slot);
        }
        free.next().map(Some).ok_or_else(|| {
            Error::Device(format!(
                "Device {} does not fit: all {SLOT_COUNT} slots are taken",
                options.name()
            ))
        })
    };
    devices.iter().zip(named).map(place).collect()
}

fn is_slotted(options: &Options) -> Result<bool, Error> {
    let model = Model::find(options.name()).map_err(|error| Error::Device(error.to_string()))?;
    Ok(model.placement == Placement::Slot)
}

/// The slot that a device names.
fn named_slot(options: &Options) -> Result<Option<usize>, Error> {
    if !is_slotted(options)? {
        return Ok(None);
    }
    let refused = |error| Error::Device(format!("Device {}: {error}", options.name()));
    let slot = options.number("slot").map_err(refused)?;
    let Some(slot) = slot else { return Ok(None) };
    let slot = usize::try_from(slot).ok().filter(|slot| *slot < SLOT_COUNT);
    slot.map(Some)
        .ok_or_else(|| refused(options.bad_value("slot", "the number of a slot, 0 to 31")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(devices: &[&str]) -> Result<Vec<Option<usize>>, String> {
        let devices: Vec<_> = devices.iter().map(|text| Options::parse(text).unwrap()).collect();
        assign(&devices).map_err(|error| error.to_string())
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
        let reached = [vec![], vec!["rng"], vec!["serial"], vec!["rng", "rng,slot=4", "rng"]]
            .map(|texts| reach(&texts.into_iter().map(String::from).collect::<Vec<_>>()).unwrap());
        assert_eq!(reached, [0, 1, 0, 5]);
    }

    #[test]
    fn a_slot_is_one_of_32_and_has_one_device() {
        for text in ["32", "-1", "", "x", "18446744073709551616"] {
            let error = slots(&[&format!("rng,slot={text}")]).unwrap_err();
            assert!(
                error.contains(text) && error.starts_with("Device rng: Option slot="),
                "{error}"
            );
        }
        let error = slots(&["rng,slot=7", "input,slot=0x7"]).unwrap_err();
        assert!(error.starts_with("Device input cannot have slot=7: rng has it"), "{error}");
        assert_eq!(slots(&["rng"; 32]).unwrap().last(), Some(&Some(31)));
        assert!(slots(&["rng"; 33]).unwrap_err().contains("all 32 slots are taken"));
        let full: Vec<_> = ["rng,slot=3"].into_iter().chain(["rng"; 32]).collect();
        assert!(slots(&full).unwrap_err().contains("all 32 slots are taken"));
    }
}
