//! Makes the namespaces that the containers of a pod share.
//!
//! ```text
//!  keeper itself:   enter: joins, unshares, names, settings
//!  or a holder:     performer ── joins user and network ──clone3(CLONE_PARENT, pid, ipc, uts, mount)──▶ holder: names, settings, empty root,
//!                                                                                                       label, filter; waits, and reaps in its pid
//!                                                                                                       namespace
//! ```
//!
//! A holder can be seen by the containers of its pid namespace: it has no files, no privileges, no words on its command line, the SELinux
//! label that the pod asks for, and none of them may trace it. Its filter allows less than any profile that a client can name for it, and what it needs.
//!
//! **Invariant:** a holder ends with its parent.
use std::convert::Infallible;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, chroot, pivot_root, sethostname, setsid};

use super::cgroup::Joining;
use super::child::{Child, check_version, decode, plain};
use super::descriptors::Kept;
use super::labels::OwnAttributes;
use super::sync::{ChildEnd, Message};
use super::{Doing, Failure, Step, init, namespaces};
use crate::plan::{Kind, Pod};
use crate::sys;

/// Enters the namespaces of a plan, encoded, with the calling process, which must have one thread. It may be in some of them after a failure.
pub fn enter_pod(plan: &[u8]) -> Result<(), Failure> {
    let pod: Pod = decode(plan)?;
    check_version(pod.version)?;
    if pod.needs_holder() {
        return Err(plain(Step::Plan, "a process cannot enter a pid or a user namespace and leave it again"));
    }
    if let Some(path) = &pod.network {
        join_network(&open_network(path)?, path)?;
    }
    let flags = own(&pod).fold(CloneFlags::empty(), |flags, kind| flags | CloneFlags::from_bits_retain(kind.flag() as i32));
    unshare(flags).doing(Step::Namespaces, || "make the namespaces of the pod".to_owned())?;
    settle(&pod)
}

/// Makes a holder. Returns its pid.
pub(super) fn make_holder(plan: &[u8], kept: &Kept) -> Result<u32, Failure> {
    let pod: Pod = decode(plan)?;
    check_version(pod.version)?;
    sys::set_dumpable(false).doing(Step::Settings, || "forbid tracing".to_owned())?;
    if let Some(path) = &pod.network {
        let network = open_network(path)?;
        if pod.user {
            let user = sys::owner_of_namespace(&network).doing(Step::Namespaces, || format!("find the user namespace of {path}"))?;
            setns(user, CloneFlags::CLONE_NEWUSER).doing(Step::Namespaces, || "join the user namespace of the pod".to_owned())?;
            namespaces::become_root()?;
        }
        join_network(&network, path)?;
    } else if pod.user {
        return Err(plain(Step::Plan, "a user namespace comes with a network namespace"));
    }
    let flags = own(&pod).chain([Kind::Mount]).fold(0, |flags, kind| flags | kind.flag());
    let child = Child::make(flags, &Joining::default(), |performer| hold(&pod, kept, performer))?;
    let prepared = match child.messages.receive().doing(Step::Child, || "wait for the holder of the pod".to_owned()) {
        Ok(Some(Message::Prepared)) => child.messages.go().doing(Step::Child, || "answer the holder of the pod".to_owned()),
        Ok(Some(Message::Failed(failure))) | Err(failure) => Err(failure),
        Ok(Some(_)) => Err(plain(Step::Child, "the holder of the pod has sent a message out of order")),
        Ok(None) => Err(plain(Step::Child, "the holder of the pod was killed")),
    };
    // Under its label it may not be allowed to send anything: it succeeds by closing its end. A kill looks the same, and is its parent's to see.
    let is_labelled = |()| match child.messages.receive().doing(Step::Child, || "wait for the label of the holder".to_owned())? {
        None => Ok(()),
        Some(Message::Failed(failure)) => Err(failure),
        Some(_) => Err(plain(Step::Child, "the holder of the pod has sent a message out of order")),
    };
    prepared.and_then(is_labelled).inspect_err(|_| child.kill())?;
    Ok(child.pid)
}

