//! The decision of a handler, sent to the keeper in one commit.
use std::path::PathBuf;
use std::rc::Rc;

use super::Container;
use super::process::{Deleted, Process, Streams};
use super::reply::Reply;
use crate::worker::error::Error;
use crate::worker::id::ProcessKey;
use crate::worker::phase::Exit;
use crate::worker::pod::PodChange;

/// The new state, events and answers. Applied whole.
#[derive(Debug, Default)]
pub(in crate::worker) struct Change {
    /// A container whose record is new or has changed.
    pub(in crate::worker) save: Option<Rc<Container>>,
    /// A deleted container.
    pub(in crate::worker) remove: Option<Rc<Container>>,
    /// A process of the container, with its pid, for the keeper to watch. The exit of init goes into the container's journal.
    pub(in crate::worker) claim: Option<(ProcessKey, u32)>,
    /// Events to publish, in this order.
    pub(in crate::worker) events: Vec<Event>,
    /// The answer to the request. A request without one is parked.
    pub(in crate::worker) reply: Option<Result<Reply, Error>>,
    /// The request waits for the end of this process.
    pub(in crate::worker) park: Option<ProcessKey>,
    /// Answers to the parked Waits for the exit of a process.
    pub(in crate::worker) wakes: Vec<(ProcessKey, Result<Exit, Error>)>,
    /// Processes for the keeper to forget.
    pub(in crate::worker) releases: Vec<ProcessKey>,
    /// What changes of the pod.
    pub(in crate::worker) pod: PodChange,
    /// The shim exits as soon as it holds nothing.
    pub(in crate::worker) leave: bool,
}

impl Change {
    /// Answers, and changes nothing.
    pub(in crate::worker) fn reply(reply: Reply) -> Self {
        Self { reply: Some(Ok(reply)), ..Self::default() }
    }

    /// Refuses, and changes nothing.
    pub(in crate::worker) fn refuse(error: Error) -> Self {
        Self { reply: Some(Err(error)), ..Self::default() }
    }

    /// Saves a container and answers.
    pub(super) fn save(container: &Rc<Container>, reply: Reply) -> Self {
        Self { save: Some(Rc::clone(container)), reply: Some(Ok(reply)), ..Self::default() }
    }

    pub(super) fn event(mut self, event: Event) -> Self {
        self.events.push(event);
        self
    }
}

/// An event of a container.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::worker) struct Event {
    pub(in crate::worker) container: String,
    pub(in crate::worker) kind: EventKind,
}

/// The kinds of events, with their fields.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::worker) enum EventKind {
    Created {
        bundle: PathBuf,
        mounts: Vec<crate::rootfs::Mount>,
        stdio: Streams,
        checkpoint: String,
        pid: Option<u32>,
    },
    Started {
        pid: u32,
    },
    ExecAdded {
        exec: String,
    },
    ExecStarted {
        exec: String,
        pid: u32,
    },
    /// `process` is the id of the container for init.
    Exited {
        process: String,
        pid: u32,
        exit: Exit,
    },
    /// Published for init only, as the stock shim does.
    Deleted(Deleted),
    Paused,
    Resumed,
    Checkpointed {
        path: String,
    },
    OutOfMemory,
}

impl Event {
    pub(super) fn new(container: &Container, kind: EventKind) -> Self {
        Self { container: container.id.to_string(), kind }
    }

    /// The exit of a process.
    pub(super) fn exited(key: &ProcessKey, process: &Process, exit: Exit) -> Self {
        let id = key.exec.as_ref().map_or_else(|| key.container.to_string(), ToString::to_string);
        let kind = EventKind::Exited { process: id, pid: process.pid.unwrap_or(0), exit };
        Self { container: key.container.to_string(), kind }
    }
}
