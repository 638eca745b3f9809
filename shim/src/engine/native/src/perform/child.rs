//! The performer: makes the child, sets its limits, reports.
use std::convert::Infallible;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use minicbor::Decode;
use nix::errno::Errno;
use nix::sched::{CloneFlags, sched_yield, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{getpid, getppid, setsid, write};

use super::agent::Agent;
use super::cgroup::{self, Joining, Unified};
use super::descriptors::{self, Kept};
use super::labels::{Attributes, Procfs};
use super::program::Role;
use super::root::{self, Root};
use super::sources::Opener;
use super::sync::{self, ChildEnd, Message, PerformerEnd};
use super::{
    Descriptors, Doing, Failure, Report, Step, entry, hooks, ids, init, leader, namespaces, network, program, scheduling, terminal,
};
use crate::plan::{Cgroup, Checkpoint, Container, Create, Exec, Hooks, Imaged, Kind, Process, VERSION};
use crate::sys::{self, Born};

/// Performs a plan, encoded, for a container. Call it in a process of one thread that was forked for it by the container's future parent.
///
/// Never returns: reports, and exits.
pub fn create(plan: &[u8], descriptors: Descriptors) -> ! {
    perform(descriptors, None, |kept, _| {
        let plan: Create = decode(plan)?;
        check_version(plan.version)?;
        create_planned(&plan, kept)
    })
}

/// Performs a plan, encoded, for another process of the container whose init `init` is a handle of (a pidfd). As [`create`].
pub fn exec(plan: &[u8], init: OwnedFd, descriptors: Descriptors) -> ! {
    perform(descriptors, Some(init), |kept, init| {
        let plan = ManuallyDrop::new(decode::<Exec>(plan)?);
        check_version(plan.version)?;
        let init = init.ok_or_else(|| plain(Step::Plan, "no init"))?;
        // Whatever failed: without init there is no container.
        exec_planned(&plan, init, kept).map_err(|failure| if is_gone(init) { plain(Step::Gone, "container not running") } else { failure })
    })
}

/// Whether init has exited, or is about to: it has no namespaces any more before it takes the other processes of its pid namespace with it, and is not
/// reported as exited before the last of them is reaped.
fn is_gone(init: &OwnedFd) -> bool {
    sys::wait_for_exit(init.as_fd(), 0).unwrap_or(false) || setns(init, CloneFlags::CLONE_NEWUTS) == Err(Errno::ESRCH)
}

/// Runs the hooks that follow the start of a container, encoded, in a process that was forked for it. `pid` is init's, `has_exited` whether that has exited
/// since: a program may be done before its hooks begin. As [`create`]; reports `pid`.
pub fn poststart(container: &[u8], pid: u32, has_exited: bool, descriptors: Descriptors) -> ! {
    let status = if has_exited { "stopped" } else { "running" };
    late_hooks(container, pid, descriptors, |hooks, state| hooks::run(&hooks.poststart, "poststart", state, cwd(hooks), &[]), status)
}

/// Runs the hooks that follow the deletion of a container. As [`poststart`].
pub fn poststop(container: &[u8], descriptors: Descriptors) -> ! {
    late_hooks(container, 0, descriptors, |hooks, state| hooks::run(&hooks.poststop, "poststop", state, cwd(hooks), &[]), "stopped")
}

/// Saves the container of a plan, encoded, whose init is `pid`, in a process that was forked for it. As [`create`]; reports `pid`.
pub fn checkpoint(plan: &[u8], pid: u32, descriptors: Descriptors) -> ! {
    perform(descriptors, None, |_, _| {
        let plan: Checkpoint = decode(plan)?;
        check_version(plan.imaged.version)?;
        super::checkpoint::save(&plan, pid).map(|()| pid)
    })
}

/// Makes a container from its checkpoint, by a plan, encoded: it runs then. As [`create`], without a gate.
pub fn restore(plan: &[u8], descriptors: Descriptors) -> ! {
    perform(descriptors, None, |kept, _| {
        let plan: Imaged = decode(plan)?;
        check_version(plan.version)?;
        super::restore::restore(&plan, kept)
    })
}

/// Makes a process that does nothing but wait at its gate, a child of the caller's parent: systemd wants one to start a scope with, before there is a container. As
/// [`create`]; reports its pid.
pub fn placeholder(descriptors: Descriptors) -> ! {
    perform(descriptors, None, |kept, _| {
        let gate = kept.gate.as_ref().ok_or_else(|| plain(Step::Plan, "a placeholder without a gate would stay for ever"))?;
        match sys::clone_into(0, None).doing(Step::Child, || "make a placeholder".to_owned())? {
            Born::Parent { pid, .. } => Ok(pid),
            Born::Child => {
                if kept.close_others(&[]).is_ok() {
                    init::wait_at(gate);
                }
                sys::exit_now(0)
            }
        }
    })
}

/// Makes the process that holds the namespaces of a pod, by a plan, encoded: a child of the caller's parent, which dies with it. As [`create`]; reports its pid.
pub fn holder(plan: &[u8], descriptors: Descriptors) -> ! {
    perform(descriptors, None, |kept, _| super::pod::make_holder(plan, kept))
}

pub(super) fn cwd(hooks: &Hooks) -> Option<&Path> {
    Some(Path::new(&hooks.state.bundle))
}

fn late_hooks(container: &[u8], pid: u32, given: Descriptors, run: impl FnOnce(&Hooks, &str) -> Result<(), Failure>, status: &str) -> ! {
    perform(given, None, |_, _| {
        let container: Container = decode(container)?;
        check_version(container.version)?;
        run(&container.hooks, &container.hooks.state.json(status, pid)).map(|()| pid)
    })
}

/// Forks a performer: runs `perform` in a child of this process, which must have one thread. Returns the child's pid. The kernel kills the
/// performer when this process dies, because no other process would remove what it makes.
///
/// Errors: EDEADLK if there are more threads: one of them could hold a lock that the child needs.
pub fn fork(perform: impl FnOnce() -> Infallible) -> io::Result<u32> {
    fork_after(|| Ok(()), perform)
}

/// As [`fork`], of a parent that is in other namespaces than its children are to be made from: the child runs `prepare` first, and exits if that fails.
pub fn fork_after(prepare: impl FnOnce() -> io::Result<()>, perform: impl FnOnce() -> Infallible) -> io::Result<u32> {
    let parent = getpid();
    sys::fork(|| {
        if set_pdeathsig(Signal::SIGKILL).is_ok() && getppid() == parent && prepare().is_ok() {
            perform();
        }
    })
}

fn perform(given: Descriptors, init: Option<OwnedFd>, act: impl FnOnce(&Kept, Option<&OwnedFd>) -> Result<u32, Failure>) -> ! {
    let _never_returns = sys::ExitOnUnwind;
    sys::reset_signals();
    let Ok((kept, init)) = descriptors::settle(given, init) else { sys::exit_now(1) };
    let report = match act(&kept, init.as_ref()) {
        Ok(pid) => Report::Born { pid },
        Err(failure) => Report::Failed(failure.shortened()),
    };
    let is_sent = minicbor::to_vec(report).is_ok_and(|report| write(&kept.report, &report).is_ok());
    // An exec is done by the report alone, and an exit takes as long as a short program: that of the process, which may wait for this processor, comes first.
    if init.is_some() {
        let _ = sched_yield();
    }
    sys::exit_now(i32::from(!is_sent))
}

pub(super) fn decode<'b, T: Decode<'b, ()>>(plan: &'b [u8]) -> Result<T, Failure> {
    minicbor::decode(plan).map_err(|error| plain(Step::Plan, &format!("read the plan: {error}")))
}

pub(super) fn check_version(version: u16) -> Result<(), Failure> {
    if version == VERSION {
        return Ok(());
    }
    Err(plain(Step::Plan, &format!("the plan has version {version}, this build performs {VERSION}")))
}

pub(super) fn plain(step: Step, what: &str) -> Failure {
    Failure { step, what: what.to_owned(), errno: 0 }
}

fn create_planned(plan: &Create, kept: &Kept) -> Result<u32, Failure> {
    let agent = Agent::connect(&plan.process, &plan.hooks.state, None)?;
    let procfs = Procfs::make(&plan.process)?;
    harden(&plan.process)?;
    let (joining, made) = Joining::make(&plan.cgroup)?;
    let begin = || {
        let live = |performer: &ChildEnd| {
            close_performers(kept, agent.as_ref())?;
            let attributes = Attributes::open(&procfs)?;
            let program = init::prepare(plan, kept, performer, &attributes)?;
            performer.send(&Message::Prepared).doing(Step::Child, || "report to the performer".to_owned())?;
            if kept.gate.as_ref().is_some_and(|gate| !init::wait_at(gate)) {
                sys::exit_now(STATUS_OF_CLOSED_GATE);
            }
            // Create and Start have succeeded: the reason goes where the user looks.
            let state = plan.hooks.state.json("created", std::process::id());
            let hooked = hooks::run(&plan.hooks.start_container, "startContainer", &state, None, &plan.process.env);
            let failure = hooked.err().unwrap_or_else(|| program.execute());
            let _ = write(std::io::stderr(), format!("{failure}\n").as_bytes());
            sys::exit_now(STATUS_OF_FAILED_EXECUTION)
        };
        let child = leader::make_init(plan, &joining, live)?;
        let parts = Parts {
            process: &plan.process,
            cgroup: &plan.cgroup,
            joining: &joining,
            hooks: &plan.hooks,
            agent: agent.as_ref(),
            is_mapped: plan.has(Kind::User),
            plan: Some(plan),
        };
        child.attend(&parts).inspect_err(|_| child.kill())?;
        Ok(child.pid)
    };
    begin().inspect_err(|_| made.remove())
}

fn exec_planned(plan: &Exec, container: &OwnedFd, kept: &Kept) -> Result<u32, Failure> {
    // What the performer has is not closed and freed piece by piece before it reports, and the keeper waits for that: its exit does it.
    let agent = ManuallyDrop::new(Agent::connect(&plan.process, &plan.state, Some(container.as_fd()))?);
    let procfs = ManuallyDrop::new(Procfs::make(&plan.process)?);
    harden(&plan.process)?;
    let joining = ManuallyDrop::new(Joining::open_all(&plan.cgroup, container.as_fd())?);
    scheduling::choose_first_processors(&plan.process)?;
    let namespaces = CloneFlags::from_bits_retain(plan.namespaces as i32);
    let is_mapped = namespaces.contains(CloneFlags::CLONE_NEWUSER);
    let chroot =
        plan.chroot.as_ref().map(|path| root::absolute(Path::new(path)).doing(Step::Root, || format!("open {path}"))).transpose()?;
    let join = |namespaces: CloneFlags| match namespaces.is_empty() {
        true => Ok(()),
        false => setns(container, namespaces).doing(Step::Namespaces, || "join the namespaces of the container".to_owned()),
    };
    let change_root = || chroot.as_ref().map_or(Ok(()), entry::change_root).doing(Step::Root, || "chroot".to_owned());
    // The child is born in the container: to a process there that may trace it, it shows nothing of the host. None may in a user namespace, into which
    // the performer must not follow: it could not set the child's limits from there.
    // Nor into the cgroup namespace: where such namespaces are borders (`nsdelegate`, as systemd mounts cgroup v2) a process of the container's makes none
    // in the container's cgroup unless it is in there itself.
    let of_performer = if is_mapped { CloneFlags::CLONE_NEWPID | namespaces::TIME } else { !CloneFlags::CLONE_NEWCGROUP };
    join(namespaces & of_performer)?;
    if !is_mapped {
        change_root()?;
    }
    namespaces::mark_descendants();
    // Each of its messages would wake the performer, and each answer the child. What the performer has privileges for, the child has too, but in a user
    // namespace; and nothing of the container's own limits is written for an exec.
    let is_alone = !is_mapped && agent.is_none();
    let child = ManuallyDrop::new(Child::make(0, &joining, |performer| {
        close_performers(kept, agent.as_ref())?;
        let attributes = Attributes::open(&procfs)?;
        umask(Mode::empty());
        setsid().doing(Step::Child, || "start a session".to_owned())?;
        join(namespaces - of_performer)?;
        if is_mapped {
            namespaces::become_root()?;
            change_root()?;
        }
        scheduling::choose_processors(&plan.process)?;
        init::join_keyring(&plan.process, &attributes)?;
        if let (Some(wanted), Some(console)) = (&plan.process.terminal, &kept.console) {
            let root = root::absolute(Path::new("/")).doing(Step::Terminal, || "open the root".to_owned())?;
            terminal::open(&Root::new(root), wanted, console, false)?;
        }
        scheduling::choose_memory(&plan.process)?;
        if is_alone {
            scheduling::schedule(0, &plan.process)?;
            init::limit(&plan.process)?;
        } else {
            init::wait_for_limits(performer, &plan.process)?;
        }
        let program = program::become_it(&plan.process, kept, &attributes, performer, Role::Added)?;
        performer.send(&Message::Prepared).doing(Step::Child, || "report to the performer".to_owned())?;
        Err(program.execute())
    })?);
    let attend = || {
        if is_alone {
            child.messages.wait_for_end().doing(Step::Child, waiting)?;
        }
        child.attend(&Parts {
            process: &plan.process,
            cgroup: &plan.cgroup,
            joining: &joining,
            hooks: &Hooks::default(),
            agent: agent.as_ref(),
            is_mapped,
            plan: None,
        })?;
        // The program's execution closes the child's end.
        match child.receive()? {
            Some(Message::Failed(failure)) => Err(failure),
            Some(_) | None => Ok(child.pid),
        }
    };
    attend().inspect_err(|_| child.kill())
}

/// Closes the child's copies of what is the performer's.
fn close_performers(kept: &Kept, agent: Option<&Agent<'_>>) -> Result<(), Failure> {
    kept.close_report().doing(Step::Child, || "close the report".to_owned())?;
    agent.map_or(Ok(()), Agent::close).doing(Step::Child, || "close the socket of the seccomp agent".to_owned())
}

/// What has to be done with the host's procfs, and before anything of the container can see this process.
fn harden(process: &Process) -> Result<(), Failure> {
    if let Some(score) = process.oom_score_adj {
        std::fs::write("/proc/self/oom_score_adj", score.to_string())
            .doing(Step::Settings, || format!("set the OOM score adjustment {score}"))?;
    }
    sys::set_dumpable(false).doing(Step::Settings, || "forbid tracing".to_owned())
}

/// The process of the container, seen by the performer.
pub(super) struct Child {
    /// As the performer's procfs counts.
    pub(super) pid: u32,
    pub(super) handle: OwnedFd,
    pub(super) messages: PerformerEnd,
}

/// What the performer does for a child.
struct Parts<'a> {
    process: &'a Process,
    cgroup: &'a Cgroup,
    joining: &'a Joining,
    hooks: &'a Hooks,
    agent: Option<&'a Agent<'a>>,
    /// It is in a user namespace.
    is_mapped: bool,
    /// Init's.
    plan: Option<&'a Create>,
}

