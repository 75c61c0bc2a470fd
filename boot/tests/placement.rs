//! The layout of guest memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod samples;

use proptest::prelude::*;
use rvmm_boot::{BootError, Initrd, Kernel, Load, Placement, Region, Request, Source, place};
use samples::{Folder, MIB2, RAM, elf, image, u_boot};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Files for a request, without contents if those are irrelevant.
struct Parts {
    folder: Folder,
    ram: Vec<Region>,
    kernel: Option<Kernel>,
    loads: Vec<Load>,
    entry: Option<u64>,
    initrd: Option<Initrd>,
    fdt_len: u64,
    fdt_at: Option<u64>,
}

impl Parts {
    /// A guest with this much memory in one range, and no files.
    fn new(mem: u64) -> Self {
        let ram = vec![Region::new(RAM, mem)];
        let folder = Folder::new();
        Self {
            folder,
            ram,
            kernel: None,
            loads: vec![],
            entry: None,
            initrd: None,
            fdt_len: 8000,
            fdt_at: None,
        }
    }

    fn kernel(mut self, bytes: &[u8]) -> Self {
        let path = self.folder.write("kernel", bytes);
        self.kernel = Some(Kernel::open(&path, u64::MAX).unwrap());
        self
    }

    /// An `Image` whose file has `len` bytes and whose memory `size`.
    fn image(mut self, len: u64, size: u64) -> Self {
        let path = self.folder.sparse("kernel", &image(MIB2, size, 0), len.max(64));
        self.kernel = Some(Kernel::open(&path, u64::MAX).unwrap());
        self
    }

    fn initrd(mut self, len: u64) -> Self {
        let path = self.folder.sparse("initrd", b"x", len.max(1));
        self.initrd = Some(Initrd::open(&path).unwrap());
        self
    }

    fn load(mut self, name: &str, address: u64, len: usize) -> Self {
        let source = Source::Bytes(vec![0x13; len]);
        self.loads.push(Load { name: name.into(), address, source });
        self
    }

    fn mem(mut self, mem: u64) -> Self {
        self.ram = vec![Region::new(RAM, mem)];
        self
    }

    fn place(&self) -> Result<Placement<'_>, BootError> {
        place(&Request {
            ram: &self.ram,
            kernel: self.kernel.as_ref(),
            loads: &self.loads,
            entry: self.entry,
            initrd: self.initrd.as_ref(),
            fdt_len: self.fdt_len,
            fdt_at: self.fdt_at,
            ..Request::default()
        })
    }

    /// The error of the placement, without the folder's name.
    fn refusal(&self) -> String {
        let folder = format!("{}", self.folder.path("").display());
        let error = self.place().unwrap_err().to_string();
        assert!(!error.contains('\n'));
        error.replace(&folder, "")
    }
}

#[test]
fn an_image_goes_to_its_offset_and_the_rest_to_the_top() {
    let parts = Parts::new(512 * MIB).image(10 * MIB, 11 * MIB).initrd(3 * MIB + 5);
    let placement = parts.place().unwrap();
    assert_eq!(placement.entry, RAM + MIB2);
    assert_eq!(placement.kernel, Some(Region::new(RAM + MIB2, 11 * MIB)));
    assert_eq!(placement.fdt, Region::new(RAM + 510 * MIB, 8000));
    assert_eq!(placement.initrd, Some(Region::new(RAM + 506 * MIB, 3 * MIB + 5)));
    let blobs: Vec<(u64, u64, u64)> =
        placement.blobs.iter().map(|b| (b.address, b.source.len(), b.mem_len)).collect();
    let initrd = (RAM + 506 * MIB, 3 * MIB + 5, 3 * MIB + 5);
    assert_eq!(blobs, [(RAM + MIB2, 10 * MIB, 11 * MIB), initrd]);
}

