//! Sets up a lab: from its definition and the user's options to the machines that run it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use rustix::fs::{MemfdFlags, memfd_create};

use super::catalog::{Guest, LOAD_ADDRESS, Lab, ORIGIN, Variant};
use super::narrator::{Code, Narration};
use super::pflash;
use crate::config::{
    BootConfig, CsrValue, DeviceConfig, Endpoint, InitrdConfig, LoadConfig, StartMode, TimerChoice,
    Unassigned, VmConfig,
};
use crate::error::Error;
use crate::host::read_small;
use crate::memory::{PAGE, Rom};
use crate::terminal::Console;
use crate::vmm::{Parts, Vmm};

/// The user's options for a lab.
#[derive(Debug, Clone, Default)]
pub struct LabOptions {
    /// A flat file that replaces the lab's own guest.
    pub payload: Option<PathBuf>,
    /// The kernel of a lab with Linux; the host's own by default.
    pub kernel: Option<PathBuf>,
    /// True if exits are explained.
    pub explain: bool,
    /// Time limit of a lab in seconds.
    pub limit_s: u64,
}

/// The device with the hypervisor's constant, and the CSR: the numbers of simple_hv.
const CONSTANT: &str = "const,addr=0x40,value=0x6688";
const MHARTID: CsrValue = CsrValue { number: 0xf14, value: 0x1234 };

/// The address of the flash in the courses' machines.
const FLASH: u64 = 0x2200_0000;

/// The addresses of kernel and tree in the variant `moved` of dtb.
const MOVED_KERNEL: u64 = 0x9000_0000;
const MOVED_TREE: u64 = 0x9800_0000;

/// The name of the socket in the configurations of two-vms.
const SOCKET: &str = "link.sock";

/// RAM of a lab: extends beyond 0x9000_0000, where the RVM tutorial's guests are. The host allocates only pages that are used.
const MEM: u64 = 512 << 20;

/// A lab whose machines can be built.
pub(super) struct LabSetup {
    /// Its machines, in the order in which they are built.
    pub(super) configs: Vec<VmConfig>,
    pub(super) narration: Narration,
    pub(super) code: Code,
    /// The lines that the host prints after a guest has powered off.
    pub(super) closing_lines: &'static [&'static str],
    /// Files that exist only as descriptors: open as long as the machine may reboot.
    pub(super) _files: Vec<File>,
    /// A folder that is removed with the lab.
    pub(super) _folder: Option<Folder>,
}

/// The reason why a lab cannot be run.
#[derive(Debug)]
pub(super) enum SetupError {
    /// The host lacks something.
    Host(String),
    /// The lab cannot be set up.
    Failed(Error),
}

impl From<Error> for SetupError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

