//! A device tree supplied by the user: compared with the machine, completed, given free space.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod samples;

use std::process::Command;

use proptest::prelude::*;
use rvmm_boot::fdt::blob::{self, Item};
use rvmm_boot::fdt::{self, Board, UserTree};
use rvmm_boot::{Kernel, Region, Request, place};
use samples::{AIA, Folder, MIB2, PLIC, RAM, board, image};

/// Number of unused bytes at the end of a tree.
const ROOM: usize = 8192;

fn given(bytes: &[u8]) -> UserTree {
    let folder = Folder::new();
    UserTree::open(&folder.write("user.dtb", bytes)).unwrap()
}

/// Compiles source with dtc, which leaves no free space at the end of the tree.
fn compiled(source: &str) -> Vec<u8> {
    let folder = Folder::new();
    let file = folder.write("user.dts", source.as_bytes());
    let output = Command::new("dtc").args(["-q", "-I", "dts", "-O", "dtb"]).arg(file).output();
    let output = output.expect("dtc is missing: apt-get install -y device-tree-compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The board's tree, decompiled and compiled again with dtc.
fn dumped(board: &Board) -> Vec<u8> {
    let folder = Folder::new();
    let file = folder.write("tree.dtb", &fdt::build(board).unwrap());
    let output = Command::new("dtc").args(["-q", "-I", "dtb", "-O", "dts"]).arg(file).output();
    compiled(&String::from_utf8(output.unwrap().stdout).unwrap())
}

fn items(blob: &[u8]) -> Vec<Item<'_>> {
    let mut items = Vec::new();
    blob::walk(blob, |item| items.push(item)).unwrap();
    items
}

fn word(blob: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(blob[at..at + 4].try_into().unwrap())
}

/// The bytes after the last block.
fn room(blob: &[u8]) -> &[u8] {
    let block = |at: usize, len: usize| (word(blob, at) + word(blob, len)) as usize;
    &blob[block(8, 36).max(block(12, 32))..]
}

fn has_room(blob: &[u8]) {
    assert_eq!(word(blob, 4) as usize, blob.len());
    assert_eq!(room(blob).len(), ROOM);
    assert!(room(blob).iter().all(|byte| *byte == 0));
}

#[test]
fn a_tree_that_went_through_dtc_has_room_for_a_firmware_again() {
    let bytes = dumped(&board(AIA));
    assert_eq!(room(&bytes).len(), 0, "dtc removes it");
    let completed = given(&bytes).completed(None);
    has_room(&completed);
    assert_eq!(items(&completed), items(&bytes), "nothing else is changed");
    let generated = fdt::build(&board(AIA)).unwrap();
    assert_eq!(given(&generated).completed(None), generated, "it needs no more");
}

#[test]
fn the_initrd_in_a_tree_is_replaced_by_the_one_that_is_loaded() {
    let mut board = board(PLIC);
    let bytes = dumped(&board);
    let tree = given(&bytes);
    assert_eq!(tree.initrd(), board.chosen.initrd);
    let other = Region::new(0x8f00_0000, 0x1_2345);
    let completed = tree.completed(Some(other));
    has_room(&completed);
    assert_eq!(given(&completed).initrd(), Some(other));
    board.chosen.initrd = Some(other);
    let expected = fdt::build(&board).unwrap();
    let sorted = |blob: &[u8]| {
        let mut lines: Vec<String> = items(blob).iter().map(|item| format!("{item:?}")).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&completed), sorted(&expected), "no other property is touched");
    let len = completed.len();
    assert_eq!(tree.completed(Some(Region::new(u64::MAX, 0))).len(), len, "at any address");
}

#[test]
fn a_tree_without_an_initrd_gets_the_one_that_is_loaded() {
    let initrd = Region::new(0x8800_0000, 0x3000);
    for source in [
        "/dts-v1/; / { a { b = <1>; }; chosen { bootargs = \"x\"; c { }; }; d { }; };",
        "/dts-v1/; / { a { chosen { linux,initrd-start = <5>; }; }; };",
        "/dts-v1/; / { };",
        "/dts-v1/; /memreserve/ 0x80000000 0x1000; / { chosen { linux,initrd-start = <1 2 3>; linux,initrd-end = <7>; }; };",
    ] {
        let bytes = compiled(source);
        assert_eq!(given(&bytes).initrd(), None, "{source}");
        let completed = given(&bytes).completed(Some(initrd));
        assert_eq!(given(&completed).initrd(), Some(initrd), "{source}");
        has_room(&completed);
        let reserved = |blob: &[u8]| blob[word(blob, 16) as usize..][..16].to_vec();
        assert_eq!(reserved(&completed), reserved(&bytes), "{source}");
        let named = |blob: &[u8]| {
            items(blob).iter().filter(|item| matches!(item, Item::Property(name, _) if name.starts_with("linux,initrd"))).count()
        };
        let elsewhere = usize::from(source.contains("/ { a { chosen"));
        assert_eq!(named(&completed), 2 + elsewhere, "{source}");
    }
}

