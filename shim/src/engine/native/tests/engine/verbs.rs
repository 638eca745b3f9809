//! What the tests' keeper does to a container beside its making and removal.
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2};
use x_engine::perform::{self, Descriptors, Report};
use x_engine::plan::{self, Criu};
use x_engine::{control, spec};

use crate::keeper::{Made, Streams, chain, report, text, wait};

impl Streams {
    /// Nothing to read, and a file for the outputs.
    pub(crate) fn to_file(path: &Path) -> io::Result<Self> {
        let output = File::options().create(true).append(true).open(path)?;
        Ok(Self { stdio: [File::open("/dev/null")?.into(), output.try_clone()?.into(), output.into()], console: None })
    }
}

/// Makes a container from a checkpoint. It runs.
pub(crate) fn restore(create: &plan::Create, criu: Criu, streams: Streams) -> Result<Made, String> {
    let restore = plan::restore(create.clone(), criu).map_err(|error| chain(&error))?;
    let encoded = minicbor::to_vec(restore).map_err(|error| error.to_string())?;
    let init =
        report(|report| perform::restore(&encoded, Descriptors { stdio: streams.stdio, report, gate: None, console: streams.console }))?;
    Ok(Made { container: create.container(), init, gate: None })
}

/// Makes the process that holds a pid namespace of a pod. Returns its pid.
pub(crate) fn holder(label: Option<&str>) -> Result<u32, String> {
    let pod = plan::Pod { pid: true, label: label.map(str::to_owned), ..plan::Pod::default() };
    let planned = plan::pod(pod, &BTreeMap::new()).map_err(|error| chain(&error))?;
    let encoded = minicbor::to_vec(planned).map_err(|error| error.to_string())?;
    let stdio = Streams::to_file(Path::new("/dev/null")).map_err(text)?.stdio;
    report(|report| perform::holder(&encoded, Descriptors { stdio, report, gate: None, console: None }))
}

/// Performs a plan, kills the performer after a while, and does what a keeper does then. Returns whether it was too late for that.
pub(crate) fn create_killed(plan: &plan::Create, streams: Streams, after: Duration) -> Result<bool, String> {
    let encoded = minicbor::to_vec(plan).map_err(|error| error.to_string())?;
    let (theirs, gate) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
    let (ours, report) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
    let performer =
        perform::fork(|| perform::create(&encoded, Descriptors { stdio: streams.stdio, report, gate: Some(theirs), console: None }))
            .map_err(text)?;
    std::thread::sleep(after);
    kill(Pid::from_raw(performer as i32), Signal::SIGKILL).map_err(text)?;
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
    /// Saves the processes of a container that was made from a plan.
    pub(crate) fn checkpoint(&self, create: &plan::Create, criu: Criu, exit: bool, is_paused: bool) -> Result<(), String> {
        let plan = plan::checkpoint(create.clone(), criu, exit, is_paused).map_err(|error| chain(&error))?;
        let encoded = minicbor::to_vec(plan).map_err(|error| error.to_string())?;
        let streams = Streams::inherited().map_err(text)?;
        let descriptors = |report| Descriptors { stdio: streams.stdio, report, gate: None, console: None };
        report(|report| perform::checkpoint(&encoded, self.init, descriptors(report))).map(drop)
    }

    /// Freezes or thaws every process.
    pub(crate) fn freeze(&self, freeze: bool) -> Result<(), String> {
        let act = if freeze { control::freeze } else { control::thaw };
        act(&self.container.cgroup).map_err(text)
    }

    /// Changes limits.
    pub(crate) fn update(&self, resources: &[u8]) -> Result<(), String> {
        let resources = spec::parse_resources(resources).map_err(|error| chain(&error))?;
        let changed = plan::update(&resources, &self.container).map_err(|error| chain(&error))?;
        control::update(&changed).map_err(|error| chain(&error))
    }

    /// How many processes it has.
    pub(crate) fn count(&self) -> usize {
        control::pids(&self.container.cgroup).len()
    }
}
