//! The commands of the small prompt.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::param::page_size;
use rustix::process::{Pid, Signal, kill_process};

use super::power::{self, Ending};
use super::session::BUSYBOX;
use super::{SEARCH, Signals, program, tables};

/// The result of a command: done, or a line with the error.
type Outcome = Result<(), String>;

/// A command: its name, its arguments as help shows them, its help text, its function.
type Command = (&'static str, &'static str, &'static str, fn(&mut Shell, &[String]) -> Outcome);

const COMMANDS: &[Command] = &[
    ("help", "", "list the commands", Shell::help),
    ("ls", "[-l] [PATH]...", "list folders", Shell::ls),
    ("cat", "FILE...", "print files", Shell::cat),
    ("cd", "[FOLDER]", "change the folder", Shell::cd),
    ("echo", "[WORD]...", "print words", Shell::echo),
    ("ps", "", "list processes", Shell::ps),
    ("free", "", "show memory", Shell::free),
    ("dmesg", "", "print the kernel's messages", Shell::dmesg),
    (
        "mount",
        "[[-r] [-t TYPE] SOURCE FOLDER]",
        "list mounts, or mount a file system",
        Shell::mount,
    ),
    ("umount", "FOLDER", "unmount a file system", Shell::umount),
    ("uname", "", "name the kernel", Shell::uname),
    ("run", "PATH [ARGUMENT]...", "run a program", Shell::run_program),
    ("sh", "", "start busybox's shell, if it is there", Shell::sh),
    ("reboot", "[-f]", "reboot the machine", Shell::reboot),
    ("poweroff", "[-f]", "power the machine off", Shell::poweroff),
];

/// The state of the prompt's commands.
pub(super) struct Shell {
    interrupts: Box<dyn Signals>,
}

impl Shell {
    pub(super) fn new(interrupts: Box<dyn Signals>) -> Self {
        Self { interrupts }
    }

    /// Runs a line that was split into words.
    pub(super) fn run(&mut self, words: &[String]) -> Outcome {
        self.interrupts.take();
        let Some((name, arguments)) = words.split_first() else { return Ok(()) };
        match COMMANDS.iter().find(|(command, ..)| command == name) {
            Some((.., run)) => run(self, arguments),
            None if find_program(name).is_some() => self.run_program(words),
            None => Err(format!("{name}: no such command (help lists them)")),
        }
    }

    fn was_interrupted(&mut self) -> bool {
        let interrupted = !self.interrupts.take().is_empty();
        if interrupted {
            // The terminal has shown ^C; the prompt is printed on the next line.
            println!();
        }
        interrupted
    }

    fn help(&mut self, _: &[String]) -> Outcome {
        for (name, arguments, what, _) in COMMANDS {
            println!("{:42}{what}", format!("{name} {arguments}"));
        }
        println!("Other words are looked up as programs in {SEARCH}.");
        Ok(())
    }

    fn ls(&mut self, arguments: &[String]) -> Outcome {
        let (options, paths): (Vec<_>, Vec<_>) = arguments.iter().partition(|word| *word == "-l");
        let here = ".".to_owned();
        let paths = if paths.is_empty() { vec![&here] } else { paths };
        for path in paths {
            let mut names =
                names_in(Path::new(path)).map_err(|error| format!("{path}: {error}"))?;
            names.sort_unstable();
            for name in &names {
                if self.was_interrupted() {
                    return Ok(());
                }
                print_name(name, !options.is_empty())?;
            }
        }
        Ok(())
    }

    fn cat(&mut self, arguments: &[String]) -> Outcome {
        let mut buffer = [0; 4096];
        for path in arguments {
            let failed = |error: io::Error| format!("{path}: {error}");
            let mut file = File::open(path).map_err(failed)?;
            loop {
                let count = match file.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => count,
                    Err(error) if error.kind() == ErrorKind::Interrupted => 0,
                    Err(error) => return Err(failed(error)),
                };
                if self.was_interrupted() {
                    return Ok(());
                }
                put(buffer.get(..count).unwrap_or_default())?;
            }
        }
        Ok(())
    }

    fn cd(&mut self, arguments: &[String]) -> Outcome {
        let folder = arguments.first().map_or("/", String::as_str);
        std::env::set_current_dir(folder).map_err(|error| format!("{folder}: {error}"))
    }

    fn echo(&mut self, arguments: &[String]) -> Outcome {
        put(format!("{}\n", arguments.join(" ")).as_bytes())
    }

    fn ps(&mut self, _: &[String]) -> Outcome {
        let mut pids: Vec<u32> = fs::read_dir("/proc")
            .map_err(|error| format!("/proc: {error}"))?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        pids.sort_unstable();
        println!("    PID    PPID S   RSS KiB COMMAND");
        for pid in pids {
            // It may have ended meanwhile.
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            let Some(process) = tables::process(&stat) else { continue };
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            // Kernel threads have none.
            let command = match command.trim_end() {
                "" => format!("[{}]", process.name),
                command => command.to_owned(),
            };
            let kib = process.pages.saturating_mul(page_size() as u64) / 1024;
            println!("{pid:7} {:7} {} {kib:9} {command}", process.parent, process.state);
        }
        Ok(())
    }

    fn free(&mut self, _: &[String]) -> Outcome {
        let text = fs::read_to_string("/proc/meminfo")
            .map_err(|error| format!("/proc/meminfo: {error}"))?;
        for (what, name) in [
            ("total", "MemTotal"),
            ("free", "MemFree"),
            ("available", "MemAvailable"),
            ("cached", "Cached"),
        ] {
            if let Some(kib) = tables::meminfo_kib(&text, name) {
                println!("{what:10}{:7} MiB", kib / 1024);
            }
        }
        Ok(())
    }

    fn dmesg(&mut self, _: &[String]) -> Outcome {
        let failed = |error: io::Error| format!("/dev/kmsg: {error}");
        let flags = libc::O_NONBLOCK;
        let mut log =
            OpenOptions::new().read(true).custom_flags(flags).open("/dev/kmsg").map_err(failed)?;
        // One record per read, never longer (CONSOLE_EXT_LOG_MAX in the kernel).
        let mut record = [0; 8192];
        loop {
            match log.read(&mut record) {
                Ok(count) => {
                    let text = String::from_utf8_lossy(record.get(..count).unwrap_or_default());
                    if let Some(line) = tables::kernel_message(&text) {
                        println!("{line}");
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // The record was overwritten; the next read gives the oldest that is left.
                Err(error)
                    if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) => {}
                Err(error) => return Err(failed(error)),
            }
            if self.was_interrupted() {
                return Ok(());
            }
        }
    }

    fn mount(&mut self, arguments: &[String]) -> Outcome {
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (flags, words) = match words.as_slice() {
            ["-r", rest @ ..] => (MountFlags::RDONLY, rest),
            rest => (MountFlags::empty(), rest),
        };
        match words {
            [] => {
                let text = fs::read_to_string("/proc/mounts")
                    .map_err(|error| format!("/proc/mounts: {error}"))?;
                for mount in tables::mounts(&text) {
                    println!(
                        "{} on {} type {} ({})",
                        mount.source, mount.place, mount.kind, mount.options
                    );
                }
                Ok(())
            }
            ["-t", kind, source, place] => mount(*source, *place, *kind, flags, None)
                .map_err(|error| format!("Cannot mount {source} on {place} as {kind}: {error}")),
            [source, place] => {
                let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
                tables::disk_file_systems(&known)
                    .find(|kind| mount(*source, *place, *kind, flags, None).is_ok())
                    .map(|_| ())
                    .ok_or_else(|| {
                        format!(
                            "Cannot mount {source} on {place} as any file system of this kernel"
                        )
                    })
            }
            _ => Err("Usage: mount [[-r] [-t TYPE] SOURCE FOLDER]".into()),
        }
    }

    fn umount(&mut self, arguments: &[String]) -> Outcome {
        arguments.iter().try_for_each(|place| {
            unmount(place.as_str(), UnmountFlags::empty())
                .map_err(|error| format!("Cannot unmount {place}: {error}"))
        })
    }

    fn uname(&mut self, _: &[String]) -> Outcome {
        let names = rustix::system::uname();
        let parts =
            [names.sysname(), names.nodename(), names.release(), names.version(), names.machine()];
        let parts: Vec<_> = parts.iter().map(|part| part.to_string_lossy()).collect();
        println!("{}", parts.join(" "));
        Ok(())
    }

    fn run_program(&mut self, words: &[String]) -> Outcome {
        let (name, arguments) = words.split_first().ok_or("Usage: run PATH [ARGUMENT]...")?;
        let path = find_program(name).ok_or_else(|| format!("{name}: no such program"))?;
        let status =
            program(path).args(arguments).status().map_err(|error| match error.raw_os_error() {
                Some(libc::ENOEXEC) => format!("{name}: not a program of this machine"),
                Some(libc::ENOENT) => {
                    format!("{name}: its interpreter is missing (a dynamically linked program?)")
                }
                _ => format!("{name}: {error}"),
            })?;
        match (status.code(), status.signal()) {
            (Some(0), _) => Ok(()),
            (Some(code), _) => Err(format!("{name}: exit code {code}")),
            // No message: the terminal has shown ^C.
            (_, Some(libc::SIGINT)) => Err(String::new()),
            (_, Some(signal)) => Err(format!("{name}: killed by signal {signal}")),
            _ => Ok(()),
        }
    }

    fn sh(&mut self, _: &[String]) -> Outcome {
        if !Path::new(BUSYBOX).exists() {
            return Err("This guest has no busybox (install busybox-static on the host)".into());
        }
        self.run_program(&[BUSYBOX.into(), "sh".into()])
    }

    fn reboot(&mut self, arguments: &[String]) -> Outcome {
        end(Ending::Reboot, arguments)
    }

    fn poweroff(&mut self, arguments: &[String]) -> Outcome {
        end(Ending::PowerOff, arguments)
    }
}

/// Signals process 1, which ends the other processes first; with `-f` calls the kernel directly.
fn end(ending: Ending, arguments: &[String]) -> Outcome {
    if arguments.first().is_some_and(|word| word == "-f") {
        power::now(ending);
    }
    let signal = match ending {
        Ending::PowerOff => Signal::USR2,
        Ending::Reboot => Signal::TERM,
    };
    kill_process(Pid::INIT, signal).map_err(|error| format!("Cannot signal process 1: {error}"))?;
    // It ends this process, too.
    std::thread::sleep(std::time::Duration::from_secs(10));
    Err("Process 1 does not respond (try -f)".into())
}

/// A program by its path, or by its name in [`SEARCH`].
fn find_program(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(name.into());
    }
    SEARCH.split(':').map(|folder| Path::new(folder).join(name)).find(|path| path.is_file())
}

