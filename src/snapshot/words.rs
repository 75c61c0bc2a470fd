//! Memory in words, for the checksum, and as bytes, for files and sockets.

/// The bytes of words, in the order of the host.
pub(crate) fn bytes(words: &[u64]) -> &[u8] {
    bytemuck::cast_slice(words)
}

/// The same to be written.
pub(crate) fn bytes_mut(words: &mut [u64]) -> &mut [u8] {
    bytemuck::cast_slice_mut(words)
}
