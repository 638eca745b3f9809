//! Containers: their records, and a handler for each call.
//!
//! Owns the lifecycle of containers and their processes. Knows no protobuf: [`crate::worker::server`] translates.
//!
//! ```text
//!  request ─▶ handler ── operations ──▶ keeper
//!                │  ▲                     │
//!                │  └────── outcomes ─────┘
//!                └─▶ Change ─▶ one commit: record, events, answer
//! ```
//!
//! A handler borrows the record for as long as it does not wait, so that no call holds up another one. What it decides is a
//! [`Change`], which is applied whole. `docs/decisions/0004-handlers-not-actors.md` explains why there is no task per container.
//!
//! **Invariant:** what a handler writes into a record before its [`Change`] is a phase in flight, which is never saved, or something
//! that its replay writes again.
use std::cell::{Cell, Ref, RefCell, RefMut};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;

mod attachments;
mod calls;
mod change;
mod choose;
mod create;
mod delete;
mod exec;
mod execs;
mod exits;
mod hibernation;
mod journal;
mod kill;
mod native;
mod process;
mod queries;
mod record;
mod registry;
mod reply;
mod shared;
mod start;
mod streams;
mod unit;
mod verb;

pub(super) use attachments::attach;
pub(super) use calls::{CheckpointCall, UpdateCall};
pub(super) use calls::{checkpoint, close_io, pause, resize, resume, update};
pub(super) use change::{Change, Event, EventKind};
pub(super) use create::{CreateCall, blocking, create};
pub(super) use delete::{delete, delete_for_command, kill_for_good, until_ended};
pub(super) use exec::{ExecCall, exec};
pub(super) use exits::exited;
pub(super) use hibernation::may_hibernate;
pub(super) use journal::path as journal_path;
pub(super) use kill::{KillCall, kill};
pub(super) use process::{Deleted, Process, Streams};
pub(super) use queries::{pids, state_of, stats, wait};
pub(super) use record::{Record, VERSION as RECORD_VERSION};
pub(super) use reply::{PodReply, Reply, StateOf, Status};
pub(super) use shared::Shared;
pub(super) use start::start;

use super::error::Error;
use super::id::{ContainerId, ExecId, ProcessKey};
use super::phase::{Announce, Fact, Phase, Request};
use super::pump::Pump;
use crate::engine::Engine;

/// The process that a client names, as the client wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) id: String,
    /// Empty for init.
    pub(super) exec: String,
}

/// A container that exists.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) id: ContainerId,
    record: RefCell<Record>,
    /// The processes whose saved entries are out of date.
    unsaved: RefCell<BTreeSet<ProcessKey>>,
    /// Whether execs were running when ready answers were last made; unknown to a new worker.
    had_execs: Cell<Option<bool>>,
    /// Notified whenever the record has changed.
    changed: Notify,
    /// A Delete of init is under way.
    deleting: Cell<bool>,
    /// A Checkpoint is under way.
    saving: Cell<bool>,
    /// Starts that look for a process whose pid the OCI runtime has not reported.
    searches: Cell<usize>,
    /// The answer to the Delete of init.
    deleted: Cell<Option<Deleted>>,
    /// See [`Attachments`].
    attachments: RefCell<Attachments>,
}

/// What this worker generation runs for a container; the next generation makes its own.
#[derive(Debug, Default)]
struct Attachments {
    /// The task that watches for OOM kills.
    oom: Option<tokio::task::AbortHandle>,
    /// Pumps of outputs that go into files.
    pumps: BTreeMap<ProcessKey, Rc<Pump>>,
}

impl Container {
    /// Makes a container from its saved record.
    pub(super) fn new(record: Record) -> Rc<Self> {
        Rc::new(Self {
            id: record.id.clone(),
            record: RefCell::new(record),
            unsaved: RefCell::default(),
            had_execs: Cell::new(None),
            changed: Notify::new(),
            deleting: Cell::new(false),
            saving: Cell::new(false),
            searches: Cell::new(0),
            deleted: Cell::new(None),
            attachments: RefCell::default(),
        })
    }

