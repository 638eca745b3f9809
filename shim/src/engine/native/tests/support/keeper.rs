//! The keeper's part, for tests, the example and the benchmark: a process of one thread that forks performers, holds gates, and reaps.
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::pipe2;
use x_engine::perform::{self, Descriptors, Report};
use x_engine::plan::{self, Container, Request};
use x_engine::{Host, control, spec};

/// A container that was made.
pub(crate) struct Made {
    pub(crate) container: Container,
    pub(crate) init: u32,
    /// Absent after a restore.
    gate: Option<OwnedFd>,
    /// For a checkpoint.
    #[allow(dead_code, reason = "not every user of this module needs it")]
    plan: plan::Create,
}

/// The streams of a process, and where its terminal goes.
pub(crate) struct Streams {
    pub(crate) stdio: [OwnedFd; 3],
    pub(crate) console: Option<OwnedFd>,
}

impl Streams {
    /// This process's own.
    pub(crate) fn inherited() -> io::Result<Self> {
        use std::os::fd::AsFd;
        let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
        Ok(Self { stdio: [copy(io::stdin().as_fd())?, copy(io::stdout().as_fd())?, copy(io::stderr().as_fd())?], console: None })
    }

    /// Nothing to read, and a file for the outputs.
    #[allow(dead_code, reason = "not every user of this module needs it")]
    pub(crate) fn to_file(path: &Path) -> io::Result<Self> {
        let output = File::options().create(true).append(true).open(path)?;
        Ok(Self { stdio: [File::open("/dev/null")?.into(), output.try_clone()?.into(), output.into()], console: None })
    }
}

/// Reaps orphans too: an exec'd process, and init, are born as children of this one.
pub(crate) fn become_keeper() -> nix::Result<()> {
    nix::sys::prctl::set_child_subreaper(true)
}

/// Makes a container; its program waits.
#[allow(dead_code, reason = "not every user of this module needs it")]
pub(crate) fn create(bundle: &Path, id: &str, host: &Host, streams: Streams) -> Result<Made, String> {
    create_for(&Request::new(id, bundle), host, streams)
}

/// Makes a container as it was requested.
pub(crate) fn create_for(request: &Request<'_>, host: &Host, streams: Streams) -> Result<Made, String> {
    let json = std::fs::read(request.bundle.join("config.json")).map_err(text)?;
    let spec = spec::parse(&json).map_err(|error| chain(&error))?;
    let plan = plan::create(&spec, request, host).map_err(|error| chain(&error))?;
    create_planned(&plan, streams)
}

/// Makes a container from its plan.
pub(crate) fn create_planned(plan: &plan::Create, streams: Streams) -> Result<Made, String> {
    let (theirs, ours) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
    let encoded = minicbor::to_vec(plan).map_err(|error| error.to_string())?;
    let init = report(|report| {
        let descriptors = Descriptors { stdio: streams.stdio, report, gate: Some(theirs), console: streams.console };
        perform::create(&encoded, descriptors)
    })?;
    Ok(Made { container: plan.container(), init, gate: Some(ours), plan: plan.clone() })
}

/// Makes a container from a checkpoint. It runs.
#[allow(dead_code, reason = "not every user of this module needs it")]
pub(crate) fn restore(request: &Request<'_>, criu: plan::Criu, host: &Host, streams: Streams) -> Result<Made, String> {
    let json = std::fs::read(request.bundle.join("config.json")).map_err(text)?;
    let spec = spec::parse(&json).map_err(|error| chain(&error))?;
    let plan = plan::create(&spec, request, host).map_err(|error| chain(&error))?;
    let restore = plan::restore(plan.clone(), criu).map_err(|error| chain(&error))?;
    let encoded = minicbor::to_vec(restore).map_err(|error| error.to_string())?;
    let init =
        report(|report| perform::restore(&encoded, Descriptors { stdio: streams.stdio, report, gate: None, console: streams.console }))?;
    Ok(Made { container: plan.container(), init, gate: None, plan })
}

/// Makes a container of a bundle, kills the performer after a while, and does what a keeper does then. Returns whether it was too late for that.
#[allow(dead_code, reason = "not every user of this module needs it")]
pub(crate) fn create_killed(bundle: &Path, id: &str, host: &Host, streams: Streams, after: std::time::Duration) -> Result<bool, String> {
    let json = std::fs::read(bundle.join("config.json")).map_err(text)?;
    let spec = spec::parse(&json).map_err(|error| chain(&error))?;
    let plan = plan::create(&spec, &Request::new(id, bundle), host).map_err(|error| chain(&error))?;
    let encoded = minicbor::to_vec(&plan).map_err(|error| error.to_string())?;
    let (theirs, gate) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
    let (ours, report) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
    let performer =
        perform::fork(|| perform::create(&encoded, Descriptors { stdio: streams.stdio, report, gate: Some(theirs), console: None }))
            .map_err(text)?;
    std::thread::sleep(after);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(performer as i32), nix::sys::signal::Signal::SIGKILL).map_err(text)?;
    let mut bytes = Vec::new();
    File::from(ours).read_to_end(&mut bytes).map_err(text)?;
    wait(performer).map_err(text)?;
    drop(gate);
    control::kill_all(&plan.cgroup).map_err(text)?;
    // Every child: init too, should there be one.
    while let Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) = waitpid(None, None) {}
    control::remove(&plan.cgroup).map_err(text)?;
    Ok(matches!(Report::parse(&bytes), Some(Report::Born { .. })))
}

