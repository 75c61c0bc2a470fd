//! The PLIC compared with its specification and with a simple model.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::sync::Arc;

use proptest::prelude::*;
use rvmm_devices::testing::TestIrq;
use rvmm_devices::{AccessError, FdtValue, IrqLine, Lifecycle, MmioDevice, Plic, PlicError};

const SOURCES: u32 = 70;

fn priority(source: u32) -> u64 {
    u64::from(source) * 4
}

fn pending(word: u64) -> u64 {
    0x1000 + word * 4
}

/// The enable register of the supervisor context of a hart, which is context `2 * hart + 1`.
fn enable(hart: usize, word: u64) -> u64 {
    0x2080 + hart as u64 * 0x100 + word * 4
}

fn threshold(hart: usize) -> u64 {
    0x20_1000 + hart as u64 * 0x2000
}

fn claim(hart: usize) -> u64 {
    threshold(hart) + 4
}

/// A PLIC with the lines to the harts and those of the devices.
struct Board {
    plic: Plic,
    harts: Vec<TestIrq>,
    lines: Vec<Arc<dyn IrqLine>>,
}

fn board(harts: usize) -> Board {
    let harts = vec![(); harts].into_iter().map(|()| TestIrq::default()).collect::<Vec<_>>();
    let outputs = harts.iter().map(|hart| Arc::new(hart.clone()) as Arc<dyn IrqLine>).collect();
    let plic = Plic::new(SOURCES, outputs).unwrap();
    let lines = (1..=SOURCES).map(|source| plic.source(source).unwrap()).collect();
    Board { plic, harts, lines }
}

impl Board {
    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xee; 4];
        self.plic.read(offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.plic.write(offset, &value.to_le_bytes()).unwrap();
    }

    fn set(&self, source: u32, high: bool) {
        self.lines[source as usize - 1].set_level(high);
    }

    /// Gives a source this priority and enables it for a hart.
    fn enable(&mut self, hart: usize, source: u32, level: u32) {
        self.write(priority(source), level);
        let word = enable(hart, u64::from(source / 32));
        let enabled = self.read(word);
        self.write(word, enabled | 1 << (source % 32));
    }
}

#[test]
fn a_high_line_interrupts_the_hart_until_it_is_claimed() {
    let mut board = board(1);
    board.enable(0, 10, 1);
    board.set(10, true);
    assert!(board.harts[0].is_high());
    assert_eq!(board.read(pending(0)), 1 << 10);
    assert_eq!(board.read(claim(0)), 10);
    assert!(!board.harts[0].is_high());
    assert_eq!(board.read(pending(0)), 0);
    assert_eq!(board.read(claim(0)), 0);
}

#[test]
fn a_line_still_high_at_completion_interrupts_again() {
    let mut board = board(1);
    board.enable(0, 10, 1);
    board.set(10, true);
    assert_eq!(board.read(claim(0)), 10);
    board.write(claim(0), 10);
    assert!(board.harts[0].is_high());
    assert_eq!(board.read(claim(0)), 10);
    board.set(10, false);
    board.write(claim(0), 10);
    assert!(!board.harts[0].is_high());
    assert_eq!(board.read(claim(0)), 0);
}

#[test]
fn a_source_that_was_claimed_and_not_completed_is_silent() {
    let mut board = board(1);
    board.enable(0, 10, 1);
    board.set(10, true);
    assert_eq!(board.read(claim(0)), 10);
    for _ in 0..1000 {
        board.set(10, false);
        board.set(10, true);
    }
    assert_eq!(board.read(claim(0)), 0);
    assert_eq!(board.harts[0].changes(), 2);
}

#[test]
fn a_request_stays_when_its_line_falls_before_the_claim() {
    let mut board = board(1);
    board.enable(0, 3, 1);
    board.set(3, true);
    board.set(3, false);
    assert!(board.harts[0].is_high());
    assert_eq!(board.read(claim(0)), 3);
    board.write(claim(0), 3);
    assert!(!board.harts[0].is_high());
}

#[test]
fn the_highest_priority_is_claimed_first_then_the_lowest_number() {
    let mut board = board(1);
    for (source, level) in [(5, 1), (6, 7), (40, 7), (41, 3)] {
        board.enable(0, source, level);
        board.set(source, true);
    }
    let claims: Vec<u32> = (0..5).map(|_| board.read(claim(0))).collect();
    assert_eq!(claims, [6, 40, 41, 5, 0]);
}

#[test]
fn priority_zero_never_interrupts_and_is_never_claimed() {
    let mut board = board(1);
    board.enable(0, 10, 0);
    board.set(10, true);
    assert!(!board.harts[0].is_high());
    assert_eq!(board.read(pending(0)), 1 << 10);
    assert_eq!(board.read(claim(0)), 0);
    board.write(priority(10), 1);
    assert!(board.harts[0].is_high());
}

