//! Makes the container's root the root.
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, readlink};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, chroot, fchdir, pivot_root};

use super::root::{self, Root};
use super::{Doing, Failure, Step};
use crate::host::unescape;
use crate::plan::{self, Entry};
use crate::sys::{self, FsContext};

/// Makes the root the root, and lets go of the host's mounts as far as that is possible.
pub(super) fn enter(root: &Root, entry: Entry) -> Result<(), Failure> {
    match entry {
        Entry::Pivot => pivot(root).doing(Step::Root, || "pivot_root".to_owned()),
        Entry::Move => hide_kernel(root)
            .and_then(|()| sys::move_mount(root.as_fd(), root::absolute(Path::new("/"))?.as_fd()))
            .and_then(|()| change_root(root))
            .doing(Step::Root, || "move the root".to_owned()),
        Entry::Chroot => change_root(root).doing(Step::Root, || "chroot".to_owned()),
    }
}

fn pivot(root: &Root) -> io::Result<()> {
    let host = open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    fchdir(root.as_fd())?;
    pivot_root(".", ".")?;
    fchdir(&host)?;
    // Else unmounting would spread to mounts that the host shares.
    mount(None::<&str>, ".", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)?;
    umount2(".", MntFlags::MNT_DETACH)?;
    Ok(chdir("/")?)
}

/// chroot(2) by a descriptor.
pub(super) fn change_root(root: &impl AsFd) -> io::Result<()> {
    fchdir(root.as_fd())?;
    chroot(".")?;
    Ok(chdir("/")?)
}

/// Unmounts every whole procfs and sysfs of the host: below a root that was moved they are still in the mount namespace, and as long as one is there
/// unmasked the kernel lets a container mount another. None is shared with the host any more: see the plan.
fn hide_kernel(root: &Root) -> io::Result<()> {
    let own = readlink(format!("/proc/self/fd/{}", root.as_fd().as_raw_fd()).as_str())?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    // Those above others first.
    for path in mounts.lines().rev().filter_map(of_kernel).map(unescape) {
        if Path::new(&path).starts_with(&own) {
            continue;
        }
        match umount2(path.as_str(), MntFlags::MNT_DETACH) {
            Ok(()) => {}
            // Locked, in a user namespace.
            Err(Errno::EINVAL | Errno::EPERM) => cover(&path)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The target of a line of mountinfo that shows a whole procfs or sysfs.
fn of_kernel(line: &str) -> Option<&str> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (shown, target) = (before.next()?, before.next()?);
    let is_whole = shown == "/" && matches!(after.split(' ').next(), Some("proc" | "sysfs"));
    is_whole.then_some(target)
}

fn cover(path: &str) -> io::Result<()> {
    let target: OwnedFd = root::absolute(Path::new(path))?;
    let empty = FsContext::open("tmpfs")?.mount(plan::RDONLY)?;
    sys::move_mount(empty.as_fd(), target.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_mounts_of_the_kernels_are_found() {
        let lines = [
            "22 27 0:21 / /proc rw,relatime - proc proc rw",
            "23 27 0:22 / /sys rw,relatime shared:7 - sysfs sysfs rw",
            "24 27 0:21 /sys /x rw - proc proc rw",
            "25 27 0:25 / /y rw - tmpfs proc rw",
            "26 27 0:21 / /a\\040b rw master:1 - proc none rw",
            "",
        ];
        assert_eq!(lines.iter().filter_map(|line| of_kernel(line)).collect::<Vec<_>>(), ["/proc", "/sys", "/a\\040b"]);
    }
}
