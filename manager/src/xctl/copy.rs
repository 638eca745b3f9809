//! `cp`: files between the host and a container's root file system.
//!
//! **Invariant:** the container's owner cannot make this reach a file of the host: its side is opened within its root, and below that each name is
//! opened from its folder's descriptor without following links.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use clap::Args;
use containerd_client::services::v1::Container;
use containerd_client::types::v1::Status;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps};
use rustix::io::Errno;

use crate::client::Client;
use crate::error::{Error, IoContext as _, Result};
use crate::stdio::Folders;
use crate::tasks::{self, Id};
use crate::{containers, image, temporary_mount};

/// Arguments of `cp`.
#[derive(Debug, Clone, Args)]
pub(crate) struct CpArgs {
    /// What to copy: CONTAINER:PATH or a path of the host; with /. at its end, what is in the folder
    source: String,
    /// Where to: CONTAINER:PATH or a path of the host
    target: String,
}

/// What is done with the root of a container.
type Work = Box<dyn FnOnce(&Path) -> Result<()> + Send>;

/// A path on one side.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Side {
    Host(PathBuf),
    Container(String, PathBuf),
}

/// What has a slash before its first colon is a path of the host.
fn side(text: &str) -> Side {
    match text.split_once(':') {
        Some((container, path)) if !container.is_empty() && !container.contains('/') => {
            Side::Container(container.to_owned(), Path::new("/").join(path))
        }
        _ => Side::Host(PathBuf::from(text)),
    }
}

/// Copies.
pub(crate) async fn run(client: &Client, folders: &Folders, args: CpArgs) -> Result<u8> {
    let (source, target) = (side(&args.source), side(&args.target));
    let has_contents_alone = args.source.ends_with("/.");
    let (id, copy): (_, Work) = match (source, target) {
        (Side::Container(id, from), Side::Host(to)) => (
            id,
            Box::new(move |root: &Path| copy(Place { root: Some(root), path: &from }, Place { root: None, path: &to }, has_contents_alone)),
        ),
        (Side::Host(from), Side::Container(id, to)) => (
            id,
            Box::new(move |root: &Path| copy(Place { root: None, path: &from }, Place { root: Some(root), path: &to }, has_contents_alone)),
        ),
        (Side::Host(_), Side::Host(_)) => return Err(Error::refused("one of both must be in a container: CONTAINER:PATH")),
        (Side::Container(..), Side::Container(..)) => {
            return Err(Error::refused("files are not copied from container to container; copy them to the host first"));
        }
    };
    in_root(client, folders, &containers::get(client, &id).await?, copy).await.map(|()| 0)
}

/// Runs `work` with the root file system of a container: as its processes see it, or as they would.
async fn in_root(client: &Client, folders: &Folders, container: &Container, work: Work) -> Result<()> {
    let task = tasks::get(client, &Id::init(&container.id)).await?.filter(|task| task.status() != Status::Stopped);
    if let Some(task) = task {
        return work(&Path::new("/proc").join(task.pid.to_string()).join("root"));
    }
    if container.snapshot_key.is_empty() {
        let spec = containers::spec(container)?;
        let root = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
        if !root.is_absolute() {
            return Err(Error::refused(format!(
                "container {id} does not run, and it is not known where its root file system is; start it first",
                id = container.id
            )));
        }
        return work(&root);
    }
    let mounts = image::mounts(client, &container.snapshotter, &container.snapshot_key).await?;
    temporary_mount::with(&folders.place_of_mounts(), &mounts, work)
}

/// A path, within a root if there is one.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    root: Option<&'a Path>,
    path: &'a Path,
}

impl Place<'_> {
    fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC;
        let Some(root) = self.root else { return rustix::fs::open(path, flags, Mode::empty()) };
        let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::fs::openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    }

    /// The folder that the last name is in, and that name.
    fn parent(&self) -> Result<(OwnedFd, CString)> {
        let name = self.path.file_name().ok_or_else(|| Error::refused(format!("{} is not the name of a file", self.path.display())))?;
        let folder = match self.path.parent() {
            None => Path::new("."),
            Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
            Some(folder) => folder,
        };
        let parent = self.open(folder, OFlags::RDONLY | OFlags::DIRECTORY).on("open the folder", folder)?;
        Ok((parent, name_of(name.as_encoded_bytes())?))
    }
}

fn name_of(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|error| Error::unreadable("a name", error))
}

