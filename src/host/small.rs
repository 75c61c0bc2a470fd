//! Files that are read into memory at once, with a size limit.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::config::quoted;
use crate::error::Error;

/// Reads a file of at most `most` bytes.
///
/// # Errors
/// `File` if it cannot be read, `Config` if it is longer, as an endless device is.
pub(crate) fn read_small(path: &Path, most: u64) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::File { verb: "read", path: path.into(), source };
    let mut bytes = Vec::new();
    let bound = most.saturating_add(1);
    let count = File::open(path)
        .and_then(|file| file.take(bound).read_to_end(&mut bytes))
        .map_err(failed)?;
    if count as u64 > most {
        let name = quoted(&path.to_string_lossy());
        return Err(Error::Config(format!("Cannot use {name}: it has more than {most} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_whole_or_refused_and_one_without_an_end_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"12345").unwrap();
        assert_eq!(read_small(&path, 5).unwrap(), b"12345");
        let of = |path: &Path, most| read_small(path, most).unwrap_err().to_string();
        assert!(of(&path, 4).contains("it has more than 4 bytes"));
        assert!(of(Path::new("/dev/zero"), 4096).contains("/dev/zero"));
        assert!(matches!(read_small(&folder.path().join("none"), 5), Err(Error::File { .. })));
    }
}
