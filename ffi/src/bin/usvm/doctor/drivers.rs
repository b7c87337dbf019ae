//! Devices and the libraries that drive them, usvm's own among them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Group};

use super::{Check, load};
use crate::drm::{self, Node};
use crate::{file, run};

const DRM: &str = "DRM devices (not used by this version of usvm)";
const COMPUTE: &str = "compute drivers";
const OWN: &str = "usvm";

/// Bytes of an .icd file, of which one line counts.
const LONGEST_ICD: u64 = 64 << 10;

/// Bytes of OpenCL's loader, at most.
const LONGEST_LIBRARY: u64 = 64 << 20;

pub(super) fn checks() -> Vec<Check> {
    let nodes = drm::nodes();
    let mut checks: Vec<Check> = nodes.iter().map(node).collect();
    if nodes.is_empty() {
        checks.push(Check::ok(DRM, "/dev/dri", "no device; usvm has its simulated ones"));
    }
    let config = format!("/boot/config-{}", rustix::system::uname().release().to_string_lossy());
    checks.push(kernel_svm(&nodes, fs::read_to_string(config).ok().as_deref()));
    checks.push(opencl_loader(load::of("libOpenCL.so.1")));
    checks.extend(opencl_drivers());
    checks.push(level_zero(load::of("libze_loader.so.1")));
    checks.push(own_library());
    checks
}

fn node(node: &Node) -> Check {
    let (name, found) = (node.path.display().to_string(), node.words());
    if node.accessible || !node.is_render() {
        return Check::ok(DRM, name, found);
    }
    let group = Group::from_gid(Gid::from_raw(node.group)).ok().flatten();
    let group = group.map_or_else(|| node.group.to_string(), |group| group.name);
    Check::warn(DRM, name, format!("{found}; may not be opened"))
        .means("compute drivers will not find it")
        .fix(format!("sudo usermod -aG {group} $USER   (and log in again)"))
}

/// Whether the kernel may have shared virtual memory of its own here; usvm then is one of two choices.
fn kernel_svm(nodes: &[Node], config: Option<&str>) -> Check {
    let name = "kernel's own SVM";
    if !nodes.iter().any(|node| node.driver.as_deref() == Some("xe")) {
        return Check::ok(DRM, name, "no: it needs a card with the xe driver");
    }
    let found = match config {
        Some(text) if text.lines().any(|line| line == "CONFIG_DRM_XE_GPUSVM=y") => {
            "may be there: a card with the xe driver, and CONFIG_DRM_XE_GPUSVM=y"
        }
        Some(_) => "no: this kernel is built without CONFIG_DRM_XE_GPUSVM",
        None => "may be there: a card with the xe driver (the kernel's configuration cannot be read)",
    };
    Check::ok(DRM, name, found)
}

fn opencl_loader(loaded: Result<PathBuf, String>) -> Check {
    let name = "OpenCL loader";
    match loaded {
        Err(why) => Check::warn(COMPUTE, name, why)
            .means("OpenCL programs do not run here")
            .fix("sudo apt install ocl-icd-libopencl1"),
        Ok(path) if knows_layers(&path) => Check::ok(COMPUTE, name, path.display().to_string()),
        Ok(path) => Check::warn(COMPUTE, name, format!("{} has no layers", path.display()))
            .means("usvm run reaches OpenCL programs through a layer: these are left alone")
            .fix("sudo apt install ocl-icd-libopencl1   (2.3.0 or newer)"),
    }
}

/// Whether the loader reads the variable that names layers.
fn knows_layers(path: &Path) -> bool {
    let variable = b"OPENCL_LAYERS\0";
    file::read(path, LONGEST_LIBRARY)
        .is_ok_and(|image| image.windows(variable.len()).any(|part| part == variable))
}

