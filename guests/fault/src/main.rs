//! Accesses that hardware would refuse are access faults that the guest can handle: atomics, floating point and misaligned
//! accesses to device addresses, and jumps outside of memory. Without translation, with the identity mapping, with an
//! offset, and from user mode; `scause`, `stval` and `sepc` are those of the instruction.

#![no_std]
#![no_main]

use core::arch::global_asm;

use runtime::trap::{self, Trap};
use runtime::uart::{self, reg};
use runtime::{
    Board, Failure, csr, csr_read, csr_write, ensure, ensure_eq, mmio, paging, report, rtc, sbi,
};

runtime::guest!(run);

// Each label is a function whose first instruction makes one access to the address in a0. If that does not trap, the
// breakpoint after it does.
global_asm!(
    r#"
    .section .text.accesses, "ax"
    .option push
    .option arch, +a, +f, +d, +c, +v, +zicboz
    .macro access name, insn:vararg
    .balign 4
    .globl \name
\name:
    \insn
    ebreak
    .endm
    access a_lr_w, lr.w t0, (a0)
    access a_lr_d, lr.d t0, (a0)
    access a_sc_w, sc.w t0, t1, (a0)
    access a_amoswap_w, amoswap.w t0, t1, (a0)
    access a_amoadd_d, amoadd.d t0, t1, (a0)
    access a_amomaxu_w, amomaxu.w.aqrl zero, t1, (a0)
    access a_flw, flw ft0, 0(a0)
    access a_fld, fld ft0, 0(a0)
    access a_fld_minus, fld ft0, -8(a0)
    access a_fsw, fsw ft0, 0(a0)
    access a_fsd, fsd ft0, 0(a0)
    access a_fsd_far, fsd ft0, 2040(a0)
    access a_c_fld, c.fld fa0, 8(a0)
    access a_c_fsd, c.fsd fa0, 8(a0)
    access a_lh_odd, lh t0, 1(a0)
    access a_lw_odd, lw t0, 1(a0)
    access a_lwu_half, lwu t0, 2(a0)
    access a_ld_half, ld t0, 4(a0)
    access a_sh_odd, sh t0, 3(a0)
    access a_sw_odd, sw t0, 1(a0)
    access a_sd_half, sd t0, 4(a0)
    access a_c_lw_odd, c.lw a1, 4(a0)
    access a_vle8, vle8.v v0, (a0)
    access a_vse32, vse32.v v0, (a0)
    access a_cbo_zero, cbo.zero (a0)
    .balign 4
    .globl a_return
a_return:
    ret
    .option pop
"#
);

unsafe extern "C" {
    static a_return: u8;
}

#[derive(Clone, Copy)]
struct Access {
    name: &'static str,
    code: usize,
    cause: usize,
    /// The offset that the instruction adds to a0.
    offset: isize,
}

macro_rules! accesses {
    ($($symbol:ident $cause:ident $offset:literal,)*) => {{
        unsafe extern "C" { $(static $symbol: u8;)* }
        [$(Access {
            name: stringify!($symbol),
            code: (&raw const $symbol) as usize,
            cause: trap::$cause,
            offset: $offset,
        }),*]
    }};
}

fn run(board: &'static Board) {
    report::run(
        "fault",
        board,
        &[
            ("untranslated", untranslated),
            ("translated, same addresses", translated),
            ("translated, other addresses", moved),
            ("user mode, untranslated", user_bare),
            ("user mode, translated", user_moved),
            ("load and store without reservation", store_conditional),
            ("jumps", jumps),
            ("jumps, translated", jumps_moved),
            ("jump to the edge of memory", edge),
            ("page faults stay the guest's", page_faults),
            ("vector and cache block", extensions),
            ("interrupt state", interrupt_state),
            ("many", many),
            ("afterwards", afterwards),
        ],
    );
}