#[test]
fn everything_stays_in_the_first_gib_if_there_is_room() {
    let parts = Parts::new(8 * GIB).image(10 * MIB, 11 * MIB).initrd(100 * MIB);
    let placement = parts.place().unwrap();
    assert_eq!(placement.fdt.base, RAM + GIB - MIB2);
    assert_eq!(placement.initrd.unwrap().base, RAM + GIB - MIB2 - 100 * MIB);
    let parts = parts.initrd(2 * GIB);
    let initrd = parts.place().unwrap().initrd.unwrap();
    assert_eq!(initrd, Region::new(RAM + 6 * GIB - MIB2, 2 * GIB), "this one has no room there");
}

#[test]
fn memory_in_two_pieces_is_used() {
    let mut parts = Parts::new(16 * MIB).image(10 * MIB, 11 * MIB).initrd(100 * MIB);
    parts.ram.push(Region::new(RAM + GIB, 256 * MIB));
    let placement = parts.place().unwrap();
    assert_eq!(placement.initrd.unwrap().base, RAM + GIB + 154 * MIB);
    assert_eq!(placement.fdt.base, RAM + GIB + 254 * MIB);
}

#[test]
fn the_pieces_of_an_initrd_follow_each_other() {
    let mut parts = Parts::new(64 * MIB).image(MIB, MIB);
    let pieces = [5000, 1, 3].map(|len| Source::Bytes(vec![7; len]));
    parts.initrd = Some(Initrd::from_sources("built-in", pieces.to_vec()));
    let placement = parts.place().unwrap();
    let start = placement.initrd.unwrap().base;
    let at: Vec<u64> = placement.blobs.iter().skip(1).map(|blob| blob.address).collect();
    assert_eq!(at, [start, start + 5000, start + 5001]);
    assert_eq!(placement.initrd.unwrap().size, 5004);
}

#[test]
fn a_boot_loader_at_ram_plus_2_mib_is_placed() {
    let parts = Parts::new(128 * MIB).kernel(&u_boot()).initrd(MIB);
    let placement = parts.place().unwrap();
    assert_eq!(placement.entry, RAM + MIB2);
    assert_eq!(placement.kernel, Some(Region::new(RAM + MIB2, 0x5000)));
    assert_eq!(placement.fdt.base, RAM + 126 * MIB);
}

#[test]
fn flat_files_go_where_they_were_told_to() {
    let mut parts = Parts::new(64 * MIB).load("os.bin", RAM, 5000).load("fs.img", RAM + MIB, 999);
    let placement = parts.place().unwrap();
    assert_eq!((placement.entry, placement.kernel), (RAM, None), "the first one is started");
    let names: Vec<&str> = placement.blobs.iter().map(|blob| blob.name.as_str()).collect();
    assert_eq!(names, ["os.bin", "fs.img"]);
    parts.entry = Some(RAM + 0x40);
    assert_eq!(parts.place().unwrap().entry, RAM + 0x40);
}

#[test]
fn flat_files_beside_a_kernel_are_placed_around() {
    let top = RAM + 62 * MIB;
    let parts = Parts::new(64 * MIB).image(MIB, MIB).load("top.bin", top, 2 << 20).initrd(MIB);
    let placement = parts.place().unwrap();
    assert_eq!(placement.entry, RAM + MIB2);
    assert_eq!(placement.fdt.base, RAM + 60 * MIB);
    assert_eq!(placement.initrd.unwrap().base, RAM + 58 * MIB);
}

#[test]
fn pieces_that_collide_are_named_both() {
    let parts = Parts::new(64 * MIB).image(4 * MIB, 6 * MIB).load("a.bin", RAM + 7 * MIB, 9);
    assert_eq!(
        parts.refusal(),
        "Cannot load kernel at 0x80200000..0x80800000 and a.bin at 0x80700000..0x80700009: \
         they overlap (move one)",
        "in the kernel's BSS"
    );
    let parts = Parts::new(64 * MIB).load("b", RAM + 4, 2).load("a", RAM, 5);
    assert!(parts.refusal().starts_with("Cannot load a at 0x80000000..0x80000005 and b at"));
    let parts = Parts::new(64 * MIB).kernel(&u_boot()).load("fw", RAM, 3 << 20);
    assert!(parts.refusal().starts_with("Cannot load fw at 0x80000000..0x80300000 and kernel at"));
}