pub(super) fn set_up(
    lab: &Lab,
    variant: &Variant,
    options: &LabOptions,
) -> Result<LabSetup, SetupError> {
    let mut config = VmConfig { name: "lab".into(), mem: MEM, ..VmConfig::default() };
    let mut files = Vec::new();
    let mut code = Code { bytes: Vec::new(), addr: LOAD_ADDRESS };
    match lab.guest {
        Guest::Bare { payload, addr } => {
            code = Code { bytes: payload.to_vec(), addr };
            if let Some(path) = &options.payload {
                code.bytes = read(path)?;
            }
            let file = in_memory(&code.bytes, &mut files)?;
            config.boot.load = vec![LoadConfig { file: file.into(), addr }];
            config.boot.entry = Some(addr);
        }
        Guest::Pair { payload, configs } => return pair(payload, configs, options),
        Guest::Linux if options.payload.is_some() => {
            let what =
                format!("Lab {} takes a kernel and no other payload (use --kernel)", lab.name);
            return Err(Error::Config(what).into());
        }
        Guest::Linux => {
            config.boot.kernel = Some(kernel(options)?.into());
            config.boot.initrd = InitrdConfig::Builtin("/proc/self/exe".into());
            config.boot.cmdline = "console=ttyS0 quiet".into();
            config.cpus.count = 4;
        }
    }
    let mut kept = None;
    let (mut narration, mut closing_lines): (_, &[&str]) = (Narration::Silent, &[]);
    match lab.name {
        "h_1_0" => {
            (narration, closing_lines) =
                (Narration::Exit, &["Shutdown vm normally!", "Hypervisor ok!"]);
            config.cpus.mode = StartMode::User;
        }
        "simple_hv" => {
            (narration, closing_lines) =
                (Narration::Exits, &["Shutdown vm normally!", "Hypervisor ok!"]);
            config.cpus.mode = StartMode::User;
            config.cpus.csrs = vec![MHARTID];
            config.devices = vec![device(CONSTANT)?];
        }
        "h_2_0" => {
            config.devices = vec![flash(variant.name, ORIGIN, &mut files)?];
            if variant.name == "lazy" {
                narration = Narration::Faults;
            }
        }
        "h_3_0" if variant.name == "user" => {
            narration = Narration::Timer;
            config.timer = TimerChoice::User;
        }
        "h_4_0" => config.devices = vec![flash("map", ORIGIN, &mut files)?],
        "rvm-1" | "rvm-2" => {
            closing_lines = &["hello world in kernel"];
            config.unassigned = Unassigned::Fault;
        }
        "smp" => config.cpus.count = 4,
        "dtb" if variant.name == "moved" => {
            for load in &mut config.boot.load {
                load.addr = MOVED_KERNEL;
            }
            config.boot.entry = Some(MOVED_KERNEL);
            config.boot.dtb_addr = Some(MOVED_TREE);
        }
        "dtb" if variant.name == "own" => {
            // Building a machine writes its tree; it is not run.
            let folder = Folder::new()?;
            let tree = folder.path.join("tree.dtb");
            let dumped = VmConfig {
                boot: BootConfig { dump_dtb: Some(tree.as_path().into()), ..config.boot.clone() },
                ..config.clone()
            };
            let parts = Parts { console: Some(Console::null()), ..Parts::default() };
            drop(Vmm::build_with(dumped.validate()?, parts)?);
            config.boot.dtb = Some(tree.into());
            kept = Some(folder);
        }
        _ => {}
    }
    Ok(LabSetup {
        configs: vec![config],
        narration,
        code,
        closing_lines,
        _files: files,
        _folder: kept,
    })
}

/// Sets up two machines, with the paths of the file and the socket in their configurations replaced.
fn pair(payload: &[u8], configs: [&str; 2], options: &LabOptions) -> Result<LabSetup, SetupError> {
    let mut files = Vec::new();
    let code = match &options.payload {
        Some(path) => read(path)?,
        None => payload.to_vec(),
    };
    let file = in_memory(&code, &mut files)?;
    let folder = Folder::new()?;
    let socket = folder.path.join(SOCKET);
    let of = |text: &str| {
        let mut config = VmConfig::from_json(text.as_bytes()).map_err(|error| {
            Error::Config(format!("Cannot read the lab's own configuration: {error}"))
        })?;
        for load in &mut config.boot.load {
            load.file = file.as_path().into();
        }
        for device in &mut config.devices {
            let DeviceConfig::Uart(uart) = device else { continue };
            if let Endpoint::Unix(path) | Endpoint::Connect(path) = &mut uart.to {
                *path = socket.as_path().into();
            }
        }
        Ok(config)
    };
    let configs = configs.into_iter().map(of).collect::<Result<Vec<_>, Error>>()?;
    let code = Code { bytes: code, addr: LOAD_ADDRESS };
    Ok(LabSetup {
        configs,
        narration: Narration::Silent,
        code,
        closing_lines: &[],
        _files: files,
        _folder: Some(folder),
    })
}

/// A temporary folder of this process, removed with its contents.
pub(super) struct Folder {
    path: PathBuf,
}