fn opencl_drivers() -> Vec<Check> {
    let mut files = Vec::new();
    let folder = ["OCL_ICD_VENDORS", "OPENCL_VENDOR_PATH"].iter().find_map(std::env::var_os);
    let folder = folder.map_or_else(|| PathBuf::from("/etc/OpenCL/vendors"), PathBuf::from);
    if folder.is_file() {
        files.push(folder.clone());
    }
    if let Ok(entries) = fs::read_dir(&folder) {
        files.extend(
            entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "icd")),
        );
    }
    files.sort();
    if files.is_empty() {
        return vec![
            Check::warn(COMPUTE, "OpenCL drivers", format!("none in {}", folder.display()))
                .means("OpenCL programs find no device")
                .fix("sudo apt install pocl-opencl-icd   (or intel-opencl-icd)"),
        ];
    }
    files.iter().map(|file| opencl_driver(file)).collect()
}

/// One .icd file: its first line names the driver's library.
fn opencl_driver(path: &Path) -> Check {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let text = match file::read(path, LONGEST_ICD) {
        Ok(text) => text,
        Err(e) => {
            let refused = e.kind() == io::ErrorKind::PermissionDenied;
            let command = if refused { "chmod a+r" } else { "rm" };
            return Check::warn(COMPUTE, name, e.to_string())
                .means(if refused {
                    "the OpenCL loader passes over it"
                } else {
                    "it names no driver; it was not read"
                })
                .fix(format!("sudo {command} {}", path.display()));
        }
    };
    let text = String::from_utf8_lossy(&text);
    let library = text.lines().next().unwrap_or_default().trim();
    match load::of(library) {
        Ok(found) => Check::ok(COMPUTE, name, format!("{} loads", found.display())),
        Err(why) => Check::warn(COMPUTE, name, why)
            .means("the OpenCL loader passes over it")
            .fix(format!("install what is missing, or: sudo rm {}", path.display())),
    }
}

fn level_zero(loaded: Result<PathBuf, String>) -> Check {
    match loaded {
        Ok(path) => Check::ok(COMPUTE, "Level Zero loader", path.display().to_string()),
        Err(_) => Check::ok(COMPUTE, "Level Zero loader", "not here (usvm does not use it)"),
    }
}

fn own_library() -> Check {
    let name = run::PRELOAD;
    let install = "make install   (or: cargo build --release -p usvm-preload)";
    match run::find_library() {
        Err(why) => Check::fail(OWN, name, why).means("usvm run cannot work").fix(install),
        Ok(path) => match load::of(&path.to_string_lossy()) {
            Ok(_) => Check::ok(OWN, name, format!("{} loads", path.display())),
            Err(why) => Check::fail(OWN, name, why).means("usvm run cannot work").fix(install),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn with_driver(driver: &str, accessible: bool) -> Node {
        Node {
            path: "/dev/dri/renderD128".into(),
            driver: Some(driver.into()),
            pci: None,
            vendor_device: None,
            window_bytes: None,
            accessible,
            group: 0,
            used: false,
        }
    }

    #[test]
    fn a_node_that_may_not_be_opened_says_which_group_may() {
        assert_eq!(node(&with_driver("i915", true)).status, Status::Ok);
        let check = node(&with_driver("i915", false));
        assert_eq!(check.status, Status::Warn);
        assert!(check.fix.unwrap().contains("usermod -aG root"));
    }

    #[test]
    fn the_kernels_own_is_told_of_only_where_it_might_be() {
        let of = |driver, config| kernel_svm(&[with_driver(driver, true)], config).found;
        assert!(of("i915", None).starts_with("no"));
        assert!(of("xe", None).starts_with("may"));
        assert!(of("xe", Some("CONFIG_DRM_XE=m\n")).starts_with("no"));
        assert!(of("xe", Some("CONFIG_DRM_XE_GPUSVM=y\n")).starts_with("may"));
    }

    #[test]
    fn loaders_without_layers_are_told_apart() {
        let place = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &[u8]| {
            let path = place.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let with = opencl_loader(Ok(file("with", b"xxOPENCL_LAYERS\0yy")));
        let without = opencl_loader(Ok(file("without", b"xxOPENCL_VENDOR_PATH\0yy")));
        assert_eq!((with.status, without.status), (Status::Ok, Status::Warn));
        assert_eq!(opencl_loader(Err("no".into())).status, Status::Warn);
    }
}
