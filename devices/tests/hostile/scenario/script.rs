//! Bytes that select the actions of a hostile guest; after their end every selection is 0.

/// Numbers that often break devices: limits of widths, of RAM, of rings.
const ODD: [u64; 26] = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    15,
    16,
    17,
    0xff,
    0x100,
    0x1ff,
    0x200,
    0xfff,
    0x1000,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0x8003_fff0,
    0xffff_fffe,
    0xffff_ffff,
    0x1_0000_0000,
    u64::MAX - 15,
    u64::MAX,
];

/// The rest of the bytes.
#[derive(Debug)]
pub(crate) struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    pub(crate) fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// True with a probability of one in `n`.
    pub(crate) fn once_in(&mut self, n: u8) -> bool {
        self.byte() % n == n - 1
    }

    /// A number below `n`, which is at least 1.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        let byte = usize::from(self.byte());
        if n <= 256 { byte % n } else { (byte << 8 | usize::from(self.byte())) % n }
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    pub(crate) fn u64(&mut self) -> u64 {
        (0..8).fold(0, |value, _| value << 8 | u64::from(self.byte()))
    }

    /// A number that is often one of [`ODD`].
    pub(crate) fn odd(&mut self) -> u64 {
        match self.byte() {
            byte @ 0..200 => ODD[usize::from(byte) % ODD.len()],
            200..240 => self.byte().into(),
            _ => self.u64(),
        }
    }

    pub(crate) fn odd32(&mut self) -> u32 {
        self.odd() as u32
    }

    pub(crate) fn odd16(&mut self) -> u16 {
        self.odd() as u16
    }

    /// The next `count` bytes, at most 64 of them from the script and the others zero.
    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        let (front, rest) = self.0.split_at(count.min(self.0.len()).min(64));
        self.0 = rest;
        let mut bytes = front.to_vec();
        bytes.resize(count, 0);
        bytes
    }

    /// All remaining bytes.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}
