//! Generates a page that shows and explains a trace: `rvmm trace report`.
//!
//! | file | what is in it |
//! |---|---|
//! | `read.rs` | reads and checks a trace, line by line |
//! | `tally.rs` | the statistics for the page, in bounded memory |
//! | `chart.rs` | time lines and histograms |
//! | `explain.rs` | explanations of the kinds of exits |
//! | `page.rs`, `page.css` | the page around them |
//! | `text.rs` | formats numbers and escapes texts |
//! | `testing.rs` | the fuzz target |

mod chart;
mod explain;
mod page;
mod read;
mod tally;
#[cfg(any(test, fuzzing))]
pub(super) mod testing;
#[cfg(test)]
mod tests;
mod text;

use std::fs::{self, File};
use std::io::{self, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use tally::Tally;

use crate::error::Error;
use crate::host::write_file;

/// Bytes of the trace that are read at once.
const BLOCK: usize = 256 << 10;

/// Reads the trace `input` and writes its report, one page of HTML, to `output`.
///
/// # Errors
/// [`Error::File`] for a file that cannot be read or written, [`Error::Config`] for one that is not a trace of rvmm's, with
/// the number of the line.
pub fn report(input: &Path, output: &Path) -> Result<(), Error> {
    let failed = |verb, path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::File { verb, path, source }
    };
    let file = File::open(input).map_err(failed("open", input))?;
    // The page replaces the file of its name, which must not be the trace.
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let own = file.metadata().map(identity).map_err(failed("read", input))?;
    if fs::metadata(output).is_ok_and(|there| identity(there) == own) {
        return Err(failed("write", output)(io::Error::other("it is the trace itself")));
    }
    let mut tally = Tally::new();
    read::events(BufReader::with_capacity(BLOCK, file), |event| tally.take(event)).map_err(
        |what| Error::Config(format!("Cannot use the trace {}: {what}", input.display())),
    )?;
    write_file(output, page::page(&tally).as_bytes()).map_err(failed("write", output))
}
