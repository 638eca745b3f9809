//! Hands the profile and the labels of a process to the kernel's security modules: they hold from its next execution on.
//!
//! **Invariant:** they are written to the attributes of this process in a procfs that was made for that. No path leads to it, so nothing that a container
//! mounts over its own `/proc` can take what is written, and there is no link on the way.
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use nix::unistd::write;

use super::root::Root;
use super::{Doing, Failure, Step};
use crate::plan::{Mount, Process, Source};
use crate::sys::{self, FsContext};

/// A procfs of the host's processes, made by the performer before it joins anything: in a user namespace the kernel makes
/// none for a process that sees no whole one, or whose pid namespace is the host's. `None` if the process has neither profile nor label.
#[derive(Debug)]
pub(super) struct Procfs(Option<OwnedFd>);

impl Procfs {
    pub(super) fn make(process: &Process) -> Result<Self, Failure> {
        if process.apparmor_profile.is_none() && process.selinux_label.is_none() {
            return Ok(Self(None));
        }
        let made = FsContext::open("proc").and_then(|context| context.mount(0)).doing(Step::Settings, || "make a procfs".to_owned())?;
        Ok(Self(Some(made)))
    }
}

/// The attributes of the calling process. Without a folder, nothing is to be written.
#[derive(Debug)]
pub(super) struct Attributes(RefCell<Option<OwnedFd>>);