/// What the holder does.
fn hold(pod: &Pod, kept: &Kept, performer: &ChildEnd) -> Result<Infallible, Failure> {
    kept.close_report().doing(Step::Child, || "close the report".to_owned())?;
    setsid().doing(Step::Child, || "start a session".to_owned())?;
    sys::ignore_children().doing(Step::Child, || "have children reaped by the kernel".to_owned())?;
    // Those that a host sends to every process before it is switched off: containers end first.
    SigSet::all().thread_block().doing(Step::Child, || "block signals".to_owned())?;
    settle(pod)?;
    sys::clear_command_line().doing(Step::Settings, || "clear the command line".to_owned())?;
    nix::sys::prctl::set_name(c"pod").doing(Step::Settings, || "name the holder".to_owned())?;
    let attributes = pod.label.as_ref().map(|label| (OwnAttributes::open(), label));
    empty_root().doing(Step::Root, || "enter an empty root".to_owned())?;
    sys::set_no_new_privileges().doing(Step::Identity, || "give up new privileges".to_owned())?;
    sys::set_capabilities(0, 0, 0).doing(Step::Identity, || "give up capabilities".to_owned())?;
    sys::set_dumpable(false).doing(Step::Settings, || "forbid tracing".to_owned())?;
    // Last: a change of credentials can undo it. The performer dies with the parent too, so an answer of it shows that the parent has lived until then.
    set_pdeathsig(Signal::SIGKILL).doing(Step::Child, || "tie the holder to its parent".to_owned())?;
    init::report_and_wait(performer, &Message::Prepared)?;
    if let Some((attributes, label)) = attributes {
        attributes.doing(Step::Settings, || "open the attributes of the holder".to_owned())?.label(label)?;
    }
    if let Some(filter) = &pod.filter {
        sys::load_filter(&filter.program, filter.flags).doing(Step::Filter, || "load the seccomp filter".to_owned())?;
    }
    // The streams are those of the parent.
    if sys::close_range(0, u32::MAX).is_err() {
        sys::exit_now(1);
    }
    sys::wait_for_ever()
}

/// The new namespaces that are made in any case, by `unshare` or with a process. The pid namespace is for a holder alone.
fn own(pod: &Pod) -> impl Iterator<Item = Kind> {
    [(pod.pid, Kind::Pid), (pod.ipc, Kind::Ipc), (pod.uts, Kind::Uts)].into_iter().filter_map(|(has, kind)| has.then_some(kind))
}

/// Names the pod and writes its settings, by a process that is in its namespaces.
fn settle(pod: &Pod) -> Result<(), Failure> {
    if let Some(hostname) = pod.hostname.as_ref().filter(|_| pod.uts) {
        sethostname(hostname).doing(Step::Settings, || format!("set the hostname {hostname:?}"))?;
    }
    pod.sysctls.iter().try_for_each(|(path, value)| {
        let write = || {
            use std::io::Write as _;
            File::options().write(true).open(Path::new("/proc/sys").join(path))?.write_all(value.as_bytes())
        };
        write().doing(Step::Settings, || format!("set linux.sysctls {} to {value:?}", path.replace('/', ".")))
    })
}

fn open_network(path: &str) -> Result<OwnedFd, Failure> {
    // A path that is no namespace, as a fifo, must not be waited for.
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    nix::fcntl::open(Path::new(path), flags, Mode::empty()).doing(Step::Namespaces, || format!("open the network namespace {path}"))
}

fn join_network(network: &OwnedFd, path: &str) -> Result<(), Failure> {
    setns(network, CloneFlags::CLONE_NEWNET).doing(Step::Namespaces, || format!("join the network namespace {path}"))
}

/// Replaces the root by an empty folder that cannot be written to.
fn empty_root() -> nix::Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    // Any folder that every host has.
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    mount(Some("none"), "/proc", Some("tmpfs"), flags, Some("size=4k,mode=555"))?;
    chdir("/proc")?;
    match pivot_root(".", ".") {
        Ok(()) => umount2(".", MntFlags::MNT_DETACH)?,
        // The root of an initramfs cannot be exchanged.
        Err(nix::errno::Errno::EINVAL) => {
            mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?;
            chroot(".")?;
        }
        Err(error) => return Err(error),
    }
    chdir("/")
}
