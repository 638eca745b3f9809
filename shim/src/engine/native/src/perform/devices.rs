//! Makes device nodes and links.
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, fstat, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};

use super::root::{self, Place, Root};
use super::{Doing, Failure, Step};
use crate::plan::Device;
use crate::sys::{self, Tree};

/// Makes a node. One that exists must be the same; it gets owner and permissions.
///
/// One that cannot be made is the host's, unless nothing may be mounted.
pub(super) fn node(root: &Root, device: &Device, may_mount: bool) -> Result<(), Failure> {
    let doing = || format!("make device {}", device.path);
    let place = root.place(&device.path).doing(Step::Devices, doing)?;
    let kind = SFlag::from_bits_truncate(device.mode) & SFlag::S_IFMT;
    let mode = Mode::from_bits_truncate(device.mode & 0o7777);
    let is_new = match mknodat(&place.folder, &place.name, kind, mode, libc::makedev(device.major, device.minor)) {
        Ok(()) => true,
        Err(Errno::EEXIST) => false,
        // In a user namespace, or without the capability.
        Err(Errno::EPERM) if may_mount => return bind(&place, device).doing(Step::Devices, doing),
        Err(error) => return Err(error).doing(Step::Devices, doing),
    };
    let node = root::in_folder(place.folder.as_fd(), &place.name, OFlag::O_PATH).doing(Step::Devices, doing)?;
    let about = fstat(&node).doing(Step::Devices, doing)?;
    let is_wanted = match kind {
        SFlag::S_IFIFO => SFlag::from_bits_truncate(about.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO,
        kind => root::is_device(&about, kind, device.major, device.minor),
    };
    if !is_wanted {
        return Err(Errno::EEXIST).doing(Step::Devices, doing);
    }
    if !is_new {
        sys::set_mode(&node, device.mode & 0o7777).doing(Step::Devices, || format!("set the permissions of {}", device.path))?;
    }
    if !is_new || device.uid != 0 || device.gid != 0 {
        let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
        fchownat(&node, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)
            .doing(Step::Devices, || format!("set the owner of {}", device.path))?;
    }
    Ok(())
}

/// Mounts the host's node of the same path. It stays the host's: neither owner nor permissions change.
fn bind(place: &Place, device: &Device) -> io::Result<()> {
    let source = root::absolute(Path::new(&device.path))?;
    if !root::is_device(&fstat(&source)?, SFlag::from_bits_truncate(device.mode) & SFlag::S_IFMT, device.major, device.minor) {
        return Err(Errno::ENODEV.into());
    }
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    match openat(&place.folder, &place.name, flags, Mode::empty()) {
        Ok(_) | Err(Errno::EEXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let target = root::in_folder(place.folder.as_fd(), &place.name, OFlag::O_PATH)?;
    let mount = sys::open_tree(source.as_fd(), Path::new(""), Tree::Top)?;
    sys::move_mount(mount.as_fd(), target.as_fd())
}

/// Makes a link, unless there is something of that name.
pub(super) fn link(root: &Root, target: &str, path: &str) -> Result<(), Failure> {
    let make = || -> io::Result<()> {
        let Place { folder, name } = root.place(path)?;
        match symlinkat(target, &folder, &name) {
            Ok(()) | Err(Errno::EEXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    };
    make().doing(Step::Devices, || format!("make link {path}"))
}
