//! The performer: makes the child, sets its limits, reports.
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use minicbor::Decode;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, fstat, stat, umask};
use nix::unistd::{setsid, write};

use super::agent::Agent;
use super::cgroup::{self, Joining};
use super::descriptors::{self, Kept};
use super::labels::{Attributes, Procfs};
use super::program::Role;
use super::root::{self, Root};
use super::sync::{self, ChildEnd, Message, PerformerEnd};
use super::{Descriptors, Doing, Failure, Report, Step, hooks, init, network, program, scheduling, terminal};
use crate::plan::{Cgroup, Container, Create, Exec, Hooks, Kind, Process, VERSION};
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
        let plan: Exec = decode(plan)?;
        check_version(plan.version)?;
        let init = init.ok_or_else(|| plain(Step::Plan, "no init"))?;
        // Whatever failed: without init there is no container.
        exec_planned(&plan, init, kept).map_err(|failure| match sys::wait_for_exit(init.as_fd(), 0) {
            Ok(true) => plain(Step::Namespaces, "container not running"),
            Ok(false) | Err(_) => failure,
        })
    })
}

/// Runs the hooks that follow the start of a container, encoded, in a process that was forked for it. `pid` is init's. As [`create`]; reports `pid`.
pub fn poststart(container: &[u8], pid: u32, descriptors: Descriptors) -> ! {
    late_hooks(container, pid, descriptors, |hooks, state| hooks::run(&hooks.poststart, "poststart", state, cwd(hooks), &[]), "running")
}

/// Runs the hooks that follow the deletion of a container. As [`poststart`].
pub fn poststop(container: &[u8], descriptors: Descriptors) -> ! {
    late_hooks(container, 0, descriptors, |hooks, state| hooks::run(&hooks.poststop, "poststop", state, cwd(hooks), &[]), "stopped")
}

fn cwd(hooks: &Hooks) -> Option<&Path> {
    Some(Path::new(&hooks.state.bundle))
}

fn late_hooks(container: &[u8], pid: u32, given: Descriptors, run: impl FnOnce(&Hooks, &str) -> Result<(), Failure>, status: &str) -> ! {
    perform(given, None, |_, _| {
        let container: Container = decode(container)?;
        check_version(container.version)?;
        run(&container.hooks, &container.hooks.state.json(status, pid)).map(|()| pid)
    })
}

/// Forks a performer: runs `perform` in a child of this process, which must have one thread. Returns the child's pid.
///
/// Errors: EDEADLK if there are more threads: one of them could hold a lock that the child needs.
pub fn fork(perform: impl FnOnce() -> Infallible) -> std::io::Result<u32> {
    sys::fork(|| {
        perform();
    })
}

fn perform(given: Descriptors, init: Option<OwnedFd>, act: impl FnOnce(&Kept, Option<&OwnedFd>) -> Result<u32, Failure>) -> ! {
    let _never_returns = sys::ExitOnUnwind;
    sys::reset_signals();
    let Ok((kept, init)) = descriptors::settle(given, init) else { sys::exit_now(1) };
    let report = match act(&kept, init.as_ref()) {
        Ok(pid) => Report::Born { pid },
        Err(failure) => Report::Failed(failure),
    };
    let is_sent = minicbor::to_vec(report).is_ok_and(|report| write(&kept.report, &report).is_ok());
    sys::exit_now(i32::from(!is_sent))
}

fn decode<'b, T: Decode<'b, ()>>(plan: &'b [u8]) -> Result<T, Failure> {
    minicbor::decode(plan).map_err(|error| plain(Step::Plan, &format!("read the plan: {error}")))
}

fn check_version(version: u16) -> Result<(), Failure> {
    if version == VERSION {
        return Ok(());
    }
    Err(plain(Step::Plan, &format!("the plan has version {version}, this build performs {VERSION}")))
}

fn plain(step: Step, what: &str) -> Failure {
    Failure { step, what: what.to_owned(), errno: 0 }
}

