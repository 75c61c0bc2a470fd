//! The image of a flash with one program, as the courses' hypervisors and guests expect it: `pfld`, the version and the size
//! as big-endian words of 32 bits, four zero bytes, and the program.

/// Size of the flash of the courses' machine, in bytes: one bank of QEMU's `virt`.
pub const SIZE: usize = 32 << 20;

/// The first four bytes.
pub(super) const MAGIC: [u8; 4] = *b"pfld";
const VERSION: u32 = 1;
const HEADER: usize = 16;

/// Creates the image with `program`, without the unused rest of the flash.
///
/// # Errors
/// The program is empty, or does not fit.
pub fn image(program: &[u8]) -> Result<Vec<u8>, String> {
    let fits = u32::try_from(program.len())
        .ok()
        .filter(|size| (1..=SIZE - HEADER).contains(&(*size as usize)));
    let Some(size) = fits else {
        return Err(format!(
            "a flash holds a program of 1 to {} bytes, not {}",
            SIZE - HEADER,
            program.len()
        ));
    };
    let mut image = Vec::with_capacity(HEADER + program.len());
    image.extend(MAGIC);
    image.extend(VERSION.to_be_bytes());
    image.extend(size.to_be_bytes());
    image.resize(HEADER, 0);
    image.extend(program);
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_that_of_the_courses() {
        let image = image(b"abc").unwrap();
        assert_eq!(image, b"pfld\0\0\0\x01\0\0\0\x03\0\0\0\0abc");
    }

    #[test]
    fn a_program_that_does_not_fit_is_refused() {
        assert!(image(b"").is_err());
        assert!(image(&vec![0; SIZE]).is_err());
        assert_eq!(image(&vec![0; SIZE - HEADER]).unwrap().len(), SIZE);
    }
}
