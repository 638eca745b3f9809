//! Removes a container of the native engine without a worker: its cgroup, then the hooks that follow a deletion.
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use x_engine::control;
use x_engine::perform::{self, Descriptors};

use super::wait;
use crate::chain::chain;
use crate::engine::{NativeEngine, Verb, reported_pid};
use crate::handover::Exited;
use crate::processes::kill_tree;
use crate::sys;
use crate::systemd::Manager;

/// Removes it. `was_made`: its init is known, so the hooks were promised their turn. Returns why something of it is left.
pub(super) fn clean(engine: &NativeEngine, was_made: bool, deadline: Instant) -> Option<String> {
    let unit = engine.container().unit.as_deref();
    if engine.blocking_cgroup_folder().is_none() && unit.is_none() {
        return None;
    }
    // An init that waited before its program ends when its keeper has died, within a moment. What runs on is another container's.
    let complaint = unit.filter(|_| is_empty_soon(engine)).and_then(|unit| stop_unit(unit, deadline));
    // As above.
    if let Err(error) = control::remove(&engine.container().cgroup) {
        return Some(format!("cannot remove its cgroup: {error}"));
    }
    if !was_made || engine.container().hooks.poststop.is_empty() {
        return complaint;
    }
    match run_hooks(engine, deadline) {
        Ok(exited) => match reported_pid(Verb::Delete, &exited) {
            Ok(Some(_)) => complaint,
            Ok(None) => Some("a hook after the deletion took too long".to_owned()),
            Err(error) => Some(error.to_string()),
        },
        Err(error) => Some(format!("run the hooks after the deletion: {error}")),
    }
}

/// Whether no process is in its cgroup, within a second.
fn is_empty_soon(engine: &NativeEngine) -> bool {
    let until = Instant::now() + Duration::from_secs(1);
    while engine.blocking_has_processes() {
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// Stops a unit of systemd's, of which a cgroup is. Returns why it was not.
pub(super) fn stop_unit(unit: &str, deadline: Instant) -> Option<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    let stop = async {
        let manager = Manager::connect().await.map_err(|error| chain(&error))?;
        manager.stop(unit).await.map_err(|error| chain(&error))
    };
    let within = deadline.saturating_duration_since(Instant::now());
    let stopped = match runtime {
        Ok(runtime) => runtime
            .block_on(async { tokio::time::timeout(within, stop).await })
            .unwrap_or_else(|_| Err(format!("systemd has not answered within {} s", within.as_secs()))),
        Err(error) => Err(error.to_string()),
    };
    stopped.err().map(|why| format!("cannot stop its unit {unit}: {why}"))
}

/// Until `deadline`; then they are killed, and there is no report.
fn run_hooks(engine: &NativeEngine, deadline: Instant) -> io::Result<Exited> {
    let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
    let (ours, report) = pipe2(OFlag::O_CLOEXEC)?;
    let plan = engine.encoded();
    let descriptors = Descriptors { stdio: [null()?, null()?, null()?], report, gate: None, console: None };
    let pid = perform::fork(|| perform::poststop(&plan, descriptors))?;
    let mut output = Vec::new();
    if wait::for_input(ours.as_fd(), Some(deadline))? {
        File::from(ours).read_to_end(&mut output)?;
    } else {
        kill_tree(pid);
    }
    sys::process::wait_for(pid)?;
    Ok(Exited { output, ..Exited::default() })
}