fn create_planned(plan: &Create, kept: &Kept) -> Result<u32, Failure> {
    let agent = Agent::connect(&plan.process, &plan.hooks.state, None)?;
    let procfs = Procfs::make(&plan.process)?;
    harden(&plan.process)?;
    let (joining, made) = Joining::make(&plan.cgroup)?;
    let begin = || {
        let namespaces = join_pids(open_namespaces(plan)?)?;
        let new = plan.namespaces.iter().filter(|namespace| namespace.path.is_none() && namespace.kind != Kind::Cgroup);
        let flags = new.fold(0, |flags, namespace| flags | namespace.kind.flag());
        let child = Child::make(flags, &joining, |performer| {
            close_performers(kept, agent.as_ref())?;
            let attributes = Attributes::open(&procfs)?;
            let program = init::prepare(plan, &joining, &namespaces, kept, performer, &attributes)?;
            performer.send(&Message::Prepared).doing(Step::Child, || "report to the performer".to_owned())?;
            if kept.gate.as_ref().is_some_and(|gate| !init::wait_at(gate)) {
                sys::exit_now(1);
            }
            // Create and Start have succeeded: the reason goes where the user looks.
            let state = plan.hooks.state.json("created", std::process::id());
            let hooked = hooks::run(&plan.hooks.start_container, "startContainer", &state, None, &plan.process.env);
            let failure = hooked.err().unwrap_or_else(|| program.execute());
            let _ = write(std::io::stderr(), format!("{failure}\n").as_bytes());
            sys::exit_now(STATUS_OF_FAILED_EXECUTION)
        })?;
        child.attend(&plan.process, &plan.cgroup, &plan.hooks, agent.as_ref(), &plan.net_devices).inspect_err(|_| child.kill())?;
        Ok(child.pid)
    };
    begin().inspect_err(|_| made.remove())
}

