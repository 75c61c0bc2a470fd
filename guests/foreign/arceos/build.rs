//! Links with the script that ArceOS' axhal writes beside the program when it is built, and as its documentation asks for.

use std::env;
use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let own = env::var("OUT_DIR")?;
    // From PROFILE/build/NAME/out to PROFILE.
    let folder = Path::new(&own).ancestors().nth(3).ok_or("OUT_DIR is no folder of cargo's")?;
    println!("cargo:rustc-link-arg=-T{}/linker_riscv64-qemu-virt.lds", folder.display());
    println!("cargo:rustc-link-arg=-no-pie");
    println!("cargo:rustc-link-arg=-znostart-stop-gc");
    Ok(())
}
