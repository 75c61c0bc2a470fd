//! Opens an image with its chain of backing files: each file is checked, locked, and opened in the format that its overlay names.
//!
//! Names of backing files are resolved as QEMU does: a path relative to the folder of the overlay, or `file:` and a path relative
//! to the current directory. Left out: formats of backing files other than raw and qcow2, names with another protocol (`json:`,
//! `nbd:`), and probing the format of a backing file if the image does not name it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
use log::warn;
use rvmm_devices::virtio::blk::{DiskFormat, DiskPlan};
use rvmm_devices::{FilePath, HostError};

use super::super::open::Files;
use super::header::{Backing, Flaw, ImageHeader};
use super::store::Store;
use super::tables;
use crate::config::quoted;

/// Limit of the files of a chain.
const MOST_FILES: usize = 16;

/// One file of a chain.
struct Layer {
    path: FilePath,
    store: Store,
    /// None if it is raw.
    header: Option<ImageHeader>,
}

/// Opens the image in `files`, which the plan names, and its backing files, which stay locked as long as the returned list of
/// files exists.
pub(super) fn open(
    plan: &DiskPlan,
    files: &Files,
) -> Result<(FormatAccess<Store>, Vec<Files>), HostError> {
    let top = layer(&plan.path, files, true)?;
    if !plan.is_read_only {
        check_writable(&plan.path, files, &top)?;
    }
    let mut seen = vec![identity(&plan.path)?];
    let mut layers = vec![top];
    let mut locked = Vec::new();
    while let Some((above, backing)) = next(&layers) {
        if plan.format != (DiskFormat::Qcow2 { has_backing: true }) {
            return Err(HostError::invalid(format!(
                "Cannot use disk {above}: it has the backing file {}, a file of the host (add backing=on if you trust the image to name a file that the guest may read)",
                quoted(&backing.name)
            )));
        }
        let path = path_of(above, backing)?;
        let is_image = is_image(above, backing)?;
        let identity = identity(&path).map_err(|error| named_by(above, error))?;
        if seen.contains(&identity) || seen.len() == MOST_FILES {
            return Err(HostError::invalid(format!(
                "Cannot use disk {}: its chain of backing files has a loop, or more than {MOST_FILES} files (list them: qemu-img info --backing-chain)",
                plan.path
            )));
        }
        seen.push(identity);
        let plan = DiskPlan {
            path: path.clone(),
            is_read_only: true,
            cache: plan.cache,
            format: DiskFormat::Raw,
        };
        let opened = Files::open(&plan).map_err(|error| named_by(above, error))?;
        layers.push(layer(&path, &opened, is_image).map_err(|error| named_by(above, error))?);
        locked.push(opened);
    }
    build(layers, !plan.is_read_only).map(|image| (image, locked))
}

/// The backing file of the lowest file so far, with the path of the latter.
fn next(layers: &[Layer]) -> Option<(&FilePath, &Backing)> {
    let lowest = layers.last()?;
    Some((&lowest.path, lowest.header.as_ref()?.backing.as_ref()?))
}

fn layer(path: &FilePath, files: &Files, is_image: bool) -> Result<Layer, HostError> {
    let unusable = |what: String| HostError::invalid(format!("Cannot use disk {path}: it {what}"));
    let refused = |source| HostError::os(format!("Cannot use disk {path}"), source);
    let mut store = Store::new(files, &path.to_string()).map_err(refused)?;
    let len = files.bytes().map_err(refused)?;
    let header = is_image.then(|| ImageHeader::read(files.readable(), len).map_err(unusable));
    let header = header.transpose()?;
    if header.as_ref().is_some_and(|header| header.flaw.is_some()) {
        store.hide_marks();
    }
    if header.as_ref().is_some_and(|header| header.flaw == Some(Flaw::Corrupt)) {
        warn!(
            "Disk {path} is marked as corrupt: reads may return wrong data (repair it: qemu-img check -r all)"
        );
    }
    Ok(Layer { path: path.clone(), store, header })
}

