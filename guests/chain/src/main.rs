//! A machine that is saved at any moment and restored computes on: every hart computes a hash chain, whose result depends on
//! nothing but the boot arguments, while it takes timer interrupts, IPIs and interrupts of devices, and counts them.
//!
//! Boot arguments: `rounds=N`; with `stop=1` the last hart stops itself repeatedly, and the boot hart starts it again. Devices
//! are the clock, at the boot hart, and as many entropy devices as there are, at most one per hart. Every wait is without
//! a limit, also because time may jump when a machine is restored: a lost wake-up is a hang.

#![no_std]
#![no_main]

mod hash;
mod interrupts;

use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};

use runtime::entry::MAX_HARTS;
use runtime::virtio::{self, Device, Queue};
use runtime::{Board, Failure, csr, ensure, ensure_eq, mmio, println, rtc, sbi, smp, trap};

use hash::Chain;
use interrupts::{Counts, DEVICES, IPIS, TICKS, Wake, sleep_until};

runtime::guest!(run);

const ROUNDS: usize = 300;
/// In this many rounds each of the events happens once, each after another round.
const PERIOD: usize = 8;
const ON_IPI: usize = 1;
const ON_ALARM: usize = 3;
const ON_ENTROPY: usize = 4;
const ON_TICK: usize = 5;
const ON_STOP: usize = 7;

/// The entropy device's id.
const RNG: u32 = 4;

/// Number of rounds.
static ROUNDS_ASKED: AtomicUsize = AtomicUsize::new(ROUNDS);
/// True if the last hart stops and is started again.
static STOPPING: AtomicBool = AtomicBool::new(false);
static HASHES: [AtomicU64; MAX_HARTS] = [const { AtomicU64::new(0) }; MAX_HARTS];
/// Number of requests to devices by each hart, each of which is answered by an interrupt.
static REQUESTS: Counts = Counts::new();
static STOPS: Counts = Counts::new();

fn run(board: &'static Board) {
    println!("chain: started, {} harts", board.cpus().len());
    ROUNDS_ASKED.store(board.number("rounds").unwrap_or(ROUNDS), SeqCst);
    STOPPING.store(board.number("stop") == Some(1), SeqCst);
    interrupts::attach(exchanges());
    compute();
    println!("PASS chain");
}

/// Number of IPIs to each hart, besides the one at the end.
fn exchanges() -> usize {
    ROUNDS_ASKED.load(SeqCst).div_ceil(PERIOD)
}

fn others(board: &'static Board) -> impl Iterator<Item = usize> {
    board.cpus().iter().map(|cpu| cpu.hart).filter(|hart| *hart != board.boot_hart)
}

/// The hart that stops and is started again.
fn stopping(board: &'static Board) -> Option<usize> {
    others(board).last().filter(|_| STOPPING.load(SeqCst))
}

/// What every hart does, the boot hart and those that it starts.
fn compute() {
    let board = Board::get();
    let hart = trap::hart().id;
    let done = if hart == board.boot_hart { lead(board, hart) } else { follow(board, hart) };
    if let Err(why) = done {
        println!("FAIL chain: hart {hart}: {why}");
        sbi::power_off_with_failure();
    }
}

fn lead(board: &'static Board, hart: usize) -> Result<(), Failure> {
    let rounds = ROUNDS_ASKED.load(SeqCst);
    let mut entropy = Entropy::begin(board, hart)?;
    let mut caller = Caller { board, awaited: 0 };
    for other in others(board) {
        caller.start(other)?;
        caller.wait(Wake::Any)?;
    }
    let mut chain = Chain::continued(hart);
    while chain.rounds < rounds {
        chain.next_round()?;
        let number = chain.rounds / PERIOD + 1;
        match chain.rounds % PERIOD {
            ON_IPI => caller.ask(number)?,
            ON_ALARM => {
                rtc::set_alarm_ns(rtc::now_ns() + 1_000_000);
                await_device(hart, number)?;
            }
            ON_ENTROPY => entropy.iter_mut().try_for_each(|device| device.request(hart, number))?,
            ON_TICK => await_tick(hart),
            ON_STOP => stopping(board).map_or(Ok(()), |last| caller.start_again(last, number))?,
            _ => {}
        }
        if chain.rounds.is_multiple_of(rounds.div_ceil(10)) {
            println!("chain: round {}", chain.rounds);
        }
    }
    finish(&chain, hart)?;
    caller.ask(exchanges() + 1)?;
    for cpu in board.cpus() {
        let hash = HASHES[cpu.hart].load(SeqCst);
        let (ipis, devices) = (IPIS.of(cpu.hart), DEVICES.of(cpu.hart));
        println!("chain: hart {} hash {hash:#018x} ipis {ipis} devices {devices}", cpu.hart);
    }
    Ok(())
}

fn follow(board: &'static Board, hart: usize) -> Result<(), Failure> {
    let mut entropy = Entropy::begin(board, hart)?;
    let mut chain = Chain::continued(hart);
    interrupts::answer(board.boot_hart);
    while chain.rounds < ROUNDS_ASKED.load(SeqCst) {
        chain.next_round()?;
        let number = chain.rounds / PERIOD + 1;
        match chain.rounds % PERIOD {
            ON_IPI => await_ipi(hart, number),
            ON_ENTROPY => entropy.iter_mut().try_for_each(|device| device.request(hart, number))?,
            ON_TICK => await_tick(hart),
            ON_STOP if stopping(board) == Some(hart) => {
                chain.save();
                interrupts::end();
                STOPS.add(hart);
                return Ok(());
            }
            _ => {}
        }
    }
    finish(&chain, hart)?;
    await_ipi(hart, exchanges() + 1);
    ensure_eq!(IPIS.of(hart), exchanges() + 1, "IPIs");
    interrupts::end();
    interrupts::answer(board.boot_hart);
    Ok(())
}

