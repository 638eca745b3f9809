//! Sources of mounts, opened by the process that may read them.
//!
//! A mount that shows other owners needs privileges over its file system. And in a user namespace the container's root is none of the host's: it may not enter a folder of mode 0700 on the way to a volume. The performer may, so it
//! goes into the child's mount namespace for a moment (a source can lie in an earlier mount) and sends the child what it has opened.
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use nix::fcntl::AT_FDCWD;

use super::sync::{ChildEnd, Message};
use super::{Doing, Failure, Step, ids, mounts, namespaces, root};
use crate::plan::{Create, Entry, IDMAP, Kind, Mappings, Mount, Source};
use crate::sys::{self, Attributes, Tree};

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

    /// The root, as a mount of its own if there is a mount namespace.
    pub(super) fn root(&self, plan: &Create) -> Result<OwnedFd, Failure> {
        if self.is_mapped { self.performer.ask(&Message::Root).doing(Step::Root, || mounting_root(plan)) } else { open_root(plan) }
    }

    /// A tree of mounts that is attached nowhere: of a bind of `path` whose number in the plan is `index`.
    pub(super) fn tree(&self, index: u32, mount: &Mount, path: &str, recursive: bool) -> io::Result<OwnedFd> {
        if self.is_mapped || mount.ids.is_some() { self.performer.ask(&Message::Source(index)) } else { open(path, recursive) }
    }
}

/// The performer's side.
pub(super) struct Opener<'a> {
    plan: &'a Create,
    /// A handle of the child, and its pid.
    child: BorrowedFd<'a>,
    pid: u32,
    /// User namespaces that were made for their mappings.
    made: RefCell<Vec<(Mappings, Rc<OwnedFd>)>>,
}

impl<'a> Opener<'a> {
    pub(super) fn new(plan: &'a Create, child: BorrowedFd<'a>, pid: u32) -> Self {
        Self { plan, child, pid, made: RefCell::default() }
    }

    pub(super) fn root(&self) -> Result<OwnedFd, Failure> {
        namespaces::within_mounts_of(self.child, || open_root(self.plan)).doing(Step::Root, || mounting_root(self.plan))?
    }

    pub(super) fn source(&self, index: u32) -> Result<OwnedFd, Failure> {
        let mount = self.plan.mounts.get(index as usize);
        let Some((mount, Source::Bind { path, recursive, .. })) = mount.map(|mount| (mount, &mount.source)) else {
            return Err(Failure { step: Step::Mounts, what: format!("mount {index} of the plan has no source"), errno: 0 });
        };
        let doing = || format!("mount {path} on {}", mount.target);
        let user = mount.ids.as_ref().map(|ids| self.user_namespace(&ids.mappings)).transpose();
        let user = user.doing(Step::Namespaces, || format!("make a user namespace for the owners of {}", mount.target))?;
        let opened = namespaces::within_mounts_of(self.child, || open(path, *recursive)).flatten().doing(Step::Mounts, doing)?;
        if let (Some(ids), Some(user)) = (&mount.ids, user) {
            let tree = if ids.recursive { Tree::Recursive } else { Tree::Top };
            let attributes = Attributes { set: IDMAP, user_namespace: user.as_raw_fd() as u64, ..Attributes::default() };
            sys::set_attributes(opened.as_fd(), &attributes, tree).doing(Step::Mounts, || format!("{}: map owners", doing()))?;
        }
        Ok(opened)
    }

    /// One with these mappings: the container's, or one that is made.
    fn user_namespace(&self, mappings: &Mappings) -> io::Result<Rc<OwnedFd>> {
        let mut made = self.made.borrow_mut();
        if let Some((_, namespace)) = made.iter().find(|(own, _)| own == mappings) {
            return Ok(Rc::clone(namespace));
        }
        let is_containers = mappings.is_empty() || *mappings == self.plan.mappings;
        let namespace = Rc::new(if is_containers { ids::of(self.pid)? } else { ids::namespace(mappings)? });
        made.push((mappings.clone(), Rc::clone(&namespace)));
        Ok(namespace)
    }
}

pub(super) fn open(path: &str, recursive: bool) -> io::Result<OwnedFd> {
    sys::open_tree(AT_FDCWD, Path::new(path), if recursive { Tree::Recursive } else { Tree::Top })
}

/// The root, mounted on itself, or mounted there from the plan.
pub(super) fn open_root(plan: &Create) -> Result<OwnedFd, Failure> {
    let path = Path::new(&plan.root);
    let target = root::absolute(path).doing(Step::Root, || mounting_root(plan))?;
    if plan.entry == Entry::Chroot {
        return Ok(target);
    }
    let Some((first, others)) = plan.root_mounts.split_first() else {
        let mount = || -> io::Result<OwnedFd> {
            let mount = sys::open_tree(AT_FDCWD, path, Tree::Recursive)?;
            sys::move_mount(mount.as_fd(), target.as_fd())?;
            Ok(mount)
        };
        return mount().doing(Step::Root, || mounting_root(plan));
    };
    others.iter().try_fold(mounts::make_root(path, first)?, |_, mount| mounts::make_root(path, mount))
}

fn mounting_root(plan: &Create) -> String {
    format!("mount the root {}", plan.root)
}
