//! The device tree, read back by dtc and by the crate's own reader.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod samples;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use proptest::prelude::*;
use rvmm_boot::fdt::blob::{self, Item};
use rvmm_boot::fdt::{
    self, Board, Irqchip, MmuType, Node, PlicContexts, Property, UserTree, Value,
};
use rvmm_boot::{Region, fdt::DeviceNode};
use samples::{AIA, Folder, PLIC, Work, board};

/// Runs dtc on a file and returns its output. A warning fails the test.
fn dtc(file: &Path, from: &str, to: &str) -> Vec<u8> {
    // Text made from a blob has numbers where dtc expects references.
    let checks = if from == "dts" { "-q" } else { "-Wnode_name_vs_property_name" };
    let output = Command::new("dtc").args(["-I", from, "-O", to, checks]).arg(file).output();
    let output = output.expect("dtc is missing: apt-get install -y device-tree-compiler");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "dtc has warnings");
    assert!(output.status.success(), "dtc cannot read {}", file.display());
    output.stdout
}

/// A blob as text.
fn text(blob: &[u8]) -> String {
    let folder = Folder::new();
    let file = folder.write("tree.dtb", blob);
    String::from_utf8(dtc(&file, "dtb", "dts")).unwrap()
}

/// A blob as a list of its items.
fn items(blob: &[u8]) -> Vec<Item<'_>> {
    let mut items = Vec::new();
    blob::walk(blob, |item| items.push(item)).unwrap();
    items
}

/// The value of a property of the node with this path.
fn value<'a>(blob: &'a [u8], path: &str, name: &str) -> Option<&'a [u8]> {
    let mut at: Vec<&str> = Vec::new();
    let mut found = None;
    blob::walk(blob, |item| match item {
        Item::Begin(node) => at.push(node),
        Item::Property(property, value) if property == name && at.join("/") == path => {
            found = Some(value);
        }
        Item::Property(..) => {}
        Item::End => drop(at.pop()),
    })
    .unwrap();
    found
}

/// Opens a tree supplied by the user and returns its blob.
fn open(path: &Path) -> Vec<u8> {
    UserTree::open(path).unwrap().blob().to_vec()
}

/// The cells of a property of the node with this path.
fn cells(blob: &[u8], path: &str, name: &str) -> Vec<u32> {
    let value = value(blob, path, name).unwrap_or_else(|| panic!("{path} has no {name}"));
    value.chunks(4).map(|cell| u32::from_be_bytes(cell.try_into().unwrap())).collect()
}

/// Compares a tree with the text kept for it, both as the same dtc prints them.
fn assert_golden(name: &str, irqchip: Irqchip) {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let got = text(&fdt::build(&board(irqchip)).unwrap());
    let kept = text(&dtc(&golden, "dts", "dtb"));
    assert_eq!(got, kept, "the tree is not the one in {}", golden.display());
}

#[test]
fn a_firmware_that_adds_to_the_tree_where_it_lies_has_room_for_it() {
    let blob = fdt::build(&board(AIA)).unwrap();
    let word = |at: usize| u32::from_be_bytes(blob[at..at + 4].try_into().unwrap()) as usize;
    let (total, strings, strings_len) = (word(4), word(12), word(32));
    assert_eq!(total, blob.len(), "the free space counts");
    assert_eq!(total, strings + strings_len + 8192);
    assert!(blob[strings + strings_len..].iter().all(|byte| *byte == 0));
}

#[test]
fn the_tree_with_an_aia_is_the_one_kept_as_text() {
    assert_golden("aia.dts", AIA);
}

#[test]
fn the_tree_with_a_plic_is_the_one_kept_as_text() {
    assert_golden("plic.dts", PLIC);
}

/// A board of another shape: more harts, more devices, nothing optional.
fn other_board(harts: u32, irqchip: Irqchip) -> Board {
    let mut board = board(irqchip);
    let cpu = board.cpus.remove(0);
    board.cpus = (0..harts).map(|hartid| fdt::Cpu { hartid, ..cpu.clone() }).collect();
    board.memory.push(Region::new(0x1_0000_0000, 4 << 30));
    board.chosen.initrd = None;
    board.chosen.stdout = None;
    board.devices.extend((0..8_u32).map(|i| DeviceNode {
        label: format!("virtio{i}"),
        address: 0x1000_1000 + 0x1000 * u64::from(i),
        size: 0x1000,
        irqs: vec![i + 1],
        node: Node {
            name: "virtio_mmio".into(),
            properties: vec![
                Property::strings("compatible", &["virtio,mmio"]),
                Property::empty("dma-coherent"),
            ],
        },
        companions: vec![],
    }));
    board
}