    pub(super) fn record(&self) -> Ref<'_, Record> {
        self.record.borrow()
    }

    /// The engine that made it.
    fn engine(&self) -> Engine {
        self.record.borrow().engine.clone()
    }

    /// Notes whether execs run now, and returns whether that has changed since it was last noted.
    pub(super) fn has_turned(&self, has_execs: bool) -> bool {
        self.had_execs.replace(Some(has_execs)) != Some(has_execs)
    }

    /// Changes what is known of the container and its init.
    fn record_mut(&self) -> RefMut<'_, Record> {
        self.unsaved.borrow_mut().insert(ProcessKey::init(&self.id));
        self.record.borrow_mut()
    }

    /// Changes the record of a process, if it has one.
    fn update<T>(&self, key: &ProcessKey, change: impl FnOnce(&mut Process) -> T) -> Option<T> {
        self.unsaved.borrow_mut().insert(key.clone());
        let mut record = self.record.borrow_mut();
        match &key.exec {
            None => Some(change(&mut record.init)),
            Some(exec) => record.execs.update(exec, change),
        }
    }

    /// Loads a saved process.
    pub(super) fn load(&self, exec: ExecId, process: Process) {
        self.record.borrow_mut().execs.insert(exec, process);
    }

    fn add(&self, exec: ExecId, process: Process) {
        self.unsaved.borrow_mut().insert(ProcessKey::exec(&self.id, &exec));
        self.load(exec, process);
    }

    fn remove(&self, exec: &ExecId) -> Option<Process> {
        self.unsaved.borrow_mut().insert(ProcessKey::exec(&self.id, exec));
        self.record.borrow_mut().execs.remove(exec)
    }

    /// Takes the processes whose entries are to be saved.
    pub(super) fn take_unsaved(&self) -> BTreeSet<ProcessKey> {
        self.unsaved.take()
    }

    /// Wakes the tasks that wait for a change of the record.
    pub(super) fn changed(&self) {
        self.changed.notify_waiters();
    }

    pub(super) fn is_deleted(&self) -> bool {
        self.deleted.get().is_some()
    }

    /// The key of a process of this container, if there is such a process.
    pub(super) fn key(&self, exec: &str) -> Result<ProcessKey, Error> {
        if exec.is_empty() {
            return Ok(ProcessKey::init(&self.id));
        }
        match self.record().execs.id(exec) {
            Some(exec) => Ok(ProcessKey::exec(&self.id, exec)),
            None => Err(Error::NoProcess { id: self.id.clone(), exec: exec.to_owned() }),
        }
    }

    /// Looks at a process that a key of [`Container::key`] names; absent if it was deleted in between.
    fn process<T>(&self, key: &ProcessKey, look: impl FnOnce(&Process) -> T) -> Result<T, Error> {
        self.record().process(key).map(look).ok_or_else(|| gone(key))
    }

    fn phase(&self, key: &ProcessKey) -> Result<Phase, Error> {
        self.process(key, |process| process.phase)
    }

    /// Refuses a request that does not fit the phase of a process.
    fn admit(&self, key: &ProcessKey, request: Request) -> Result<(), Error> {
        self.phase(key)?.admit(request).map_err(|source| Error::Refused { key: key.clone(), source })
    }

    /// Applies a fact to a process and wakes the tasks that wait for it. Returns what is to be published.
    fn observe(&self, key: &ProcessKey, fact: Fact) -> &'static [Announce] {
        let announcements = self.update(key, |process| {
            let (phase, announcements) = process.phase.observe(fact);
            process.phase = phase;
            announcements
        });
        self.changed.notify_waiters();
        announcements.unwrap_or_default()
    }

    /// Waits until the record fits; `what` names the wait in the error after `within`.
    async fn until(&self, what: &str, within: Duration, fits: impl Fn(&Record) -> bool) -> Result<(), Error> {
        let wait = async {
            loop {
                // Before the check, so that no change is missed.
                let changed = self.changed.notified();
                if fits(&self.record()) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(within, wait)
            .await
            .map_err(|_| Error::TimedOut { waiting_for: format!("container {}: {what}", self.id), seconds: within.as_secs() })
    }

    /// The pump of a process whose output goes into files.
    fn pump_of(&self, key: &ProcessKey) -> Option<Rc<Pump>> {
        self.attachments.borrow().pumps.get(key).map(Rc::clone)
    }
}

impl Drop for Attachments {
    fn drop(&mut self) {
        if let Some(task) = &self.oom {
            task.abort();
        }
    }
}

fn gone(key: &ProcessKey) -> Error {
    match &key.exec {
        Some(exec) => Error::NoProcess { id: key.container.clone(), exec: exec.to_string() },
        None => Error::NoContainer { id: key.container.to_string() },
    }
}