/// The entries of a folder; for a file, the file itself.
fn names_in(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return path.symlink_metadata().map(|_| vec![path.into()]);
    }
    fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.path())).collect()
}

fn print_name(path: &Path, long: bool) -> Outcome {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let Ok(metadata) = path.symlink_metadata() else { return put(format!("{name}\n").as_bytes()) };
    let tail = match fs::read_link(path) {
        Ok(target) => format!(" -> {}", target.display()),
        Err(_) if metadata.is_dir() => "/".to_owned(),
        Err(_) => String::new(),
    };
    if long {
        let (mode, size) = (metadata.permissions().mode() & 0o7777, metadata.len());
        put(format!("{mode:04o} {size:12} {name}{tail}\n").as_bytes())
    } else {
        put(format!("{name}{tail}\n").as_bytes())
    }
}

fn put(bytes: &[u8]) -> Outcome {
    let mut output = io::stdout().lock();
    output
        .write_all(bytes)
        .and_then(|()| output.flush())
        .map_err(|error| format!("Cannot print: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_its_own_name_and_says_what_it_does() {
        for (at, (name, _, what, _)) in COMMANDS.iter().enumerate() {
            assert!(!what.is_empty());
            assert!(COMMANDS.iter().skip(at + 1).all(|(other, ..)| other != name), "{name} twice");
        }
    }

    #[test]
    fn programs_are_found_by_path_or_in_the_usual_folders() {
        assert_eq!(
            find_program("/no/such"),
            Some("/no/such".into()),
            "running it says what is wrong"
        );
        assert!(find_program("sh").is_some_and(|path| path.is_absolute()));
        assert_eq!(find_program("no-such-program"), None);
    }

    #[test]
    fn a_folder_is_listed_by_its_names_and_a_file_by_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "x").unwrap();
        assert_eq!(names_in(folder.path()).unwrap(), vec![file.clone()]);
        assert_eq!(names_in(&file).unwrap(), vec![file]);
        assert!(names_in(&folder.path().join("none")).is_err());
    }
}