fn aia_for(hart_index_bits: u32) -> Irqchip {
    let Irqchip::Aia { aplic, sources, imsic_base, num_ids, .. } = AIA else { unreachable!() };
    Irqchip::Aia { aplic, sources, imsic_base, num_ids, guest_index_bits: 1, hart_index_bits }
}

#[test]
fn dtc_finds_no_warning_in_boards_of_any_shape() {
    let registers = Region::new(0x0c00_0000, 0x60_0000);
    let plic = Irqchip::Plic { registers, sources: 95, contexts: PlicContexts::Supervisor };
    for harts in [1, 2, 4, 8, 33, 100] {
        text(&fdt::build(&other_board(harts, aia_for(7))).unwrap());
        text(&fdt::build(&other_board(harts, plic)).unwrap());
        text(&fdt::build(&other_board(harts, PLIC)).unwrap());
    }
}

#[test]
fn a_tree_that_went_through_dtc_as_text_is_still_the_same() {
    for board in [board(AIA), other_board(8, aia_for(3)), other_board(3, PLIC)] {
        let blob = fdt::build(&board).unwrap();
        let folder = Folder::new();
        let file = folder.write("tree.dts", text(&blob).as_bytes());
        let again = dtc(&file, "dts", "dtb");
        assert_eq!(items(&blob), items(&again));
        assert_eq!(open(&folder.write("tree.dtb", &again)), again);
    }
}

#[test]
fn the_length_does_not_depend_on_addresses_and_seeds() {
    let mut board = board(AIA);
    let len = fdt::build(&board).unwrap().len();
    board.chosen.initrd = Some(Region::new(u64::MAX, 0));
    board.chosen.rng_seed = [0xff; 64];
    board.chosen.kaslr_seed = u64::MAX;
    assert_eq!(fdt::build(&board).unwrap().len(), len);
}

#[test]
fn the_same_board_gives_the_same_bytes() {
    assert_eq!(fdt::build(&board(PLIC)).unwrap(), fdt::build(&board(PLIC)).unwrap());
}

#[test]
fn every_hart_has_its_msi_page_and_its_contexts() {
    let blob = fdt::build(&other_board(3, aia_for(2))).unwrap();
    let imsics = "/soc/interrupt-controller@28000000";
    assert_eq!(cells(&blob, imsics, "interrupts-extended"), [2, 9, 4, 9, 6, 9]);
    assert_eq!(cells(&blob, imsics, "reg"), [0, 0x2800_0000, 0, 0x6000], "two pages a hart");
    assert_eq!(cells(&blob, imsics, "riscv,guest-index-bits"), [1]);
    let blob = fdt::build(&other_board(2, PLIC)).unwrap();
    let plic = "/soc/interrupt-controller@c000000";
    assert_eq!(cells(&blob, plic, "interrupts-extended"), [2, 11, 2, 9, 4, 11, 4, 9]);
}

#[test]
fn optional_facts_are_left_out_when_there_are_none() {
    let mut board = other_board(1, PLIC);
    board.cpus[0].cbom_block_size = None;
    board.cpus[0].cbop_block_size = Some(32);
    board.cpus[0].mmu = MmuType::None;
    board.hypervisor = None;
    let blob = fdt::build(&board).unwrap();
    assert_eq!(value(&blob, "/cpus/cpu@0", "riscv,cbom-block-size"), None);
    assert_eq!(cells(&blob, "/cpus/cpu@0", "riscv,cbop-block-size"), [32]);
    assert_eq!(value(&blob, "/cpus/cpu@0", "mmu-type"), Some(&b"riscv,none\0"[..]));
    assert_eq!(value(&blob, "/chosen", "linux,initrd-start"), None);
    assert_eq!(value(&blob, "/chosen", "stdout-path"), None);
    assert_eq!(value(&blob, "/aliases", "serial0"), None);
    assert_eq!(value(&blob, "/hypervisor", "compatible"), None);
}

