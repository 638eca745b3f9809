//! Mounts as snapshotters describe them.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::{fs, io};

use containerd_client::types::Mount;
use nix::mount::{MsFlags, mount};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    move_mount,
};

use crate::error::{Error, IoContext as _, Result};
use crate::snapshots::{Maps, blocking_mapped, is_map};

/// What is seen of mounts without mounting them.
#[derive(Debug)]
pub(super) enum Layout<'m> {
    /// An overlay that can be written to.
    Upper {
        upper: &'m Path,
        lowers: Vec<PathBuf>,
    },
    /// A folder that is there.
    Folder {
        path: &'m Path,
        is_read_only: bool,
    },
    Other,
}

impl<'m> Layout<'m> {
    pub(super) fn of(mounts: &'m [Mount]) -> Self {
        let [only] = mounts else { return Self::Other };
        match &*only.r#type {
            "overlay" => match option(only, "upperdir=") {
                Some(upper) => Self::Upper { upper: Path::new(upper), lowers: lowers(mounts) },
                None => Self::Other,
            },
            "bind" | "rbind" => {
                let is_read_only = only.options.iter().any(|option| option == "ro");
                Self::Folder { path: Path::new(&only.source), is_read_only }
            }
            _ => Self::Other,
        }
    }
}

/// The lower folders of an overlay, the uppermost first.
pub(super) fn lowers(mounts: &[Mount]) -> Vec<PathBuf> {
    let [only] = mounts else { return Vec::new() };
    option(only, "lowerdir=").map_or(Vec::new(), |lowers| lowers.split(':').map(PathBuf::from).collect())
}

/// The mounts of an id-mapped overlay that can be written to, in ids as they are inside: its upper folder has those outside, and is mounted on
/// `point` with a map that leads back. None for other mounts.
pub(super) fn unmapped(mounts: &[Mount], point: &Path) -> Result<Option<Vec<Mount>>> {
    let [only] = mounts else { return Ok(None) };
    let (Some(maps), Some(upper)) = (Maps::in_options(&only.options)?, option(only, "upperdir=")) else { return Ok(None) };
    let (Some(folder), Some(name)) = (Path::new(upper).parent(), Path::new(upper).file_name()) else { return Ok(None) };
    blocking_mapped(folder, point, maps.blocking_inverse()?.as_fd())?;
    let work = option(only, "workdir=").and_then(|work| Path::new(work).file_name().filter(|_| Path::new(work).parent() == Some(folder)));
    let mut only = only.clone();
    for option in &mut only.options {
        if option.starts_with("upperdir=") {
            *option = format!("upperdir={}", point.join(name).display());
        } else if let Some(work) = work.filter(|_| option.starts_with("workdir=")) {
            *option = format!("workdir={}", point.join(work).display());
        }
    }
    only.options.retain(|option| !is_map(option));
    Ok(Some(vec![only]))
}

/// Whether mounts are those of an id-mapped overlay that can be written to.
pub(super) fn is_mapped(mounts: &[Mount]) -> bool {
    matches!(mounts, [only] if only.options.iter().any(|option| is_map(option)) && option(only, "upperdir=").is_some())
}

/// Whether an upper folder may name files of lower ones by other names.
pub(super) fn may_redirect(mounts: &[Mount]) -> bool {
    let is_on = |name: &str| fs::read_to_string(format!("/sys/module/overlay/parameters/{name}")).is_ok_and(|value| value.starts_with('Y'));
    let asks = |option: &String| matches!(&**option, "redirect_dir=on" | "metacopy=on");
    ["redirect_dir", "metacopy"].into_iter().any(is_on) || mounts.iter().flat_map(|mount| &mount.options).any(asks)
}

fn option<'m>(mount: &'m Mount, name: &str) -> Option<&'m str> {
    mount.options.iter().find_map(|option| option.strip_prefix(name))
}

/// Folders to mount on. They are the same for all: each mounts where no other sees it, and nothing is left when a process is killed.
pub(super) fn points<const N: usize>(state: &Path) -> Result<[PathBuf; N]> {
    let points = std::array::from_fn(|index| state.join(format!("{POINT}{index}")));
    for point in &points {
        match fs::create_dir(point) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.on("make mount point", point)?,
        }
    }
    Ok(points)
}

