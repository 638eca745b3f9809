//! The pod that a shim is, for a client that gives it a sandbox of its own instead of a pause container.
//!
//! Owns the sandbox calls: the lifecycle of the pod, its files, its cgroup, and what a container gets that joins it. The keeper holds the namespaces, or a
//! holder does, a process of the keeper's (`x_engine::perform`). Knows no protobuf but the pod's own configuration: [`crate::worker::server`] translates.
//!
//! ```text
//!            Start                Stop, or the holder exits
//!  Created ─────────▶ Ready ───────────────────────────────▶ NotReady
//!     │ │               │                                       │
//!     │ └── not started in time: expired                        │
//!     └─────────────────┴──────────────── Shutdown ─────────────┴──▶ gone, and the keeper with it
//! ```
//!
//! Start, Stop and Shutdown take turns. What Start makes on the host is recorded before it is made, so that a replay knows what is ours.
//!
//! **Invariant:** a pod that was not started has nothing on the host: no mount, no folder, no namespace.
//! **Invariant:** once a pod is stopping, no container joins it.
use std::cell::{Cell, Ref, RefCell};
use std::rc::Rc;

mod calls;
mod cgroup;
mod change;
mod config;
mod files;
mod join;
mod record;
mod selinux;
mod stop;

pub(super) use calls::{CreateCall, blocking_look_ahead, create, metrics, ping, platform, start, status, wait};
pub(super) use change::PodChange;
pub(super) use join::{blocking_forget_journal, blocking_join, blocking_keep_journal};
pub(super) use record::{Record, Status};
pub(super) use stop::{LINGER, exited, shutdown, shutdown_by_task, stop};

use self::calls::Plan;
use super::container::{Change, Shared};
use super::error::Error;

/// The pod.
#[derive(Debug)]
pub(super) struct Pod {
    record: RefCell<Record>,
    /// Held by the call that changes the pod.
    turn: tokio::sync::Mutex<()>,
    /// It is being stopped.
    is_stopping: Cell<bool>,
    /// What Create has planned, for Start. None after a Start, and in a later worker generation.
    plan: RefCell<Option<Plan>>,
}

/// Commits a change that ends no request.
pub(super) trait Apply {
    fn apply(&self, change: Change);
}

impl Pod {
    /// Makes the pod from its record.
    pub(super) fn new(record: Record) -> Rc<Self> {
        Rc::new(Self::with_plan(record, None))
    }

    fn with_plan(record: Record, plan: Option<Plan>) -> Self {
        Self { record: RefCell::new(record), turn: tokio::sync::Mutex::default(), is_stopping: Cell::default(), plan: RefCell::new(plan) }
    }

    pub(super) fn record(&self) -> Ref<'_, Record> {
        self.record.borrow()
    }

    fn update(&self, change: impl FnOnce(&mut Record)) {
        change(&mut self.record.borrow_mut());
    }

    /// Refuses a request that does not fit the phase.
    fn refused(&self, request: &'static str) -> Error {
        let record = self.record();
        let phase = if self.is_stopping.get() { "stopping" } else { record.phase.name() };
        Error::PodRefused { id: record.id.clone(), request, phase }
    }
}

/// The pod of a name.
fn find(shared: &Shared, id: &str) -> Result<Rc<Pod>, Error> {
    let pod = shared.pod.borrow().clone().filter(|pod| pod.record().id.as_str() == id);
    pod.ok_or_else(|| Error::NoPod { id: id.to_owned() })
}
