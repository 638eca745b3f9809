//! The namespaces of a container, entered by the performer for the time in which it makes the child.
//!
//! **Invariant:** all are opened before the first is joined, and the performer is back in its own before it does anything else on the host.
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, fstat, stat};

use super::{Doing, Failure, Step};
use crate::plan::{Create, Kind};
use crate::sys;

/// Namespaces that were named by their paths.
#[derive(Debug)]
pub(super) struct Named {
    opened: Vec<(Kind, OwnedFd)>,
}

/// The performer's own, to return to.
#[derive(Debug)]
pub(super) struct Own(Vec<(Kind, OwnedFd)>);

impl Named {
    pub(super) fn open(plan: &Create) -> Result<Self, Failure> {
        let mut opened = Vec::new();
        for namespace in &plan.namespaces {
            let Some(path) = &namespace.path else { continue };
            let doing = || format!("open the namespace {path}");
            let handle =
                nix::fcntl::open(Path::new(path), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).doing(Step::Namespaces, doing)?;
            if namespace.kind == Kind::Mount && is_own(&handle, Kind::Mount).doing(Step::Namespaces, doing)? {
                let what = "the mount namespace to join is the runtime's: the host's root would be replaced";
                return Err(Failure { step: Step::Namespaces, what: what.to_owned(), errno: 0 });
            }
            let has_settings = || plan.sysctls.iter().any(|(path, _)| path.starts_with("net/"));
            if namespace.kind == Kind::Network && has_settings() && is_own(&handle, Kind::Network).doing(Step::Namespaces, doing)? {
                let what = "linux.sysctl net.* would change the settings of the host: the network namespace is the runtime's";
                return Err(Failure { step: Step::Settings, what: what.to_owned(), errno: 0 });
            }
            opened.push((namespace.kind, handle));
        }
        Ok(Self { opened })
    }

    /// The user namespace to join.
    pub(super) fn user(&self) -> Option<&OwnedFd> {
        self.find(Kind::User)
    }

    /// The mount namespace to join, as a member of which the performer could not see the host's files.
    pub(super) fn mount(&self) -> Option<&OwnedFd> {
        self.find(Kind::Mount)
    }

    fn find(&self, kind: Kind) -> Option<&OwnedFd> {
        self.opened.iter().find(|(own, _)| *own == kind).map(|(_, handle)| handle)
    }

    /// Joins all but the user and the mount namespace: the child inherits them. It could not join those that are not its user namespace's.
    pub(super) fn join(&self) -> Result<Own, Failure> {
        let joined = || self.opened.iter().filter(|(kind, _)| !matches!(kind, Kind::User | Kind::Mount));
        let own = joined().map(|(kind, _)| own(*kind)).collect::<Result<_, _>>()?;
        for (kind, namespace) in joined() {
            enter(namespace, *kind).doing(Step::Namespaces, || format!("join the {kind:?} namespace").to_lowercase())?;
        }
        Ok(Own(own))
    }
}

impl Own {
    /// Makes a time namespace for the next child.
    pub(super) fn with_new_clocks(mut self, clocks: &[String]) -> Result<Self, Failure> {
        self.0.push(own(Kind::Time)?);
        unshare(TIME).doing(Step::Namespaces, || "make a time namespace".to_owned())?;
        set_clocks("self", clocks)?;
        Ok(self)
    }

    pub(super) fn restore(self) -> Result<(), Failure> {
        self.0.iter().try_for_each(|(kind, namespace)| {
            enter(namespace, *kind).doing(Step::Namespaces, || format!("return to the {kind:?} namespace").to_lowercase())
        })
    }
}

/// Gives the next child a time namespace of its own, with the clocks of this one: every descendant of it inherits that, whatever becomes
/// of its parents and sessions, and only with CAP_SYS_ADMIN can one leave it. So the descendants of an exec are found when it is killed.
///
/// Without it they are found as far as their parents, sessions and pipes show them: a kernel without time namespaces, or with all in
/// use, fails no exec.
pub(super) fn mark_descendants() {
    let _ = unshare(TIME);
}

/// The flag of time namespaces, which nix does not know.
pub(super) const TIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

/// Writes the offsets of the time namespace for the children of a process (a pid, or `self`). The kernel takes them before the first of these only.
pub(super) fn set_clocks(process: &str, clocks: &[String]) -> Result<(), Failure> {
    if clocks.is_empty() {
        return Ok(());
    }
    let text = clocks.join("\n");
    std::fs::write(format!("/proc/{process}/timens_offsets"), &text).doing(Step::Namespaces, || format!("set the clocks to {text:?}"))
}

/// Runs `act` in the mount namespace of a process, by its handle.
pub(super) fn within_mounts_of<T>(process: impl AsFd, act: impl FnOnce() -> T) -> std::io::Result<T> {
    let own = nix::fcntl::open("/proc/self/ns/mnt", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    setns(process, CloneFlags::CLONE_NEWNS)?;
    let done = act();
    setns(own, CloneFlags::CLONE_NEWNS)?;
    Ok(done)
}

/// Becomes root of the user namespace that this process has entered.
pub(super) fn become_root() -> Result<(), Failure> {
    let become_it = || -> std::io::Result<()> {
        match sys::set_groups(&[]) {
            // A namespace can forbid it.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
            other => other?,
        }
        sys::set_ids(0, 0)?;
        // A change of ids decides about it anew.
        sys::set_dumpable(false)
    };
    become_it().doing(Step::Namespaces, || "become root of the user namespace".to_owned())
}

/// Whether it is the performer's.
fn is_own(namespace: &OwnedFd, kind: Kind) -> std::io::Result<bool> {
    let (theirs, ours) = (fstat(namespace)?, stat(format!("/proc/self/ns/{}", file(kind)).as_str())?);
    Ok((theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino))
}

fn own(kind: Kind) -> Result<(Kind, OwnedFd), Failure> {
    let path = format!("/proc/self/ns/{}", file(kind));
    let handle = nix::fcntl::open(Path::new(&path), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
    Ok((kind, handle.doing(Step::Namespaces, || format!("open {path}"))?))
}

fn enter(namespace: &OwnedFd, kind: Kind) -> nix::Result<()> {
    setns(namespace, CloneFlags::from_bits_retain(kind.flag() as i32))
}

/// The name in `/proc/PID/ns`.
pub(super) fn file(kind: Kind) -> &'static str {
    match kind {
        Kind::Mount => "mnt",
        Kind::Pid => "pid",
        Kind::Network => "net",
        Kind::Ipc => "ipc",
        Kind::Uts => "uts",
        Kind::Cgroup => "cgroup",
        Kind::User => "user",
        Kind::Time => "time",
    }
}