fn copy(source: Place<'_>, target: Place<'_>, has_contents_alone: bool) -> Result<()> {
    let existing = match target.open(target.path, OFlags::RDONLY | OFlags::DIRECTORY) {
        Ok(folder) => Some(folder),
        Err(Errno::NOENT | Errno::NOTDIR) => None,
        Err(error) => return Err(error).on("open", target.path),
    };
    if has_contents_alone || source.path == Path::new("/") {
        let from = source.open(source.path, OFlags::RDONLY | OFlags::DIRECTORY).on("open the folder", source.path)?;
        let to = match existing {
            Some(folder) => folder,
            None => {
                let (parent, name) = target.parent()?;
                make_folder(&parent, &name, 0o755).on("make the folder", target.path)?
            }
        };
        return contents(from, to.as_fd(), source.path, target.path, 0);
    }
    let (from, name) = source.parent()?;
    let (to, new_name) = match existing {
        Some(folder) => (folder, name.clone()),
        None if target.path.as_os_str().as_encoded_bytes().ends_with(b"/") => {
            return Err(Error::refused(format!("there is no folder {}", target.path.display())));
        }
        None => target.parent()?,
    };
    entry(from.as_fd(), &name, to.as_fd(), &new_name, source.path, target.path, 0)
}

/// Copies what is in a folder.
fn contents(from: OwnedFd, to: impl AsFd + Copy, shown: &Path, shown_target: &Path, depth: usize) -> Result<()> {
    if depth > DEEPEST {
        return Err(Error::unreadable(shown.display().to_string(), format!("there are folders more than {DEEPEST} deep")));
    }
    for item in Dir::read_from(&from).on("list", shown)? {
        let item = item.on("list", shown)?;
        let name = item.file_name();
        if !matches!(name.to_bytes(), b"." | b"..") {
            let below = |path: &Path| path.join(String::from_utf8_lossy(name.to_bytes()).as_ref());
            entry(from.as_fd(), name, to, name, &below(shown), &below(shown_target), depth + 1)?;
        }
    }
    Ok(())
}

