//! Tasks and sandboxes: what has, or had, a shim.
//!
//! This module knows which shims there are, how to reach them, and what is left of dead ones. `phase` has the lifecycle.
//!
//! A sandbox is a shim that a client has started for several containers; their tasks join it and start none. Where nothing else is said, a
//! task is either of them: a sandbox has the same phases and the same leftovers. `sandboxes` has what differs.
//!
//! **Invariants:** an exit is recorded, then published, and only then acknowledged to the shim: see `shim_events`. No task has the id of a
//! sandbox in its namespace: a shim would take one for the other.

mod bundle;
mod cleanup;
mod connection;
mod create;
mod deletion;
pub(crate) mod limits;
mod load;
mod log_fifo;
mod mounts;
mod phase;
mod program;
mod sandboxes;
mod shim;
mod shim_events;
mod start;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

pub(crate) use create::NewTask;
pub(crate) use phase::Phase;
pub(crate) use sandboxes::NewSandbox;
pub(crate) use shim::{Shim, Unanswered};

use crate::error::{Error, Object, Result};
use crate::events::Exchange;
use crate::gate::Gate;
use crate::name::Namespace;
use crate::pools::Pool;
use crate::settings::Settings;
use crate::store::{Kind, Store};
use bundle::Bundle;
use phase::Fact;
use program::Programs;

/// All tasks.
#[derive(Debug)]
pub(crate) struct Tasks {
    settings: Settings,
    store: Store,
    events: Arc<Exchange>,
    gate: Gate,
    programs: Programs,
    /// For what waits for the disk or the mount table.
    pool: Pool,
    all: Mutex<BTreeMap<Key, Arc<Task>>>,
}

type Key = (Namespace, String);

/// One of them.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) namespace: Namespace,
    pub(crate) id: String,
    kind: Kind,
    /// The sandbox whose shim it has joined: that one stays when the task is deleted.
    sandbox: Option<String>,
    bundle: Bundle,
    phase: watch::Sender<Phase>,
}

impl Task {
    fn new(settings: &Settings, kind: Kind, (namespace, id): Key, sandbox: Option<String>, phase: Phase) -> Arc<Self> {
        let bundle = Bundle::of(settings, kind, &namespace, &id);
        Arc::new(Self { namespace, id, kind, sandbox, bundle, phase: watch::Sender::new(phase) })
    }

