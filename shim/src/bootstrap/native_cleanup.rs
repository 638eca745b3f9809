//! Removes a container of the native engine without a worker: its cgroup, then the hooks that follow a deletion.
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use x_engine::control;
use x_engine::perform::{self, Descriptors};

use super::wait;
use crate::engine::{NativeEngine, Verb, reported_pid};
use crate::handover::Exited;
use crate::processes::kill_tree;
use crate::sys;

/// Removes it. `was_made`: its init is known, so the hooks were promised their turn. Returns why something of it is left.
pub(super) fn clean(engine: &NativeEngine, was_made: bool, deadline: Instant) -> Option<String> {
    engine.blocking_cgroup_folder()?;
    // It waits a second for processes that are about to exit: an init that waited before its program ends when its keeper has died.
    if let Err(error) = control::remove(&engine.container().cgroup) {
        return Some(format!("cannot remove its cgroup: {error}"));
    }
    if !was_made || engine.container().hooks.poststop.is_empty() {
        return None;
    }
    match run_hooks(engine, deadline) {
        Ok(exited) => match reported_pid(Verb::Delete, &exited) {
            Ok(Some(_)) => None,
            Ok(None) => Some("a hook after the deletion took too long".to_owned()),
            Err(error) => Some(error.to_string()),
        },
        Err(error) => Some(format!("run the hooks after the deletion: {error}")),
    }
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