fn all() -> [Access; 21] {
    accesses! {
        a_lr_w LOAD_ACCESS 0,
        a_lr_d LOAD_ACCESS 0,
        a_amoswap_w STORE_ACCESS 0,
        a_amoadd_d STORE_ACCESS 0,
        a_amomaxu_w STORE_ACCESS 0,
        a_flw LOAD_ACCESS 0,
        a_fld LOAD_ACCESS 0,
        a_fld_minus LOAD_ACCESS -8,
        a_fsw STORE_ACCESS 0,
        a_fsd STORE_ACCESS 0,
        a_fsd_far STORE_ACCESS 2040,
        a_c_fld LOAD_ACCESS 8,
        a_c_fsd STORE_ACCESS 8,
        a_lh_odd LOAD_ACCESS 1,
        a_lw_odd LOAD_ACCESS 1,
        a_lwu_half LOAD_ACCESS 2,
        a_ld_half LOAD_ACCESS 4,
        a_sh_odd STORE_ACCESS 3,
        a_sw_odd STORE_ACCESS 1,
        a_sd_half STORE_ACCESS 4,
        // a0 itself is odd for this one.
        a_c_lw_odd LOAD_ACCESS 4,
    }
}

/// The addresses of the accesses: a device with byte registers, one with word registers, and a hole.
const PLACES: [usize; 3] = [uart::BASE, rtc::BASE, 0x6000_0000];

/// Makes an access at `addr`, in S-mode or (if `user` holds the offset of the code's mapping) in U-mode.
fn make(access: Access, addr: usize, user: Option<usize>) -> Option<Trap> {
    match user {
        Some(view) => trap::user(access.code + view, addr),
        None => trap::expect(|| {
            // SAFETY: the labels above are functions that make one access and trap.
            let code: extern "C" fn(usize) = unsafe { core::mem::transmute(access.code) };
            code(addr);
        }),
    }
}

/// Checks that every access at every place causes the fault in its row; `data` and `user` are offsets of addresses.
fn sweep(data: usize, user: Option<usize>) -> Result<(), Failure> {
    for access in all() {
        for place in PLACES {
            let odd = usize::from(access.name == "a_c_lw_odd");
            let addr = place + data + odd;
            let expected = Trap {
                cause: access.cause,
                tval: addr.wrapping_add_signed(access.offset),
                epc: access.code + user.unwrap_or(0),
                from_user: user.is_some(),
            };
            ensure_eq!(make(access, addr, user), Some(expected), "{} at {addr:#x}", access.name);
        }
    }
    Ok(())
}

fn untranslated(_: &'static Board) -> Result<(), Failure> {
    sweep(0, None)
}

fn with_paging(check: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    paging::on();
    let outcome = check();
    paging::off();
    outcome
}

fn translated(_: &'static Board) -> Result<(), Failure> {
    with_paging(|| sweep(0, None))
}

fn moved(_: &'static Board) -> Result<(), Failure> {
    with_paging(|| sweep(paging::OFFSET, None))
}

fn user_bare(_: &'static Board) -> Result<(), Failure> {
    sweep(0, Some(0))
}

fn user_moved(_: &'static Board) -> Result<(), Failure> {
    with_paging(|| sweep(paging::USER, Some(paging::USER)))
}

/// Without a reservation `sc` may fail without accessing the address: both that and the fault are correct.
fn store_conditional(_: &'static Board) -> Result<(), Failure> {
    let [sc] = accesses! { a_sc_w STORE_ACCESS 0, };
    for place in PLACES {
        let trap = make(sc, place, None);
        let fault = trap.is_some_and(|trap| trap.cause == trap::STORE_ACCESS && trap.tval == place);
        let failed = trap.is_some_and(|trap| trap.cause == trap::BREAKPOINT);
        ensure!(fault || failed, "sc.w at {place:#x}: {trap:x?}");
    }
    Ok(())
}

/// Jumps to `target` and returns the trap.
fn jump(target: usize) -> Option<Trap> {
    trap::expect(|| {
        // SAFETY: there is no instruction there; only a trap returns.
        let code: extern "C" fn() = unsafe { core::mem::transmute(target) };
        code();
    })
}

fn check_jump(target: usize, user: bool) -> Result<(), Failure> {
    let expected =
        Trap { cause: trap::INSTRUCTION_ACCESS, tval: target, epc: target, from_user: user };
    let got = if user { trap::user(target, 0) } else { jump(target) };
    ensure_eq!(got, Some(expected), "a jump to {target:#x}");
    Ok(())
}

const TARGETS: [usize; 7] =
    [0, 0x10_0000, 0x10_1000, 0x1000_0000, 0x1000_0800, 0x6000_0000, 0x7fff_fffc];

fn jumps(board: &'static Board) -> Result<(), Failure> {
    let end = board.ram.0 + board.ram.1;
    for target in TARGETS.into_iter().chain([end, end + 0x1000, 1 << 40]) {
        check_jump(target, false)?;
        check_jump(target, true)?;
    }
    Ok(())
}