fn exec_planned(plan: &Exec, container: &OwnedFd, kept: &Kept) -> Result<u32, Failure> {
    let agent = Agent::connect(&plan.process, &plan.state, Some(container.as_fd()))?;
    let procfs = Procfs::make(&plan.process)?;
    harden(&plan.process)?;
    let joining = Joining::open_all(&plan.cgroup)?;
    scheduling::choose_first_processors(&plan.process)?;
    let flags = CloneFlags::from_bits_retain(plan.namespaces as i32);
    setns(container, flags).doing(Step::Namespaces, || "join the namespaces of the container".to_owned())?;
    let child = Child::make(0, &joining, |performer| {
        close_performers(kept, agent.as_ref())?;
        umask(Mode::empty());
        setsid().doing(Step::Child, || "start a session".to_owned())?;
        joining.join()?;
        scheduling::choose_processors(&plan.process)?;
        let attributes = Attributes::open(&procfs)?;
        init::join_keyring(&plan.process, &attributes)?;
        if let (Some(wanted), Some(console)) = (&plan.process.terminal, &kept.console) {
            let root = root::absolute(Path::new("/")).doing(Step::Terminal, || "open the root".to_owned())?;
            terminal::open(&Root::new(root), wanted, console, false)?;
        }
        scheduling::schedule(&plan.process)?;
        init::wait_for_limits(performer)?;
        let program = program::become_it(&plan.process, &attributes, performer, Role::Added)?;
        performer.send(&Message::Prepared).doing(Step::Child, || "report to the performer".to_owned())?;
        Err(program.execute())
    })?;
    let attend = || {
        child.attend(&plan.process, &plan.cgroup, &Hooks::default(), agent.as_ref(), &[])?;
        // The program's execution closes the child's end.
        match child.receive()? {
            Some(Message::Failed(failure)) => Err(failure),
            Some(Message::Mounted | Message::Ready | Message::Filtered { .. } | Message::Prepared) | None => Ok(child.pid),
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

/// All before the first is joined: a mount namespace hides the paths of the others.
fn open_namespaces(plan: &Create) -> Result<Vec<(Kind, OwnedFd)>, Failure> {
    let mut opened = Vec::new();
    for namespace in &plan.namespaces {
        let Some(path) = &namespace.path else { continue };
        let doing = || format!("open the namespace {path}");
        let handle = nix::fcntl::open(Path::new(path), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).doing(Step::Namespaces, doing)?;
        if namespace.kind == Kind::Network && plan.sysctls.iter().any(|(path, _)| path.starts_with("net/")) {
            let (theirs, ours) =
                (fstat(&handle).doing(Step::Namespaces, doing)?, stat("/proc/self/ns/net").doing(Step::Namespaces, doing)?);
            if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino) {
                return Err(plain(
                    Step::Settings,
                    "linux.sysctl net.* would change the settings of the host: the network namespace is the runtime's",
                ));
            }
        }
        opened.push((namespace.kind, handle));
    }
    Ok(opened)
}

/// A pid namespace takes effect for children, so the performer joins it. The others are left to the child.
fn join_pids(namespaces: Vec<(Kind, OwnedFd)>) -> Result<Vec<(Kind, OwnedFd)>, Failure> {
    let (pids, others) = namespaces.into_iter().partition::<Vec<_>, _>(|(kind, _)| *kind == Kind::Pid);
    for (_, namespace) in pids {
        setns(namespace, CloneFlags::CLONE_NEWPID).doing(Step::Namespaces, || "join the pid namespace".to_owned())?;
    }
    Ok(others)
}

/// The process of the container, seen by the performer.
struct Child {
    pid: u32,
    handle: OwnedFd,
    messages: PerformerEnd,
}

impl Child {
    /// Makes it. `live` is what it does; it returns if it failed.
    fn make(flags: u64, joining: &Joining, live: impl FnOnce(&ChildEnd) -> Result<Infallible, Failure>) -> Result<Self, Failure> {
        let doing = || "make the process of the container".to_owned();
        let (messages, theirs) = sync::pair().doing(Step::Child, doing)?;
        let (born, is_outside) = match sys::clone_into(flags, joining.unified()) {
            // No process may be made in a cgroup that has as many as it may have, but one may join it.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => (sys::clone_into(flags, None), true),
            born => (born, false),
        };
        match born.doing(Step::Namespaces, doing)? {
            Born::Parent { pid, pidfd } => Ok(Self { pid, handle: pidfd, messages }),
            Born::Child => {
                drop(messages);
                let joined = if is_outside { joining.join_unified() } else { Ok(()) };
                let Err(failure) = joined.and_then(|()| live(&theirs));
                let _ = theirs.send(&Message::Failed(failure));
                sys::exit_now(1)
            }
        }
    }

    /// Sets the limits when it is ready for them, runs the hooks on the host, and returns when it is prepared.
    fn attend(
        &self,
        process: &Process,
        cgroup: &Cgroup,
        hooks: &Hooks,
        agent: Option<&Agent<'_>>,
        devices: &[(String, String)],
    ) -> Result<(), Failure> {
        let mut is_limited = false;
        loop {
            match self.receive()? {
                Some(Message::Mounted) => {
                    network::move_devices(devices, self.pid)?;
                    // Before the hooks: one may allow more devices.
                    cgroup::limit(cgroup)?;
                    is_limited = true;
                    hooks::run(&hooks.on_host, "createRuntime", &hooks.state.json("creating", self.pid), cwd(hooks), &[])?;
                }
                Some(Message::Ready) => {
                    if !is_limited {
                        network::move_devices(devices, self.pid)?;
                        cgroup::limit(cgroup)?;
                    }
                    for limit in &process.rlimits {
                        sys::set_rlimit(self.pid, limit.resource, limit.soft, limit.hard).doing(Step::Limits, || {
                            format!("set the limit of resource {} to {}:{}", limit.resource, limit.soft, limit.hard)
                        })?;
                    }
                }
                Some(Message::Filtered { listener }) => {
                    let agent = agent.ok_or_else(|| plain(Step::Filter, "a filter without an agent has a listener"))?;
                    agent.send(self.pid, self.handle.as_fd(), listener)?;
                }
                Some(Message::Prepared) => return Ok(()),
                Some(Message::Failed(failure)) => return Err(failure),
                None => return Err(self.vanished(cgroup)),
            }
            // It may have been killed meanwhile; then the next message is none.
            let _ = self.messages.go();
        }
    }

    fn receive(&self) -> Result<Option<Message>, Failure> {
        self.messages.receive().doing(Step::Child, || "wait for the process of the container".to_owned())
    }

    fn vanished(&self, cgroup: &Cgroup) -> Failure {
        let why = if cgroup::out_of_memory(cgroup) { ": it was OOM-killed, the memory limit may be too low" } else { "" };
        plain(Step::Child, &format!("the process of the container was killed before its program could be executed{why}"))
    }

    /// Its parent reaps it.
    fn kill(&self) {
        let _ = sys::signal(self.handle.as_fd(), libc::SIGKILL);
        let _ = sys::wait_for_exit(self.handle.as_fd(), KILL_MILLISECONDS);
    }
}

/// As runc's.
const STATUS_OF_FAILED_EXECUTION: i32 = 255;

/// How long a killed process may take to leave its cgroup.
const KILL_MILLISECONDS: u16 = 10_000;
