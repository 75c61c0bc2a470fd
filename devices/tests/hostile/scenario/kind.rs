//! The virtio devices: options to build each of them, and requests that are nearly valid.

use super::script::Script;

/// A buffer of a request.
#[derive(Debug, Clone)]
pub(crate) enum Piece {
    /// Bytes for the device to read.
    Read(Vec<u8>),
    /// Number of bytes for the device to write.
    Write(u32),
}

/// A kind of virtio device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Rng,
    Blk,
    Net,
    Vsock,
    Input,
    Balloon,
    Console,
}

impl Kind {
    /// All of them.
    pub(crate) const ALL: [Self; 7] =
        [Self::Rng, Self::Blk, Self::Net, Self::Vsock, Self::Input, Self::Balloon, Self::Console];

    /// Values of `--device` that create one.
    pub(crate) fn options(self) -> &'static [&'static str] {
        match self {
            Self::Rng => &["rng"],
            Self::Blk => &["blk,path=d", "blk,path=d,queues=3", "blk,path=d,ro=on,cache=unsafe"],
            Self::Net => {
                &["net,tap=t", "net,tap=t,mtu=1500,queues=2", "net,tap=t,mac=02:00:00:00:00:01"]
            }
            Self::Vsock => &["vsock,path=s"],
            Self::Input => &["input"],
            Self::Balloon => {
                &["balloon,size=1,reporting=on", "balloon,stats=3600,reporting=on", "balloon"]
            }
            Self::Console => &["console,to=file:c", "console,to=file:c,port1=log=file:x"],
        }
    }

    /// A request for `queue` that is valid, or nearly.
    pub(crate) fn request(self, queue: usize, script: &mut Script<'_>) -> Vec<Piece> {
        match (self, queue) {
            (Self::Rng, _) => vec![Piece::Write(script.pick(&[1, 64, 4096, 70_000, 0]))],
            (Self::Blk, _) => disk(script),
            (Self::Net, 2) if script.flag() => command(script),
            (Self::Net, 0 | 2) => {
                vec![Piece::Write(script.pick(&[12, 1526, 4096, 11, 1, 65_562, 13]))]
            }
            (Self::Net, 1 | 3) => frame(script),
            (Self::Net, _) => command(script),
            (Self::Vsock, 0) => vec![Piece::Write(script.pick(&[4096, 44, 45, 43, 65_580, 100]))],
            (Self::Vsock, _) => packet(script),
            (Self::Input, 0) => vec![Piece::Write(script.pick(&[8, 7, 64, 0]))],
            (Self::Input, _) => vec![Piece::Read(script.bytes(8))],
            (Self::Balloon, 0 | 1) => pages(script),
            (Self::Balloon, _) if script.flag() => {
                vec![Piece::Write(script.pick(&[4096, 8192, 1, 100_000]))]
            }
            (Self::Balloon, _) => {
                let count = script.pick(&[10, 20, 100, 5, 330]);
                vec![Piece::Read(script.bytes(count))]
            }
            (Self::Console, 3) => control(script),
            (Self::Console, 0 | 2 | 4) => vec![Piece::Write(script.pick(&[1, 64, 4096, 5000, 0]))],
            (Self::Console, _) => {
                vec![Piece::Read(vec![b'o'; script.pick(&[1, 100, 4096, 30_000])])]
            }
        }
    }
}

fn disk(script: &mut Script<'_>) -> Vec<Piece> {
    let kind = match script.below(9) {
        8 => script.odd32(),
        at => [0, 1, 0, 1, 4, 8, 11, 13][at],
    };
    let sector = match script.below(4) {
        3 => script.odd(),
        _ => script.below(18) as u64,
    };
    let mut header = u64::from(kind).to_le_bytes().to_vec();
    header.extend(sector.to_le_bytes());
    let mut pieces = vec![Piece::Read(header)];
    let len = script.pick(&[512, 1024, 4096, 0, 1, 511, 513]);
    match kind {
        0 => pieces.push(Piece::Write(len)),
        1 => pieces.push(Piece::Read(vec![0xd1; len as usize])),
        8 => pieces.push(Piece::Write(script.pick(&[20, 1, 4096]))),
        11 | 13 => {
            let mut segment = (script.below(18) as u64).to_le_bytes().to_vec();
            segment.extend(script.pick(&[1, 2, 0, u32::MAX, 1 << 15]).to_le_bytes());
            segment.extend(script.pick(&[0, 1, 2, u32::MAX]).to_le_bytes());
            pieces.push(Piece::Read(segment));
        }
        _ => {}
    }
    if !script.once_in(16) {
        pieces.push(Piece::Write(script.pick(&[1, 1, 1, 0, 5])));
    }
    pieces
}