impl Attributes {
    /// Opens them in the child, whose copy of the procfs is closed: of the host's processes it keeps itself alone.
    pub(super) fn open(procfs: &Procfs) -> Result<Self, Failure> {
        let Some(procfs) = &procfs.0 else { return Ok(Self(RefCell::default())) };
        let open = || -> io::Result<OwnedFd> {
            // A link to the own pid, as the procfs counts.
            let own = openat(procfs, "self", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
            let number = procfs.as_raw_fd() as u32;
            sys::close_range(number, number)?;
            Ok(own)
        };
        let own = open().doing(Step::Settings, || "open the attributes of the process".to_owned())?;
        Ok(Self(RefCell::new(Some(own))))
    }

    /// The folder, if there is one.
    pub(super) fn number(&self) -> Option<RawFd> {
        self.0.borrow().as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Nothing is written any more. Through the folder, a path could lead to the host's processes.
    pub(super) fn close(&self) {
        self.0.take();
    }

    /// Sets the profile that the next execution gets. The kernel wants the file opened with the very ids that it is written with.
    pub(super) fn confine(&self, process: &Process) -> Result<(), Failure> {
        let folder = self.0.borrow();
        let (Some(folder), Some(profile)) = (&*folder, &process.apparmor_profile) else { return Ok(()) };
        write_first(folder.as_fd(), &OF_APPARMOR, &format!("exec {profile}"))
            .doing(Step::Settings, || format!("unable to apply apparmor profile {profile:?}"))
    }

    /// Sets the label that the next execution gets.
    pub(super) fn label(&self, process: &Process) -> Result<(), Failure> {
        let folder = self.0.borrow();
        let (Some(folder), Some(label)) = (&*folder, &process.selinux_label) else { return Ok(()) };
        write_first(folder.as_fd(), &["attr/exec"], label).doing(Step::Settings, || format!("set the label {label:?}"))
    }

    /// Runs `make`, whose keyrings get the process's label.
    pub(super) fn with_keyring_label(&self, process: &Process, make: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
        let folder = self.0.borrow();
        let (Some(folder), Some(label)) = (&*folder, &process.selinux_label) else { return make() };
        let set = |value: &str| write_first(folder.as_fd(), &["attr/keycreate"], value);
        set(label).doing(Step::Settings, || format!("set the label {label:?} of keyrings"))?;
        make()?;
        set("").doing(Step::Settings, || "unset the label of keyrings".to_owned())
    }
}

/// The attributes of a process that executes nothing. Nothing of the host is reached through them but the process itself.
#[derive(Debug)]
pub(super) struct OwnAttributes(OwnedFd);

impl OwnAttributes {
    /// Of the calling process, in the procfs at `/proc`.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self(open("/proc/self", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?))
    }

    /// Sets the label of the process at once. It must have one thread. From here on it may do what the policy lets that label do.
    pub(super) fn label(&self, label: &str) -> Result<(), Failure> {
        write_first(self.0.as_fd(), &["attr/current"], label).doing(Step::Settings, || format!("set the label {label:?}"))
    }
}

/// Labels a mount whose file system takes no label when it is made.
pub(super) fn label_mount(root: &Root, mount: &Mount, label: Option<&str>) -> Result<(), Failure> {
    let (Some(label), Source::New { kind, .. }) = (label, &mount.source) else { return Ok(()) };
    if kind != "mqueue" {
        return Ok(());
    }
    let set = || sys::set_extended_attribute(&root.find(&mount.target)?, "security.selinux", label);
    set().doing(Step::Mounts, || format!("set the label {label:?} of {}", mount.target))
}

/// AppArmor's own file, and the one that it shares with other modules (Linux before 5.8).
const OF_APPARMOR: [&str; 2] = ["attr/apparmor/exec", "attr/exec"];

/// Writes to the first file that exists, at once: the kernel takes each write as a whole value.
fn write_first(folder: BorrowedFd<'_>, files: &[&str], value: &str) -> io::Result<()> {
    for file in files {
        let opened = match openat(folder, *file, OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty()) {
            Err(nix::errno::Errno::ENOENT) => continue,
            opened => opened?,
        };
        let length = write(&opened, value.as_bytes())?;
        return if length == value.len() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EIO)) };
    }
    Err(io::Error::from_raw_os_error(libc::ENOENT))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;
    use crate::perform::root;

    /// A folder in place of a process's in procfs.
    fn double(name: &str, files: &[&str]) -> (PathBuf, OwnedFd) {
        let folder = std::env::temp_dir().join(format!("x-engine-labels-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(folder.join("attr/apparmor")).expect("folders");
        files.iter().for_each(|file| fs::write(folder.join(file), "").expect("a file"));
        let handle = root::absolute(&folder).expect("a handle");
        (folder, handle)
    }

    #[test]
    fn apparmors_own_file_comes_first() {
        let (folder, handle) = double("own", &["attr/apparmor/exec", "attr/exec"]);
        write_first(handle.as_fd(), &OF_APPARMOR, "exec p").expect("written");
        assert_eq!(fs::read_to_string(folder.join("attr/apparmor/exec")).expect("a file"), "exec p");
        assert_eq!(fs::read_to_string(folder.join("attr/exec")).expect("a file"), "");
        fs::remove_dir_all(folder).expect("removed");
    }

    #[test]
    fn the_shared_file_is_used_without_it() {
        let (folder, handle) = double("shared", &["attr/exec"]);
        write_first(handle.as_fd(), &OF_APPARMOR, "exec p").expect("written");
        assert_eq!(fs::read_to_string(folder.join("attr/exec")).expect("a file"), "exec p");
        fs::remove_dir_all(folder).expect("removed");
    }

    #[test]
    fn a_process_that_executes_nothing_is_labelled_at_once() {
        let (folder, handle) = double("current", &["attr/current", "attr/exec"]);
        OwnAttributes(handle).label("u:r:t:s0").expect("written");
        assert_eq!(fs::read_to_string(folder.join("attr/current")).expect("a file"), "u:r:t:s0");
        assert_eq!(fs::read_to_string(folder.join("attr/exec")).expect("a file"), "");
        fs::remove_dir_all(folder).expect("removed");
    }

    #[test]
    fn a_link_is_not_followed_and_a_missing_file_is_an_error() {
        let (folder, handle) = double("link", &["elsewhere"]);
        assert_eq!(write_first(handle.as_fd(), &OF_APPARMOR, "exec p").expect_err("refused").raw_os_error(), Some(libc::ENOENT));
        std::os::unix::fs::symlink("../elsewhere", folder.join("attr/exec")).expect("a link");
        assert_eq!(write_first(handle.as_fd(), &OF_APPARMOR, "exec p").expect_err("refused").raw_os_error(), Some(libc::ELOOP));
        assert_eq!(fs::read_to_string(folder.join("elsewhere")).expect("a file"), "");
        fs::remove_dir_all(folder).expect("removed");
    }
}