#[test]
fn pieces_outside_of_memory_are_refused() {
    let parts = |address: u64| Parts::new(64 * MIB).image(MIB, MIB).load("a.bin", address, 10);
    assert_eq!(
        parts(0x1000).refusal(),
        "Cannot load a.bin at 0x1000..0x100a: guest memory is 0x80000000..0x84000000 \
         (choose an address inside it)",
        "more memory would not help"
    );
    let advice = "(choose an address inside it, or give --mem 68M)";
    assert!(
        parts(RAM + 64 * MIB).refusal().ends_with(advice),
        "{}",
        parts(RAM + 64 * MIB).refusal()
    );
    assert!(parts(RAM + 64 * MIB).mem(68 * MIB).place().is_ok());
    for address in [RAM + 64 * MIB, u64::MAX, u64::MAX - 5, 0, RAM - 5] {
        assert!(parts(address).refusal().starts_with("Cannot load a.bin at"), "{address:#x}");
    }
    let user_program = elf(0x1_0000, &[samples::Load(0x1_0000, 0x1000, 9, 9)], 0x2000);
    let refusal = Parts::new(64 * MIB).kernel(&user_program).refusal();
    assert!(refusal.starts_with("Cannot load kernel at 0x10000..0x10009: guest memory is"));
}

/// The memory size in an error.
fn needed(error: &BootError) -> u64 {
    let BootError::TooLittleMemory { needed, .. } = error else { panic!("{error}") };
    *needed
}

#[test]
fn too_little_memory_is_refused_with_a_figure_that_works() {
    let parts = Parts::new(32 * MIB).image(10 * MIB, 11 * MIB).initrd(30 * MIB + 1);
    assert_eq!(
        parts.refusal(),
        "Cannot fit kernel (11M) + initrd (30721K) + device tree (8K) into 32M of guest memory \
         (give at least --mem 46M)"
    );
    assert!(parts.mem(46 * MIB).place().is_ok());
    for mem in [0, MIB, 2 * MIB, 3 * MIB, 12 * MIB] {
        let parts = Parts::new(mem).image(10 * MIB, 11 * MIB);
        assert_eq!(needed(&parts.place().unwrap_err()), 16 * MIB, "{mem}");
        assert!(parts.mem(16 * MIB).place().is_ok());
    }
}

#[test]
fn a_kernel_or_an_initrd_of_absurd_size_is_refused_with_its_figure() {
    let parts = Parts::new(512 * MIB).image(100 * GIB, 11 * MIB);
    assert!(parts.refusal().starts_with("Cannot fit kernel (100G) + device tree (8K) into 512M"));
    let parts = Parts::new(512 * MIB).image(MIB, (1 << 40) - 1);
    assert!(parts.refusal().contains("give at least --mem 1048580M"), "{}", parts.refusal());
    let mut parts = Parts::new(512 * MIB).image(MIB, MIB);
    // Longer than any file, and than the address space.
    let file = std::fs::File::open(parts.folder.path("kernel")).unwrap();
    let huge = Source::File { file: file.into(), offset: 0, len: u64::MAX };
    parts.initrd = Some(Initrd::from_sources("huge", vec![huge.clone(), huge]));
    assert!(parts.refusal().starts_with("Cannot fit kernel (1M) + initrd ("));
}

#[test]
fn an_entry_where_nothing_is_loaded_is_refused() {
    let mut parts = Parts::new(64 * MIB).image(MIB, 3 * MIB);
    for entry in [0, RAM, RAM + 4 * MIB, RAM + 64 * MIB, u64::MAX] {
        parts.entry = Some(entry);
        assert_eq!(
            parts.refusal(),
            format!(
                "Cannot start the guest at {entry:#x}: nothing is loaded there \
                 (give --entry an address inside a loaded file, or a flash with mode=map)"
            )
        );
    }
    parts.entry = Some(RAM + MIB2 + 1);
    assert_eq!(
        parts.refusal(),
        "Cannot start the guest at 0x80200001: instructions have even addresses (give --entry one)"
    );
}