#[test]
fn the_threshold_masks_interrupts_and_not_claims() {
    let mut board = board(1);
    board.enable(0, 10, 3);
    board.write(threshold(0), 3);
    board.set(10, true);
    assert!(!board.harts[0].is_high());
    board.write(threshold(0), 2);
    assert!(board.harts[0].is_high());
    board.write(threshold(0), 7);
    assert!(!board.harts[0].is_high());
    assert_eq!(board.read(claim(0)), 10);
}

#[test]
fn a_source_enabled_for_two_harts_interrupts_both_and_one_gets_it() {
    let mut board = board(3);
    board.enable(0, 33, 1);
    board.enable(2, 33, 1);
    board.set(33, true);
    let high = |board: &Board| board.harts.iter().map(TestIrq::is_high).collect::<Vec<_>>();
    assert_eq!(high(&board), [true, false, true]);
    assert_eq!(board.read(claim(2)), 33);
    assert_eq!(high(&board), [false; 3]);
    assert_eq!(board.read(claim(0)), 0);
    // The other hart has it enabled as well, so it may complete it.
    board.write(claim(0), 33);
    assert_eq!(high(&board), [true, false, true]);
}

#[test]
fn a_completion_of_an_unclaimed_or_disabled_source_is_ignored() {
    let mut board = board(2);
    board.enable(0, 10, 1);
    board.set(10, true);
    for id in [0, 10, 11, SOURCES, SOURCES + 1, 1023, 1024, 0xffff_ffff] {
        board.write(claim(0), id);
    }
    assert_eq!(board.read(claim(0)), 10);
    // Hart 1 has not enabled it.
    board.write(claim(1), 10);
    assert!(!board.harts[0].is_high());
    board.write(claim(0), 10);
    assert!(board.harts[0].is_high());
}

#[test]
fn registers_keep_only_the_bits_that_exist() {
    let mut board = board(1);
    board.write(priority(10), 0xffff_ffff);
    assert_eq!(board.read(priority(10)), 7);
    board.write(threshold(0), 0xffff_fff8);
    assert_eq!(board.read(threshold(0)), 0);
    for (word, bits) in [(0, 0xffff_fffe), (1, 0xffff_ffff), (2, 0x7f)] {
        board.write(enable(0, word), 0xffff_ffff);
        assert_eq!(board.read(enable(0, word)), bits);
    }
}

#[test]
fn machine_contexts_read_as_zero_and_do_nothing() {
    let mut board = board(2);
    board.enable(0, 10, 1);
    board.set(10, true);
    for machine_context in [0x2000, 0x2100, 0x20_0000, 0x20_0004, 0x20_2000, 0x20_2004] {
        board.write(machine_context, 10);
        assert_eq!(board.read(machine_context), 0, "at {machine_context:#x}");
    }
    assert_eq!(board.read(claim(0)), 10);
}

#[test]
fn what_does_not_exist_is_refused() {
    let mut plic = board(2).plic;
    let nothing = [
        0,
        priority(SOURCES + 1),
        0xffc,
        pending(3),
        0x107c,
        0x1080,
        0x1ffc,
        enable(0, 3),
        enable(2, 0),
        enable(511, 0),
        0x1f_fffc,
        0x20_0008,
        0x20_0ffc,
        threshold(2),
        claim(2),
        threshold(511),
        Plic::SIZE - 4,
    ];
    for offset in nothing {
        let refused = Err(AccessError::NoRegister);
        assert_eq!(plic.read(offset, &mut [0; 4]), refused, "at {offset:#x}");
        assert_eq!(plic.write(offset, &[0xff; 4]), refused, "at {offset:#x}");
    }
    assert_eq!(plic.write(pending(0), &[0xff; 4]), Err(AccessError::ReadOnly));
    for offset in [priority(1), pending(0), enable(0, 0), threshold(0), claim(0)] {
        for width in [1, 2, 8] {
            let refused = Err(AccessError::Width);
            assert_eq!(plic.read(offset, &mut [0; 8][..width]), refused, "{width} at {offset:#x}");
            assert_eq!(plic.write(offset, &[0xff; 8][..width]), refused, "{width} at {offset:#x}");
        }
        assert_eq!(plic.read(offset + 2, &mut [0; 4]), Err(AccessError::Misaligned));
    }
}

