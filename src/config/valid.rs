//! Checks of a configuration that need neither files nor the host.

use std::ops::Deref;

use rvmm_boot::error::Size;
use rvmm_devices::Placement;

use super::{
    BootConfig, CpuConfig, CsrValue, DeviceConfig, Endpoint, ExtensionChange, GdbAddress,
    HUGE_MEM_STEP, MAX_CPUS, MAX_MEM, MAX_NAME, MAX_SOCKET_PATH, MEM_STEP, MIN_MEM, TraceConfig,
    VmConfig, slots,
};
use crate::error::Error;

/// A checked configuration: it is consistent and within rvmm's limits, and its devices have their slots. Files, KVM and the host are
/// not checked yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidConfig {
    config: VmConfig,
    /// The slot of each device, in the order of the devices.
    slots: Vec<Option<usize>>,
}

impl Deref for ValidConfig {
    type Target = VmConfig;

    fn deref(&self) -> &VmConfig {
        &self.config
    }
}

impl ValidConfig {
    /// Returns the configuration, to be changed and checked again.
    #[must_use]
    pub fn into_inner(self) -> VmConfig {
        self.config
    }

    /// The devices, each with its slot; `None` for a device outside the slots.
    pub(crate) fn placed_devices(&self) -> impl Iterator<Item = (&DeviceConfig, Option<usize>)> {
        self.config.devices.iter().zip(self.slots.iter().copied())
    }

    /// Number of slots up to the last one in use.
    pub(crate) fn slot_reach(&self) -> usize {
        self.slots.iter().flatten().max().map_or(0, |last| last + 1)
    }

    /// Removes the file that the device tree is written to.
    pub(crate) fn forget_tree_file(&mut self) {
        self.config.boot.dump_dtb = None;
    }
}

impl VmConfig {
    /// Checks everything that needs neither files nor the host.
    ///
    /// # Errors
    /// [`Error::Config`] with the first mistake, its value, and what to do; [`Error::Device`] for a device
    /// that is not in the catalog or an option that it does not take.
    pub fn validate(&self) -> Result<ValidConfig, Error> {
        let mut config = self.clone();
        config.cpus.count = config.cpus.count.max(1);
        check_name(&config.name)?;
        check_mem(config.mem, config.hugepages)?;
        config.cpus.check()?;
        config.boot.check(config.has_device("flash"))?;
        check_serial(&config.serial)?;
        if let Some(gdb) = &config.gdb {
            gdb.at.check()?;
        }
        let slots = check_devices(&config.devices)?;
        config.trace.as_ref().map_or(Ok(()), TraceConfig::check)?;
        Ok(ValidConfig { config, slots })
    }
}

fn refuse<T>(what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Config(what.into()))
}

fn check_name(name: &str) -> Result<(), Error> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if (1..=MAX_NAME).contains(&name.len()) && name.chars().all(good) {
        return Ok(());
    }
    refuse(format!(
        "Cannot use --name {}: a name has 1 to {MAX_NAME} letters, digits, '_' and '-'",
        quoted(name)
    ))
}

fn check_mem(mem: u64, hugepages: bool) -> Result<(), Error> {
    if mem < MIN_MEM {
        return refuse(format!(
            "Cannot use --mem {}: a machine has at least {} (Linux needs 128M or more)",
            Size(mem),
            Size(MIN_MEM)
        ));
    }
    if mem > MAX_MEM {
        return refuse(format!(
            "Cannot use --mem {}: guest-physical addresses have 56 bits (use less than 65536T)",
            Size(mem)
        ));
    }
    // No size is proposed here: the next one may be too small for the files, which are opened later.
    if hugepages && !mem.is_multiple_of(HUGE_MEM_STEP) {
        return refuse(format!(
            "Cannot use --mem {} with --hugepages: it is not a multiple of {} (use one that is, or leave --hugepages out)",
            Size(mem),
            Size(HUGE_MEM_STEP)
        ));
    }
    if !mem.is_multiple_of(MEM_STEP) {
        return refuse(format!(
            "Cannot use --mem {}: it is not a multiple of {} (use one that is, such as any number of M)",
            Size(mem),
            Size(MEM_STEP)
        ));
    }
    Ok(())
}