fn jumps_moved(_: &'static Board) -> Result<(), Failure> {
    with_paging(|| {
        for target in TARGETS {
            check_jump(target, false)?;
            check_jump(target + paging::OFFSET, false)?;
            check_jump(target + paging::USER, true)?;
        }
        Ok(())
    })
}

/// The first half of an instruction in the last halfword of memory, the second half outside of it: `sepc` is the
/// instruction's address, `stval` that of the missing half.
fn edge(board: &'static Board) -> Result<(), Failure> {
    let end = board.ram.0 + board.ram.1;
    let saved = mmio::read16(end - 2);
    mmio::write16(end - 2, 0x0013);
    let got = jump(end - 2);
    mmio::write16(end - 2, saved);
    let expected =
        Trap { cause: trap::INSTRUCTION_ACCESS, tval: end, epc: end - 2, from_user: false };
    ensure_eq!(got, Some(expected), "an instruction across the end of memory");
    Ok(())
}

fn page_faults(_: &'static Board) -> Result<(), Failure> {
    with_paging(|| {
        let load = trap::expect(|| _ = mmio::read32(paging::UNMAPPED));
        let store = trap::expect(|| mmio::write32(paging::UNMAPPED, 0));
        let causes = (load.map(|t| (t.cause, t.tval)), store.map(|t| (t.cause, t.tval)));
        let expected =
            (Some((trap::LOAD_PAGE, paging::UNMAPPED)), Some((trap::STORE_PAGE, paging::UNMAPPED)));
        ensure_eq!(causes, expected, "accesses to an unmapped page");
        Ok(())
    })
}

fn extensions(board: &'static Board) -> Result<(), Failure> {
    if board.has_extension("v") {
        csr_write!("sstatus", csr_read!("sstatus") | 3 << 9);
        // SAFETY: loads eight elements of eight bits into registers that the compiler does not use.
        unsafe {
            core::arch::asm!(
                ".option push",
                ".option arch, +v",
                "vsetivli zero, 8, e8, m1, ta, ma",
                ".option pop"
            )
        };
        for access in accesses! { a_vle8 LOAD_ACCESS 0, a_vse32 STORE_ACCESS 0, } {
            let trap = make(access, uart::BASE, None).map(|trap| (trap.cause, trap.epc));
            ensure_eq!(trap, Some((access.cause, access.code)), "{}", access.name);
        }
    }
    if board.has_extension("zicboz") {
        csr_write!("senvcfg", csr_read!("senvcfg") | 1 << 7);
        let [access] = accesses! { a_cbo_zero STORE_ACCESS 0, };
        let trap = make(access, uart::BASE, None).map(|trap| (trap.cause, trap.epc));
        ensure_eq!(trap, Some((access.cause, access.code)), "cbo.zero");
    }
    Ok(())
}

/// A fault saves `sstatus.SIE` in SPIE and clears it for the handler.
fn interrupt_state(_: &'static Board) -> Result<(), Failure> {
    let [access, ..] = all();
    for on in [false, true] {
        if on {
            csr::interrupts_on()
        } else {
            csr::interrupts_off()
        }
        let trap = make(access, uart::BASE, None);
        let after = csr_read!("sstatus") & csr::SSTATUS_SIE != 0;
        csr::interrupts_off();
        ensure!(trap.is_some(), "no fault");
        ensure_eq!(after, on, "sstatus.SIE after a fault");
    }
    Ok(())
}

fn many(_: &'static Board) -> Result<(), Failure> {
    for round in 0..100 {
        for access in all() {
            let odd = usize::from(access.name == "a_c_lw_odd");
            ensure!(make(access, 0x6000_0000 + odd, None).is_some(), "no fault in round {round}");
        }
    }
    Ok(())
}

/// Devices and memory are unchanged.
fn afterwards(_: &'static Board) -> Result<(), Failure> {
    uart::write(reg::SCR, 0xa5);
    ensure_eq!(uart::read(reg::SCR), 0xa5, "the scratch register");
    ensure_eq!(uart::read(reg::LCR), uart::LCR_8N1, "LCR");
    // SAFETY: a function that returns at once.
    let code: extern "C" fn() = unsafe { core::mem::transmute((&raw const a_return) as usize) };
    ensure_eq!(trap::expect(|| code()), None, "a call that faults nowhere");
    ensure!(sbi::has(sbi::HSM), "no SBI any more");
    Ok(())
}
