//! What init does between its birth and its program.
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, sethostname, setsid};

use super::descriptors::Kept;
use super::labels::{self, Attributes};
use super::mounts::{self, Bind, Late};
use super::program::{self, Program, Role};
use super::root::{self, Root};
use super::sources::Sources;
use super::sync::{Answer, ChildEnd, Message};
use super::{Doing, Failure, Step, devices, entry, hooks, masks, scheduling, terminal};
use crate::plan::{Create, Entry, Kind, Process};
use crate::sys::{self, FsContext, Tree};

/// Everything up to the gate.
pub(super) fn prepare(plan: &Create, kept: &Kept, performer: &ChildEnd, attributes: &Attributes) -> Result<Program, Failure> {
    // The caller's would change the modes of what is made.
    umask(Mode::empty());
    setsid().doing(Step::Child, || "start a session".to_owned())?;
    // Its root is the cgroup at this moment.
    if plan.makes(Kind::Cgroup) {
        unshare(CloneFlags::CLONE_NEWCGROUP).doing(Step::Namespaces, || "make a cgroup namespace".to_owned())?;
    }
    scheduling::allow_every_processor()?;
    join_keyring(&plan.process, attributes)?;
    if plan.makes(Kind::Network) {
        sys::loopback_up().doing(Step::Namespaces, || "set the loopback interface up".to_owned())?;
    }

    let sources = Sources::new(plan, performer);
    if plan.entry != Entry::Chroot {
        mounts::separate(&plan.root, plan.propagation)?;
    }
    let root = Root::new(sources.root(plan)?);
    let mut late = Late::default();
    (0..).zip(&plan.mounts).try_for_each(|(index, mount)| {
        mounts::make(&root, mount, &Bind { sources: &sources, index }, &mut late)?;
        labels::label_mount(&root, mount, plan.mount_label.as_deref())
    })?;
    plan.devices.iter().try_for_each(|device| devices::node(&root, device, plan.entry != Entry::Chroot))?;
    plan.links.iter().try_for_each(|(target, path)| devices::link(&root, target, path))?;
    reopen_null_streams(&root)?;
    run_hooks(plan, performer)?;
    if let (Some(terminal), Some(console)) = (&plan.process.terminal, &kept.console) {
        terminal::open(&root, terminal, console, plan.own_dev)?;
    }
    name(plan)?;
    settings(plan)?;
    masks::make_readonly(&root, &plan.readonly)?;
    masks::hide(&root, &plan.masked, plan.mount_label.as_deref())?;
    late.make_readonly()?;
    entry::enter(&root, plan.entry)?;
    if let Some(flags) = plan.root_propagation {
        mounts::propagate(root.as_fd(), flags).doing(Step::Root, || "set the propagation of the root".to_owned())?;
    }
    if plan.root_readonly {
        mounts::readonly(root.as_fd(), Tree::Top).doing(Step::Root, || "make the root read-only".to_owned())?;
    }
    drop(root);

    scheduling::choose_memory(&plan.process)?;
    if plan.makes(Kind::Pid) {
        // The kernel spares the first process of a pid namespace the signals that it does not handle. Before the filter, which may forbid it.
        sys::exit_on_signals();
    }
    wait_for_limits(performer, &plan.process)?;
    program::become_it(&plan.process, kept, attributes, performer, Role::Init)
}

/// Lets the performer run the hooks on the host, then runs those in the container's namespaces.
fn run_hooks(plan: &Create, performer: &ChildEnd) -> Result<(), Failure> {
    let planned = &plan.hooks;
    if planned.on_host.is_empty() && planned.create_container.is_empty() {
        return Ok(());
    }
    // A hook may run for long, and nothing else of the container shows that the keeper, this process's parent, has died: it would be left, with
    // its cgroup. Before the report: until then the performer's end shows it.
    let tie = |signal| set_pdeathsig(signal).doing(Step::Hooks, || "end with the keeper".to_owned());
    tie(Some(Signal::SIGKILL))?;
    report_and_wait(performer, &Message::Mounted)?;
    // Its own pid, as the container sees it, is all that it knows.
    let state = planned.state.json("creating", std::process::id());
    hooks::run(&planned.create_container, "createContainer", &state, Some(std::path::Path::new(&plan.root)), &[])?;
    tie(None::<Signal>)
}