/// The warnings for a board's tree on a changed machine.
fn compared(theirs: &Board, change: impl FnOnce(&mut Board)) -> Result<Vec<String>, String> {
    let tree = given(&dumped(theirs));
    let mut ours = theirs.clone();
    change(&mut ours);
    tree.compare(&ours).map_err(|error| error.to_string())
}

/// The only warning, after the file's name.
fn warning(change: impl FnOnce(&mut Board)) -> String {
    let said = compared(&board(AIA), change).unwrap();
    let [only] = said.as_slice() else { panic!("{said:?}") };
    let (_, rest) = only.split_once("user.dtb ").unwrap();
    rest.to_string()
}

#[test]
fn a_tree_of_the_same_machine_fits() {
    for irqchip in [AIA, PLIC] {
        assert_eq!(compared(&board(irqchip), |_| ()), Ok(vec![]));
    }
}

#[test]
fn memory_that_the_machine_lacks_is_refused_with_both_ranges() {
    let error = compared(&board(AIA), |ours| ours.memory = vec![Region::new(RAM, 256 << 20)]);
    let error = error.unwrap_err();
    assert!(
        error.ends_with(
            "it describes memory at 0x80000000..0xa0000000, but the machine's is \
             0x80000000..0x90000000 (change --mem, or the tree)"
        ),
        "{error}"
    );
}

#[test]
fn less_memory_than_the_machine_has_is_a_warning_with_both_sizes() {
    assert_eq!(
        warning(|ours| ours.memory = vec![Region::new(RAM, 1 << 30)]),
        "describes 512M of memory, but the machine has 1G: the guest does not see the rest"
    );
    let nothing = given(&compiled("/dts-v1/; / { };")).compare(&board(AIA)).unwrap();
    assert!(
        nothing[0].contains("describes no memory, but the machine's is 0x80000000..0xa0000000")
    );
    assert!(
        nothing[1].contains("describes no harts, but the machine has 2 (--cpus)"),
        "{nothing:?}"
    );
    assert_eq!(nothing.len(), 2, "{nothing:?}");
}

#[test]
fn other_harts_than_the_machines_are_a_warning_and_no_boot_hart_is_refused() {
    let cut = |ours: &mut Board| ours.cpus.truncate(1);
    assert_eq!(warning(cut), "describes 2 harts, but the machine has 1 (--cpus)");
    let mut theirs = board(AIA);
    theirs.cpus.remove(0);
    let error = compared(&theirs, |ours| *ours = board(AIA)).unwrap_err();
    assert!(
        error.ends_with("boot hart 0 is not among the 1 that it describes (change the tree)"),
        "{error}"
    );
    theirs = board(AIA);
    theirs.cpus[1].hartid = 7;
    let said = given(&dumped(&theirs)).compare(&board(AIA)).unwrap();
    assert!(said[0].ends_with("describes other harts than 0 to 1, but the machine has 2 (--cpus)"));
}