#[test]
fn the_users_entry_takes_precedence_over_that_of_the_file() {
    let at = RAM + MIB2;
    let zeros_first =
        [samples::Load(RAM, 0x1000, 0, 0x800), samples::Load(at, 0x1000, 0x800, 0x800)];
    let mut parts = Parts::new(64 * MIB).kernel(&elf(0, &zeros_first, 0x2000));
    assert_eq!(
        parts.refusal(),
        "Cannot start the guest at 0x0: the ELF file has nothing there, and nothing at its lowest \
         address either (give --entry an address inside a loaded file)"
    );
    for entry in [at, at + 4] {
        parts.entry = Some(entry);
        assert_eq!(parts.place().unwrap().entry, entry);
    }
    parts = parts.kernel(&u_boot());
    assert_eq!(parts.place().unwrap().entry, at + 4);
}

#[test]
fn a_guest_may_start_in_flash_and_needs_no_file_then() {
    let parts = Parts::new(64 * MIB);
    let roms = [Region::new(0x2000_0000, 32 * MIB)];
    let request = Request { ram: &parts.ram, roms: &roms, fdt_len: 8000, ..Request::default() };
    let placed = |entry| place(&Request { entry: Some(entry), ..request });
    for entry in [0x2000_0000, 0x2000_0000 + 32 * MIB - 2] {
        let placement = placed(entry).unwrap();
        assert_eq!((placement.entry, placement.blobs.len()), (entry, 0));
        assert_eq!(placement.fdt.base, RAM + 62 * MIB);
    }
    for entry in [0x2000_0000 - 2, 0x2000_0000 + 32 * MIB, RAM] {
        assert!(matches!(placed(entry), Err(BootError::Entry { .. })), "{entry:#x}");
    }
    assert!(placed(0x2000_0001).unwrap_err().to_string().contains("even addresses"));
    assert!(matches!(place(&request), Err(BootError::Layout(_))), "nowhere to start");
}

#[test]
fn a_request_against_the_rules_is_refused() {
    let refusal = |change: fn(&mut Parts)| {
        let mut parts = Parts::new(64 * MIB).image(MIB, MIB);
        change(&mut parts);
        assert!(matches!(parts.place(), Err(BootError::Layout(_))));
    };
    refusal(|parts| parts.ram.clear());
    refusal(|parts| parts.ram[0].base += 4096);
    refusal(|parts| parts.ram[0].size += 1);
    refusal(|parts| parts.ram[0].size = u64::MAX - 0xfff);
    refusal(|parts| parts.ram.push(Region::new(RAM + MIB, MIB)));
    refusal(|parts| parts.fdt_len = 0);
    refusal(|parts| parts.fdt_len = MIB2 + 1);
    refusal(|parts| parts.kernel = None);
}