#[test]
fn a_reset_forgets_all_but_the_levels_of_the_lines() {
    let mut board = board(1);
    for source in [10, 11] {
        board.enable(0, source, 1);
        board.set(source, true);
    }
    board.write(threshold(0), 5);
    assert_eq!(board.read(claim(0)), 10);
    board.plic.reset();
    assert!(!board.harts[0].is_high());
    // Its device is reset as well, and lowers its line before the guest's first access.
    board.set(11, false);
    for offset in [priority(10), enable(0, 0), threshold(0), claim(0)] {
        assert_eq!(board.read(offset), 0, "at {offset:#x}");
    }
    assert_eq!(board.read(pending(0)), 1 << 10);
    board.enable(0, 10, 1);
    assert!(board.harts[0].is_high());
}

#[test]
fn a_request_between_a_reset_and_the_guest_s_first_access_stays() {
    let mut board = board(1);
    board.plic.reset();
    board.set(2, true);
    board.set(2, false);
    board.enable(0, 2, 1);
    assert_eq!(board.read(claim(0)), 2);
}

#[test]
fn harts_lines_are_driven_only_when_they_change() {
    let mut board = board(1);
    for source in 1..=SOURCES {
        board.enable(0, source, 1);
        board.set(source, true);
        board.set(source, true);
    }
    assert_eq!(board.harts[0].changes(), 1);
    for expected in 1..=SOURCES {
        assert_eq!(board.read(claim(0)), expected);
    }
    assert_eq!(board.harts[0].changes(), 2);
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let outputs = |harts: usize| {
        let line: Arc<dyn IrqLine> = Arc::new(TestIrq::default());
        vec![line; harts]
    };
    assert_eq!(Plic::new(0, outputs(1)).err(), Some(PlicError::Sources(0)));
    assert_eq!(Plic::new(1024, outputs(1)).err(), Some(PlicError::Sources(1024)));
    assert_eq!(Plic::new(95, outputs(0)).err(), Some(PlicError::Harts(0)));
    assert_eq!(Plic::new(95, outputs(513)).err(), Some(PlicError::Harts(513)));
    let mut largest = Plic::new(1023, outputs(512)).unwrap();
    assert_eq!(largest.read(Plic::SIZE - 0x1000, &mut [0; 4]), Ok(()));
    assert!(largest.source(0).is_none());
    assert!(largest.source(1023).is_some());
    assert!(largest.source(1024).is_none());
}

#[test]
fn the_tree_says_how_many_sources_there_are() {
    let fdt = board(1).plic.fdt().unwrap();
    let property = fdt.properties.iter().find(|property| property.name == "riscv,ndev").unwrap();
    assert_eq!(property.value, FdtValue::U32(vec![SOURCES]));
}

#[test]
fn lines_and_registers_are_used_from_many_threads() {
    let mut board = board(2);
    (1..=4).for_each(|source| board.enable(0, source, 1));
    std::thread::scope(|scope| {
        for source in 1..=4 {
            let line = board.plic.source(source).unwrap();
            scope.spawn(move || (0..1000).for_each(|turn| line.set_level(turn % 2 == 0)));
        }
        let mut plic = board.plic.clone();
        scope.spawn(move || {
            for _ in 0..1000 {
                let mut id = [0; 4];
                plic.read(claim(0), &mut id).unwrap();
                plic.write(claim(0), &id).unwrap();
            }
        });
    });
    while board.read(claim(0)) != 0 {}
    assert!(!board.harts[0].is_high());
}

/// A direct transcription of the specification.
struct Model {
    level: Vec<bool>,
    pending: Vec<bool>,
    claimed: Vec<bool>,
    priority: Vec<u32>,
    enabled: Vec<Vec<bool>>,
    threshold: Vec<u32>,
    shut: bool,
}

impl Model {
    fn new(harts: usize) -> Self {
        let none = vec![false; SOURCES as usize + 1];
        Self {
            level: none.clone(),
            pending: none.clone(),
            claimed: none.clone(),
            priority: vec![0; SOURCES as usize + 1],
            enabled: vec![none; harts],
            threshold: vec![0; harts],
            shut: false,
        }
    }

    fn sources() -> std::ops::RangeInclusive<usize> {
        1..=SOURCES as usize
    }

    fn forward(&mut self, source: usize) {
        self.pending[source] |= self.level[source] && !self.claimed[source];
    }

    fn touch(&mut self) {
        if std::mem::take(&mut self.shut) {
            Self::sources().for_each(|source| self.forward(source));
        }
    }

    fn output(&self, hart: usize) -> bool {
        Self::sources().any(|source| {
            self.pending[source]
                && self.enabled[hart][source]
                && self.priority[source] > self.threshold[hart]
        })
    }

    fn claim(&mut self, hart: usize) -> usize {
        let candidates = Self::sources().filter(|&source| {
            self.pending[source] && self.enabled[hart][source] && self.priority[source] > 0
        });
        // max_by_key returns the last maximum.
        let best = candidates.rev().max_by_key(|&source| self.priority[source]).unwrap_or(0);
        if best != 0 {
            self.pending[best] = false;
            self.claimed[best] = true;
        }
        best
    }

