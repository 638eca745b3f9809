//! What is committed and what is open.
//!
//! Owns the committed state, the causes that no commit has ended yet with the outcomes of their operations, the callers that wait,
//! and the ready-made answers. It does no I/O, and it does not look into what it keeps.
//!
//! ```text
//!  request ─▶ open ──(operations, remembered)──▶ answered | parked ──▶ woken
//!  exit    ─▶ open ──(operations, remembered)──▶ ended
//! ```
//!
//! **Invariant:** an operation of an open cause is performed once; whoever asks again is told its outcome.
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::relay::Caller;
use crate::frame::RequestView;
use crate::handover::{Cause, Commit, Origin, Outcome, ProcessExit, Ready, Step, ToWorker};

/// How long a request with a ready-made answer waits for the worker's own. Connect and State have 1 s in all.
const READY_AFTER: Duration = Duration::from_millis(600);
/// How long a place in the group is kept for a container that was announced.
const RESERVATION: Duration = Duration::from_secs(120);

/// Who is waiting for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asker {
    Client(Caller),
    /// A connection on the control socket.
    Commander(u32),
}

/// Something the worker has to deal with.
#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) what: What,
    pub(crate) operations: Vec<(Step, Option<Outcome>)>,
    /// A process was started for it that reports the pid of a child: zombies that nobody has claimed must stay.
    pub(crate) reports_pid: bool,
}

#[derive(Debug)]
pub(crate) enum What {
    Request { asker: Asker, payload: Vec<u8>, arrived: Instant, ready_at: Option<Instant> },
    Exit(ProcessExit),
}

/// What becomes of an operation that is asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Never seen before: perform it.
    New,
    /// Under way: the outcome will come.
    Pending,
    Known(Outcome),
    /// The cause was ended.
    Over,
}

/// An answer that is due.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) asker: Asker,
    /// `None` for a caller that was parked.
    pub(crate) request_bytes: Option<usize>,
    pub(crate) response: Vec<u8>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    last_cause: Cause,
    causes: BTreeMap<Cause, Open>,
    state: BTreeMap<String, Vec<u8>>,
    parked: BTreeMap<String, Vec<Asker>>,
    ready: Vec<Ready>,
    reservations: BTreeMap<String, Instant>,
    leave: bool,
}

impl Ledger {
    /// Opens a cause for a request.
    pub(crate) fn open_request(&mut self, asker: Asker, payload: Vec<u8>, now: Instant) -> Cause {
        let ready_at = self.ready_answer(&payload).map(|_| now + READY_AFTER);
        self.open(What::Request { asker, payload, arrived: now, ready_at })
    }

    /// Opens a cause for an exit.
    pub(crate) fn open_exit(&mut self, exit: ProcessExit) -> Cause {
        self.open(What::Exit(exit))
    }

    fn open(&mut self, what: What) -> Cause {
        self.last_cause += 1;
        self.causes.insert(self.last_cause, Open { what, operations: Vec::new(), reports_pid: false });
        self.last_cause
    }

    /// The message that tells a worker of a cause.
    pub(crate) fn announce(&self, cause: Cause, now: Instant) -> Option<ToWorker> {
        Some(match &self.causes.get(&cause)?.what {
            What::Request { asker, payload, arrived, .. } => ToWorker::Request {
                cause,
                age_nanos: now.saturating_duration_since(*arrived).as_nanos() as u64,
                origin: match asker {
                    Asker::Client(_) => Origin::Client,
                    Asker::Commander(_) => Origin::Control,
                },
                payload: payload.clone(),
            },
            What::Exit(exit) => ToWorker::Exit { cause, exit: exit.clone() },
        })
    }

    /// Everything that a new worker must know, in the order that lets it go on: state, requests, exits.
    pub(crate) fn replay(&self, now: Instant) -> Vec<ToWorker> {
        let mut messages: Vec<_> =
            self.state.iter().map(|(key, value)| ToWorker::State { key: key.clone(), value: value.clone() }).collect();
        let is_request = |open: &Open| matches!(open.what, What::Request { .. });
        let requests = self.causes.iter().filter(|(_, open)| is_request(open));
        let exits = self.causes.iter().filter(|(_, open)| !is_request(open));
        messages.extend(requests.chain(exits).filter_map(|(cause, _)| self.announce(*cause, now)));
        messages.push(ToWorker::CaughtUp);
        messages
    }

    /// Looks an operation up, and notes that it was asked for.
    pub(crate) fn ask(&mut self, cause: Cause, step: Step, reports_pid: bool) -> Asked {
        let Some(open) = self.causes.get_mut(&cause) else { return Asked::Over };
        match open.operations.iter().find(|(known, _)| *known == step) {
            Some((_, Some(outcome))) => Asked::Known(outcome.clone()),
            Some((_, None)) => Asked::Pending,
            None => {
                open.operations.push((step, None));
                open.reports_pid |= reports_pid;
                Asked::New
            }
        }
    }

    /// Remembers an outcome. Returns whether anybody may still want it.
    pub(crate) fn settle(&mut self, cause: Cause, step: Step, outcome: &Outcome) -> bool {
        let Some(open) = self.causes.get_mut(&cause) else { return false };
        let Some(slot) = open.operations.iter_mut().find(|(known, _)| *known == step) else { return false };
        slot.1 = Some(outcome.clone());
        true
    }