#[test]
fn a_device_can_refer_to_others_by_label() {
    let mut board = board(AIA);
    let properties = &mut board.devices[2].node.properties;
    for (name, label) in [("a-peer", "power"), ("msi-parent", "msi"), ("a-chip", "irqchip")] {
        properties.push(Property::new(name, Value::Phandle(label.into())));
    }
    let blob = fdt::build(&board).unwrap();
    let (serial, soc) = ("/soc/serial@10000000", "/soc/interrupt-controller@");
    let phandle = |path: &str| cells(&blob, path, "phandle");
    assert_eq!(cells(&blob, serial, "a-peer"), phandle("/soc/test@100000"));
    assert_eq!(cells(&blob, serial, "msi-parent"), phandle(&format!("{soc}28000000")));
    assert_eq!(cells(&blob, serial, "a-chip"), phandle(&format!("{soc}d000000")));
    assert_eq!(cells(&blob, "/reboot", "regmap"), phandle("/soc/test@100000"));
    assert_eq!(value(&blob, "/soc/rtc@101000", "phandle"), None, "nothing refers to the clock");
}

/// The error of building a board after `change`.
fn fault(irqchip: Irqchip, change: impl FnOnce(&mut Board)) -> String {
    let mut board = board(irqchip);
    change(&mut board);
    let error = fdt::build(&board).unwrap_err().to_string();
    assert!(!error.contains('\n'));
    error
}

#[test]
fn an_invalid_board_is_refused_by_name() {
    let cannot = "Cannot describe the board: ";
    assert_eq!(fault(AIA, |b| b.cpus.clear()), format!("{cannot}it has no hart or no memory"));
    assert_eq!(
        fault(AIA, |b| b.devices[1].label = "serial0".into()),
        format!("{cannot}the label \"serial0\" is taken")
    );
    assert_eq!(
        fault(PLIC, |b| b.devices[1].label = "irqchip".into()),
        format!("{cannot}the label \"irqchip\" is taken")
    );
    assert_eq!(
        fault(PLIC, |b| b.chosen.stdout = Some("hvc0".into())),
        format!("{cannot}there is no device \"hvc0\"")
    );
    assert_eq!(
        fault(PLIC, |b| {
            let msi = Property::new("msi-parent", Value::Phandle("msi".into()));
            b.devices[1].node.properties.push(msi);
        }),
        format!("{cannot}there is no device \"msi\"")
    );
    assert_eq!(
        fault(PLIC, |b| b.devices[1].irqs = vec![96]),
        format!("{cannot}\"rtc\" has interrupt 96, but the sources are 1 to 95")
    );
    assert_eq!(
        fault(AIA, |b| b.cpus.push(b.cpus[0].clone())),
        format!("{cannot}there are two nodes /cpus/cpu@0")
    );
    assert_eq!(
        fault(AIA, |b| b.devices[1].node.properties.push(Property::empty("reg"))),
        format!("{cannot}there are two properties /soc/rtc@101000/reg")
    );
    let third = |b: &mut Board| b.cpus.push(fdt::Cpu { hartid: 2, ..b.cpus[0].clone() });
    assert!(fault(AIA, third).contains("1 hart index bits"), "three harts in one bit");
}

#[test]
fn an_invalid_name_is_refused_with_its_path() {
    let odd = |b: &mut Board| b.devices[1].node.properties.push(Property::empty("odd name"));
    assert_eq!(fault(AIA, odd), "Cannot write the device tree at /soc/rtc@101000/odd name");
    let nul = |b: &mut Board| b.chosen.bootargs = "a\0b".into();
    assert_eq!(fault(AIA, nul), "Cannot write the device tree at /chosen/bootargs");
}

/// The error of opening a blob as a tree supplied by the user.
fn refusal(bytes: &[u8]) -> String {
    let folder = Folder::new();
    let path = folder.write("user.dtb", bytes);
    let work = Work::begin();
    let error = UserTree::open(&path).unwrap_err().to_string();
    assert!(work.is_little(), "{work:?}");
    let rest = error.strip_prefix(&format!("Cannot use {} as a device tree: ", path.display()));
    rest.unwrap_or_else(|| panic!("{error}")).to_string()
}

/// A valid blob with one field of its header replaced.
fn with_header(at: usize, value: u32) -> Vec<u8> {
    let mut blob = fdt::build(&board(PLIC)).unwrap();
    blob[at..at + 4].copy_from_slice(&value.to_be_bytes());
    blob
}

/// A blob whose structure block is `structure` and whose strings block is `strings`.
fn raw(structure: &[u8], strings: &[u8]) -> Vec<u8> {
    let number = |n: usize| u32::try_from(n).unwrap().to_be_bytes();
    let (at, end) = (56, 56 + structure.len());
    let header =
        [0xd00d_feed, end + strings.len(), at, end, 40, 17, 16, 0, strings.len(), structure.len()];
    let mut blob: Vec<u8> = header.into_iter().flat_map(number).collect();
    blob.resize(at, 0);
    blob.extend(structure);
    blob.extend(strings);
    blob
}