impl Child {
    /// Makes it. `live` is what it does; it returns if it failed.
    pub(super) fn make(
        flags: u64,
        joining: &Joining,
        live: impl FnOnce(&ChildEnd) -> Result<Infallible, Failure>,
    ) -> Result<Self, Failure> {
        let (messages, theirs) = sync::pair().doing(Step::Child, making)?;
        let clone_into = |place: Option<&Unified>| sys::clone_into(flags, place.map(AsFd::as_fd));
        let failed = |born: &io::Result<Born>, errors: [i32; 2]| {
            born.as_ref().is_err_and(|error| error.raw_os_error().is_some_and(|error| errors.contains(&error)))
        };
        let nested;
        let mut place = joining.unified();
        let mut born = clone_into(place);
        if failed(&born, [libc::EBUSY, libc::EOPNOTSUPP])
            && let Some(found) = joining.of_init()
        {
            nested = found;
            place = Some(&nested);
            born = clone_into(place);
        }
        // No process may be made in a cgroup that has as many as it may have, but one may join it. Nor may one whose cgroup namespace begins elsewhere, where
        // such namespaces are borders (`nsdelegate`).
        let is_outside = failed(&born, [libc::EAGAIN, libc::ENOENT]);
        if is_outside {
            born = clone_into(None);
        }
        match born.doing(Step::Namespaces, making)? {
            Born::Parent { pid, pidfd } => Ok(Self { pid, handle: pidfd, messages }),
            Born::Child => {
                drop(messages);
                let joined = place.filter(|_| is_outside).map_or(Ok(()), Unified::join);
                let Err(failure) = joined.and_then(|()| joining.join()).and_then(|()| live(&theirs));
                let _ = theirs.send(&Message::Failed(failure.shortened()));
                sys::exit_now(1)
            }
        }
    }