/// Copies a file, a folder or a link: by its name in its folder.
fn entry(from: impl AsFd, name: &CStr, to: impl AsFd, new_name: &CStr, shown: &Path, shown_target: &Path, depth: usize) -> Result<()> {
    let about = rustix::fs::statat(&from, name, AtFlags::SYMLINK_NOFOLLOW).on("look at", shown)?;
    match FileType::from_raw_mode(about.st_mode) {
        FileType::RegularFile => file(from, name, to, new_name, shown, shown_target),
        FileType::Directory => {
            let source =
                rustix::fs::openat(&from, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
            let source = source.on("open the folder", shown)?;
            let target = make_folder(&to, new_name, 0o700).on("make the folder", shown_target)?;
            contents(source, target.as_fd(), shown, shown_target, depth)?;
            finish(&target, &about).on("set the mode of", shown_target)
        }
        FileType::Symlink => {
            let link = rustix::fs::readlinkat(&from, name, Vec::new()).on("read the link", shown)?;
            match rustix::fs::symlinkat(&link, &to, new_name) {
                Err(Errno::EXIST) => {
                    rustix::fs::unlinkat(&to, new_name, AtFlags::empty()).on("replace", shown_target)?;
                    rustix::fs::symlinkat(&link, &to, new_name).on("make the link", shown_target)
                }
                made => made.on("make the link", shown_target),
            }
        }
        _ => Err(Error::refused(format!("{} is a device, a fifo or a socket: only files, folders and links are copied", shown.display()))),
    }
}

fn file(from: impl AsFd, name: &CStr, to: impl AsFd, new_name: &CStr, shown: &Path, shown_target: &Path) -> Result<()> {
    // not blocked by a fifo that has taken the file's place
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut source = File::from(rustix::fs::openat(&from, name, flags, Mode::empty()).on("open", shown)?);
    let about = rustix::fs::fstat(&source).on("look at", shown)?;
    if FileType::from_raw_mode(about.st_mode) != FileType::RegularFile {
        return Err(Error::refused(format!("{} has changed while it was copied", shown.display())));
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut target = File::from(rustix::fs::openat(&to, new_name, flags, Mode::RUSR | Mode::WUSR).on("create", shown_target)?);
    let existing = rustix::fs::fstat(&target).on("look at", shown_target)?;
    if FileType::from_raw_mode(existing.st_mode) != FileType::RegularFile {
        return Err(Error::refused(format!("{} exists, and is no regular file", shown_target.display())));
    }
    target.set_len(0).on("empty", shown_target)?;
    io::copy(&mut source, &mut target).on("copy to", shown_target)?;
    finish(&target, &about).on("set the mode of", shown_target)
}

/// A folder that is there already is used.
fn make_folder(parent: impl AsFd, name: &CStr, mode: u32) -> Result<OwnedFd, Errno> {
    match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    rustix::fs::openat(&parent, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Mode and time are the source's, without bits that give rights away; the owner is who copies.
fn finish(target: impl AsFd, about: &Stat) -> Result<(), Errno> {
    rustix::fs::fchmod(&target, Mode::from_raw_mode(about.st_mode & 0o1777))?;
    let changed = Timespec { tv_sec: about.st_mtime, tv_nsec: i64::try_from(about.st_mtime_nsec).unwrap_or(0) };
    rustix::fs::futimens(&target, &Timestamps { last_access: changed, last_modification: changed })
}

/// Each level has a descriptor.
const DEEPEST: usize = 200;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn a_side_is_a_container_unless_a_slash_comes_first() {
        assert_eq!(side("c:/etc/x"), Side::Container("c".to_owned(), "/etc/x".into()));
        assert_eq!(side("c:x"), Side::Container("c".to_owned(), "/x".into()));
        for host in ["/a:b", "./c:x", "c", ":x", "a/b:c"] {
            assert_eq!(side(host), Side::Host(host.into()), "{host}");
        }
    }

    #[test]
    fn a_tree_is_copied_into_a_root_and_no_link_leads_out() {
        let folder = scratch::Folder::new("xctl-copy");
        let (root, outside, tree) = (folder.join("root"), folder.join("outside"), folder.join("tree"));
        fs::create_dir_all(root.join("etc")).expect("a folder");
        fs::create_dir_all(&outside).expect("a folder");
        fs::create_dir_all(tree.join("sub")).expect("a folder");
        fs::write(tree.join("sub/file"), "content").expect("a file");
        fs::set_permissions(tree.join("sub/file"), fs::Permissions::from_mode(0o4751)).expect("a mode");
        symlink("nowhere", tree.join("link")).expect("a link");
        // a folder of the container that is a link to the host's is one of its own, which is not there
        symlink(&outside, root.join("trap")).expect("a link");
        let into = |path: &str| copy(Place { root: None, path: &tree }, Place { root: Some(&root), path: Path::new(path) }, false);
        into("/etc").expect("copied");
        assert_eq!(fs::read_to_string(root.join("etc/tree/sub/file")).expect("there"), "content");
        let mode = fs::metadata(root.join("etc/tree/sub/file")).expect("there").permissions().mode();
        assert_eq!(mode & 0o7777, 0o751, "without setuid");
        assert_eq!(fs::read_link(root.join("etc/tree/link")).expect("there"), Path::new("nowhere"));
        into("/trap/x").expect_err("there is no such folder in the root");
        assert_eq!(fs::read_dir(&outside).expect("a folder").count(), 0);
        // and back, under another name
        fs::write(outside.join("secret"), "of the host").expect("a file");
        symlink(outside.join("secret"), root.join("etc/stolen")).expect("a link");
        let target = folder.join("copied");
        let back = |path: &str| copy(Place { root: Some(&root), path: Path::new(path) }, Place { root: None, path: &target }, false);
        back("/etc").expect("copied");
        assert!(target.join("stolen").is_symlink() && target.join("tree/sub/file").exists());
        back("/trap/secret").expect_err("the link ends in the root");
        // a file of the target that is a link is not written through
        fs::write(folder.join("new"), "new").expect("a file");
        let (new, stolen) = (folder.join("new"), Path::new("/etc/stolen"));
        copy(Place { root: None, path: &new }, Place { root: Some(&root), path: stolen }, false).expect_err("a link is there");
        assert_eq!(fs::read_to_string(outside.join("secret")).expect("there"), "of the host");
    }

    #[test]
    fn what_is_in_a_folder_is_copied_alone_with_a_dot() {
        let folder = scratch::Folder::new("xctl-copy");
        fs::create_dir_all(folder.join("from/sub")).expect("a folder");
        let (from, to) = (folder.join("from/."), folder.join("to"));
        copy(Place { root: None, path: &from }, Place { root: None, path: &to }, true).expect("copied");
        assert!(to.join("sub").is_dir() && !to.join("from").exists());
        rustix::fs::mknodat(rustix::fs::CWD, folder.join("from/pipe"), FileType::Fifo, Mode::RUSR, 0).expect("a fifo");
        let error = copy(Place { root: None, path: &from }, Place { root: None, path: &to }, true).expect_err("a fifo");
        assert!(error.chain().contains("pipe is a device, a fifo or a socket"), "{}", error.chain());
    }
}