/// Publishes the result of a hart.
fn finish(chain: &Chain, hart: usize) -> Result<(), Failure> {
    await_tick(hart);
    ensure!(TICKS.of(hart) > 0, "no ticks");
    ensure_eq!(DEVICES.of(hart), REQUESTS.of(hart), "interrupts of devices");
    HASHES[hart].store(chain.hash(), SeqCst);
    Ok(())
}

fn await_tick(hart: usize) {
    // A tick in between would set the next one, too.
    csr::interrupts_off();
    let before = TICKS.of(hart);
    interrupts::tick_in(hart, 1);
    sleep_until(Wake::Only(csr::SIE_TIMER), || TICKS.of(hart) > before);
}

fn await_ipi(hart: usize, number: usize) {
    sleep_until(Wake::by(csr::SIE_SOFTWARE, number), || IPIS.of(hart) >= number);
}

/// Waits for the interrupt of a request.
fn await_device(hart: usize, number: usize) -> Result<(), Failure> {
    let requests = REQUESTS.add(hart);
    sleep_until(Wake::by(csr::SIE_EXTERNAL, number), || DEVICES.of(hart) >= requests);
    ensure_eq!(DEVICES.of(hart), requests, "interrupts of devices");
    Ok(())
}

/// The boot hart's side of all IPIs. At most one IPI to it is under way: two that are pending would be taken as one.
struct Caller {
    board: &'static Board,
    /// Number of IPIs to the boot hart.
    awaited: usize,
}

impl Caller {
    /// Starts a hart, which reports by an IPI.
    fn start(&mut self, hart: usize) -> Result<(), Failure> {
        ensure_eq!(smp::start(hart, compute).error, 0, "start of hart {hart}");
        self.awaited += 1;
        Ok(())
    }

    /// Starts a hart again when it has stopped for the time `number`.
    fn start_again(&mut self, hart: usize, number: usize) -> Result<(), Failure> {
        let stopped = || STOPS.of(hart) == number && sbi::hart_status(hart).value == 1;
        sleep_until(Wake::Any, stopped);
        self.start(hart)
    }

    /// Waits for the IPIs of all reports and answers.
    fn wait(&self, wake: Wake) -> Result<(), Failure> {
        let hart = self.board.boot_hart;
        sleep_until(wake, || IPIS.of(hart) >= self.awaited);
        ensure_eq!(IPIS.of(hart), self.awaited, "IPIs");
        Ok(())
    }

    /// Sends IPI `number` to each other hart and waits for its answer; to itself if it is the only one.
    fn ask(&mut self, number: usize) -> Result<(), Failure> {
        let wake = Wake::by(csr::SIE_SOFTWARE, number);
        // A hart that is started again has to report first, because its start clears its pending interrupts.
        self.wait(wake)?;
        let me = self.board.boot_hart;
        let alone = self.board.cpus().len() == 1;
        for hart in others(self.board).chain(alone.then_some(me)) {
            ensure_eq!(sbi::send_ipi(1, hart).error, 0, "IPI to hart {hart}");
            self.awaited += 1;
            self.wait(wake)?;
            ensure_eq!(IPIS.of(hart), number, "IPIs of hart {hart}");
        }
        Ok(())
    }
}

/// The entropy device of a hart.
struct Entropy {
    device: Device,
    queue: Queue,
}

impl Entropy {
    /// Starts the device with the index of the hart, if there is one, and enables all interrupts of the hart.
    fn begin(board: &'static Board, hart: usize) -> Result<Option<Self>, Failure> {
        let index = board.cpus().iter().position(|cpu| cpu.hart == hart);
        let device = index.and_then(|index| entropy_devices(board).nth(index));
        let mut started = None;
        if let Some(device) = device {
            let [queue] = device.start(0)?;
            started = Some(Self { device, queue });
        }
        interrupts::begin(board, hart, device);
        Ok(started)
    }

    /// Makes a request and waits for the interrupt of its answer.
    fn request(&mut self, hart: usize, number: usize) -> Result<(), Failure> {
        let buffer = self.queue.buffer(number);
        mmio::write64(buffer, 0);
        self.queue.describe(0, (buffer, 64, virtio::WRITE, 0));
        self.queue.offer(0);
        self.queue.ring(&self.device);
        await_device(hart, number)?;
        ensure_eq!(self.queue.take(), Some((0, 64)), "answer of the entropy device");
        ensure!(mmio::read64(buffer) != 0, "no random number");
        Ok(())
    }
}

fn entropy_devices(board: &Board) -> impl Iterator<Item = Device> {
    let nodes = board.fdt.nodes();
    let nodes = nodes.filter(|node| node.strings("compatible").any(|s| s == "virtio,mmio"));
    let devices = nodes.filter_map(|node| {
        Some(Device { base: node.reg(0)?.0 as usize, irq: node.cell("interrupts")? })
    });
    devices.filter(|device| device.read(virtio::reg::DEVICE_ID) == RNG)
}