impl CpuConfig {
    fn check(&self) -> Result<(), Error> {
        if self.count > MAX_CPUS {
            return refuse(format!(
                "Cannot use --cpus {}: a machine has at most {MAX_CPUS} harts",
                self.count
            ));
        }
        check_knobs("--isa", &self.isa)?;
        check_knobs("--sbi", &self.sbi)?;
        for (index, csr) in self.csrs.iter().enumerate() {
            let number = csr.number;
            CsrValue::number(&format!("{number:#x}"))
                .or_else(|reason| refuse(format!("Cannot use --csr {number:#x}: {reason}")))?;
            if self.csrs.iter().take(index).any(|other| other.number == number) {
                return refuse(format!(
                    "Cannot use --csr {number:#x}: it is given twice (leave one out)"
                ));
            }
        }
        let mut seen = Vec::with_capacity(self.affinity.len());
        for &(hart, cpu) in &self.affinity {
            let last = self.count - 1;
            if hart > last {
                return refuse(format!(
                    "Cannot use --affinity {hart}={cpu}: there is no hart {hart} (the last one is {last}; see --cpus)"
                ));
            }
            if seen.contains(&hart) {
                return refuse(format!(
                    "Cannot use --affinity {hart}={cpu}: hart {hart} is pinned twice (leave one out)"
                ));
            }
            seen.push(hart);
        }
        Ok(())
    }
}

fn check_knobs(flag: &str, knobs: &[ExtensionChange]) -> Result<(), Error> {
    for (index, knob) in knobs.iter().enumerate() {
        let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        if knob.name.is_empty() || !knob.name.chars().all(good) {
            return refuse(format!(
                "Cannot use {flag} {}: an extension's name has lower-case letters and digits only",
                quoted(&knob.name)
            ));
        }
        if knobs.iter().take(index).any(|other| other.name == knob.name) {
            return refuse(format!(
                "Cannot use {flag}: {} is given twice (leave one out)",
                knob.name
            ));
        }
    }
    Ok(())
}

impl BootConfig {
    fn check(&self, has_flash: bool) -> Result<(), Error> {
        if self.kernel.is_some() || !self.load.is_empty() {
            return Ok(());
        }
        match self.entry {
            Some(_) if has_flash => Ok(()),
            None if has_flash => refuse(
                "Nothing to run: give --entry ADDR, an address in the flash, or --kernel FILE or --load FILE@ADDR",
            ),
            Some(entry) => refuse(format!(
                "Cannot use --entry {entry:#x}: nothing is loaded there (add --kernel FILE or --load FILE@ADDR)"
            )),
            None => {
                refuse("Nothing to run: give --kernel FILE or --load FILE@ADDR (see rvmm --help)")
            }
        }
    }
}

fn check_serial(serial: &Endpoint) -> Result<(), Error> {
    let path = match serial {
        Endpoint::Unix(path) | Endpoint::Connect(path) | Endpoint::File(path) => path,
        Endpoint::Stdio | Endpoint::Null | Endpoint::Pty => return Ok(()),
    };
    let len = path.as_os_str().len();
    if len == 0 {
        return refuse("Cannot use --serial: its path is empty (write file:PATH or unix:PATH)");
    }
    if !matches!(serial, Endpoint::File(_)) && len > MAX_SOCKET_PATH {
        return refuse(format!(
            "Cannot use --serial unix:PATH: the path has {len} bytes, a socket's at most {MAX_SOCKET_PATH} (use a shorter one)"
        ));
    }
    Ok(())
}

impl TraceConfig {
    fn check(&self) -> Result<(), Error> {
        if self.file.as_os_str().is_empty() {
            return refuse("Cannot use --trace: its file is missing (write --trace exits.json)");
        }
        let (least, most) = (Self::MIN_RING, Self::MAX_RING);
        match self.ring.filter(|ring| !(least..=most).contains(ring)) {
            None => Ok(()),
            Some(ring) => refuse(format!(
                "Cannot use --trace with ring={ring}: a ring holds {least} to {most} records"
            )),
        }
    }
}

impl GdbAddress {
    fn check(&self) -> Result<(), Error> {
        let Self::Unix(path) = self else { return Ok(()) };
        match path.as_os_str().len() {
            0 => refuse("Cannot use --gdb: its path is empty (write unix:PATH)"),
            len if len > MAX_SOCKET_PATH => refuse(format!(
                "Cannot use --gdb unix:PATH: the path has {len} bytes, a socket's at most {MAX_SOCKET_PATH} (use a shorter one)"
            )),
            _ => Ok(()),
        }
    }
}

/// Checks values that exclude each other, and returns the slots.
fn check_devices(devices: &[DeviceConfig]) -> Result<Vec<Option<usize>>, Error> {
    for (index, device) in devices.iter().enumerate() {
        let name = device.model().name;
        device
            .check()
            .map_err(|error| Error::Device(format!("Cannot use --device {name}: {error}")))?;
        let is_again = devices.iter().take(index).any(|other| other.model().name == name);
        if device.model().placement == Placement::Fixed && is_again {
            return Err(Error::Device(format!(
                "Cannot use --device {name}: a machine has one {name} only (leave one out)"
            )));
        }
    }
    slots::assign(devices)
}

