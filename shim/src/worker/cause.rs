//! Causes: the request or exit that the worker is handling, and the operations that it requests from the keeper for it.
//!
//! **Invariant:** the steps of a handler are constants, so that the handler's replay requests the same operations.
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use super::error::Error;
use super::link::Link;
use crate::handover::{self, Exited, Op, Outcome, Perform, Spawn, Step};

/// A request or an exit that is being handled.
#[derive(Debug, Clone)]
pub(crate) struct Cause {
    link: Rc<Link>,
    number: handover::Cause,
    /// Added to each step: see [`Cause::part`].
    first_step: Step,
}

/// The steps of all handlers. A number means the same in every version: a later version may complete what an earlier one has begun.
pub(crate) mod step {
    use crate::handover::Step;

    /// Marks the cause as begun.
    pub(crate) const BEGIN: Step = 0;
    pub(crate) const OPEN_STDIO: Step = 1;
    /// Two loggers at most.
    pub(crate) const LOGGERS: Step = 2;
    pub(crate) const JOURNAL: Step = 4;
    /// The engine's verb for the request.
    pub(crate) const ENGINE: Step = 5;
    pub(crate) const JOURNAL_AGAIN: Step = 6;
    pub(crate) const RESIZE: Step = 7;
    pub(crate) const CLOSE_STDIN: Step = 8;
    pub(crate) const SIGNAL: Step = 9;
    pub(crate) const THAW: Step = 10;
    pub(crate) const KILL_ALL: Step = 11;
    /// Removes what the engine created before a failure.
    pub(crate) const UNDO: Step = 12;
    pub(crate) const ENGINE_DELETE: Step = 13;
    pub(crate) const END_HELPERS: Step = 14;
    /// Deletes by force after a delete that failed.
    pub(crate) const ENGINE_DELETE_BY_FORCE: Step = 15;
    pub(crate) const DRAIN: Step = 16;
    /// Looks at what has the id after a failure, before UNDO.
    pub(crate) const ENGINE_STATE: Step = 17;
    /// Hooks that follow a start or a deletion.
    pub(crate) const HOOKS: Step = 18;
    /// Makes the process that a unit of systemd's is started with.
    pub(crate) const PLACEHOLDER: Step = 24;
    /// Makes the process that holds the namespaces of a pod.
    pub(crate) const HOLDER: Step = 26;
    pub(crate) const ENTER_POD: Step = 27;
    pub(crate) const LEAVE_POD: Step = 28;
    /// Comes before the return from a pod's namespaces after a failed start.
    pub(crate) const UNDO_POD: Step = 29;
    /// Shows that the keeper has the record of what a pod makes on the host.
    pub(crate) const POD_RECORDED: Step = 30;

    /// The steps of the work on one of several containers.
    pub(crate) const PER_PART: Step = 64;
    /// Signals the descendants of an exec: from here on two steps for each worker that comes to it. The first counts the workers, the
    /// second asks whether the exec is still there. A Kill has no parts.
    pub(crate) const DESCENDANTS: Step = 1000;
}

impl Cause {
    pub(crate) fn new(link: Rc<Link>, number: handover::Cause) -> Self {
        Self { link, number, first_step: 0 }
    }

    /// For operations that belong to no request and no exit, each at an [`Link::own_step`]. The keeper does not remember them.
    pub(crate) fn own(link: &Rc<Link>) -> Self {
        Self::new(Rc::clone(link), 0)
    }

    /// For the work on one of several containers: its steps are of its own. `index`: the same for that container in a replay.
    pub(crate) fn part(&self, index: usize) -> Self {
        Self { first_step: step::PER_PART * (index as Step + 1), ..self.clone() }
    }

    pub(crate) fn number(&self) -> handover::Cause {
        self.number
    }

    /// Marks the cause as begun, for [`Cause::was_begun`] of a later worker generation.
    pub(crate) fn begin(&self) {
        drop(self.link.operation(self.number, self.first_step + step::BEGIN, Op::Once));
    }

    /// Whether an earlier worker began to handle it. If not, it counts as begun now.
    pub(crate) async fn was_begun(&self) -> bool {
        !self.is_first(step::BEGIN).await
    }

    /// Whether no earlier worker has come to this step.
    pub(crate) async fn is_first(&self, at: Step) -> bool {
        matches!(self.link.operation(self.number, self.first_step + at, Op::Once).await.0, Outcome::Done)
    }

    /// Waits until the keeper has taken every message from before. One that it has not read when a worker ends is lost, so what a worker itself does after a
    /// commit, a replay may know nothing of. `at`: a step of its own.
    pub(crate) async fn until_taken(&self, at: Step) {
        // Any answer shows it.
        self.is_first(at).await;
    }

    /// Requests an operation whose outcome is success and nothing else.
    pub(crate) async fn perform(&self, at: Step, op: Op) -> Result<(), Error> {
        match self.link.operation(self.number, self.first_step + at, op).await.0 {
            Outcome::Done => Ok(()),
            Outcome::Failed { errno, what } => Err(failed(errno, what)),
            Outcome::Exited(_) | Outcome::Ready { .. } | Outcome::Descriptor => Err(Error::Outcome { doing: "operation" }),
        }
    }

    /// Runs a helper to its end.
    pub(crate) async fn run(&self, at: Step, spawn: Spawn) -> Result<Exited, Error> {
        self.ended(at, Op::Spawn(spawn)).await
    }

    /// Has a plan performed. The output is the performer's report.
    pub(crate) async fn run_plan(&self, at: Step, order: Perform) -> Result<Exited, Error> {
        self.ended(at, Op::Perform(order)).await
    }

    async fn ended(&self, at: Step, op: Op) -> Result<Exited, Error> {
        match self.link.operation(self.number, self.first_step + at, op).await.0 {
            Outcome::Exited(exited) => Ok(exited),
            Outcome::Failed { errno, what } => Err(failed(errno, what)),
            Outcome::Done | Outcome::Ready { .. } | Outcome::Descriptor => Err(Error::Outcome { doing: "start a process" }),
        }
    }

    /// Starts a helper and waits until it reports readiness.
    pub(crate) async fn start(&self, at: Step, spawn: Spawn) -> Result<Started, Error> {
        match self.link.operation(self.number, self.first_step + at, Op::Spawn(spawn)).await.0 {
            Outcome::Ready { byte } => Ok(Started::Ready { byte }),
            Outcome::Exited(exited) => Ok(Started::Ended { status: exited.status }),
            Outcome::Failed { errno, what } => Err(failed(errno, what)),
            Outcome::Done | Outcome::Descriptor => Err(Error::Outcome { doing: "start a process" }),
        }
    }

    /// Gets a descriptor; absent if the keeper no longer has it.
    pub(crate) async fn descriptor(&self, at: Step, op: Op) -> Result<Option<OwnedFd>, Error> {
        match self.link.operation(self.number, self.first_step + at, op).await {
            (Outcome::Descriptor, Some(descriptor)) => Ok(Some(descriptor)),
            (Outcome::Failed { errno: nix::libc::ENOENT, .. }, _) => Ok(None),
            (Outcome::Failed { errno, what }, _) => Err(failed(errno, what)),
            _ => Err(Error::Outcome { doing: "fetch a descriptor" }),
        }
    }
}

/// What a helper with a ready pipe did first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Started {
    Ready { byte: bool },
    Ended { status: u32 },
}

fn failed(errno: i32, what: String) -> Error {
    Error::Keeper { what, source: io::Error::from_raw_os_error(errno) }
}