    /// Opens sources, sets the limits when it is ready for them, runs the hooks on the host, and returns when it is prepared.
    fn attend(&self, parts: &Parts<'_>) -> Result<(), Failure> {
        let Parts { process, cgroup, hooks, .. } = parts;
        let devices = parts.plan.map_or(&[][..], |plan| &plan.net_devices);
        let mut is_limited = false;
        let opener = parts.plan.map(|plan| Opener::new(plan, self.handle.as_fd(), self.pid));
        loop {
            match (self.receive()?, &opener) {
                (Some(Message::Mounted), _) => {
                    network::move_devices(devices, self.pid)?;
                    // Before the hooks: one may allow more devices.
                    cgroup::limit(cgroup)?;
                    is_limited = true;
                    hooks::run(&hooks.on_host, "createRuntime", &hooks.state.json("creating", self.pid), cwd(hooks), &[])?;
                }
                (Some(Message::Ready), _) => {
                    if !is_limited {
                        network::move_devices(devices, self.pid)?;
                        cgroup::limit(cgroup)?;
                    }
                    if parts.is_mapped {
                        ids::give_streams(self.pid, process.uid)?;
                    }
                    scheduling::schedule(self.pid, process)?;
                    if !self.limit(parts)? {
                        let _ = self.messages.limit_yourself();
                        continue;
                    }
                }
                (Some(message @ (Message::Root | Message::Source(_))), Some(opener)) => {
                    let opened = match message {
                        Message::Source(index) => opener.source(index)?,
                        _ => opener.root()?,
                    };
                    self.messages.give(&opened).doing(Step::Child, || "send the source of a mount".to_owned())?;
                    continue;
                }
                (Some(Message::Filtered { listener }), _) => {
                    let agent = parts.agent.ok_or_else(|| plain(Step::Filter, "a filter without an agent has a listener"))?;
                    agent.send(self.pid, self.handle.as_fd(), listener)?;
                }
                (Some(Message::Prepared), _) => return Ok(()),
                (Some(Message::Failed(failure)), _) => return Err(failure),
                (Some(_), _) => return Err(plain(Step::Child, "the process of the container has sent a message out of order")),
                (None, _) => return Err(self.vanished(parts.joining)),
            }
            // It may have been killed meanwhile; then the next message is none.
            let _ = self.messages.go();
        }
    }