/// Tokens of a structure block.
fn tokens(cells: &[u32]) -> Vec<u8> {
    cells.iter().flat_map(|cell| cell.to_be_bytes()).collect()
}

#[test]
fn a_users_tree_is_taken_verbatim() {
    let folder = Folder::new();
    let blob = fdt::build(&board(AIA)).unwrap();
    assert_eq!(open(&folder.write("a.dtb", &blob)), blob);
    let empty = raw(&tokens(&[1, 0, 2, 9]), &[]);
    assert_eq!(open(&folder.write("b.dtb", &empty)), empty, "no memory, no chosen");
    let padded = [empty.as_slice(), &[0; 100]].concat();
    assert_eq!(open(&folder.write("c.dtb", &padded)), empty, "data after the end is ignored");
}

#[test]
fn a_file_that_is_no_tree_is_refused() {
    let again = "(build it again with dtc)";
    assert_eq!(refusal(b""), "it is empty (give a file with contents)");
    assert_eq!(
        refusal(b"MZ"),
        format!("there is no magic number of a device tree blob at offset 0x0 {again}")
    );
    assert_eq!(
        refusal(&with_header(0, 0)[..20]),
        format!("there is no magic number of a device tree blob at offset 0x0 {again}")
    );
    assert_eq!(
        refusal(&with_header(0, 0xd00d_feed)[..20]),
        format!("the header is cut short at offset 0x14 {again}")
    );
    assert!(refusal(b"/dts-v1/;\n/ {};").starts_with("it is device tree source (compile it first"));
    let folder = Folder::new();
    let large = folder.sparse("large.dtb", &with_header(0, 0xd00d_feed), 100 << 30);
    let error = UserTree::open(&large).unwrap_err().to_string();
    assert!(error.ends_with("it is larger than 2M (give a .dtb file)"), "{error}");
    let error = UserTree::open(&folder.path("")).unwrap_err().to_string();
    assert!(error.ends_with("as a device tree: it is a folder (give a regular file)"), "{error}");
}

#[test]
fn a_header_that_lies_is_refused() {
    for total in [0, 39, 1 << 20, u32::MAX] {
        assert!(
            refusal(&with_header(4, total)).starts_with("the total size does not fit the file")
        );
    }
    for at in [8, 36] {
        assert!(
            refusal(&with_header(at, u32::MAX)).starts_with("the structure block is not inside")
        );
    }
    assert!(refusal(&with_header(8, 57)).starts_with("the structure block is not inside"), "odd");
    for at in [12, 32] {
        assert!(refusal(&with_header(at, u32::MAX)).starts_with("the strings block is not inside"));
    }
    assert!(refusal(&with_header(16, u32::MAX)).starts_with("the memory reservations are not"));
    assert!(refusal(&with_header(20, 16)).starts_with("the format version is not 17"));
    assert!(refusal(&with_header(24, 18)).starts_with("the format version is not 17"));
    let mut endless = raw(&tokens(&[1, 0, 2, 9]), &[]);
    endless[40..56].fill(0xff);
    assert!(refusal(&endless).starts_with("the list of memory reservations has no end"));
}

#[test]
fn a_structure_that_lies_is_refused() {
    let faulty = |cells: &[u32], strings: &[u8]| refusal(&raw(&tokens(cells), strings));
    assert!(faulty(&[], &[]).starts_with("the structure block is cut short"));
    assert!(faulty(&[1, 0, 2], &[]).starts_with("the structure block is cut short"));
    assert!(faulty(&[1, 0, 9], &[]).starts_with("there is an invalid token"));
    assert!(faulty(&[1, 0, 5], &[]).starts_with("there is an invalid token"));
    assert!(faulty(&[2], &[]).starts_with("there is a node end without a beginning"));
    assert!(faulty(&[1, 0, 2, 1, 0, 2, 9], &[]).starts_with("the root node is not followed"));
    assert!(faulty(&[3, 0, 0], b"a\0").starts_with("there is a property outside of all nodes"));
    assert!(faulty(&[1, 0, 3, 0, 0], b"a").starts_with("a property's name is not"), "no NUL");
    assert!(faulty(&[1, 0, 3, 0, 9], b"a\0").starts_with("a property's name is not"), "outside");
    assert!(faulty(&[1, 0, 3, 0, 1], b"a\0").starts_with("a property's name is not"), "empty");
    assert!(faulty(&[1, 0, 3, 0, 0], b"\xff\0").starts_with("a property's name is not"), "no text");
    let long = [b'a'; 300];
    assert!(faulty(&[1, 0, 3, 0, 0], &long).starts_with("a property's name is not"), "too long");
    let huge = [1, 0, 3, u32::MAX, 0, 2, 9];
    assert!(faulty(&huge, b"a\0").starts_with("the structure block is cut short"), "huge property");
    assert!(faulty(&[1, 0x6161_6161, 0x6161_6161], &[]).starts_with("the structure block is cut"));
    assert!(faulty(&[1, 0x61ff_6100, 2, 9], &[]).starts_with("a node's name is not UTF-8"));
}

