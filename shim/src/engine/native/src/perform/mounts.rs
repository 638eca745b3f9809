//! Makes mounts in the root.
//!
//! **Invariant:** a mount is complete, attributes and all, before it is attached, and it is attached on a descriptor.
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::sys::stat::fstat;

use super::root::{self, Root};
use super::sources::Sources;
use super::{Doing, Failure, Step, devices};
use crate::plan::{self, Mount, Source};
use crate::sys::{self, FsContext, Tree};

/// Mounts that are made read-only at the end.
#[derive(Debug, Default)]
pub(super) struct Late(Vec<(String, OwnedFd)>);

impl Late {
    pub(super) fn make_readonly(self) -> Result<(), Failure> {
        self.0
            .iter()
            .try_for_each(|(target, mount)| readonly(mount.as_fd(), Tree::Top).doing(Step::Mounts, || format!("make {target} read-only")))
    }
}

/// Makes the mounts of the host private to the new mount namespace, then the root a mount of its own.
pub(super) fn root(path: &str, propagation: u64, sources: &Sources<'_>) -> Result<Root, Failure> {
    let (tree, flags) = split(propagation);
    let propagate = || set(root::absolute(Path::new("/"))?.as_fd(), 0, 0, flags, tree);
    propagate().doing(Step::Root, || "set the propagation of the host's mounts".to_owned())?;
    Ok(Root::new(sources.root(path)?))
}

/// Where a bind's source comes from.
pub(super) struct Bind<'a> {
    pub(super) sources: &'a Sources<'a>,
    /// Of the mount, in the plan.
    pub(super) index: u32,
}

/// Makes a mount.
pub(super) fn make(root: &Root, mount: &Mount, bind: &Bind<'_>, late: &mut Late) -> Result<(), Failure> {
    let doing = || match &mount.source {
        Source::New { kind, .. } => format!("mount {kind} on {}", mount.target),
        Source::Bind { path, .. } => format!("mount {path} on {}", mount.target),
        Source::Link { .. } => format!("make link {}", mount.target),
    };
    let made = match &mount.source {
        Source::Link { to } => return devices::link(root, to, &mount.target),
        Source::New { kind, parameters, strict, keep_mode, .. } => {
            let existing = root.find(&mount.target);
            let target = match (strict, existing) {
                (true, _) => root.strict_folder(&mount.target),
                (false, Ok(existing)) => Ok(existing),
                (false, Err(_missing)) => {
                    let target = root.folder(&mount.target).doing(Step::Mounts, doing)?;
                    let made = new(kind, parameters, None, mount.attributes.set).doing(Step::Mounts, doing)?;
                    sys::move_mount(made.as_fd(), target.as_fd()).doing(Step::Mounts, doing)?;
                    return finish(made, mount, late);
                }
            }
            .doing(Step::Mounts, doing)?;
            let mode = if *keep_mode { Some(fstat(&target).doing(Step::Mounts, doing)?.st_mode & 0o7777) } else { None };
            let made = new(kind, parameters, mode, mount.attributes.set).doing(Step::Mounts, doing)?;
            sys::move_mount(made.as_fd(), target.as_fd()).map(|()| made)
        }
        Source::Bind { path, recursive } => {
            bind.sources.tree(bind.index, mount, path, *recursive).and_then(|made| attach_bind(root, mount, made))
        }
    };
    finish(made.doing(Step::Mounts, doing)?, mount, late)
}

fn finish(made: OwnedFd, mount: &Mount, late: &mut Late) -> Result<(), Failure> {
    for flags in &mount.propagation {
        let (tree, flags) = split(*flags);
        set(made.as_fd(), 0, 0, flags, tree).doing(Step::Mounts, || format!("set the propagation of {}", mount.target))?;
    }
    if matches!(mount.source, Source::New { late_readonly: true, .. }) {
        late.0.push((mount.target.clone(), made));
    }
    Ok(())
}

fn new(kind: &str, parameters: &[(String, Option<String>)], mode: Option<u32>, attributes: u64) -> io::Result<OwnedFd> {
    let context = FsContext::open(kind)?;
    for (key, value) in parameters {
        context.set(key, value.as_deref())?;
    }
    if let Some(mode) = mode {
        context.set("mode", Some(&format!("{mode:o}")))?;
    }
    context.mount(attributes)
}

fn attach_bind(root: &Root, mount: &Mount, made: OwnedFd) -> io::Result<OwnedFd> {
    let target = if root::is_folder(&made)? { root.folder(&mount.target)? } else { root.file(&mount.target)? };
    let plan::Attributes { set: wanted, clear } = mount.attributes;
    if !mount.attributes.is_empty() {
        match set(made.as_fd(), wanted, clear, 0, Tree::Top) {
            // The kernel has locked some in a user namespace: those that were to be cleared by a word cannot be, the others stay.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) && mount.lenient != 0 => {
                set(made.as_fd(), wanted, clear & !mount.lenient, 0, Tree::Top)?;
            }
            other => other?,
        }
    }
    if !mount.recursive.is_empty() {
        set(made.as_fd(), mount.recursive.set, mount.recursive.clear, 0, Tree::Recursive)?;
    }
    sys::move_mount(made.as_fd(), target.as_fd())?;
    Ok(made)
}

/// Makes a mount, or a tree of them, read-only.
pub(super) fn readonly(mount: BorrowedFd<'_>, tree: Tree) -> io::Result<()> {
    set(mount, plan::RDONLY, 0, 0, tree)
}

fn set(mount: BorrowedFd<'_>, set: u64, clear: u64, propagation: u64, tree: Tree) -> io::Result<()> {
    sys::set_attributes(mount, &sys::Attributes { set, clear, propagation, user_namespace: 0 }, tree)
}

/// `MS_REC` apart from the propagation.
fn split(propagation: u64) -> (Tree, u64) {
    let tree = if propagation & libc::MS_REC != 0 { Tree::Recursive } else { Tree::Top };
    (tree, propagation & !libc::MS_REC)
}
