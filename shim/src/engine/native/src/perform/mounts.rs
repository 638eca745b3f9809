//! Makes mounts in the root.
//!
//! **Invariant:** a mount is complete, attributes and all, before it is attached, and it is attached on a descriptor.
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::MsFlags;
use nix::sys::stat::fstat;
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};

use super::root::{self, Root};
use super::sources::{self, Sources};
use super::{Doing, Failure, Step, copy, devices};
use crate::host::unescape;
use crate::plan::{self, Classic, Mount, Source};
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

/// Makes the mounts of the host private to the new mount namespace: all of them, or the first and the one that the root lies in. What is mounted in that
/// one would be on the host too, and pivot_root(2) refuses it.
pub(super) fn separate(path: &str, propagation: u64) -> Result<(), Failure> {
    let set = |mount: &Path, flags: u64| propagate(root::absolute(mount)?.as_fd(), flags);
    let separate = || -> io::Result<()> {
        set(Path::new("/"), propagation)?;
        if propagation & libc::MS_REC != 0 {
            return Ok(());
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let targets = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
        let above = targets.filter(|target| Path::new(path).starts_with(target)).max_by_key(String::len);
        above.map_or(Ok(()), |above| set(Path::new(&above), libc::MS_SLAVE))
    };
    separate().doing(Step::Root, || "set the propagation of the host's mounts".to_owned())
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
        Source::Classic(Classic { kind, .. }) => format!("mount {kind} on {}", mount.target),
        Source::Link { .. } => format!("make link {}", mount.target),
        Source::Existing { .. } => format!("remount {}", mount.target),
    };
    let made = match &mount.source {
        Source::Link { to } => return devices::link(root, to, &mount.target),
        Source::New { .. } => new(root, mount),
        Source::Bind { path, recursive, procfs } => match bind.sources.tree(bind.index, mount, path, *recursive) {
            Ok(made) if *procfs && !is_procfs(&made) => {
                return Err(Failure { step: Step::Mounts, what: format!("{}: it is no procfs", doing()), errno: 0 });
            }
            made => made.and_then(|made| attach_bind(root, mount, made, *procfs)),
        },
        Source::Existing { parameters } => remount(root, mount, parameters.as_deref()),
        // It would take a path.
        Source::Classic(_) => Err(Errno::EINVAL.into()),
    };
    finish(made.doing(Step::Mounts, doing)?, mount, late)
}

fn finish(made: OwnedFd, mount: &Mount, late: &mut Late) -> Result<(), Failure> {
    for flags in &mount.propagation {
        propagate(made.as_fd(), *flags).doing(Step::Mounts, || format!("set the propagation of {}", mount.target))?;
    }
    if matches!(mount.source, Source::New { late_readonly: true, .. }) {
        late.0.push((mount.target.clone(), made));
    }
    Ok(())
}

/// Makes a file system, and attaches it.
fn new(root: &Root, mount: &Mount) -> io::Result<OwnedFd> {
    let Source::New { kind, parameters, strict, keep_mode, copy_up, .. } = &mount.source else { return Err(Errno::EINVAL.into()) };
    let existing = if *strict { root.strict_folder(&mount.target).map(Some)? } else { root.find(&mount.target).ok() };
    let mode = match &existing {
        Some(existing) if *keep_mode => Some(fstat(existing)?.st_mode & 0o7777),
        Some(_) | None => None,
    };
    let target = existing.map_or_else(|| root.folder(&mount.target), Ok)?;
    let context = FsContext::open(kind)?;
    for (key, value) in parameters {
        context.set(key, value.as_deref())?;
    }
    // What is copied needs no option of the file system.
    if let Some(mode) = mode.filter(|_| !copy_up) {
        context.set("mode", Some(&format!("{mode:o}")))?;
    }
    let made = context.mount(mount.attributes.set)?;
    if *copy_up {
        if let Some(mode) = mode {
            sys::set_mode(&made, mode)?;
        }
        if !parameters.iter().any(|(key, _)| key == "uid" || key == "gid") {
            copy::owner(&target, made.as_fd())?;
        }
        copy::content(&target, made.as_fd())?;
    }
    sys::move_mount(made.as_fd(), target.as_fd())?;
    set_recursive(&made, mount)?;
    Ok(made)
}

/// Gives a bind of a container that criu has restored the attributes of its plan: criu does not for every mount from outside.
pub(super) fn confirm(root: &Root, mount: &Mount) -> Result<(), Failure> {
    let confirm = || -> io::Result<()> {
        let target = root.find(&mount.target)?;
        if !mount.attributes.is_empty() {
            set_attributes(&target, mount)?;
        }
        set_recursive(&target, mount)
    };
    confirm().doing(Step::Mounts, || format!("set the attributes of {}", mount.target))
}

