//! Attachments of a container: what a worker runs for it, fitted to its record after every change and when a worker starts.
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::exits::{START_WITHIN, out_of_memory};
use super::streams::Plan;
use super::{Change, Container, Shared};
use crate::cgroup::{Cgroup, OomWake};
use crate::worker::id::ProcessKey;
use crate::worker::phase::Phase;
use crate::worker::pump::Pump;

/// The shortest and the longest pause between two OOM events of a container. An OOM kill is always published before the exit.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(60);

/// Starts the missing attachments of a container and those of its processes that have changed. `apply` commits what they find.
pub(in crate::worker) fn attach<'a>(
    shared: &Shared,
    container: &Rc<Container>,
    changed: impl IntoIterator<Item = &'a ProcessKey>,
    apply: impl Fn(Change) + 'static,
) {
    watch_memory(container, apply);
    for key in changed {
        pump_files(shared, container, key);
    }
}

fn watch_memory(container: &Rc<Container>, apply: impl Fn(Change) + 'static) {
    let record = container.record();
    let mut attachments = container.attachments.borrow_mut();
    match record.init.phase {
        Phase::Exited(_) => {
            if let Some(task) = attachments.oom.take() {
                task.abort();
            }
            return;
        }
        Phase::Created | Phase::Starting { .. } | Phase::Running | Phase::Paused | Phase::Dying { .. } => {}
    }
    if attachments.oom.is_some() || record.cgroup == Cgroup::default() {
        return;
    }
    let mut watch = match record.cgroup.watch_oom() {
        Ok(watch) => watch,
        Err(error) => {
            // The counter is still read before each exit.
            log::warn!(container:% = container.id, error:%; "cannot watch for OOM kills");
            return;
        }
    };
    watch.follow();
    let watched = Rc::clone(container);
    let task = tokio::task::spawn_local(async move {
        let mut pause = FIRST_PAUSE;
        loop {
            // An OOM kill during a start is published after the start.
            let is_settled = |record: &super::Record| !matches!(record.init.phase, Phase::Starting { .. });
            if let Err(error) = watched.until("start", START_WITHIN, is_settled).await {
                log::warn!(container:% = watched.id, error:% = error.chain(); "publishing an OOM kill before the start");
            }
            // The counter may have grown before the watch was set.
            if watched.record().init.exit().is_none()
                && let Some(event) = out_of_memory(&watched)
            {
                apply(Change { save: Some(Rc::clone(&watched)), ..Change::default() }.event(event));
                // Kills in this pause share one event: events wait in memory while the daemon is away.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
            let since = Instant::now();
            match watch.changed().await {
                OomWake::Changed => {}
                OomWake::Gone => return,
            }
            if since.elapsed() >= LAST_PAUSE {
                pause = FIRST_PAUSE;
            }
        }
    });
    attachments.oom = Some(task.abort_handle());
}

fn pump_files(shared: &Shared, container: &Rc<Container>, key: &ProcessKey) {
    let record = container.record();
    let Some(process) = record.process(key) else { return };
    let has_streams = key.exec.is_none() || !matches!(process.phase, Phase::Created | Phase::Starting { .. });
    if !has_streams || !process.stdio.go_into_files() || container.attachments.borrow().pumps.contains_key(key) {
        return;
    }
    // The streams were parsed once already, when they were opened.
    let Ok(plan) = Plan::read(key, &process.stdio, &record) else { return };
    match Pump::start(&shared.link, key.clone(), plan.files()) {
        Ok(pump) => drop(container.attachments.borrow_mut().pumps.insert(key.clone(), pump)),
        Err(error) => log::error!(container:% = key, error:%; "cannot start a pump: output stays in its pipe until the next worker"),
    }
}

impl Container {
    /// Waits, with a bound, until the output of the container's processes is in the files.
    pub(super) async fn flush_pumps(&self) {
        let pumps: Vec<_> = self.attachments.borrow().pumps.values().map(Rc::clone).collect();
        for pump in pumps {
            pump.flush(super::exits::FLUSH_WITHIN).await;
        }
    }

    /// Ends all pumps: output that they have not moved by now is lost, and logged as lost.
    pub(super) async fn end_pumps(&self) {
        let pumps: Vec<_> = self.attachments.borrow().pumps.values().map(Rc::clone).collect();
        for pump in pumps {
            pump.end(super::exits::FLUSH_WITHIN).await;
        }
    }

    pub(super) fn drop_pump(&self, key: &ProcessKey) {
        self.attachments.borrow_mut().pumps.remove(key);
    }
}
