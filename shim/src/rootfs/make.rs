//! Makes one mount.
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::options::{Options, compact_overlay};
use super::{Mount, MountError, Place, errno};
use crate::sys;

/// Refuses unsupported mounts before anything is changed.
pub(super) fn refuse_unsupported(mount: &Mount, options: &Options, path: &Path) -> Result<(), MountError> {
    let why = if mount.kind.starts_with("fuse.") || mount.kind.starts_with("fuse3.") {
        "file systems in user space need a helper program that this shim does not start"
    } else if matches!(options.maps, Some(Err(_))) {
        "uidmap= and gidmap= must both be given, as INSIDE:OUTSIDE:COUNT, more of them separated by commas"
    } else if options.managers.is_some() {
        "its options X-containerd.… are for containerd's mount manager, which has not handled them"
    } else {
        return Ok(());
    };
    Err(MountError::Unsupported { kind: mount.kind.clone(), path: path.to_owned(), why })
}

/// The call that makes the mount, with `data` for the file system.
pub(super) fn first_mount(wanted: &Mount, options: &Options, mut data: Vec<String>, place: &Place) -> Result<(), MountError> {
    let refused =
        |source| MountError::Refused { kind: wanted.kind.clone(), origin: wanted.source.clone(), path: place.path.clone(), source };
    let mut base = None;
    if wanted.kind == "overlay" && data.iter().map(|option| option.len() + 1).sum::<usize>() >= MAX_DATA_BYTES - 512 {
        (base, data) = compact_overlay(&data).map_or((None, data), |(base, data)| (Some(base), data));
    }
    let (mut origin, mut device) = (PathBuf::from(&wanted.source), None);
    if options.is_loop {
        let direct = data.iter().position(|option| option == "direct-io").map(|at| data.remove(at)).is_some();
        let read_only = options.flags.contains(MsFlags::MS_RDONLY);
        let attached = File::options()
            .read(true)
            .write(!read_only)
            .open(&origin)
            .and_then(|file| sys::mount::attach_loop(&file, read_only, direct))
            .map_err(|error| MountError::System { op: "attach a loop device to", path: origin.clone(), source: errno(&error) })?;
        origin.clone_from(&attached.path);
        device = Some(attached);
    }
    let data = data.join(",");
    if data.len() >= MAX_DATA_BYTES {
        let (kind, path) = (wanted.kind.clone(), place.path.clone());
        return Err(MountError::Unsupported { kind, path, why: "its options are longer than the page that mount(2) takes" });
    }
    let flags = options.flags;
    let kind = (!flags.contains(MsFlags::MS_BIND)).then_some(wanted.kind.as_str());
    let data = (!data.is_empty()).then_some(data.as_str());
    let call = || mount(Some(&origin), &place.link(), kind, flags, data);
    match base {
        None => call(),
        Some(base) => in_folder(&base, call),
    }
    .map_err(refused)?;
    // From here on the mount holds the device.
    drop(device);
    Ok(())
}

/// The calls that change a mount: its propagation, and the flags that bind(2) ignores at first.
pub(super) fn finish_mount(wanted: &Mount, options: &Options, place: &Place) -> Result<(), MountError> {
    let refused =
        |source| MountError::Refused { kind: wanted.kind.clone(), origin: wanted.source.clone(), path: place.path.clone(), source };
    let none = None::<&str>;
    if !options.propagation.is_empty() {
        mount(none, &place.link(), none, options.propagation, none).map_err(refused)?;
    }
    let flags = options.flags & PER_MOUNT;
    if options.flags.contains(MsFlags::MS_BIND) && !(flags.is_empty() && (options.cleared & PER_MOUNT).is_empty()) {
        // The source's flags stay, unless an option clears them.
        let kept = inherited_flags(&place.fd).map_err(refused)? - options.cleared;
        mount(none, &place.link(), none, flags | kept | MsFlags::MS_BIND | MsFlags::MS_REMOUNT, none).map_err(refused)?;
    }
    Ok(())
}

fn inherited_flags(fd: &OwnedFd) -> Result<MsFlags, Errno> {
    let has = fstatvfs(fd)?.flags();
    let pairs = [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    Ok(pairs.into_iter().filter(|(has_flag, _)| has.contains(*has_flag)).map(|(_, flag)| flag).collect())
}

/// Runs `call` on a short-lived thread whose own working directory is `folder`.
fn in_folder(folder: &str, call: impl FnOnce() -> Result<(), Errno> + Send) -> Result<(), Errno> {
    std::thread::scope(|scope| {
        let work = || {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(folder)?;
            call()
        };
        let thread = std::thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, work).map_err(|error| errno(&error))?;
        thread.join().unwrap_or(Err(Errno::EFAULT))
    })
}

/// Flags of one mount, which bind(2) takes from the source first.
const PER_MOUNT: MsFlags = MsFlags::MS_RDONLY
    .union(MsFlags::MS_NOSUID)
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC)
    .union(MsFlags::MS_NOATIME)
    .union(MsFlags::MS_NODIRATIME)
    .union(MsFlags::MS_RELATIME);

/// mount(2) takes one page of options, with its final NUL.
const MAX_DATA_BYTES: usize = 4096;
