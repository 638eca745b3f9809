//! Exits: published in order.
//!
//! ```text
//!  exec exited ─▶ output files flushed ─▶ OOM? ─▶ publish exit
//!  init exited ─▶ start published ─▶ others killed ─▶ exits of execs published ─▶ OOM? ─▶ publish exit
//! ```
use std::rc::Rc;
use std::time::Duration;

use super::kill::kill_rest;
use super::{Change, Container, Event, EventKind, Process, Record, Shared};
use crate::worker::cause::Cause;
use crate::worker::id::ProcessKey;
use crate::worker::phase::{Announce, Exit, Fact, Phase};

/// Handles the exit of a process.
pub(in crate::worker) async fn exited(shared: &Shared, cause: &Cause, key: ProcessKey, exit: Exit) -> Change {
    if shared.registry.is_set_aside(key.container.as_str()) {
        // for a worker of a version that can read the record
        return std::future::pending().await;
    }
    let Ok(container) = shared.registry.get(key.container.as_str()) else { return Change::default() };
    if container.process(&key, |process| process.exit().is_some()).unwrap_or(true) {
        return Change::default();
    }
    log::info!(container:% = key.container, exec:% = key.exec.as_ref().map_or("", |exec| exec.as_str()), status = exit.status; "process exited");
    container.observe(&key, Fact::Reaped(exit));
    // Its start is published first, by the request in progress, however long that takes: an exit that is dropped here is never published.
    let has_started = |record: &Record| record.process(&key).is_none_or(|process| !matches!(process.phase, Phase::Starting { .. }));
    while let Err(error) = container.until("start", START_WITHIN, has_started).await {
        log::error!(container:% = key.container, error:% = error.chain(); "OCI runtime hangs in a start: its exit event is delayed until the start ends");
    }
    if key.exec.is_none() {
        init_exited(cause, &container).await;
    }
    if let Some(pump) = container.pump_of(&key) {
        pump.flush(FLUSH_WITHIN).await;
    }
    let mut change = Change { save: Some(Rc::clone(&container)), ..Change::default() };
    change.events.extend(out_of_memory(&container));
    if container.observe(&key, Fact::Settled).contains(&Announce::Exit) {
        let event = container.process(&key, |process| Event::exited(&key, process, exit));
        change.events.extend(event);
    }
    change.wakes.push((key.clone(), Ok(exit)));
    if key.exec.is_some() {
        // Its start is committed, or it could not have been claimed.
        container.update(&key, Process::blocking_remove_files);
        container.drop_surplus(&mut change);
    }
    change
}

/// Ensures that no process of the container outlives its init, and that no exit is published after init's.
async fn init_exited(cause: &Cause, container: &Rc<Container>) {
    if container.record().shared_pid_namespace {
        kill_rest(cause, container).await;
    }
    let alone = container.until("exit of all execs", EXECS_WITHIN, |record| !record.execs.are_under_way());
    if let Err(error) = alone.await {
        log::warn!(container:% = container.id, error:% = error.chain(); "an exec outlives init");
    }
}

/// The event for OOM kills that are not published yet. The caller commits the record.
pub(super) fn out_of_memory(container: &Container) -> Option<Event> {
    let kills = container.record().cgroup.oom_kills()?;
    if kills <= container.record().oom_kills {
        return None;
    }
    container.record_mut().oom_kills = kills;
    log::info!(container:% = container.id, kills; "out of memory");
    Some(Event::new(container, EventKind::OutOfMemory))
}

/// How long a wait for a start lasts: a runtime's start takes milliseconds.
pub(super) const START_WITHIN: Duration = Duration::from_secs(600);
/// How long the exit of init waits for those of the execs.
const EXECS_WITHIN: Duration = Duration::from_secs(10);
/// How long an exit waits for its output to reach a file.
pub(super) const FLUSH_WITHIN: Duration = Duration::from_secs(1);
