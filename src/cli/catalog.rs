//! The device catalog as a text: `--list-devices` and `--device help`.

use std::fmt::Write;

use rvmm_devices::{CATALOG, Model, Placement, SLOT};

/// Every model, its placement, and its options.
pub(super) fn listing() -> String {
    let mut text = String::from("Devices (--device NAME,KEY=VALUE,...):\n");
    // Writing into a String cannot fail.
    let _ = writeln!(
        text,
        "\nDevices in slots, the virtio ones and uart, also take\n      {}={:<13} {}",
        SLOT.name, SLOT.value, SLOT.help
    );
    for model in CATALOG {
        describe(&mut text, model);
    }
    text
}

fn describe(text: &mut String, model: &Model) {
    let place = match model.placement {
        Placement::Fixed => " (every machine has one; --device sets its options)",
        Placement::Slot | Placement::AtAddress => "",
    };
    // Writing into a String cannot fail.
    let _ = writeln!(text, "\n  {:<10} {}{place}", model.name, model.summary);
    for key in model.keys {
        let option = format!("{}={}", key.name, key.value);
        let _ = writeln!(text, "      {option:<18} {}", key.help);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_and_every_option_of_the_catalog_is_listed() {
        let text = listing();
        for model in CATALOG {
            assert!(text.contains(model.name) && text.contains(model.summary), "{}", model.name);
            for key in model.keys {
                assert!(text.contains(&format!("{}={}", key.name, key.value)), "{}", key.name);
                assert!(text.contains(key.help), "{}", key.name);
            }
        }
    }
}
