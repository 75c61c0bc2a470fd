//! Invalid rings for vhost queues (a network card with `vhost=on`, sockets with `backend=kernel`): each breaks the device
//! until its reset. Meanwhile and afterwards the entropy device, whose queue rvmm serves itself, works, and the device works
//! again after its reset.
//!
//! The host has to send arbitrary frames to the card, starting with the first line that this guest prints.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use runtime::virtio::{
    Descriptor, Device, INDIRECT, INDIRECT_DESC, NEEDS_RESET, NEXT, Queue, SIZE, WRITE, reg,
};
use runtime::{Board, Failure, ensure, ensure_eq, mmio, println, report, time};

runtime::guest!(run);

/// Device ids.
const NET: u32 = 1;
const RNG: u32 = 4;
const VSOCK: u32 = 19;

/// Queue indices.
const RECEIVE: usize = 0;
const SEND: usize = 1;

/// Size of `virtio_net_hdr` (virtio 1.3, section 5.1.6) and of `virtio_vsock_hdr` (section 5.10.6).
const NET_HEADER: u32 = 12;
const VSOCK_HEADER: u32 = 44;

fn run(board: &'static Board) {
    println!("vhost: waiting for frames");
    report::run(
        "vhost",
        board,
        &[
            ("frames that make no sense", |board| check_queue(board, NET, SEND)),
            ("buffers for frames that make no sense", |board| check_queue(board, NET, RECEIVE)),
            ("packets that make no sense", |board| check_queue(board, VSOCK, SEND)),
            ("buffers for packets that make no sense", |board| check_queue(board, VSOCK, RECEIVE)),
            ("a hundred resets under load", resets),
            ("frames and packets", |board| {
                exchange_frames(&find(board, NET)?)?;
                exchange_packets(&find(board, VSOCK)?)
            }),
        ],
    );
}

/// Invalid contents of a ring.
#[derive(Debug, Clone, Copy)]
enum Invalid {
    /// A chain that begins with this descriptor; the second one links back to it.
    Chain(Descriptor),
    /// An indirect table that begins with this descriptor, and its stated size.
    Table(Descriptor, u32),
    /// The index of a nonexistent descriptor.
    Head(u16),
    /// An available index; the last one was 0.
    Index(u16),
}

use Invalid::{Chain, Head, Index, Table};

/// All variants, for a queue whose buffers have these flags. RAM ends at `end`.
fn invalid(queue: &Queue, end: usize, flags: u16) -> [Invalid; 20] {
    let here = queue.buffer(0);
    [
        Chain((here, 64, flags | NEXT, 0)),
        Chain((here, 64, flags | NEXT, 1)),
        Chain((here, 64, flags | NEXT, SIZE)),
        Chain((here, 64, flags | NEXT, 0xffff)),
        Chain((end, 64, flags, 0)),
        Chain((end - 4, 64, flags, 0)),
        Chain((0, 64, flags, 0)),
        Chain((0x1000_0000, 64, flags, 0)),
        Chain((usize::MAX - 3, 64, flags, 0)),
        Chain((here, u32::MAX, flags, 0)),
        Chain((here, 64, flags ^ WRITE, 0)),
        Table((here, 64, INDIRECT, 0), 16),
        Table((here, 64, flags | NEXT, 0), 16),
        Table((here, 64, flags | NEXT, 1), 16),
        Table((end, 64, flags, 0), 16),
        Table((here, 64, flags, 0), 15),
        Head(SIZE),
        Head(0xffff),
        Index(SIZE + 1),
        Index(0x8000),
    ]
}

impl Invalid {
    /// Writes it into the ring.
    fn write_into(self, queue: &mut Queue) {
        match self {
            Chain(descriptor) => {
                let (addr, len, flags, _) = descriptor;
                queue.describe(1, (addr, len, flags | NEXT, 0));
                queue.describe(0, descriptor);
                queue.offer(0);
            }
            Table((addr, len, flags, next), bytes) => {
                let table = queue.buffer(1);
                mmio::write64(table, addr as u64);
                let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
                mmio::write64(table + 8, rest);
                queue.describe(0, (table, bytes, INDIRECT, 0));
                queue.offer(0);
            }
            Head(head) => queue.offer(head),
            Index(index) => queue.publish(index),
        }
    }
}

fn find(board: &Board, id: u32) -> Result<Device, Failure> {
    Device::find(board, id)
        .ok_or_else(|| Failure::new(format_args!("no device with id {id} in the tree")))
}