impl Made {
    /// Lets the program run.
    pub(crate) fn start(&self) -> Result<(), String> {
        let gate = self.gate.as_ref().ok_or("it runs already")?;
        File::from(gate.try_clone().map_err(text)?).write_all(&[1]).map_err(text)?;
        if self.container.hooks.poststart.is_empty() {
            return Ok(());
        }
        let encoded = minicbor::to_vec(&self.container).map_err(|error| error.to_string())?;
        let streams = Streams::inherited().map_err(text)?;
        report(|report| perform::poststart(&encoded, self.init, Descriptors { stdio: streams.stdio, report, gate: None, console: None }))
            .map(drop)
    }

    /// Saves its processes.
    #[allow(dead_code, reason = "not every user of this module needs it")]
    pub(crate) fn checkpoint(&self, criu: plan::Criu, exit: bool, is_paused: bool) -> Result<(), String> {
        let plan = plan::checkpoint(self.plan.clone(), criu, exit, is_paused).map_err(|error| chain(&error))?;
        let encoded = minicbor::to_vec(plan).map_err(|error| error.to_string())?;
        let streams = Streams::inherited().map_err(text)?;
        let descriptors = |report| Descriptors { stdio: streams.stdio, report, gate: None, console: None };
        report(|report| perform::checkpoint(&encoded, self.init, descriptors(report))).map(drop)
    }

    /// Adds a process.
    #[allow(dead_code, reason = "not every user of this module needs it")]
    pub(crate) fn exec(&self, process: &[u8], host: &Host, streams: Streams) -> Result<u32, String> {
        let process = spec::parse_process(process).map_err(|error| chain(&error))?;
        let plan = plan::exec(&process, &self.container, host).map_err(|error| chain(&error))?;
        let encoded = minicbor::to_vec(plan).map_err(|error| error.to_string())?;
        let init = x_engine::open_process(self.init).map_err(text)?;
        report(|report| {
            let descriptors = Descriptors { stdio: streams.stdio, report, gate: None, console: streams.console };
            perform::exec(&encoded, init, descriptors)
        })
    }

    /// Freezes or thaws every process.
    #[allow(dead_code, reason = "not every user of this module needs it")]
    pub(crate) fn freeze(&self, freeze: bool) -> Result<(), String> {
        let act = if freeze { control::freeze } else { control::thaw };
        act(&self.container.cgroup).map_err(text)
    }

    /// Changes limits.
    #[allow(dead_code, reason = "not every user of this module needs it")]
    pub(crate) fn update(&self, resources: &[u8]) -> Result<(), String> {
        let resources = spec::parse_resources(resources).map_err(|error| chain(&error))?;
        let changed = plan::update(&resources, &self.container).map_err(|error| chain(&error))?;
        control::update(&changed).map_err(|error| chain(&error))
    }

    /// How many processes it has.
    #[allow(dead_code, reason = "not every user of this module needs it")]
    pub(crate) fn count(&self) -> usize {
        control::pids(&self.container.cgroup).len()
    }

    /// Kills what is left, and removes the cgroup.
    pub(crate) fn delete(&self) -> Result<(), String> {
        control::kill_all(&self.container.cgroup).map_err(text)?;
        control::remove(&self.container.cgroup).map_err(text)?;
        if self.container.hooks.poststop.is_empty() {
            return Ok(());
        }
        let encoded = minicbor::to_vec(&self.container).map_err(|error| error.to_string())?;
        let streams = Streams::inherited().map_err(text)?;
        report(|report| perform::poststop(&encoded, Descriptors { stdio: streams.stdio, report, gate: None, console: None })).map(drop)
    }
}

/// Forks a performer, and returns the pid that it reports. The performer is reaped.
fn report(perform: impl FnOnce(OwnedFd) -> std::convert::Infallible) -> Result<u32, String> {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
    let performer = perform::fork(|| perform(theirs)).map_err(text)?;
    let mut bytes = Vec::new();
    File::from(ours).read_to_end(&mut bytes).map_err(text)?;
    wait(performer).map_err(text)?;
    match Report::parse(&bytes) {
        Some(Report::Born { pid }) => Ok(pid),
        Some(Report::Failed(failure)) => Err(failure.to_string()),
        None => Err("the performer was killed".to_owned()),
    }
}

thread_local! {
    /// Children that were reaped before they were asked for.
    static REAPED: RefCell<BTreeMap<i32, i32>> = const { RefCell::new(BTreeMap::new()) };
}

/// Waits for a child, and returns its status: 0 to 255, or 128 and the signal.
///
/// Reaps every other on the way: an init does not end before each process of its pid namespace is reaped, those of failed execs too.
pub(crate) fn wait(pid: u32) -> io::Result<i32> {
    loop {
        if let Some(status) = REAPED.with_borrow_mut(|reaped| reaped.remove(&(pid as i32))) {
            return Ok(status);
        }
        let (pid, status) = match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, status)) => (pid, status),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        };
        REAPED.with_borrow_mut(|reaped| reaped.insert(pid.as_raw(), status));
    }
}

fn text(error: impl Into<io::Error>) -> String {
    error.into().to_string()
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
