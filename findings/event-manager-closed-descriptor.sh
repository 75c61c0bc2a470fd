#!/usr/bin/env bash
# event-manager 0.4.2: a descriptor that is closed without being removed blocks the events of the next one with its number, unlike in epoll.
#
# Seen with event-manager 0.4.2 and vmm-sys-util 0.15.0 on Linux: epoll(7) removes a descriptor when it is closed, so the kernel would accept the next one
# with that number. The crate has its own map from numbers to subscribers and checks it first: the second `add` is refused with
# FdAlreadyRegistered, and no events of the new descriptor arrive. A thread other than the loop's that closes a descriptor, as in a
# device's reset, must have the loop remove it first, or remove the stale entry when its number is reused.
#
# Needs a Rust toolchain and the crates registry. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/src"
cat >"$folder/Cargo.toml" <<'TOML'
[package]
name = "seen"
version = "0.0.0"
edition = "2021"
[dependencies]
event-manager = "=0.4.2"
vmm-sys-util = "=0.15.0"
[workspace]
TOML
cat >"$folder/src/main.rs" <<'RUST'
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

struct Quiet;

impl MutEventSubscriber for Quiet {
    fn process(&mut self, _: Events, _: &mut EventOps) {}
    fn init(&mut self, _: &mut EventOps) {}
}

fn main() {
    let mut manager = EventManager::<Arc<Mutex<dyn MutEventSubscriber>>>::new().unwrap();
    let id = manager.add_subscriber(Arc::new(Mutex::new(Quiet)));
    let first = EventFd::new(0).unwrap();
    let number = first.as_raw_fd();
    manager.event_ops(id).unwrap().add(Events::new(&first, EventSet::IN)).unwrap();
    drop(first);
    let second = EventFd::new(0).unwrap();
    assert_eq!(second.as_raw_fd(), number, "the number is free again");
    let answer = manager.event_ops(id).unwrap().add(Events::new(&second, EventSet::IN));
    println!("event-manager: {answer:?}");
    second.write(1).unwrap();
    println!("events that come: {:?}", manager.run_with_timeout(200));

    // The same with epoll alone.
    let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
    let add = |fd: &EventFd| {
        use vmm_sys_util::epoll::{ControlOperation, EpollEvent};
        epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))
    };
    let first = EventFd::new(0).unwrap();
    let number = first.as_raw_fd();
    add(&first).unwrap();
    drop(first);
    let second = EventFd::new(0).unwrap();
    assert_eq!(second.as_raw_fd(), number, "the number is free again");
    println!("epoll: {:?}", add(&second));
}
RUST
(cd "$folder" && cargo run --quiet) | tee "$folder/seen"
grep -q '^event-manager: Err(FdAlreadyRegistered)$' "$folder/seen"
grep -q '^events that come: Ok(0)$' "$folder/seen"
grep -q '^epoll: Ok(())$' "$folder/seen"
echo "as described"