/// Mounts all of them, one over the other, in this thread's mount namespace.
pub(super) fn all(mounts: &[Mount], point: &Path) -> Result<()> {
    if mounts.is_empty() {
        return Err(Error::Invalid("no mounts are given".to_owned()));
    }
    mounts.iter().try_for_each(|mount| one(mount, point))
}

/// Mounts one, in this thread's mount namespace.
pub(crate) fn one(asked: &Mount, point: &Path) -> Result<()> {
    let at = match asked.target.trim_start_matches('/') {
        "" => point.to_owned(),
        target => point.join(target),
    };
    let (mut flags, mut data) = (MsFlags::empty(), Vec::new());
    for option in &asked.options {
        match FLAGS.iter().find(|(name, ..)| name == option) {
            Some((_, set, true)) => flags |= *set,
            Some((_, cleared, false)) => flags &= !*cleared,
            // layers have ids as they are inside, and so have these files
            None if is_map(option) => {}
            None => data.push(option.as_str()),
        }
    }
    let none: Option<&str> = None;
    if matches!(&*asked.r#type, "bind" | "rbind") || flags.contains(MsFlags::MS_BIND) {
        let recursive = if asked.r#type == "rbind" { MsFlags::MS_REC } else { flags & MsFlags::MS_REC };
        mount(Some(&*asked.source), &at, none, MsFlags::MS_BIND | recursive, none).on("bind mount at", &at)?;
        let rest = flags & !(MsFlags::MS_BIND | MsFlags::MS_REC);
        if rest.is_empty() {
            return Ok(());
        }
        return mount(none, &at, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | rest, none).on("set options of mount at", &at);
    }
    let text = data.join(",");
    if asked.r#type == "overlay" && text.len() >= PAGE_BYTES {
        return overlay(&data, flags, &at);
    }
    let data = (!text.is_empty()).then_some(&*text);
    mount(Some(&*asked.source), &at, Some(&*asked.r#type), flags, data).on("mount at", &at)
}

/// An overlay whose options have no room in one page.
fn overlay(options: &[&str], flags: MsFlags, at: &Path) -> Result<()> {
    let mut folders = Vec::new();
    // a string may have 255 bytes, fewer than a path
    let mut short = |path: &str| -> rustix::io::Result<String> {
        if path.len() < STRING_BYTES {
            return Ok(path.to_owned());
        }
        let folder = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let name = format!("/proc/self/fd/{}", folder.as_raw_fd());
        folders.push(folder);
        Ok(name)
    };
    let mut made = || -> rustix::io::Result<()> {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for option in options {
            match option.split_once('=') {
                Some(("lowerdir", lowers)) => {
                    lowers.split(':').try_for_each(|lower| fsconfig_set_string(&context, "lowerdir+", short(lower)?))?;
                }
                Some((key @ ("upperdir" | "workdir"), path)) => fsconfig_set_string(&context, key, short(path)?)?,
                Some((key, value)) => fsconfig_set_string(&context, key, value)?,
                None => fsconfig_set_flag(&context, *option)?,
            }
        }
        fsconfig_create(&context)?;
        let read_only = if flags.contains(MsFlags::MS_RDONLY) { MountAttrFlags::MOUNT_ATTR_RDONLY } else { MountAttrFlags::empty() };
        let mounted = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, read_only)?;
        move_mount(&mounted, "", rustix::fs::CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    };
    made().map_err(std::io::Error::from).on("mount an overlay of many layers at", at)
}

/// Options that are flags, and whether they set or clear them.
const FLAGS: &[(&str, MsFlags, bool)] = &[
    ("bind", MsFlags::MS_BIND, true),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
    ("ro", MsFlags::MS_RDONLY, true),
    ("rw", MsFlags::MS_RDONLY, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("nodev", MsFlags::MS_NODEV, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
    ("dirsync", MsFlags::MS_DIRSYNC, true),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("defaults", MsFlags::empty(), true),
];
/// In the folder of state.
const POINT: &str = "mount-";
/// What fsconfig(2) takes of a string, with the NUL behind it.
const STRING_BYTES: usize = 256;
/// What mount(2) takes of options.
const PAGE_BYTES: usize = 4096;
