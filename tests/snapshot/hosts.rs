//! Snapshots that one kind of host saves and another restores: `scripts/restores` runs both halves.

use std::fs;
use std::path::{Path, PathBuf};

use crate::harness::{Session, host, skip};
use crate::{Place, busy_linux, expect_no_complaints, goes_on, saved_chain};

/// Names the folder in which a host saves.
const SAVE_TO: &str = "RVMM_TEST_SAVE_TO";
/// Names such folders of other hosts, separated by colons.
const RESTORE_FROM: &str = "RVMM_TEST_RESTORE_FROM";

#[test]
fn a_host_saves_for_others() {
    let Some(to) = std::env::var_os(SAVE_TO).map(PathBuf::from) else {
        return skip("scripts/restores runs it");
    };
    let Some(host) = host() else { return };
    let at = |name: &str| to.join(name).display().to_string();
    for irqchip in host.usual_irqchip() {
        let rest = saved_chain(&Place::new(), irqchip, &at("chain"));
        fs::write(at("rest"), rest).expect("space");

        let place = Place::new();
        let mut session = busy_linux(&place, irqchip);
        place.save(&mut session, "one", &at("linux"));
        fs::copy(place.at("disk"), to.join("disk")).expect("a copy");
    }
}

/// The machine that continues, or the message with which it was refused.
fn restore(place: &Place, folder: &str, name: &str, arguments: &[&str]) -> Result<Session, String> {
    let mut session = place.restore(folder, arguments);
    place.await_socket(&mut session, name);
    if !session.is_running() && session.exit_code() == 4 {
        return Err(session.all_errors());
    }
    Ok(session)
}

/// Continues the guests of another host to the end of their work, and prints for each that it goes, or the refusal.
fn continue_guests(from: &Path) {
    let host = from.file_name().expect("a name").display();
    let report = |guest, outcome: Result<(), String>| {
        let said = outcome.map_or_else(|error| error, |()| "goes on".into());
        println!("{guest} of {host}: {}", said.trim());
    };
    let place = Place::new();
    fs::copy(from.join("disk"), place.at("disk")).expect("a copy");
    let at = |name: &str| from.join(name).display().to_string();
    let chain = restore(&place, &at("chain"), "chain", &[]).map(|mut session| {
        assert_eq!(session.exit_code(), 0);
        let rest = fs::read_to_string(at("rest")).expect("what it prints");
        assert_eq!(String::from_utf8(session.output()).expect("text"), rest);
    });
    report("chain", chain);

    let disk = format!("vda={}", place.at("disk").display());
    // The copy has another time, though nothing else.
    let linux = restore(&place, &at("linux"), "one", &["--force", "--disk-path", &disk]).map(
        |mut session| {
            assert_eq!(session.ask("echo $kept; nproc"), "42\n2\n");
            goes_on(&mut session);
            expect_no_complaints(&mut session);
            session.send("poweroff -f\n");
            assert_eq!(session.exit_code(), 0);
        },
    );
    report("linux", linux);
}

#[test]
fn a_host_continues_what_others_have_saved() {
    let Ok(folders) = std::env::var(RESTORE_FROM) else {
        return skip("scripts/restores runs it");
    };
    if host().is_none() {
        return;
    }
    folders.split(':').for_each(|folder| continue_guests(Path::new(folder)));
}
