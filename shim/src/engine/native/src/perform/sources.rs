//! Sources of mounts, opened by the process that may read them.
//!
//! In a user namespace the container's root is none of the host's: it may not enter a folder of mode 0700 on the way to a volume. The performer may, so it
//! goes into the child's mount namespace for a moment (a source can lie in an earlier mount) and sends the child what it has opened.
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::fcntl::AT_FDCWD;

use super::sync::{ChildEnd, Message};
use super::{Doing, Failure, Step, namespaces, root};
use crate::plan::{Create, Kind, Source};
use crate::sys::{self, Tree};

/// The child's side.
pub(super) struct Sources<'a> {
    performer: &'a ChildEnd,
    /// The container has a user namespace.
    is_mapped: bool,
}

impl<'a> Sources<'a> {
    pub(super) fn new(plan: &Create, performer: &'a ChildEnd) -> Self {
        Self { performer, is_mapped: plan.has(Kind::User) }
    }

    /// Mounts the root on itself.
    pub(super) fn root(&self, path: &str) -> Result<OwnedFd, Failure> {
        if self.is_mapped { self.ask(&Message::Root) } else { mount_on_itself(path) }.doing(Step::Root, || mounting_root(path))
    }

    /// A tree of mounts that is attached nowhere: of a bind whose number in the plan is `index`.
    pub(super) fn tree(&self, index: u32, path: &str, recursive: bool) -> io::Result<OwnedFd> {
        if self.is_mapped { self.ask(&Message::Source(index)) } else { open(path, recursive) }
    }

    fn ask(&self, message: &Message) -> io::Result<OwnedFd> {
        self.performer.send(message)?;
        self.performer.take()?.ok_or_else(|| io::Error::from_raw_os_error(libc::EPIPE))
    }
}

/// The performer's side.
pub(super) struct Opener<'a> {
    pub(super) plan: &'a Create,
    /// A handle of the child.
    pub(super) child: BorrowedFd<'a>,
}

impl Opener<'_> {
    pub(super) fn root(&self) -> Result<OwnedFd, Failure> {
        let path = &self.plan.root;
        namespaces::within_mounts_of(self.child, || mount_on_itself(path)).doing(Step::Root, || mounting_root(path))
    }

    pub(super) fn source(&self, index: u32) -> Result<OwnedFd, Failure> {
        let mount = self.plan.mounts.get(index as usize);
        let Some((mount, Source::Bind { path, recursive })) = mount.map(|mount| (mount, &mount.source)) else {
            return Err(Failure { step: Step::Mounts, what: format!("mount {index} of the plan has no source"), errno: 0 });
        };
        namespaces::within_mounts_of(self.child, || open(path, *recursive))
            .doing(Step::Mounts, || format!("mount {path} on {}", mount.target))
    }
}

fn open(path: &str, recursive: bool) -> io::Result<OwnedFd> {
    sys::open_tree(AT_FDCWD, Path::new(path), if recursive { Tree::Recursive } else { Tree::Top })
}

fn mount_on_itself(path: &str) -> io::Result<OwnedFd> {
    let path = Path::new(path);
    let target = root::absolute(path)?;
    let mount = sys::open_tree(AT_FDCWD, path, Tree::Recursive)?;
    sys::move_mount(mount.as_fd(), target.as_fd())?;
    Ok(mount)
}

fn mounting_root(path: &str) -> String {
    format!("mount the root {path}")
}