/// A control message of a console: port, event, value.
fn control(script: &mut Script<'_>) -> Vec<Piece> {
    let mut message = u32::from(script.pick(&[0_u8, 1, 2, 255])).to_le_bytes().to_vec();
    message.extend(u16::to_le_bytes(script.pick(&[0, 1, 2, 3, 4, 5, 6, 7, 99])));
    message.extend(u16::to_le_bytes(script.pick(&[1, 0, 2])));
    message.truncate(script.pick(&[8, 8, 8, 7, 0]));
    vec![Piece::Read(message)]
}

fn frame(script: &mut Script<'_>) -> Vec<Piece> {
    let mut header = vec![script.pick(&[0, 1, 2, 0xff]), script.pick(&[0, 1, 4, 0x81, 3, 5])];
    for _ in 0..4 {
        header.extend(script.odd16().to_le_bytes());
    }
    header.extend([0, 0]);
    if script.flag() {
        header.fill(0);
    }
    let len = script.pick(&[60, 14, 13, 0, 1514, 9000, 65_000]);
    let mut frame = vec![0xf0; len];
    frame.iter_mut().zip(script.bytes(14)).for_each(|(to, from)| *to = from);
    if script.flag() {
        header.extend(frame);
        return vec![Piece::Read(header)];
    }
    vec![Piece::Read(header), Piece::Read(frame)]
}

fn command(script: &mut Script<'_>) -> Vec<Piece> {
    let head = vec![script.pick(&[0, 1, 5, 2, 4, 255]), script.pick(&[0, 1, 2])];
    let count = script.pick(&[1, 8, 10, 4, 14, 0, 40]);
    let data = script.bytes(count);
    vec![Piece::Read(head), Piece::Read(data), Piece::Write(script.pick(&[1, 0, 2]))]
}

fn packet(script: &mut Script<'_>) -> Vec<Piece> {
    let mut header = Vec::new();
    let odd = script.once_in(16);
    header.extend(if odd { script.odd() } else { 3 }.to_le_bytes());
    header.extend(if odd { script.odd() } else { 2 }.to_le_bytes());
    // Few ports, so that streams collide; the host's own ports begin at 1 << 30.
    header.extend((script.below(4) as u32).to_le_bytes());
    let host_port = script.below(4) as u32 + if script.flag() { 1 << 30 } else { 0 };
    header.extend(host_port.to_le_bytes());
    let len = script.pick(&[0, 1, 100, 5000, 65_536, 65_537]);
    let lie = if script.once_in(16) { script.odd32() } else { len };
    header.extend(lie.to_le_bytes());
    header.extend(if script.once_in(16) { script.odd16() } else { 1 }.to_le_bytes());
    let op = script.pick(&[1, 2, 5, 5, 5, 4, 6, 7, 3, 0, 9, 1]);
    header.extend(u16::to_le_bytes(op));
    header.extend(script.pick(&[0, 1, 2, 3, u32::MAX]).to_le_bytes());
    header.extend(script.pick(&[1 << 18, 4096, 1, 0, u32::MAX]).to_le_bytes());
    header.extend(if script.once_in(4) { script.odd32() } else { 0 }.to_le_bytes());
    let payload = vec![0xb7; len.min(70_000) as usize];
    match script.below(3) {
        0 => {
            header.extend(payload);
            vec![Piece::Read(header)]
        }
        _ if len == 0 => vec![Piece::Read(header)],
        _ => vec![Piece::Read(header), Piece::Read(payload)],
    }
}

fn pages(script: &mut Script<'_>) -> Vec<Piece> {
    let count = script.pick(&[1, 4, 60, 0, 2000]);
    let first = if script.once_in(4) { script.odd32() } else { 0x8_0000 + script.below(80) as u32 };
    let step = script.pick(&[1, 0, 2, u32::MAX]);
    let mut numbers: Vec<u8> = (0..count)
        .flat_map(|index| first.wrapping_add(step.wrapping_mul(index)).to_le_bytes())
        .collect();
    if script.once_in(8) {
        numbers.push(1);
    }
    vec![Piece::Read(numbers)]
}
