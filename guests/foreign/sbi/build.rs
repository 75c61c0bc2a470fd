//! Links to where every guest of ours lies.

use std::env;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = env::var("CARGO_MANIFEST_DIR")?;
    println!("cargo:rustc-link-arg=-T{folder}/../../runtime/guest.ld");
    println!("cargo:rerun-if-changed={folder}/../../runtime/guest.ld");
    Ok(())
}