    /// Sets the limits of the process. False if only it may: without CAP_SYS_RESOURCE those of one in another user namespace cannot be changed.
    fn limit(&self, parts: &Parts<'_>) -> Result<bool, Failure> {
        for limit in &parts.process.rlimits {
            match sys::set_rlimit(self.pid, limit.resource, limit.soft, limit.hard) {
                Err(error) if parts.is_mapped && error.raw_os_error() == Some(libc::EPERM) => return Ok(false),
                other => other.doing(Step::Limits, || limit.to_string())?,
            }
        }
        Ok(true)
    }

    fn receive(&self) -> Result<Option<Message>, Failure> {
        self.messages.receive().doing(Step::Child, waiting)
    }

    pub(super) fn vanished(&self, joining: &Joining) -> Failure {
        let why = if joining.is_out_of_memory() { ": it was OOM-killed, the memory limit may be too low" } else { "" };
        plain(Step::Child, &format!("the process of the container was killed before its program could be executed{why}"))
    }

    /// Its parent reaps it.
    pub(super) fn kill(&self) {
        let _ = sys::signal(self.handle.as_fd(), libc::SIGKILL);
        let _ = sys::wait_for_exit(self.handle.as_fd(), KILL_MILLISECONDS);
    }
}

pub(super) fn making() -> String {
    "make the process of the container".to_owned()
}

pub(super) fn waiting() -> String {
    "wait for the process of the container".to_owned()
}

/// As if it had been killed, which it cannot do to itself as the init of a pid namespace: its keeper has died, or deletes it.
const STATUS_OF_CLOSED_GATE: i32 = 137;

/// As runc's.
const STATUS_OF_FAILED_EXECUTION: i32 = 255;

/// How long a killed process may take to leave its cgroup.
const KILL_MILLISECONDS: u16 = 10_000;