/// Reports that limits may be set, and waits until they are.
pub(super) fn wait_for_limits(performer: &ChildEnd, process: &Process) -> Result<(), Failure> {
    performer.send(&Message::Ready).doing(Step::Child, || "report to the performer".to_owned())?;
    if wait_for(performer)? == Answer::LimitYourself { limit(process) } else { Ok(()) }
}

/// Sets the limits of this process.
pub(super) fn limit(process: &Process) -> Result<(), Failure> {
    process
        .rlimits
        .iter()
        .try_for_each(|limit| sys::set_rlimit(0, limit.resource, limit.soft, limit.hard).doing(Step::Limits, || limit.to_string()))
}

/// Reports, and waits until the performer has done what follows from it.
pub(super) fn report_and_wait(performer: &ChildEnd, message: &Message) -> Result<(), Failure> {
    performer.send(message).doing(Step::Child, || "report to the performer".to_owned())?;
    wait_for(performer).map(drop)
}

/// Waits until the performer lets this process go on.
pub(super) fn wait_for(performer: &ChildEnd) -> Result<Answer, Failure> {
    match performer.answer().doing(Step::Child, || "wait for the performer".to_owned())? {
        Answer::None => Err(Failure { step: Step::Child, what: "the performer was killed".to_owned(), errno: 0 }),
        answer => Ok(answer),
    }
}

/// Waits for the byte at the gate. False if the gate was closed instead.
pub(super) fn wait_at(gate: &OwnedFd) -> bool {
    loop {
        match nix::unistd::read(gate, &mut [0; 1]) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return other == Ok(1),
        }
    }
}

pub(super) fn join_keyring(process: &Process, attributes: &Attributes) -> Result<(), Failure> {
    let Some(name) = &process.keyring else { return Ok(()) };
    attributes.with_keyring_label(process, || match sys::join_session_keyring(name) {
        // A kernel without keyrings.
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        // The quota of a user: all containers whose root it is share it.
        Err(error) if error.raw_os_error() == Some(libc::EDQUOT) => Err(error).doing(Step::Settings, || {
            "join a session keyring (limited by kernel.keys.maxkeys and maxbytes; the option NoNewKeyring makes none)".to_owned()
        }),
        other => other.doing(Step::Settings, || "join a session keyring".to_owned()),
    })
}

fn name(plan: &Create) -> Result<(), Failure> {
    if let Some(name) = &plan.hostname {
        sethostname(name).doing(Step::Settings, || format!("set the host name {name:?}"))?;
    }
    if let Some(name) = &plan.domainname {
        sys::set_domain_name(name).doing(Step::Settings, || format!("set the domain name {name:?}"))?;
    }
    Ok(())
}

/// Kernel settings, through a procfs that no mount of the container can cover.
fn settings(plan: &Create) -> Result<(), Failure> {
    if plan.sysctls.is_empty() {
        return Ok(());
    }
    let procfs = FsContext::open("proc").and_then(|context| context.mount(0)).doing(Step::Settings, || "make a procfs".to_owned())?;
    for (path, value) in &plan.sysctls {
        let write = || -> io::Result<()> {
            let file = root::beneath(procfs.as_fd(), &format!("sys/{path}"), nix::fcntl::OFlag::O_WRONLY)?;
            io::Write::write_all(&mut std::fs::File::from(file), value.as_bytes())
        };
        write().doing(Step::Settings, || format!("write {value:?} to /proc/sys/{path}"))?;
    }
    Ok(())
}

/// A stream that is the host's null device becomes the container's.
fn reopen_null_streams(root: &Root) -> Result<(), Failure> {
    let streams = sys::streams().map(root::is_null);
    if !streams.contains(&true) {
        return Ok(());
    }
    let reopen = || -> io::Result<()> {
        let null = root.open("/dev/null", nix::fcntl::OFlag::O_RDWR)?;
        if !root::is_null(&null) {
            return Err(nix::errno::Errno::ENODEV.into());
        }
        if streams[0] {
            dup2_stdin(&null)?;
        }
        if streams[1] {
            dup2_stdout(&null)?;
        }
        if streams[2] {
            dup2_stderr(&null)?;
        }
        Ok(())
    };
    reopen().doing(Step::Devices, || "open /dev/null of the container".to_owned())
}
