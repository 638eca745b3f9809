//! Makes device nodes and links.
use std::io;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{Mode, SFlag, fstat, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};

use super::root::{self, Place, Root};
use super::{Doing, Failure, Step};
use crate::plan::Device;
use crate::sys;

/// Makes a node. One that exists must be the same; it gets owner and permissions.
pub(super) fn node(root: &Root, device: &Device) -> Result<(), Failure> {
    let doing = || format!("make device {}", device.path);
    let place = root.place(&device.path).doing(Step::Devices, doing)?;
    let kind = SFlag::from_bits_truncate(device.mode) & SFlag::S_IFMT;
    let mode = Mode::from_bits_truncate(device.mode & 0o7777);
    let is_new = match mknodat(&place.folder, &place.name, kind, mode, libc::makedev(device.major, device.minor)) {
        Ok(()) => true,
        Err(Errno::EEXIST) => false,
        Err(error) => return Err(error).doing(Step::Devices, doing),
    };
    let node = root::in_folder(std::os::fd::AsFd::as_fd(&place.folder), &place.name, OFlag::O_PATH).doing(Step::Devices, doing)?;
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