/// Mounts a root on a path of the host, in the container's mount namespace.
pub(super) fn make_root(path: &Path, mount: &Mount) -> Result<OwnedFd, Failure> {
    let name = |kind: &str, source: &str| format!("mount {kind} from {source:?} at {}", path.display());
    match &mount.source {
        Source::New { kind, parameters, .. } => {
            let mut complaint = None;
            let made = new_root(kind, parameters, mount, &mut complaint).and_then(|made| attach_root(path, made, mount));
            made.doing(Step::RootMount, || {
                let source = parameters.iter().find_map(|(key, value)| (key == "source").then(|| value.clone()).flatten());
                let complaint = complaint.map(|complaint| format!(" ({complaint})")).unwrap_or_default();
                format!("{}{complaint}", name(kind, &source.unwrap_or_default()))
            })
        }
        Source::Bind { path: source, recursive, .. } => {
            let bind = || -> io::Result<OwnedFd> {
                let made = sources::open(source, *recursive)?;
                if !mount.attributes.is_empty() {
                    set_attributes(&made, mount)?;
                }
                attach_root(path, made, mount)
            };
            bind().doing(Step::RootMount, || name("bind", source))
        }
        Source::Classic(classic) => classic_root(path, classic, mount).doing(Step::RootMount, || name(&classic.kind, &classic.source)),
        Source::Link { .. } | Source::Existing { .. } => {
            Err(Errno::EINVAL).doing(Step::Root, || format!("mount a root at {}", path.display()))
        }
    }
}

/// `complaint`: what the file system itself says about a failure.
fn new_root(kind: &str, parameters: &[(String, Option<String>)], mount: &Mount, complaint: &mut Option<String>) -> io::Result<OwnedFd> {
    let context = FsContext::open(kind)?;
    let configured = parameters.iter().try_for_each(|(key, value)| context.set(key, value.as_deref()));
    let made = configured.and_then(|()| context.mount(mount.attributes.set));
    if made.is_err() {
        *complaint = context.complaint();
    }
    made
}

fn attach_root(path: &Path, made: OwnedFd, mount: &Mount) -> io::Result<OwnedFd> {
    set_recursive(&made, mount)?;
    sys::move_mount(made.as_fd(), root::absolute(path)?.as_fd())?;
    Ok(made)
}

/// By mount(2), on the path. The working directory is that of no program yet.
fn classic_root(path: &Path, classic: &Classic, mount: &Mount) -> io::Result<OwnedFd> {
    if let Some(base) = &classic.base {
        nix::unistd::chdir(base.as_str())?;
    }
    let flags = if mount.attributes.set & plan::RDONLY == 0 { MsFlags::empty() } else { MsFlags::MS_RDONLY };
    let mounted = nix::mount::mount(Some(classic.source.as_str()), path, Some(classic.kind.as_str()), flags, Some(classic.data.as_str()));
    if classic.base.is_some() {
        nix::unistd::chdir("/")?;
    }
    mounted?;
    let made = root::absolute(path)?;
    set_attributes(&made, mount)?;
    set_recursive(&made, mount)?;
    Ok(made)
}

fn attach_bind(root: &Root, mount: &Mount, made: OwnedFd, procfs: bool) -> io::Result<OwnedFd> {
    let target = match (procfs, root::is_folder(&made)?) {
        (true, _) => root.strict_folder(&mount.target)?,
        (false, true) => root.folder(&mount.target)?,
        (false, false) => root.file(&mount.target)?,
    };
    if !mount.attributes.is_empty() {
        set_attributes(&made, mount)?;
    }
    set_recursive(&made, mount)?;
    sys::move_mount(made.as_fd(), target.as_fd())?;
    Ok(made)
}

/// Changes what is mounted at the target: the file system, then the mount.
fn remount(root: &Root, mount: &Mount, parameters: Option<&[(String, Option<String>)]>) -> io::Result<OwnedFd> {
    let target = root.find(&mount.target)?;
    if let Some(parameters) = parameters {
        let context = FsContext::pick(target.as_fd())?;
        for (key, value) in parameters {
            context.set(key, value.as_deref())?;
        }
        context.reconfigure()?;
    }
    set_attributes(&target, mount)?;
    set_recursive(&target, mount)?;
    Ok(target)
}

fn set_attributes(made: &OwnedFd, mount: &Mount) -> io::Result<()> {
    let plan::Attributes { set: wanted, clear } = mount.attributes;
    match set(made.as_fd(), wanted, clear, 0, Tree::Top) {
        // The kernel has locked some in a user namespace: those that were to be cleared by a word cannot be, the others stay.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) && mount.lenient != 0 => {
            set(made.as_fd(), wanted, clear & !mount.lenient, 0, Tree::Top)
        }
        other => other,
    }
}

fn set_recursive(made: &OwnedFd, mount: &Mount) -> io::Result<()> {
    if mount.recursive.is_empty() {
        return Ok(());
    }
    set(made.as_fd(), mount.recursive.set, mount.recursive.clear, 0, Tree::Recursive)
}

/// Whether a mount shows a whole procfs, not a folder of one.
fn is_procfs(mount: &OwnedFd) -> bool {
    let is_first = fstat(mount).is_ok_and(|about| about.st_ino == INODE_OF_PROCFS);
    is_first && fstatfs(mount).is_ok_and(|about| about.filesystem_type() == PROC_SUPER_MAGIC)
}

/// The root of every procfs has it: PROC_ROOT_INO.
const INODE_OF_PROCFS: u64 = 1;

/// Sets the propagation of a mount, or of a tree of them, by `MS_*` flags.
pub(super) fn propagate(mount: BorrowedFd<'_>, flags: u64) -> io::Result<()> {
    let (tree, flags) = split(flags);
    set(mount, 0, 0, flags, tree)
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