/// Checks the guarantees of [`Placement`].
fn assert_sound(parts: &Parts, placement: &Placement<'_>) -> Result<(), TestCaseError> {
    let mut regions: Vec<Region> = placement.blobs.iter().map(|blob| blob.region()).collect();
    regions.push(placement.fdt);
    for (index, region) in regions.iter().enumerate() {
        prop_assert!(parts.ram.iter().any(|ram| ram.encloses(*region)), "{region} is not in RAM");
        let clash = regions.iter().skip(index + 1).find(|other| other.overlaps(*region));
        prop_assert!(clash.is_none(), "{region} and {clash:?} overlap");
    }
    for blob in &placement.blobs {
        prop_assert!(blob.source.len() <= blob.mem_len);
    }
    let mapped = placement.fdt.base / MIB2 * MIB2 + 2 * MIB2;
    prop_assert!(placement.fdt.end() <= mapped, "Linux maps 4 MiB");
    prop_assert_eq!(placement.fdt.base % 4096, 0);
    prop_assert_eq!(placement.initrd.map_or(0, |initrd| initrd.base) % 4096, 0);
    prop_assert!(placement.blobs.iter().any(|blob| blob.region().contains(placement.entry)));
    if let (Some(kernel), Some(initrd)) = (placement.kernel, placement.initrd) {
        prop_assert!(!kernel.overlaps(initrd) && !kernel.overlaps(placement.fdt));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn nothing_overlaps_and_the_figure_for_too_little_memory_works(
        mem in 0_u64..80 * MIB,
        kernel in (0_u64..40 * MIB, 0_u64..40 * MIB),
        initrd in prop::option::of(1_u64..40 * MIB),
        fdt_len in 1_u64..=MIB2,
    ) {
        let mut parts = Parts::new(mem / 4096 * 4096).image(kernel.0, kernel.1);
        parts.fdt_len = fdt_len;
        parts.fdt_at = None;
        if let Some(len) = initrd {
            parts = parts.initrd(len);
        }
        let figure = match parts.place() {
            Ok(placement) => return assert_sound(&parts, &placement),
            Err(error) => needed(&error),
        };
        prop_assert!(figure > mem);
        parts = parts.mem(figure);
        assert_sound(&parts, &parts.place().unwrap())?;
        prop_assert_eq!(figure % MIB2, 0);
        parts = parts.mem(figure - MIB2);
        prop_assert_eq!(needed(&parts.place().unwrap_err()), figure, "and no smaller one does");
    }

    #[test]
    fn the_proposed_memory_size_is_sufficient_for_any_addresses(
        mem in 4_u64..40,
        load in (0_u64..80 * MIB, 1_usize..3_000_000),
        tree in prop::option::of(0_u64..80 * MIB),
        initrd in 1_u64..40 * MIB,
    ) {
        let mut parts = Parts::new(mem * MIB).initrd(initrd).load("a", RAM + load.0 / 2 * 2, load.1);
        parts.fdt_at = tree.map(|offset| RAM + offset / 8 * 8);
        let more = match parts.place() {
            Err(BootError::TooLittleMemory { needed, .. }) => needed,
            Err(BootError::OutsideRam { more, .. }) => more.expect("all pieces are above the start of RAM"),
            _ => return Ok(()),
        };
        prop_assert!(more > mem * MIB && more % MIB2 == 0);
        // More memory does not help against overlapping fixed addresses.
        match parts.mem(more).place() {
            Ok(_) | Err(BootError::Overlap { .. }) => {}
            Err(error) => prop_assert!(false, "{error}"),
        }
    }

    #[test]
    fn nothing_overlaps_around_flat_files_and_holes(
        mem in (0_u64..40, 0_u64..40, 0_u64..40),
        loads in prop::collection::vec((0_u64..80 * MIB, 1_usize..100_000), 1..6),
        initrd in 1_u64..40 * MIB,
        fdt_len in 1_u64..=MIB2,
    ) {
        let mut parts = Parts::new(mem.0 * MIB).initrd(initrd);
        parts.ram.push(Region::new(RAM + (mem.0 + mem.1) * MIB, mem.2 * MIB));
        parts.fdt_len = fdt_len;
        for (index, (offset, len)) in loads.iter().enumerate() {
            parts = parts.load(&format!("load{index}"), RAM + offset, *len);
        }
        parts.entry = Some((RAM + loads[0].0) & !1).filter(|entry| *entry >= RAM + loads[0].0);
        match parts.place() {
            Ok(placement) => assert_sound(&parts, &placement)?,
            Err(error) => prop_assert!(!error.to_string().contains('\n')),
        }
    }
}

#[test]
fn a_device_tree_at_a_users_address_overlaps_nothing() {
    let mut parts = Parts::new(128 * MIB).image(6 * MIB, 6 * MIB).initrd(MIB2);
    parts.fdt_at = Some(RAM + 126 * MIB + 8);
    let placement = parts.place().unwrap();
    assert_eq!(placement.fdt, Region::new(RAM + 126 * MIB + 8, 8000));
    let initrd = placement.initrd.unwrap();
    assert!(!initrd.overlaps(placement.fdt), "{initrd}");
    for (at, words) in [
        (RAM + 4 * MIB, "device tree"),
        (RAM + 128 * MIB - 8, "device tree"),
        (8, "device tree"),
        (RAM + 100 * MIB + 4, "multiple of 8"),
    ] {
        parts.fdt_at = Some(at);
        assert!(parts.refusal().contains(words), "{at:#x}: {}", parts.refusal());
    }
}
