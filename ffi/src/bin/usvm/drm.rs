//! The DRM nodes of this machine, and what is known of them without asking their drivers.
//!
//! # Overview
//! Nodes are listed from /dev/dri; driver, place on the bus and address windows come from /sys. Nothing is opened, so
//! looking disturbs nobody and needs no rights.
//!
//! # Limits
//! Where /sys is not there (some containers) only the path and the permission are known.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::Access;
use serde::Serialize;

/// One node.
#[derive(Debug, Serialize)]
pub struct Node {
    /// Its path.
    pub path: PathBuf,
    /// The kernel driver's name.
    pub driver: Option<String>,
    /// Where it is on the bus, e.g. 0000:03:00.0.
    pub pci: Option<String>,
    /// Vendor and device, e.g. 8086:56a0.
    pub vendor_device: Option<String>,
    /// The largest window through which the CPU reaches it.
    pub window_bytes: Option<u64>,
    /// Whether this user may open it.
    pub accessible: bool,
    /// The group that may.
    #[serde(skip)]
    pub group: u32,
    /// Whether usvm uses it.
    pub used: bool,
}

impl Node {
    /// Whether it is a render node: what programs compute with.
    pub fn is_render(&self) -> bool {
        self.path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("renderD"))
    }

    /// What it is, in few words.
    pub fn words(&self) -> String {
        let known = [
            Some(self.driver.clone().unwrap_or_else(|| "driver unknown".into())),
            self.vendor_device.clone(),
            self.pci.clone(),
            self.window_bytes.map(|bytes| format!("window of {}", crate::say::bytes(bytes))),
        ];
        known.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// All nodes, in order.
pub fn nodes() -> Vec<Node> {
    nodes_in(Path::new("/dev/dri"), Path::new("/sys"))
}

fn nodes_in(directory: &Path, sys: &Path) -> Vec<Node> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let is_node = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("card") || name.starts_with("renderD")
    };
    let mut nodes: Vec<Node> =
        entries.flatten().map(|e| e.path()).filter(is_node).map(|path| node(path, sys)).collect();
    nodes.sort_by(|a, b| a.path.cmp(&b.path));
    nodes
}

fn node(path: PathBuf, sys: &Path) -> Node {
    let device = sys.join("class/drm").join(path.file_name().unwrap_or_default()).join("device");
    let name_of = |link: &str| {
        let target = fs::canonicalize(device.join(link)).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    };
    let id = |file: &str| {
        let text = fs::read_to_string(device.join(file)).ok()?;
        Some(text.trim().trim_start_matches("0x").to_owned())
    };
    let vendor_device = id("vendor").zip(id("device")).map(|(vendor, device)| format!("{vendor}:{device}"));
    Node {
        driver: name_of("driver"),
        pci: vendor_device.is_some().then(|| name_of("")).flatten(),
        window_bytes: fs::read_to_string(device.join("resource")).ok().and_then(|text| largest_window(&text)),
        vendor_device,
        accessible: rustix::fs::access(&path, Access::READ_OK | Access::WRITE_OK).is_ok(),
        group: fs::metadata(&path).map_or(0, |meta| meta.gid()),
        path,
        used: false,
    }
}

/// The largest of the windows that a PCI device's `resource` file lists as "first last flags".
fn largest_window(resource: &str) -> Option<u64> {
    let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    let sizes = resource.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (first, last) = (number(words.next()?)?, number(words.next()?)?);
        (last > first).then(|| last - first + 1)
    });
    sizes.max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_card_is_described_from_sys() {
        let place = tempfile::tempdir().unwrap();
        let (dev, sys) = (place.path().join("dri"), place.path().join("sys"));
        let device = sys.join("devices/0000:03:00.0");
        for directory in [&dev, &device, &sys.join("drivers/i915"), &sys.join("class/drm/renderD128")] {
            fs::create_dir_all(directory).unwrap();
        }
        fs::write(dev.join("renderD128"), "").unwrap();
        fs::create_dir(dev.join("by-path")).unwrap();
        symlink(&device, sys.join("class/drm/renderD128/device")).unwrap();
        symlink(sys.join("drivers/i915"), device.join("driver")).unwrap();
        fs::write(device.join("vendor"), "0x8086\n").unwrap();
        fs::write(device.join("device"), "0x56a0\n").unwrap();
        let resource = "0x00000000a0000000 0x00000000a0ffffff 0x0000000000140204\n\
                        0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                        0x0000004000000000 0x000000400fffffff 0x000000000014220c\n";
        fs::write(device.join("resource"), resource).unwrap();
        let nodes = nodes_in(&dev, &sys);
        assert_eq!(nodes.len(), 1);
        let card = &nodes[0];
        assert!(card.is_render() && card.accessible);
        assert_eq!(card.words(), "i915, 8086:56a0, 0000:03:00.0, window of 256.0 MiB");
    }

    #[test]
    fn nothing_is_no_error() {
        assert!(nodes_in(Path::new("/nowhere"), Path::new("/nowhere")).is_empty());
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("card0"), "").unwrap();
        let nodes = nodes_in(place.path(), Path::new("/nowhere"));
        assert_eq!(nodes[0].words(), "driver unknown");
    }
}