/// Fails if writing the image could damage it, or loses snapshots.
fn check_writable(path: &FilePath, files: &Files, top: &Layer) -> Result<(), HostError> {
    let Some(header) = &top.header else { return Ok(()) };
    if let Some(flaw) = header.flaw {
        let what = match flaw {
            Flaw::Dirty => "was not closed properly",
            Flaw::Corrupt => "is marked as corrupt",
        };
        return Err(HostError::invalid(format!(
            "Cannot use disk {path}: it {what} (repair it: qemu-img check -r all, or add ro=on)"
        )));
    }
    if header.snapshots > 0 {
        let count = header.snapshots;
        return Err(HostError::invalid(format!(
            "Cannot use disk {path}: it has {count} internal snapshots, which rvmm supports read-only (add ro=on, or remove them: qemu-img snapshot -d)"
        )));
    }
    let refused = |source| HostError::os(format!("Cannot use disk {path}"), source);
    let len = files.bytes().map_err(refused)?;
    tables::check(files.readable(), header, len)
        .map_err(|what| HostError::invalid(format!("Cannot use disk {path}: it {what}")))?;
    if let Some(what) = lost_bitmaps(header) {
        warn!("Disk {path} {what}");
    }
    Ok(())
}

/// A warning about bitmaps that become invalid when the image is written.
pub(super) fn lost_bitmaps(header: &ImageHeader) -> Option<String> {
    let count = header.bitmaps;
    (count > 0).then(|| {
        format!(
            "loses its {count} dirty bitmaps, which rvmm does not update: the next incremental backup has to be a full one (keep them: ro=on)"
        )
    })
}

fn is_image(above: &FilePath, backing: &Backing) -> Result<bool, HostError> {
    match backing.format.as_deref() {
        Some("qcow2") => Ok(true),
        // The latter two are QEMU's names of the protocol layer.
        Some("raw" | "file" | "host_device") => Ok(false),
        other => {
            let name = quoted(&backing.name);
            let what =
                other.map_or("no format".into(), |format| format!("the format {}", quoted(format)));
            Err(HostError::invalid(format!(
                "Cannot use disk {above}: it names {what} for its backing file {name}, supported are raw and qcow2 (set it: qemu-img rebase -u -f qcow2 -b NAME -F FORMAT {above})"
            )))
        }
    }
}

/// The path of a backing file, from its name in the image `above`.
fn path_of(above: &FilePath, backing: &Backing) -> Result<FilePath, HostError> {
    match backing.name.split_once(':') {
        Some(("file", path)) if !path.is_empty() => Ok(path.into()),
        Some((protocol, _)) if !protocol.contains('/') => Err(HostError::invalid(format!(
            "Cannot use disk {above}: it has the backing file {}, which is not a path (set one: qemu-img rebase -u -f qcow2 -b PATH -F FORMAT {above}; ./NAME if the file's name has a colon)",
            quoted(&backing.name)
        ))),
        _ => Ok(beside(above, &backing.name)),
    }
}

/// A path relative to the folder of `image`.
fn beside(image: &FilePath, name: &str) -> FilePath {
    image.parent().unwrap_or(Path::new("")).join(name).into()
}

fn identity(path: &FilePath) -> Result<(u64, u64), HostError> {
    let data = std::fs::metadata(path)
        .map_err(|error| HostError::invalid(format!("Cannot open disk {path}: {error}")))?;
    Ok((data.dev(), data.ino()))
}

fn named_by(above: &FilePath, error: HostError) -> HostError {
    let (what, source) = error.into_parts();
    let what = format!("{what} (a backing file of {above})");
    match source {
        Some(source) => HostError::os(what, source),
        None => HostError::invalid(what),
    }
}

/// Opens the layers, the lowest first, each as the backing file of the next.
fn build(layers: Vec<Layer>, is_written: bool) -> Result<FormatAccess<Store>, HostError> {
    let mut below: Option<FormatAccess<Store>> = None;
    let mut above = layers.len();
    for Layer { path, store, header } in layers.into_iter().rev() {
        above -= 1;
        let opened = match header {
            None => {
                Raw::builder(store).open(DenyImplicitOpenGate::default()).map(FormatAccess::new)
            }
            Some(_) => Qcow2::<Store>::builder(store)
                .write(is_written && above == 0)
                .backing(below.take())
                .data_file(None)
                .open(DenyImplicitOpenGate::default())
                .map(FormatAccess::new),
        };
        below = Some(opened.map_err(|error| {
            HostError::invalid(format!(
                "Cannot use disk {path}: the image is invalid: {error} (check it: qemu-img check)"
            ))
        })?);
    }
    below.ok_or_else(|| HostError::invalid("Cannot use a disk without a file"))
}
