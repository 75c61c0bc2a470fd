//! Queries over a socket, and page table walks.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rvmm_devices::Bus;

use super::{
    Connection, Inspectable, InspectionServer, Order, Query, Reply, Stages, Stat, Walk, WalkTarget,
};
use crate::config::Unassigned;
use crate::io_loop::{IoLoop, IoThread};
use crate::migration::{MigrationProgress, MigrationRequest};
use crate::snapshot::SnapshotRequest;
use crate::trace::DeviceMap;
use crate::vcpu::testing::{RAM, UART, context};

struct Echo;

impl Inspectable for Echo {
    fn answer(&self, query: Query) -> Reply {
        match query {
            Query::Stat => Reply::Stat(Stat { name: "web".into(), ..Stat::default() }),
            query => Reply::Error(query.line()),
        }
    }

    fn carry_out(
        &self,
        order: Order,
        attached: Option<OwnedFd>,
        tell: &mut dyn FnMut(&Reply) -> bool,
    ) -> Reply {
        match order {
            Order::Migrate(_) => {
                assert!(tell(&Reply::Progress(MigrationProgress::default())));
                let mut text = String::new();
                let mut stream = attached.map(UnixStream::from).expect("a socket");
                stream.read_to_string(&mut text).unwrap();
                Reply::Error(text)
            }
            Order::Pause => Reply::Done { took_ns: 1 },
            other => Reply::Error(serde_json::to_string(&other).unwrap()),
        }
    }
}

/// The I/O loop of a machine without devices, with an inspection socket at `path`.
fn server(path: &Path) -> IoThread {
    let server = InspectionServer::open(path, Arc::new(Echo)).unwrap();
    let mut io = IoLoop::new(Arc::new(Bus::new(Vec::new()).unwrap())).unwrap();
    io.watch_external(Arc::new(server));
    io.spawn().unwrap()
}

#[test]
fn queries_are_answered_one_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web-1.sock");
    let served = server(&path);
    let mut connection = Connection::to(&path).unwrap();
    for query in [Query::Registers, Query::Walk { address: u64::MAX, hart: 3 }] {
        assert_eq!(connection.ask(query).unwrap(), Reply::Error(query.line()));
    }
    let Reply::Stat(stat) = connection.ask(Query::Stat).unwrap() else { panic!("no counters") };
    assert_eq!(stat.name, "web");
    served.stop(Duration::ZERO).unwrap();
    assert!(!path.exists(), "the socket's file is removed with it");
}

#[test]
fn orders_are_carried_out_on_the_same_connection() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web-1.sock");
    let served = server(&path);
    let mut connection = Connection::to(&path).unwrap();
    assert_eq!(connection.give(&Order::Pause).unwrap(), Reply::Done { took_ns: 1 });
    // The longest path that the kernel takes, of bytes that are no text.
    let folder = std::ffi::OsString::from_vec(vec![0xff; 4095]);
    let request =
        SnapshotRequest { folder: folder.into(), stop: true, ..SnapshotRequest::default() };
    let Reply::Error(text) = connection.give(&Order::Snapshot(request.clone())).unwrap() else {
        panic!("no reply")
    };
    assert_eq!(serde_json::from_str::<Order>(&text).unwrap(), Order::Snapshot(request));
    assert!(matches!(connection.ask(Query::Stat).unwrap(), Reply::Stat(_)));
    for order in
        ["\"reboot\"\n", "{\"snapshot\":{}}\n", "{\n", "{\"snapshot\":{\"folder\":\"\"}}\n"]
    {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(order.as_bytes()).unwrap();
        let mut reply = String::new();
        let _ = stream.read_to_string(&mut reply);
        assert!(reply.starts_with("{\"error\":\"The order is invalid: "), "{order:?}: {reply}");
    }
    served.stop(Duration::ZERO).unwrap();
}

#[test]
fn a_descriptor_comes_with_an_order_and_replies_come_before_the_last_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web-1.sock");
    let served = server(&path);
    let mut connection = Connection::to(&path).unwrap();
    for text in ["first", "second"] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(text.as_bytes()).unwrap();
        drop(ours);
        let mut before = Vec::new();
        let order = Order::Migrate(MigrationRequest::default());
        let last = connection.give_with(&order, theirs.into(), |reply| before.push(reply.clone()));
        assert_eq!(last.unwrap(), Reply::Error(text.into()));
        assert_eq!(before, [Reply::Progress(MigrationProgress::default())]);
    }
    assert!(matches!(connection.ask(Query::Stat).unwrap(), Reply::Stat(_)));
    served.stop(Duration::ZERO).unwrap();
}

#[test]
fn an_invalid_query_gets_an_error_and_ends_the_connection() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web-1.sock");
    let queries = ["no\n", "walk\n", "walk 0xzz\n", "stat now\n", "\n", &"x".repeat(40000)];
    let served = server(&path);
    for query in queries {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(query.as_bytes()).unwrap();
        let mut reply = String::new();
        // A part that was not read by then resets the connection, after the reply.
        let _ = stream.read_to_string(&mut reply);
        assert!(reply.starts_with("{\"error\":\"Queries are info"), "{query:?}: {reply}");
        assert_eq!(reply.lines().count(), 1);
    }
    served.stop(Duration::ZERO).unwrap();
}