#[test]
fn extensions_that_the_harts_lack_are_a_warning() {
    let without = |names: &'static [&str]| {
        move |ours: &mut Board| {
            for cpu in &mut ours.cpus {
                cpu.isa.extensions.retain(|name| !names.contains(&name.as_str()));
            }
        }
    };
    let what = "describes extensions that the machine's harts lack: ";
    assert_eq!(warning(without(&["zba", "sstc"])), format!("{what}sstc, zba"));
    let more = |ours: &mut Board| ours.cpus[0].isa.extensions.push("v".into());
    assert_eq!(
        compared(&board(AIA), more),
        Ok(vec![]),
        "what the tree does not name is not missed"
    );
    let most = warning(|ours| ours.cpus.iter_mut().for_each(|cpu| cpu.isa.extensions.clear()));
    assert!(most.starts_with(what) && most.ends_with(" more"), "{most}");
    let older = "/dts-v1/; / { #address-cells = <2>; #size-cells = <2>;
        memory@80000000 { device_type = \"memory\"; reg = <0 0x80000000 0 0x20000000>; };
        cpus { #address-cells = <1>; #size-cells = <0>;
            cpu@0 { device_type = \"cpu\"; reg = <0>; riscv,isa = \"rv64imafdch_zba_zicond\"; };
            cpu@1 { device_type = \"cpu\"; reg = <1>; riscv,isa = \"rv64gc\"; }; }; };";
    let said = given(&compiled(older)).compare(&board(AIA)).unwrap();
    let [only] = said.as_slice() else { panic!("{said:?}") };
    assert!(only.ends_with(&format!("{what}h, zicond")), "{only}");
}

#[test]
fn another_clock_or_interrupt_controller_is_a_warning() {
    assert_eq!(
        warning(|ours| ours.timebase_frequency = 4_000_000),
        "describes a timebase of 10000000 Hz, but the host's is 4000000 Hz: the guest's clock is wrong"
    );
    assert_eq!(
        warning(|ours| ours.irqchip = PLIC),
        "describes an AIA, but the machine has a PLIC (--irqchip): the guest gets no interrupts"
    );
    let said = compared(&board(PLIC), |ours| ours.irqchip = AIA).unwrap();
    assert!(said[0].contains("describes a PLIC, but the machine has an AIA"), "{said:?}");
}

#[test]
fn what_is_disabled_does_not_count_and_cells_of_one_are_read() {
    let source = "/dts-v1/; / { #address-cells = <1>; #size-cells = <1>;
        memory@90000000 { device_type = \"memory\"; reg = <0x90000000 0x1000000 0x88000000 0x100000>; };
        memory@f0000000 { device_type = \"memory\"; status = \"disabled\"; reg = <0xf0000000 0x1000>; };
        cpus { #address-cells = <1>; #size-cells = <0>; timebase-frequency = <0 10000000>;
            cpu@0 { device_type = \"cpu\"; reg = <0>; intc { compatible = \"riscv,cpu-intc\"; }; };
            cpu@1 { device_type = \"cpu\"; reg = <1>; status = \"okay\"; };
            cpu@2 { device_type = \"cpu\"; reg = <2>; status = \"fail\"; }; }; };";
    let tree = given(&compiled(source));
    let ranges = [Region::new(0x8800_0000, 1 << 20), Region::new(0x9000_0000, 16 << 20)];
    assert_eq!(tree.memory(), ranges);
    let said = tree.compare(&board(AIA)).unwrap();
    assert!(said[0].contains("describes 17M of memory, but the machine has 512M"), "{said:?}");
    assert_eq!(said.len(), 1, "the harts are the machine's: {said:?}");
}

#[test]
fn tree_and_initrd_lie_in_the_memory_that_the_tree_names() {
    let folder = Folder::new();
    let kernel = Kernel::open(&folder.write("kernel", &image(MIB2, MIB2, 5000)), 1 << 30).unwrap();
    let path = folder.sparse("initrd", b"x", 3 << 20);
    let initrd = rvmm_boot::Initrd::open(&path).unwrap();
    let ram = [Region::new(RAM, 512 << 20)];
    let named = [Region::new(RAM, 32 << 20), Region::new(RAM + (64 << 20), 4096)];
    let request = Request {
        ram: &ram,
        memory: &named,
        kernel: Some(&kernel),
        initrd: Some(&initrd),
        fdt_len: 9000,
        ..Request::default()
    };
    let placement = place(&request).unwrap();
    for region in [placement.fdt, placement.initrd.unwrap()] {
        assert!(named[0].encloses(region), "{region}");
    }
    let named = [Region::new(RAM, 4 << 20)];
    let error = place(&Request { memory: &named, ..request }).unwrap_err().to_string();
    assert_eq!(
        error,
        "Cannot fit kernel (2M) + initrd (3M) + device tree (9K) into 0x80000000..0x80400000, \
         the memory in the device tree (change its memory nodes)"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_completed_tree_can_be_completed_again(first in any::<(u64, u64)>(), second in any::<(u64, u64)>()) {
        let tree = given(&fdt::build(&board(PLIC)).unwrap());
        let (first, second) = (Region::new(first.0, first.1), Region::new(second.0, second.1));
        let once = given(&tree.completed(Some(first)));
        let (again, direct) = (once.completed(Some(second)), tree.completed(Some(second)));
        prop_assert_eq!(items(&again), items(&direct));
        let end = Region::new(second.base, second.end() - second.base);
        prop_assert_eq!(given(&again).initrd(), Some(end));
    }
}