/// Quotes a user's text for a message: without control characters, not longer than a line.
pub(crate) fn quoted(text: &str) -> String {
    const MOST: usize = 80;
    let mut out = String::from("'");
    for c in text.chars().take(MOST) {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out.push_str(if text.chars().nth(MOST).is_some() { "...'" } else { "'" });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{FilePath, GdbConfig, LoadConfig};

    fn bootable() -> VmConfig {
        let mut config = VmConfig::default();
        config.boot.kernel = Some("Image".into());
        config
    }

    /// The refusal of a bootable machine after `change`.
    fn refusal(change: impl FnOnce(&mut VmConfig)) -> String {
        let mut config = bootable();
        change(&mut config);
        let error = config.validate().expect_err("the change makes it invalid");
        assert_eq!(error.exit_code(), crate::error::EXIT_USAGE);
        let text = error.to_string();
        assert!(!text.contains('\n'), "one line: {text}");
        text
    }

    #[test]
    fn a_kernel_is_all_that_a_machine_needs() {
        let valid = bootable().validate().expect("the defaults are valid");
        assert_eq!(valid.mem, 512 << 20);
        assert_eq!(valid.cpus.count, 1);
        assert_eq!(valid.into_inner(), bootable());
    }

    #[test]
    fn a_flat_binary_with_an_entry_needs_no_kernel() {
        let mut config = VmConfig::default();
        config.boot.load = vec![LoadConfig { file: "a.bin".into(), addr: 0x8000_0000 }];
        config.boot.entry = Some(0x8000_0000);
        config.validate().expect("a flat binary can be started");
    }

    #[test]
    fn firmware_in_a_flash_needs_an_entry_and_no_file() {
        let devices = vec![DeviceConfig::parse("flash,addr=0x20000000,file=CODE.fd").unwrap()];
        let mut config = VmConfig { devices, ..VmConfig::default() };
        let error = config.validate().expect_err("no entry point").to_string();
        assert!(error.contains("--entry ADDR"), "{error}");
        config.boot.entry = Some(0x2000_0000);
        config.validate().expect("the flash is started");
    }

    #[test]
    fn nothing_to_run_is_refused() {
        let text = refusal(|config| config.boot.kernel = None);
        assert!(text.contains("--kernel") && text.contains("--load"), "{text}");
    }

    #[test]
    fn an_entry_without_anything_loaded_is_refused() {
        let text = refusal(|config| {
            config.boot.kernel = None;
            config.boot.entry = Some(0x8000_0000);
        });
        assert!(text.contains("--entry 0x80000000"), "{text}");
    }

    #[test]
    fn memory_is_a_multiple_of_the_page_size_also_with_huge_pages() {
        let mut config = bootable();
        for mem in [33 << 20, 39 << 20, (64 << 20) + 4096] {
            config.mem = mem;
            config.validate().expect("a number of pages");
        }
        config.hugepages = true;
        let error = config.validate().expect_err("half a huge page").to_string();
        assert!(error.contains("not a multiple of 2M"), "{error}");
        config.mem = 34 << 20;
        config.validate().expect("a number of huge pages");
    }

    #[test]
    fn no_harts_at_all_means_one() {
        let mut config = bootable();
        config.cpus.count = 0;
        assert_eq!(config.validate().expect("0 is taken as 1").cpus.count, 1);
    }

    #[test]
    fn the_most_harts_are_accepted_and_one_more_is_refused() {
        let mut config = bootable();
        config.cpus.count = MAX_CPUS;
        config.validate().expect("the limit itself is fine");
        assert!(refusal(|config| config.cpus.count = MAX_CPUS + 1).contains("--cpus 513"));
    }

    #[test]
    fn memory_that_is_too_small_too_large_or_odd_is_refused_with_what_to_do() {
        assert!(refusal(|config| config.mem = 0).contains("--mem 0"));
        assert!(refusal(|config| config.mem = MIN_MEM - MEM_STEP).contains("at least 16M"));
        let odd = refusal(|config| config.mem = (17 << 20) + 1);
        assert!(odd.contains("not a multiple of 4K (use one that is"), "{odd}");
        assert!(refusal(|config| config.mem = u64::MAX).contains("56 bits"));
        let mut config = bootable();
        config.mem = MAX_MEM;
        config.validate().expect("the limit itself is fine");
    }

    #[test]
    fn names_are_short_and_plain() {
        let long = "n".repeat(MAX_NAME + 1);
        for name in ["", "two words", "../../etc", "a\nb", "\u{1b}[31m", "n\0", "ä", long.as_str()]
        {
            let text = refusal(|config| config.name = name.into());
            assert!(text.contains("--name") && !text.contains('\u{1b}'), "{text}");
        }
        let mut config = bootable();
        config.name = "n".repeat(MAX_NAME);
        config.validate().expect("64 letters are fine");
    }

    #[test]
    fn a_hart_that_does_not_exist_cannot_be_pinned() {
        let text = refusal(|config| config.cpus.affinity = vec![(0, 2), (1, 3)]);
        assert!(text.contains("--affinity 1=3") && text.contains("no hart 1"), "{text}");
    }

    #[test]
    fn a_hart_is_pinned_once() {
        let text = refusal(|config| config.cpus.affinity = vec![(0, 2), (0, 3)]);
        assert!(text.contains("pinned twice"), "{text}");
    }

    #[test]
    fn two_harts_may_share_a_host_cpu() {
        let mut config = bootable();
        config.cpus.count = 2;
        config.cpus.affinity = vec![(0, 0), (1, 0)];
        config.validate().expect("sharing is slow, not wrong");
    }

    #[test]
    fn an_extension_is_named_once_and_in_lower_case() {
        let knob = |name: &str, on| ExtensionChange { name: name.into(), on };
        let twice = vec![knob("v", false), knob("v", true)];
        assert!(refusal(|config| config.cpus.isa = twice).contains("given twice"));
        assert!(
            refusal(|config| config.cpus.sbi = vec![knob("PMU", false)]).contains("--sbi 'PMU'")
        );
        assert!(refusal(|config| config.cpus.sbi = vec![knob("", false)]).contains("--sbi"));
    }

    #[test]
    fn a_socket_path_that_no_socket_can_have_is_refused() {
        let path = FilePath::from("s".repeat(MAX_SOCKET_PATH + 1));
        assert!(refusal(|config| config.serial = Endpoint::Unix(path)).contains("108 bytes"));
        for (path, part) in
            [("s".repeat(MAX_SOCKET_PATH + 1), "108 bytes"), (String::new(), "empty")]
        {
            let at = GdbAddress::Unix(path.into());
            let text = refusal(|config| config.gdb = Some(GdbConfig { at, wait: true }));
            assert!(text.contains("--gdb") && text.contains(part), "{text}");
        }
        assert!(
            refusal(|config| config.serial = Endpoint::File(FilePath::default()))
                .contains("--serial")
        );
    }

    #[test]
    fn the_board_has_one_of_each_of_its_devices() {
        let clock = || DeviceConfig::parse("rtc").unwrap();
        assert!(refusal(|config| config.devices = vec![clock(), clock()]).contains("one rtc only"));
    }

    #[test]
    fn a_device_whose_options_exclude_each_other_is_refused() {
        let net: DeviceConfig = serde_json::from_str(r#"{"model":"net"}"#).unwrap();
        let text = refusal(|config| config.devices = vec![net]);
        assert!(text.starts_with("Cannot use --device net: The host interface"), "{text}");
    }

    #[test]
    fn a_valid_configuration_knows_the_slots_of_its_devices() {
        for (texts, reach) in [
            (vec![], 0),
            (vec!["rng"], 1),
            (vec!["serial"], 0),
            (vec!["rng", "rng,slot=4", "rng"], 5),
        ] {
            let mut config = bootable();
            config.devices = texts.iter().map(|text| DeviceConfig::parse(text).unwrap()).collect();
            assert_eq!(config.validate().unwrap().slot_reach(), reach, "{texts:?}");
        }
    }

    #[test]
    fn a_quoted_text_is_short_and_has_no_control_characters() {
        assert_eq!(quoted("a\u{7}b"), "'a\\u{7}b'");
        let long = quoted(&"x".repeat(100_000));
        assert!(long.len() < 100 && long.ends_with("...'"), "{long}");
    }

    #[test]
    fn a_configuration_survives_json_and_unknown_keys_are_refused() {
        let text = serde_json::to_string(&bootable()).expect("plain data");
        assert_eq!(serde_json::from_str::<VmConfig>(&text).expect("its own output"), bootable());
        assert!(serde_json::from_str::<VmConfig>(r#"{"memory": 1}"#).is_err());
        let sparse: VmConfig =
            serde_json::from_str(r#"{"boot":{"kernel":"Image"},"cpus":{"isa":[]}}"#)
                .expect("all has a default");
        assert_eq!(sparse.validate().expect("valid").cpus.count, 1);
    }
}