impl Folder {
    fn new() -> Result<Self, Error> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("rvmm-lab-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let path = std::env::temp_dir().join(name);
        let made = fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|source| Error::File { verb: "create", path: path.clone(), source })?;
        Ok(Self { path })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // On failure the rest stays in the folder for temporary files.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The flash device of a lab; in mode passthrough the host's own, if it has an image.
fn flash(mode: &str, program: &[u8], files: &mut Vec<File>) -> Result<DeviceConfig, SetupError> {
    if mode == "passthrough" {
        host_flash()?;
        return Ok(device(&format!("flash,addr={FLASH:#x},mode=passthrough,size=4096"))?);
    }
    let image = pflash::image(program).map_err(Error::Config)?;
    let path = in_memory(&image, files)?;
    Ok(device(&format!("flash,addr={FLASH:#x},mode={mode},file={}", path.display()))?)
}

fn device(text: &str) -> Result<DeviceConfig, Error> {
    DeviceConfig::parse(text).map_err(|error| Error::Device(error.to_string()))
}

/// Checks that the host has a readable flash at the address, with an image. Its device tree is checked first: a read of an address
/// without a device can hang a machine.
fn host_flash() -> Result<(), SetupError> {
    let missing = |why: &str| Err(SetupError::Host(why.into()));
    let nodes = fs::read_dir("/sys/firmware/devicetree/base").into_iter().flatten().flatten();
    let flashes = nodes.filter(|node| node.file_name().to_string_lossy().starts_with("flash@"));
    let is_there = |reg: Vec<u8>| reg.chunks(8).step_by(2).any(|addr| addr == FLASH.to_be_bytes());
    if !flashes.filter_map(|node| fs::read(node.path().join("reg")).ok()).any(is_there) {
        return missing("this host has no flash at 0x22000000");
    }
    let mut magic = [0; 4];
    let mapped = File::open("/dev/mem").and_then(|memory| Rom::of(memory, FLASH, PAGE));
    match mapped.and_then(|flash| flash.read(0, &mut magic)) {
        Ok(()) if magic == pflash::MAGIC => Ok(()),
        Ok(()) => missing("this host's flash has no image of rvmm mkpflash"),
        Err(error) => {
            missing(&format!("this host's flash cannot be read ({error}; only root can)"))
        }
    }
}

/// Path of the kernel: the given one, or the one that this host has booted.
fn kernel(options: &LabOptions) -> Result<PathBuf, SetupError> {
    if let Some(path) = &options.kernel {
        return Ok(path.clone());
    }
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let candidates = [
        format!("/boot/vmlinux-{release}"),
        format!("/boot/vmlinuz-{release}"),
        "/boot/Image".into(),
    ];
    let found = candidates.iter().map(Path::new).find(|path| path.is_file());
    found.map(Into::into).ok_or_else(|| {
        SetupError::Host(format!(
            "there is no kernel in /boot for {release} (give one: --kernel FILE)"
        ))
    })
}

/// Reads a program of the user's: a guest, or the content of a flash. Not longer than a flash; an endless device is refused.
pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
    read_small(path, pflash::SIZE as u64)
}

/// Creates an anonymous file with these bytes; returns a path by which this process can open it.
fn in_memory(bytes: &[u8], files: &mut Vec<File>) -> Result<PathBuf, Error> {
    let made = || -> io::Result<File> {
        let mut file = File::from(memfd_create("lab", MemfdFlags::CLOEXEC)?);
        file.write_all(bytes)?;
        Ok(file)
    };
    let file = made()
        .map_err(|source| Error::Host { what: "Cannot create a file in memory".into(), source })?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    files.push(file);
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labs::LABS;

    #[test]
    fn every_lab_becomes_a_valid_configuration() {
        let options = LabOptions { kernel: Some("Image".into()), ..LabOptions::default() };
        for lab in LABS {
            // The variant own needs KVM for its tree.
            for variant in lab.variants.iter().filter(|variant| variant.name != "own") {
                match set_up(lab, variant, &options) {
                    Ok(setup) => {
                        for config in setup.configs {
                            config.validate().unwrap();
                        }
                    }
                    Err(SetupError::Host(why)) => {
                        assert!(variant.name == "passthrough", "{}: {why}", lab.name)
                    }
                    Err(SetupError::Failed(error)) => panic!("{}: {error}", lab.name),
                }
            }
        }
    }

    #[test]
    fn a_payload_of_the_user_replaces_that_of_the_lab() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), b"mine").unwrap();
        let options = LabOptions { payload: Some(file.path().into()), ..LabOptions::default() };
        let lab = Lab::find("simple_hv").unwrap();
        let setup = set_up(lab, &lab.variants[0], &options).ok().unwrap();
        let loaded = &setup.configs[0].boot.load[0];
        assert_eq!(
            (fs::read(&loaded.file).unwrap(), loaded.addr),
            (b"mine".to_vec(), LOAD_ADDRESS)
        );
    }

    #[test]
    fn an_endless_file_is_no_program() {
        assert!(matches!(read(Path::new("/dev/zero")), Err(Error::Config(_))));
    }

    #[test]
    fn a_payload_that_cannot_be_read_is_a_usage_error() {
        let options = LabOptions { payload: Some("/nowhere".into()), ..LabOptions::default() };
        let lab = Lab::find("h_1_0").unwrap();
        assert!(matches!(
            set_up(lab, &lab.variants[0], &options),
            Err(SetupError::Failed(Error::File { .. }))
        ));
    }
}