    fn key(&self) -> Key {
        (self.namespace.clone(), self.id.clone())
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// What errors call it.
    fn object(&self) -> Object {
        object(self.kind, &self.id)
    }

    fn not_found(&self) -> Error {
        Error::NotFound(self.object())
    }

    /// Waits until it is known whether the task has a shim.
    ///
    /// Errors: [`Error::NotFound`] for one that does not exist yet or any more, [`Error::Unsettled`] when that takes too long.
    pub(crate) async fn settled(&self) -> Result<Phase> {
        let mut phase = self.phase.subscribe();
        let settled = phase.wait_for(|phase| !matches!(phase, Phase::Loading(_) | Phase::Cleaning(_)));
        match tokio::time::timeout(SETTLE, settled).await {
            Ok(Ok(phase)) => match &*phase {
                phase if phase.is_visible() => Ok(phase.clone()),
                _ => Err(self.not_found()),
            },
            Ok(Err(_)) => Err(self.not_found()),
            Err(_elapsed) => {
                let why = match self.phase() {
                    Phase::Loading(Some(why)) => format!("cannot be reached, will retry: {why}"),
                    Phase::Cleaning(Some(why)) => format!("is dead and its cleanup failed, will retry: {why}"),
                    _ => "has not been found yet".to_owned(),
                };
                Err(Error::Unsettled { object: self.object(), why })
            }
        }
    }

    /// Applies a fact: the only place where its phase changes. False when an earlier fact made it irrelevant.
    fn observe(&self, fact: Fact) -> bool {
        self.phase.send_if_modified(|phase| match phase.observe(fact) {
            Some(next) => {
                *phase = next;
                true
            }
            None => false,
        })
    }

    /// Waits until it does not exist any more.
    async fn gone(&self) {
        let mut phase = self.phase.subscribe();
        // an error means that it is
        let _ = phase.wait_for(|phase| matches!(phase, Phase::Gone)).await;
    }

    /// Waits until the task is no longer live.
    pub(crate) async fn left(&self) {
        let mut phase = self.phase.subscribe();
        // an error means that the task is gone
        let _ = phase.wait_for(|phase| phase.shim().is_none()).await;
    }

    /// Waits until no client is deleting the task, or until it is gone.
    async fn not_being_deleted(&self) {
        let mut phase = self.phase.subscribe();
        // as above
        let _ = phase.wait_for(|phase| !matches!(phase, Phase::Deleting(_) | Phase::Ending)).await;
    }

    /// Its shim.
    ///
    /// Errors: [`Error::NotFound`], or [`Error::Precondition`] when the task has ended with its shim.
    pub(crate) async fn shim(&self) -> Result<Shim> {
        match self.settled().await? {
            Phase::Live(shim) | Phase::Deleting(shim) => Ok(shim),
            Phase::Ended(_) => Err(Error::Precondition(format!("{} has ended with its shim", self.object()))),
            Phase::Starting | Phase::Loading(_) | Phase::Cleaning(_) | Phase::Ending | Phase::Gone => Err(self.not_found()),
        }
    }

    /// Calls a method of its shim.
    pub(crate) async fn call<A: protobuf::Message>(
        &self,
        method: &'static str,
        request: &impl protobuf::Message,
        limit: Duration,
    ) -> Result<A> {
        Ok(self.shim().await?.call(method, request, Some(limit)).await?)
    }
}

fn object(kind: Kind, id: &str) -> Object {
    match kind {
        Kind::Task => Object::Task(id.to_owned()),
        Kind::Sandbox => Object::Sandbox(id.to_owned()),
    }
}

impl Tasks {
    /// None yet: see [`Tasks::load`].
    pub(crate) fn new(settings: &Settings, store: Store, events: Arc<Exchange>, gate: Gate, pool: Pool) -> Self {
        Self { settings: settings.clone(), store, events, gate, programs: Programs::new(settings), pool, all: Mutex::default() }
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<Key, Arc<Task>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find_any(&self, namespace: &Namespace, id: &str) -> Option<Arc<Task>> {
        self.all().get(&(namespace.clone(), id.to_owned())).cloned()
    }

    fn find_kind(&self, kind: Kind, namespace: &Namespace, id: &str) -> Result<Arc<Task>> {
        self.find_any(namespace, id).filter(|found| found.kind == kind).ok_or_else(|| Error::NotFound(object(kind, id)))
    }

    /// The container's task of that id.
    pub(crate) fn find(&self, namespace: &Namespace, id: &str) -> Result<Arc<Task>> {
        self.find_kind(Kind::Task, namespace, id)
    }

    /// The sandbox of that id.
    pub(crate) fn find_sandbox(&self, namespace: &Namespace, id: &str) -> Result<Arc<Task>> {
        self.find_kind(Kind::Sandbox, namespace, id)
    }

    /// Containers' tasks of a namespace that exist for clients, by id.
    pub(crate) fn list(&self, namespace: &Namespace) -> Vec<Arc<Task>> {
        let all = self.all();
        let tasks = all.values().filter(|task| task.kind == Kind::Task && task.namespace == *namespace);
        tasks.filter(|task| task.phase.borrow().is_visible()).cloned().collect()
    }

    /// How many there are of a kind, by what they are doing.
    pub(crate) fn counts(&self, kind: Kind) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::from(["starting_or_ending", "loading", "live", "cleaning", "ended"].map(|name| (name, 0)));
        for task in self.all().values().filter(|task| task.kind == kind) {
            let name = task.phase.borrow().name();
            *counts.entry(name).or_default() += 1;
        }
        counts
    }

    /// The program of a runtime, asked about itself: a `RuntimeInfo`.
    pub(crate) async fn runtime_info(&self, runtime: &str, options: Option<&protobuf::well_known_types::any::Any>) -> Result<Vec<u8>> {
        self.programs.info(&program::find(runtime)?, options).await
    }

    fn forget(&self, task: &Task) {
        {
            let mut all = self.all();
            // the id may be another task's by now
            if all.get(&task.key()).is_some_and(|found| std::ptr::eq(&**found, task)) {
                all.remove(&task.key());
            }
        }
        task.observe(Fact::Removed);
    }
}

/// Before the next attempt at what a shim, or its program, did not do; doubled each time.
const AGAIN: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long clients wait for a shim that has not been found yet.
const SETTLE: Duration = Duration::from_secs(10);