    /// Whether an operation under way may still name a pid.
    pub(crate) fn awaits_pid(&self) -> bool {
        self.causes.values().any(|open| open.reports_pid)
    }

    /// Applies the parts of a commit that concern the ledger and returns the answers that are due.
    pub(crate) fn commit(&mut self, commit: &mut Commit) -> Vec<Due> {
        for (key, value) in std::mem::take(&mut commit.state) {
            self.ready.retain(|ready| ready.key != key);
            match value {
                Some(value) => {
                    self.reservations.remove(&key);
                    self.leave = false;
                    self.state.insert(key, value);
                }
                None => drop(self.state.remove(&key)),
            }
        }
        let mut due = Vec::new();
        for (cause, response) in std::mem::take(&mut commit.answers) {
            if let Some(Open { what: What::Request { asker, payload, .. }, .. }) = self.causes.remove(&cause) {
                due.push(Due { asker, request_bytes: Some(payload.len()), response });
            }
        }
        for (key, response) in std::mem::take(&mut commit.wakes) {
            let askers = self.parked.remove(&key).unwrap_or_default();
            due.extend(askers.into_iter().map(|asker| Due { asker, request_bytes: None, response: response.clone() }));
        }
        for cause in std::mem::take(&mut commit.ends) {
            self.causes.remove(&cause);
        }
        self.ready.append(&mut commit.ready);
        self.leave |= commit.leave;
        due
    }

    /// Parks the callers of a commit's `parks`. Returns each with the length of its request.
    pub(crate) fn park(&mut self, parks: Vec<(Cause, String)>, is_connected: impl Fn(Asker) -> bool) -> Vec<(Asker, usize)> {
        let mut settled = Vec::new();
        for (cause, key) in parks {
            if let Some(Open { what: What::Request { asker, payload, .. }, .. }) = self.causes.remove(&cause) {
                settled.push((asker, payload.len()));
                if is_connected(asker) {
                    self.parked.entry(key).or_default().push(asker);
                }
            }
        }
        settled
    }

    /// Forgets the parked callers of a connection that is gone. Requests under way go on: what they do must be done.
    pub(crate) fn forget(&mut self, is_gone: impl Fn(Asker) -> bool) {
        self.parked.retain(|_, askers| {
            askers.retain(|asker| !is_gone(*asker));
            !askers.is_empty()
        });
    }

    /// The ready-made answer to a request, if there is one.
    pub(crate) fn ready_answer(&self, request: &[u8]) -> Option<&[u8]> {
        let view = RequestView::parse(request)?;
        self.ready
            .iter()
            .find(|ready| {
                ready.service.as_bytes() == view.service && ready.method.as_bytes() == view.method && ready.payload == view.payload
            })
            .map(|ready| ready.answer.as_slice())
    }

    /// Answers that are due because the worker has taken too long, or because there is none (`at_once`).
    pub(crate) fn overdue(&mut self, now: Instant, at_once: bool) -> Vec<Due> {
        let late: Vec<Cause> = self
            .causes
            .iter()
            .filter(|(_, open)| matches!(open.what, What::Request { ready_at: Some(at), .. } if at_once || at <= now))
            .map(|(cause, _)| *cause)
            .collect();
        let mut due = Vec::new();
        for cause in late {
            let Some(Open { what: What::Request { asker, payload, ready_at, .. }, .. }) = self.causes.get_mut(&cause) else { continue };
            *ready_at = None;
            let (asker, payload) = (*asker, payload.clone());
            if let Some(response) = self.ready_answer(&payload).map(<[u8]>::to_vec) {
                self.causes.remove(&cause);
                due.push(Due { asker, request_bytes: Some(payload.len()), response });
            }
        }
        due
    }

    /// When [`Ledger::overdue`] or [`Ledger::expire`] have something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let late = self.causes.values().filter_map(|open| match open.what {
            What::Request { ready_at, .. } => ready_at,
            What::Exit(_) => None,
        });
        late.chain(self.reservations.values().copied()).min()
    }

    /// Keeps a place for a container. Refused once the keeper was told to leave and nothing holds it.
    pub(crate) fn reserve(&mut self, id: String, now: Instant) {
        self.reservations.insert(id, now + RESERVATION);
    }

    /// Drops reservations that nobody has used.
    pub(crate) fn expire(&mut self, now: Instant) {
        self.reservations.retain(|_, until| *until > now);
    }

    /// Whether the keeper was told to leave and nothing here holds it.
    pub(crate) fn may_leave(&self) -> bool {
        self.leave && self.state.is_empty() && self.reservations.is_empty() && self.causes.is_empty()
    }

    /// Gives a place up, and the keeper with it if that was all: the container of this name was deleted before it was created.
    pub(crate) fn release_reservation(&mut self, id: &str) {
        self.reservations.remove(id);
    }

    pub(crate) fn state(&self) -> &BTreeMap<String, Vec<u8>> {
        &self.state
    }

    pub(crate) fn causes(&self) -> &BTreeMap<Cause, Open> {
        &self.causes
    }

    pub(crate) fn parked(&self) -> impl Iterator<Item = (&str, usize)> {
        self.parked.iter().map(|(key, askers)| (key.as_str(), askers.len()))
    }

    pub(crate) fn reservations(&self) -> impl Iterator<Item = &str> {
        self.reservations.keys().map(String::as_str)
    }
}