#[test]
fn clients_are_limited_and_a_slot_is_free_after_a_disconnect() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web-1.sock");
    let served = server(&path);
    let mut clients: Vec<_> = (0..8).map(|_| Connection::to(&path).unwrap()).collect();
    for client in &mut clients {
        client.ask(Query::Stat).unwrap();
    }
    let mut late = Connection::to(&path).unwrap();
    assert!(late.ask(Query::Stat).is_err());
    drop(clients);
    // A slot is free once its thread has seen the disconnect.
    while Connection::to(&path).unwrap().ask(Query::Stat).is_err() {
        thread::yield_now();
    }
    served.stop(Duration::ZERO).unwrap();
}

/// Entries of page tables at the start of RAM: root, second and last table, a page each.
fn tables(entries: &[(u64, u64)]) -> (crate::vcpu::MachineContext, DeviceMap) {
    let (context, _) = context(Unassigned::Zero);
    for (at, entry) in entries {
        context.ram.write(RAM.base + at, &entry.to_le_bytes()).unwrap();
    }
    let places = DeviceMap::of(&context.bus);
    (context, places)
}

const SATP: u64 = 8 << 60 | RAM.base >> 12;

/// An entry that points to `addr` with these flags.
fn entry(addr: u64, flags: u64) -> u64 {
    addr >> 12 << 10 | flags
}

#[test]
fn a_walk_shows_every_entry_and_where_it_ends() {
    let base = RAM.base;
    let (context, places) = tables(&[
        (0, entry(base + 0x1000, 1)),
        (0x1000, entry(base + 0x2000, 1)),
        (0x2000, entry(base + 0x5000, 0xcf)),
        (0x2008, entry(UART, 0x17)),
        (0x2010, entry(0x2800_0000, 0x17)),
        (0x2018, entry(0x7000_0000_0000, 0x17)),
        (0x2020, 0),
        (0x2028, entry(0x1000, 0x0b)),
        (8, entry(base, 0xcf) | 1 << 61),
    ]);
    let walk = |address| {
        let stages = Stages {
            ram: &context.ram,
            shim: Some((1, 0x1000)),
            places: &places,
            address_bits: Some(59),
        };
        Walk::of(stages, 0, SATP, address)
    };
    let page = walk(0x678);
    let levels: Vec<_> = page.steps.iter().map(|step| (step.level, step.addr)).collect();
    assert_eq!(levels, [(2, base), (1, base + 0x1000), (0, base + 0x2000)]);
    assert_eq!((page.steps[0].flags.as_str(), page.steps[2].flags.as_str()), ("V", "V R W X A D"));
    assert_eq!((page.mode.as_str(), page.physical), ("Sv39", Some(base + 0x5678)));
    assert_eq!(page.landing, Some(WalkTarget::Memory { slot: 0, base, offset: 0x5678 }));
    assert_eq!((page.second_levels, page.accesses), (Some(5), Some(23)));
    let device = WalkTarget::Device { name: "fake-uart".into(), offset: 5, register: None };
    assert_eq!(walk(0x1005).landing, Some(device));
    assert_eq!(
        walk(0x5010).landing,
        Some(WalkTarget::Memory { slot: 1, base: 0x1000, offset: 0x10 })
    );
    assert_eq!(walk(0x2000).landing, Some(WalkTarget::Range("imsics".into())));
    assert_eq!(walk(0x3000).landing, Some(WalkTarget::Nothing));
    let fault = walk(0x4000);
    assert_eq!((fault.physical, fault.landing, fault.steps.len()), (None, None, 3));
    assert!(fault.fault.contains("not valid"), "{}", fault.fault);
    assert_eq!(fault.accesses, Some(18), "three entries, and no result to be translated");
    let huge = walk(1 << 30 | 0x1234);
    assert_eq!((huge.steps.len(), huge.accesses), (1, Some(11)));
    assert_eq!(huge.steps[0].flags, "V R W X A D NC");
    assert!(walk(1 << 40).fault.contains("not canonical"));
}

#[test]
fn without_translation_only_the_second_stage_is_left() {
    let (context, places) = tables(&[]);
    let stages = Stages {
        ram: &context.ram,
        shim: Some((1, 0x1000)),
        places: &places,
        address_bits: Some(41),
    };
    let bare = Walk::of(stages, 0, 0, RAM.base);
    assert_eq!(
        (bare.mode.as_str(), bare.physical, bare.accesses),
        ("bare", Some(RAM.base), Some(3))
    );
    let stages = Stages { address_bits: None, ..stages };
    assert_eq!(Walk::of(stages, 0, 0, RAM.base).accesses, None);
}
