//! Hides paths, and makes paths read-only.
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::mounts::readonly;
use super::root::{self, Root};
use super::{Doing, Failure, Step, failure};
use crate::plan;
use crate::sys::{self, FsContext, Tree};

/// Covers files with the null device and folders with one empty file system that they share. Missing ones are skipped.
pub(super) fn hide(root: &Root, paths: &[String], label: Option<&str>) -> Result<(), Failure> {
    let mut covers = Covers::default();
    for path in paths {
        let Some(target) = existing(root, path).doing(Step::Masks, || format!("open {path}"))? else { continue };
        covers.hide(root, &target, label).doing(Step::Masks, || format!("hide {path}"))?;
    }
    Ok(())
}

/// Does the same in a container that criu has restored, for what is not hidden yet: the image could be of one that hides less.
pub(super) fn confirm_hidden(root: &Root, paths: &[String], label: Option<&str>) -> Result<(), Failure> {
    let is_open = |path: &&String| match root.find(path) {
        Ok(found) => {
            let is_cover = fstatfs(&found).is_ok_and(|about| about.filesystem_type() == TMPFS_MAGIC && about.files() <= 1);
            !(root::is_null(&found) || (is_cover && is_readonly(&found)))
        }
        Err(_) => true,
    };
    let open: Vec<String> = paths.iter().filter(is_open).cloned().collect();
    hide(root, &open, label)
}

/// The same for paths that are to be read-only.
pub(super) fn confirm_readonly(root: &Root, paths: &[String]) -> Result<(), Failure> {
    let is_writable = |path: &&String| root.find(path).is_ok_and(|found| !is_readonly(&found));
    let writable: Vec<String> = paths.iter().filter(is_writable).cloned().collect();
    make_readonly(root, &writable)
}

fn is_readonly(found: &OwnedFd) -> bool {
    fstatvfs(found).is_ok_and(|about| about.flags().contains(FsFlags::ST_RDONLY))
}

/// What covers; made when first needed. A mount that is attached nowhere cannot be cloned (before Linux 6.15), so the first is, and the others are its clones.
#[derive(Default)]
struct Covers {
    folder: Option<OwnedFd>,
    file: Option<OwnedFd>,
}

impl Covers {
    fn hide(&mut self, root: &Root, target: &OwnedFd, label: Option<&str>) -> io::Result<()> {
        let cover = if root::is_folder(target)? { &mut self.folder } else { &mut self.file };
        let next = match cover {
            Some(cover) => clone(cover)?,
            None if root::is_folder(target)? => {
                let context = FsContext::open("tmpfs")?;
                for (key, value) in [("source", "tmpfs"), ("nr_blocks", "1"), ("nr_inodes", "1")] {
                    context.set(key, Some(value))?;
                }
                if let Some(label) = label {
                    context.set("context", Some(label))?;
                }
                context.mount(plan::RDONLY)?
            }
            None => {
                let null = root.find("/dev/null")?;
                if !root::is_null(&null) {
                    return Err(Errno::ENODEV.into());
                }
                clone(&null)?
            }
        };
        sys::move_mount(next.as_fd(), target.as_fd())?;
        cover.get_or_insert(next);
        Ok(())
    }
}

fn clone(mount: &OwnedFd) -> io::Result<OwnedFd> {
    sys::open_tree(mount.as_fd(), Path::new(""), Tree::Top)
}

/// Makes paths read-only: the mount of each, and none below it. Missing ones are skipped.
pub(super) fn make_readonly(root: &Root, paths: &[String]) -> Result<(), Failure> {
    for path in paths {
        let Some(target) = existing(root, path).doing(Step::Masks, || format!("open {path}"))? else { continue };
        let cover = || -> io::Result<()> {
            let mount = sys::open_tree(target.as_fd(), Path::new(""), Tree::Recursive)?;
            readonly(mount.as_fd(), Tree::Top)?;
            sys::move_mount(mount.as_fd(), target.as_fd())
        };
        cover().map_err(|error| failure(Step::Masks, format!("make {path} read-only"), error))?;
    }
    Ok(())
}

fn existing(root: &Root, path: &str) -> io::Result<Option<OwnedFd>> {
    match root.find(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