#[test]
fn nodes_may_be_nested_64_deep_and_not_deeper() {
    let nested = |depth: usize| {
        let mut cells = [1, 0].repeat(depth);
        cells.extend(vec![2; depth]);
        cells.push(9);
        raw(&tokens(&cells), &[])
    };
    let folder = Folder::new();
    assert!(UserTree::open(&folder.write("64.dtb", &nested(64))).is_ok());
    assert!(refusal(&nested(65)).starts_with("nodes are nested deeper than 64 at offset"));
    assert!(refusal(&nested(10_000)).starts_with("nodes are nested deeper than 64 at offset"));
}

#[test]
fn the_slowest_tree_is_checked_within_a_second() {
    // As many properties as fit, each with a name of the maximum length.
    let mut strings = vec![b'a'; 255];
    strings.push(0);
    let mut cells = vec![1, 0];
    cells.extend([3, 0, 0].repeat(170_000));
    cells.extend([2, 9]);
    let folder = Folder::new();
    let path = folder.write("slow.dtb", &raw(&tokens(&cells), &strings));
    let work = Work::begin();
    assert!(UserTree::open(&path).is_ok());
    assert!(work.is_little(), "{work:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_mutated_tree_is_read_or_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        len in any::<prop::sample::Index>(),
        cut in any::<bool>(),
    ) {
        static BLOB: LazyLock<Vec<u8>> = LazyLock::new(|| fdt::build(&board(AIA)).unwrap());
        let mut blob = BLOB.clone();
        for (at, value) in changes {
            let at = at.index(blob.len());
            blob[at] = value;
        }
        if cut {
            blob.truncate(len.index(blob.len()));
        }
        let mut depth = 0_i32;
        let result = blob::walk(&blob, |item| match item {
            Item::Begin(_) => depth += 1,
            Item::End => depth -= 1,
            Item::Property(..) => assert!(depth > 0),
        });
        prop_assert!(result.is_err() || depth == 0);
    }

    #[test]
    fn any_bytes_are_read_or_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = blob::check(&bytes);
        for (at, byte) in 0xd00d_feed_u32.to_be_bytes().into_iter().enumerate() {
            if let Some(to) = bytes.get_mut(at) {
                *to = byte;
            }
        }
        let _ = blob::check(&bytes);
    }

    #[test]
    fn what_was_built_is_read_back(
        harts in 1_u32..9,
        irqs in prop::collection::vec(1_u32..96, 0..4),
        name in "[a-z][a-z0-9,._+-]{0,20}",
        words in prop::collection::vec(any::<u32>(), 0..9),
        strings in prop::collection::vec("[ -~]{0,20}", 1..4),
    ) {
        let mut board = other_board(harts, aia_for(3));
        let device = &mut board.devices[1];
        device.irqs.clone_from(&irqs);
        let properties = &mut device.node.properties;
        properties.push(Property::new("some-cells", Value::U32(words.clone())));
        properties.push(Property::new("some-strings", Value::Strings(strings.clone())));
        device.node.name.clone_from(&name);
        let blob = fdt::build(&board).unwrap();
        prop_assert_eq!(blob::check(&blob), Ok(blob.len()));
        let path = format!("/soc/{name}@101000");
        prop_assert_eq!(cells(&blob, &path, "some-cells"), words);
        let joined: String = strings.iter().map(|string| format!("{string}\0")).collect();
        prop_assert_eq!(value(&blob, &path, "some-strings"), Some(joined.as_bytes()));
        if !irqs.is_empty() {
            let cells = cells(&blob, &path, "interrupts");
            let sources: Vec<u32> = cells.chunks(2).map(|pair| pair[0]).collect();
            prop_assert_eq!(sources, irqs);
            prop_assert!(cells.chunks(2).all(|pair| pair[1] == 4));
        }
        let harts_in_tree = items(&blob).into_iter().filter(
            |item| matches!(item, Item::Begin(name) if name.starts_with("cpu@")));
        prop_assert_eq!(harts_in_tree.count(), harts as usize);
    }
}
