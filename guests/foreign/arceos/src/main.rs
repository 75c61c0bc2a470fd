//! An application on ArceOS, a unikernel from the crates registry: threads that sleep, two harts, a file on a FAT disk behind
//! virtio, a line from the console. Nothing of ArceOS is changed; it takes its machine for QEMU's `virt`.

#![no_std]
#![no_main]

use axstd::fs;
use axstd::io;
use axstd::println;
use axstd::string::String;
use axstd::thread;
use axstd::time::{Duration, Instant};
use axstd::vec::Vec;

/// Where the test looks for it, as bytes of the disk.
const TEXT: &str = "written by ArceOS";
const THREADS: u64 = 8;

// SAFETY: the one symbol of this name; ArceOS' runtime calls it with this signature.
#[unsafe(no_mangle)]
fn main() {
    println!("app: started");
    sleepers();
    files();
    println!("app: what is your name?");
    match line() {
        Ok(name) => println!("app: hello, {}", name.trim()),
        Err(error) => println!("app: no name: {error:?}"),
    }
    println!("app: done");
}

/// Threads that sleep until the timer's interrupt, the last that started the shortest, and then are joined.
fn sleepers() {
    let start = Instant::now();
    let threads: Vec<_> = (1..=THREADS)
        .map(|number| {
            thread::spawn(move || {
                thread::sleep(Duration::from_millis(10 * (THREADS + 1 - number)));
                number
            })
        })
        .collect();
    let sum: u64 = threads.into_iter().filter_map(|thread| thread.join().ok()).sum();
    let slept = start.elapsed() >= Duration::from_millis(10 * THREADS);
    println!("app: threads gave {sum}, slept long enough: {slept}");
}

/// A file that is written, and read again through the file system.
fn files() {
    let outcome = fs::write("/arceos.txt", TEXT).and_then(|()| fs::read_to_string("/arceos.txt"));
    match outcome {
        Ok(text) => println!("app: the file says: {text}"),
        Err(error) => println!("app: no file: {error:?}"),
    }
}

/// A line from the console. ArceOS gives what has come, which may be nothing.
fn line() -> io::Result<String> {
    let mut line = String::new();
    while !line.ends_with('\n') {
        io::stdin().read_line(&mut line)?;
        thread::yield_now();
    }
    Ok(line)
}
