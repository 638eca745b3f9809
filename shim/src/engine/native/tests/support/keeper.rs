//! The keeper's part, for tests, the example and the benchmark: a process of one thread that forks performers, holds gates, and reaps. What not all of them
//! need is beside it.
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

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
    pub(crate) gate: Option<OwnedFd>,
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
}

/// Reaps orphans too: an exec'd process, and init, are born as children of this one.
pub(crate) fn become_keeper() -> nix::Result<()> {
    nix::sys::prctl::set_child_subreaper(true)
}

/// Plans a container as it was requested.
pub(crate) fn planned(request: &Request<'_>, host: &Host) -> Result<plan::Create, String> {
    let json = std::fs::read(request.bundle.join("config.json")).map_err(text)?;
    let spec = spec::parse(&json).map_err(|error| chain(&error))?;
    plan::create(&spec, request, host).map_err(|error| chain(&error))
}

/// Makes a container from its plan; its program waits.
pub(crate) fn create(plan: &plan::Create, streams: Streams) -> Result<Made, String> {
    let (theirs, ours) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
    let encoded = minicbor::to_vec(plan).map_err(|error| error.to_string())?;
    let init = report(|report| {
        let descriptors = Descriptors { stdio: streams.stdio, report, gate: Some(theirs), console: streams.console };
        perform::create(&encoded, descriptors)
    })?;
    Ok(Made { container: plan.container(), init, gate: Some(ours) })
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
        report(|report| {
            perform::poststart(&encoded, self.init, false, Descriptors { stdio: streams.stdio, report, gate: None, console: None })
        })
        .map(drop)
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
pub(crate) fn report(perform: impl FnOnce(OwnedFd) -> std::convert::Infallible) -> Result<u32, String> {
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

pub(crate) fn text(error: impl Into<io::Error>) -> String {
    error.into().to_string()
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