/// Applies each variant to one queue of a device, with a reset before each.
fn check_queue(board: &'static Board, id: u32, number: usize) -> Result<(), Failure> {
    let (device, rng) = (find(board, id)?, find(board, RNG)?);
    let [mut numbers] = rng.start(0)?;
    let flags = if number == RECEIVE { WRITE } else { 0 };
    let end = board.ram.0 + board.ram.1;
    for place in 0.. {
        let mut queues: [Queue; 2] = device.start(INDIRECT_DESC)?;
        let Some(given) = invalid(&queues[number], end, flags).get(place).copied() else { break };
        given.write_into(&mut queues[number]);
        queues[number].ring(&device);
        if (id, number) == (VSOCK, RECEIVE) {
            // The kernel takes a buffer when it has a packet to deliver.
            request_stream(&device, &mut queues[SEND]);
        }
        let needs_reset = || device.read(reg::STATUS) & NEEDS_RESET != 0;
        ensure!(time::wait_until(needs_reset), "no NEEDS_RESET for {given:x?}");
        ensure_eq!(numbers.fill(&rng, 16)?, 16, "random numbers beside {given:x?}");
    }
    ensure_eq!(numbers.fill(&rng, 64)?, 64, "random numbers afterwards");
    if id == NET { exchange_frames(&device) } else { exchange_packets(&device) }
}

fn resets(board: &'static Board) -> Result<(), Failure> {
    let devices = [find(board, NET)?, find(board, VSOCK)?];
    for _ in 0..100 {
        for device in &devices {
            let [mut receive, mut send]: [Queue; 2] = device.start(0)?;
            give_buffers(device, &mut receive);
            for slot in 0..SIZE {
                send.describe(slot, (send.buffer(slot.into()), 1500, 0, 0));
                send.offer(slot);
            }
            send.ring(device);
        }
    }
    Ok(())
}

fn give_buffers(device: &Device, receive: &mut Queue) {
    for slot in 0..SIZE {
        receive.describe(slot, (receive.buffer(slot.into()), 4096, WRITE, 0));
        receive.offer(slot);
    }
    receive.ring(device);
}

/// Sends a broadcast frame, and receives any frame.
fn exchange_frames(device: &Device) -> Result<(), Failure> {
    let [mut receive, mut send]: [Queue; 2] = device.start(0)?;
    give_buffers(device, &mut receive);
    let at = send.buffer(0);
    for word in (0..128).step_by(8) {
        mmio::write64(at + word, 0);
    }
    // Broadcast, from an unused address, with the EtherType for experiments.
    let frame = at + NET_HEADER as usize;
    mmio::write32(frame, u32::MAX);
    mmio::write32(frame + 4, 0x0002_ffff);
    mmio::write32(frame + 12, 0xb588);
    send.describe(0, (at, NET_HEADER + 60, 0, 0));
    send.offer(0);
    send.ring(device);
    ensure_eq!(send.wait()?, (0, 0), "the frame that was sent");
    let (_, len) = receive.wait()?;
    ensure!(len > NET_HEADER, "a frame of {len} bytes with its header");
    Ok(())
}

/// Requests a stream to a port of the host without a listener.
fn request_stream(device: &Device, send: &mut Queue) {
    let at = send.buffer(7);
    for (place, word) in [
        device.read(reg::CONFIG),
        0,
        // The host's CID; the ports; no bytes.
        2,
        0,
        1234,
        0xfff0_0001,
        0,
        // Type stream, operation request.
        1 | 1 << 16,
        0,
        4096,
        0,
    ]
    .into_iter()
    .enumerate()
    {
        mmio::write32(at + 4 * place, word);
    }
    send.describe(7, (at, VSOCK_HEADER, 0, 0));
    send.offer(7);
    send.ring(device);
}

/// Checks that a connection is refused.
fn exchange_packets(device: &Device) -> Result<(), Failure> {
    let [mut receive, mut send]: [Queue; 2] = device.start(0)?;
    give_buffers(device, &mut receive);
    request_stream(device, &mut send);
    let (head, len) = receive.wait()?;
    let operation = mmio::read16(receive.buffer(head as usize) + 30);
    // VIRTIO_VSOCK_OP_RST
    ensure_eq!((len, operation), (VSOCK_HEADER, 3), "the answer");
    Ok(())
}