    fn complete(&mut self, hart: usize, id: u32) {
        let id = id as usize;
        if Self::sources().contains(&id) && self.enabled[hart][id] && self.claimed[id] {
            self.claimed[id] = false;
            self.forward(id);
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Line(u32, bool),
    Priority(u32, u32),
    Enable(usize, u64, u32),
    Threshold(usize, u32),
    Claim(usize),
    Complete(usize, u32),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    // Few sources, so that they collide; at the boundaries of words.
    let source =
        prop_oneof![Just(1_u32), Just(2), Just(31), Just(32), Just(63), Just(64), Just(70)];
    let hart = 0_usize..3;
    prop_oneof![
        8 => (source.clone(), any::<bool>()).prop_map(|(source, high)| Step::Line(source, high)),
        3 => (source.clone(), 0_u32..10).prop_map(|(source, value)| Step::Priority(source, value)),
        3 => (hart.clone(), 0_u64..3, any::<u32>()).prop_map(|(h, w, v)| Step::Enable(h, w, v)),
        1 => (hart.clone(), 0_u32..10).prop_map(|(hart, value)| Step::Threshold(hart, value)),
        6 => hart.clone().prop_map(Step::Claim),
        4 => (hart.clone(), source).prop_map(|(hart, id)| Step::Complete(hart, id)),
        1 => (hart, any::<u32>()).prop_map(|(hart, id)| Step::Complete(hart, id)),
        1 => Just(Step::Reset),
    ]
}

fn apply(step: &Step, board: &mut Board, model: &mut Model) -> Result<(), TestCaseError> {
    if !matches!(step, Step::Line(..) | Step::Reset) {
        model.touch();
    }
    match *step {
        Step::Line(source, high) => {
            board.set(source, high);
            model.level[source as usize] = high;
            if high {
                model.forward(source as usize);
            }
        }
        Step::Priority(source, value) => {
            board.write(priority(source), value);
            model.priority[source as usize] = value % 8;
        }
        Step::Enable(hart, word, value) => {
            board.write(enable(hart, word), value);
            for source in Model::sources().filter(|source| *source as u64 / 32 == word) {
                model.enabled[hart][source] = value >> (source % 32) & 1 == 1;
            }
        }
        Step::Threshold(hart, value) => {
            board.write(threshold(hart), value);
            model.threshold[hart] = value % 8;
        }
        Step::Claim(hart) => {
            prop_assert_eq!(board.read(claim(hart)) as usize, model.claim(hart));
        }
        Step::Complete(hart, id) => {
            board.write(claim(hart), id);
            model.complete(hart, id);
        }
        Step::Reset => {
            board.plic.reset();
            let level = std::mem::take(&mut model.level);
            *model = Model { level, shut: true, ..Model::new(model.enabled.len()) };
        }
    }
    Ok(())
}

fn bits(set: &[bool], word: usize) -> u32 {
    let members = set.iter().enumerate().filter(|(source, on)| **on && source / 32 == word);
    members.map(|(source, _)| 1 << (source % 32)).sum()
}

proptest! {
    #[test]
    fn any_sequence_of_steps_matches_the_model(
        steps in prop::collection::vec(step(), 1..80)
    ) {
        let (mut board, mut model) = (board(3), Model::new(3));
        for step in &steps {
            apply(step, &mut board, &mut model)?;
            for hart in 0..3 {
                prop_assert_eq!(board.harts[hart].is_high(), model.output(hart), "{:?}", step);
            }
        }
        model.touch();
        for word in 0..3 {
            prop_assert_eq!(board.read(pending(word)), bits(&model.pending, word as usize));
        }
        for hart in 0..3 {
            prop_assert_eq!(board.read(threshold(hart)), model.threshold[hart]);
            prop_assert_eq!(board.read(enable(hart, 1)), bits(&model.enabled[hart], 1));
            prop_assert_eq!(board.harts[hart].is_high(), model.output(hart));
        }
    }

    #[test]
    fn no_access_makes_it_panic(
        accesses in prop::collection::vec(
            (any::<bool>(), prop_oneof![0..Plic::SIZE, 0_u64..0x3000], 0_usize..9, any::<u64>()),
            1..200,
        )
    ) {
        let mut board = board(3);
        for (write, offset, width, value) in accesses {
            let mut data = value.to_le_bytes();
            let _ = match write {
                true => board.plic.write(offset, &data[..width]),
                false => board.plic.read(offset, &mut data[..width]),
            };
            board.set((value % u64::from(SOURCES)) as u32 + 1, value & 1 == 1);
        }
    }
}
