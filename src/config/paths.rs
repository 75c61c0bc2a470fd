//! The paths in a configuration.

use std::path::Path;

use rvmm_devices::FilePath;

use super::{BootConfig, GdbAddress, InitrdConfig, VmConfig};

impl VmConfig {
    /// Makes every path absolute: a relative one begins in `folder`.
    pub fn make_absolute(&mut self, folder: &Path) {
        for path in self.paths() {
            *path = folder.join(&*path).into();
        }
    }

    /// All paths: of files, folders and sockets of the host.
    fn paths(&mut self) -> Vec<&mut FilePath> {
        let BootConfig { kernel, initrd, cmdline: _, dtb, dump_dtb, dtb_addr: _, load, entry: _ } =
            &mut self.boot;
        let mut paths: Vec<&mut FilePath> =
            kernel.iter_mut().chain(dtb).chain(dump_dtb).chain(self.serial.path_mut()).collect();
        paths.extend(match initrd {
            InitrdConfig::None => None,
            InitrdConfig::File(path) | InitrdConfig::Builtin(path) => Some(path),
        });
        paths.extend(load.iter_mut().map(|load| &mut load.file));
        paths.extend(self.devices.iter_mut().flat_map(|device| device.paths()));
        paths.extend(self.trace.iter_mut().map(|trace| &mut trace.file));
        paths.extend(self.gdb.iter_mut().filter_map(|gdb| match &mut gdb.at {
            GdbAddress::Unix(path) => Some(path),
            GdbAddress::Tcp(_) => None,
        }));
        paths
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DeviceConfig, Endpoint, GdbConfig, LoadConfig, TraceConfig};

    #[test]
    fn every_path_of_a_configuration_becomes_absolute() {
        let devices = [
            "blk,path=relative",
            "flash,addr=0x20000000,file=relative",
            "uart,to=file:relative",
            "console,to=unix:relative,port1=a=connect:relative,port7=b=file:relative",
            "vsock,path=relative",
            "fs,tag=a,path=relative",
            "fs,tag=b,socket=relative",
            "vhost-user-blk,socket=relative",
            "vhost-user-net,socket=relative",
            "vhost-user-vsock,socket=relative",
            "blk,path=/absolute",
        ];
        let devices = devices.map(|text| DeviceConfig::parse(text).unwrap()).to_vec();
        let path = || FilePath::from("relative");
        let mut config = VmConfig { devices, ..VmConfig::default() };
        config.boot = BootConfig {
            kernel: Some(path()),
            initrd: InitrdConfig::File(path()),
            dtb: Some(path()),
            dump_dtb: Some(path()),
            load: vec![LoadConfig { file: path(), addr: 0 }],
            ..BootConfig::default()
        };
        config.serial = Endpoint::File(path());
        config.trace = Some(TraceConfig { file: path(), ..TraceConfig::default() });
        config.gdb = Some(GdbConfig { at: GdbAddress::Unix(path()), wait: true });
        let text = |config: &VmConfig| serde_json::to_string(config).unwrap();
        let count = |text: &str, part: &str| text.matches(part).count();
        let before = text(&config);
        config.make_absolute("/folder".as_ref());
        let after = text(&config);
        assert_eq!(count(&before, "relative"), 20);
        assert_eq!(count(&after, "/folder/relative"), 20, "{after}");
        assert_eq!(count(&after, "relative"), 20);
        assert_eq!(count(&after, "\"/absolute\""), 1);
    }
}
