//! Containers: what is known of them, and what each call does.
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
//! [`Change`], which is applied whole. `docs/decisions/0004-handlers-not-actors.md` says why there is no task per container.
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
mod create;
mod delete;
mod exec;
mod execs;
mod exits;
mod hibernation;
mod id;
mod journal;
mod kill;
mod phase;
mod queries;
mod record;
pub(crate) mod spec;
mod start;
mod streams;
mod verb;

pub(super) use attachments::attach;
pub(super) use calls::{CheckpointCall, UpdateCall};
pub(super) use calls::{checkpoint, close_io, pause, resize, resume, update};
pub(super) use change::{Change, Event, EventKind, Reply};
pub(super) use create::{CreateCall, create};
pub(super) use delete::{Deleted, delete, delete_for_command};
pub(super) use exec::{ExecCall, exec};
pub(super) use exits::exited;
pub(super) use hibernation::may_hibernate;
pub(super) use id::{ContainerId, ExecId, InvalidId, ProcessKey};
pub(super) use journal::path as journal_path;
pub(super) use kill::{KillCall, kill};
pub(super) use phase::{Announce, Exit, Fact, Phase, Refused, Request};
pub(super) use queries::{StateOf, Status, pids, state_of, stats, wait};
pub(super) use record::{Process, Record, Streams, VERSION as RECORD_VERSION};
pub(super) use spec::SpecError;
pub(super) use start::start;

use super::error::Error;
use super::pump::Pump;

/// The process that a client speaks of, in its own words.
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
    /// Whose entries in the keeper's state are not as the record is now.
    unsaved: RefCell<BTreeSet<ProcessKey>>,
    /// Whether execs were running when ready answers were last made; unknown to a new worker.
    had_execs: Cell<Option<bool>>,
    /// Told whenever the record has changed.
    changed: Notify,
    /// A Delete of init is under way.
    deleting: Cell<bool>,
    /// How the Delete of init was answered.
    deleted: Cell<Option<Deleted>>,
    /// What accompanies the container while this worker lives.
    attachments: RefCell<Attachments>,
}

/// What accompanies a container while this worker lives; made anew by the next one.
#[derive(Debug, Default)]
struct Attachments {
    /// The watch for want of memory.
    oom: Option<tokio::task::AbortHandle>,
    /// Outputs that go into files.
    pumps: BTreeMap<ProcessKey, Rc<Pump>>,
}

impl Container {
    /// A container as it is saved.
    pub(super) fn new(record: Record) -> Rc<Self> {
        Rc::new(Self {
            id: record.id.clone(),
            record: RefCell::new(record),
            unsaved: RefCell::default(),
            had_execs: Cell::new(None),
            changed: Notify::new(),
            deleting: Cell::new(false),
            deleted: Cell::new(None),
            attachments: RefCell::default(),
        })
    }

    pub(super) fn record(&self) -> Ref<'_, Record> {
        self.record.borrow()
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

    /// Changes what is known of a process, if it is still there.
    fn update<T>(&self, key: &ProcessKey, change: impl FnOnce(&mut Process) -> T) -> Option<T> {
        self.unsaved.borrow_mut().insert(key.clone());
        let mut record = self.record.borrow_mut();
        match &key.exec {
            None => Some(change(&mut record.init)),
            Some(exec) => record.execs.update(exec, change),
        }
    }

    /// Takes in a process as it is saved.
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

    /// Whose entries are to be saved; they count as saved then.
    pub(super) fn take_unsaved(&self) -> BTreeSet<ProcessKey> {
        self.unsaved.take()
    }

    /// Tells those who wait that the record has changed.
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

    /// Folds in what happened to a process, and tells those who wait for it. Returns what the world has to be told.
    fn observe(&self, key: &ProcessKey, fact: Fact) -> &'static [Announce] {
        let said = self.update(key, |process| {
            let (phase, said) = process.phase.observe(fact);
            process.phase = phase;
            said
        });
        self.changed.notify_waiters();
        said.unwrap_or_default()
    }

    /// Waits until the record fits; the wait has a name and an end.
    async fn until(&self, what: &str, within: Duration, fits: impl Fn(&Record) -> bool) -> Result<(), Error> {
        let wait = async {
            loop {
                // Before the look, so that no change is missed.
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
