//! The committed state and the open causes.
//!
//! Owns the committed state, the causes that no commit has ended yet with the outcomes of their operations, the parked callers, and the
//! ready-made answers. It does no I/O and does not interpret its entries.
//!
//! ```text
//!  request ─▶ open ──(operations, stored)──▶ answered | parked ──▶ woken
//!  exit    ─▶ open ──(operations, stored)──▶ ended
//! ```
//!
//! **Invariant:** an operation of an open cause is performed once; a worker that requests it again receives its outcome.
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::relay::Caller;
use crate::frame::RequestView;
use crate::handover::{Cause, Commit, Origin, Outcome, POD_KEY, ProcessExit, Ready, Step, ToWorker, is_of};
use crate::saved::saved;

/// The most entries of the state that are moved together.
const COMPACTED_ENTRIES: usize = 8;

/// How long a request with a ready-made answer waits for the worker's own. Clients give Connect and State 1 s in all.
const READY_AFTER: Duration = Duration::from_millis(600);
/// How long a place in the group is reserved for a container.
const RESERVATION: Duration = Duration::from_secs(120);

/// Where an answer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asker {
    Client(Caller),
    /// A connection on the control socket.
    ControlClient(u32),
}

saved!(enum Asker { 0 => Client, 1 => ControlClient });

/// A request or exit that the worker has to handle.
#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) what: What,
    pub(crate) operations: Vec<(Step, Option<Outcome>)>,
}

saved!(Open { what, operations });

#[derive(Debug)]
pub(crate) enum What {
    Request(Request),
    Exit(ProcessExit),
}

saved!(enum What { 0 => Request, 1 => Exit });

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) asker: Asker,
    pub(crate) payload: Vec<u8>,
    pub(crate) arrived: Instant,
}

saved!(Request { asker, payload, arrived });

impl Request {
    fn answered(&self, response: Vec<u8>) -> Due {
        Due { asker: self.asker, request_bytes: Some(self.payload.len()), response }
    }
}

impl What {
    /// The method of a request, or the process of an exit, for reports.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Request(Request { payload, .. }) => {
                RequestView::parse(payload).map_or("?".into(), |view| String::from_utf8_lossy(view.method).into_owned())
            }
            Self::Exit(exit) => format!("exit of {}", exit.key),
        }
    }
}

/// The state of an operation that a worker requests.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Never seen before: perform it.
    New,
    /// Under way: the outcome follows later.
    Pending,
    Known(Outcome),
    /// The cause is closed.
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
    /// The causes that are exits.
    exits: BTreeSet<Cause>,
    /// The causes that were not sent to the worker.
    unsent: BTreeSet<Cause>,
    /// When requests with a ready-made answer receive it. Separate from the causes, of which a flood makes thousands.
    ready_due: BTreeMap<Cause, Instant>,
    /// Causes with a process that reports the pid of a child: while there are any, unclaimed zombies are not reaped.
    naming: BTreeSet<Cause>,
    state: BTreeMap<String, Vec<u8>>,
    parked: BTreeMap<String, Vec<Asker>>,
    /// Ready-made answers by their question, and the questions by the state entry that they depend on.
    ready: BTreeMap<Rc<[u8]>, Ready>,
    questions: BTreeMap<String, Vec<Rc<[u8]>>>,
    reservations: BTreeMap<String, Instant>,
    exit_allowed: bool,
    /// Entries of the state that expire. Absent from the state of an earlier version.
    expiring: Option<BTreeMap<String, Instant>>,
    /// How long the keeper stays for its clients once it may exit.
    linger_millis: Option<u32>,
    /// After how many seconds without a request each of `expiring` does.
    expire_after: Option<BTreeMap<String, u32>>,
}

saved!(Ledger {
    last_cause, causes, ready_due, naming, state, parked, ready, reservations, exit_allowed, expiring, linger_millis, expire_after;
    exits, unsent, questions
});

impl Ledger {
    /// Resumes after a re-exec.
    pub(crate) fn resume(&mut self) {
        self.exits = self.causes.iter().filter(|(_, open)| matches!(open.what, What::Exit(_))).map(|(cause, _)| *cause).collect();
        for ready in std::mem::take(&mut self.ready).into_values() {
            self.add_ready(ready);
        }
        self.begin_generation();
    }

    /// Moves what is kept for long to lower addresses, where there is room: it was made between what a request needs for a moment, and holds those pages. Only
    /// of a few containers: it is copied for that.
    pub(crate) fn compact(&mut self) {
        if self.state.len() > COMPACTED_ENTRIES {
            return;
        }
        self.state.values_mut().for_each(|value| move_down(vec![value]));
        move_down(self.ready.values_mut().flat_map(|ready| [&mut ready.payload, &mut ready.answer]).collect());
        move_down(self.ready.values_mut().flat_map(|ready| [&mut ready.key, &mut ready.service, &mut ready.method]).collect());
    }

    /// Opens a cause for a request.
    pub(crate) fn open_request(&mut self, asker: Asker, payload: Vec<u8>, now: Instant) -> Cause {
        let has_ready_answer = self.ready_answer(&payload).is_some();
        let cause = self.open(What::Request(Request { asker, payload, arrived: now }));
        if has_ready_answer {
            self.ready_due.insert(cause, now + READY_AFTER);
        }
        cause
    }

    /// Opens a cause for an exit.
    pub(crate) fn open_exit(&mut self, exit: ProcessExit) -> Cause {
        let cause = self.open(What::Exit(exit));
        self.exits.insert(cause);
        cause
    }

    fn open(&mut self, what: What) -> Cause {
        self.last_cause += 1;
        self.unsent.insert(self.last_cause);
        self.causes.insert(self.last_cause, Open { what, operations: Vec::new() });
        self.last_cause
    }

    fn close(&mut self, cause: Cause) -> Option<Open> {
        self.ready_due.remove(&cause);
        self.naming.remove(&cause);
        self.exits.remove(&cause);
        self.unsent.remove(&cause);
        self.causes.remove(&cause)
    }

    /// Closes a request; `None` if it is closed, or an exit.
    fn close_request(&mut self, cause: Cause) -> Option<Request> {
        match self.close(cause)?.what {
            What::Request(request) => Some(request),
            What::Exit(_) => None,
        }
    }

    /// Closes a poisoned request with `response`. `None` for an exit.
    pub(crate) fn give_up(&mut self, cause: Cause, response: Vec<u8>) -> Option<Due> {
        if self.exits.contains(&cause) {
            return None;
        }
        Some(self.close_request(cause)?.answered(response))
    }

    /// A new worker starts, to which no cause was sent yet.
    pub(crate) fn begin_generation(&mut self) {
        self.unsent = self.causes.keys().copied().collect();
    }

    /// The open causes that were sent to the worker.
    pub(crate) fn sent(&self) -> Vec<Cause> {
        self.causes.keys().filter(|cause| !self.unsent.contains(cause)).copied().collect()
    }

    /// Whether any cause is open.
    pub(crate) fn is_busy(&self) -> bool {
        !self.causes.is_empty()
    }

    pub(crate) fn unsent(&self) -> &BTreeSet<Cause> {
        &self.unsent
    }

    pub(crate) fn exits(&self) -> &BTreeSet<Cause> {
        &self.exits
    }

    /// The message that sends a cause to the worker; the cause counts as sent from then on.
    pub(crate) fn message(&mut self, cause: Cause, now: Instant) -> Option<ToWorker> {
        self.unsent.remove(&cause);
        Some(match &self.causes.get(&cause)?.what {
            What::Request(Request { asker, payload, arrived, .. }) => ToWorker::Request {
                cause,
                age_nanos: now.saturating_duration_since(*arrived).as_nanos() as u64,
                origin: match asker {
                    Asker::Client(_) => Origin::Client,
                    Asker::ControlClient(_) => Origin::Control,
                },
                payload: payload.clone(),
            },
            What::Exit(exit) => ToWorker::Exit { cause, exit: exit.clone() },
        })
    }

    /// Looks up an operation, and records that it was requested.
    pub(crate) fn ask(&mut self, cause: Cause, step: Step, reports_pid: bool) -> Asked {
        let Some(open) = self.causes.get_mut(&cause) else { return Asked::Over };
        match open.operations.iter().find(|(known, _)| *known == step) {
            Some((_, Some(outcome))) => Asked::Known(outcome.clone()),
            Some((_, None)) => Asked::Pending,
            None => {
                open.operations.push((step, None));
                if reports_pid {
                    self.naming.insert(cause);
                }
                Asked::New
            }
        }
    }

    /// Stores an outcome. Returns whether its cause is still open.
    pub(crate) fn settle(&mut self, cause: Cause, step: Step, outcome: &Outcome) -> bool {
        let Some(open) = self.causes.get_mut(&cause) else { return false };
        let Some(slot) = open.operations.iter_mut().find(|(known, _)| *known == step) else { return false };
        slot.1 = Some(outcome.clone());
        true
    }

    /// Whether an operation under way may still report a pid.
    pub(crate) fn awaits_pid(&self) -> bool {
        !self.naming.is_empty()
    }

    /// Applies the parts of a commit that concern the ledger and returns the answers that are due.
    pub(crate) fn commit(&mut self, commit: &mut Commit, now: Instant) -> Vec<Due> {
        for (key, value) in std::mem::take(&mut commit.state) {
            self.drop_ready(&key);
            if let Some(expiring) = &mut self.expiring {
                expiring.remove(&key);
            }
            if let Some(after) = &mut self.expire_after {
                after.remove(&key);
            }
            match value {
                Some(value) => {
                    self.reservations.remove(&key);
                    self.exit_allowed = false;
                    self.state.insert(key, value);
                }
                None => drop(self.state.remove(&key)),
            }
        }
        let mut due = Vec::new();
        for (cause, response) in std::mem::take(&mut commit.answers) {
            due.extend(self.close_request(cause).map(|request| request.answered(response)));
        }
        for (key, response) in std::mem::take(&mut commit.wakes) {
            let askers = self.parked.remove(&key).unwrap_or_default();
            due.extend(askers.into_iter().map(|asker| Due { asker, request_bytes: None, response: response.clone() }));
        }
        for cause in std::mem::take(&mut commit.ends) {
            self.close(cause);
        }
        for ready in std::mem::take(&mut commit.ready) {
            self.add_ready(ready);
        }
        for (key, seconds) in std::mem::take(&mut commit.expiring) {
            if self.state.contains_key(&key) {
                self.expire_after.get_or_insert_default().insert(key.clone(), seconds);
                self.expiring.get_or_insert_default().insert(key, now + Duration::from_secs(seconds.into()));
            }
        }
        self.exit_allowed |= commit.leave;
        if commit.leave {
            self.linger_millis = Some(commit.linger_millis);
        }
        due
    }

    fn add_ready(&mut self, ready: Ready) {
        let question: Rc<[u8]> = question(ready.service.as_bytes(), ready.method.as_bytes(), &ready.payload).into();
        let key = ready.key.clone();
        if self.ready.insert(Rc::clone(&question), ready).is_none() {
            self.questions.entry(key).or_default().push(question);
        }
    }

    fn drop_ready(&mut self, key: &str) {
        for question in self.questions.remove(key).unwrap_or_default() {
            self.ready.remove(&question);
        }
    }

    /// Parks the callers of a commit's `parks`. Returns each with the length of its request.
    pub(crate) fn park(&mut self, parks: Vec<(Cause, String)>, is_connected: impl Fn(Asker) -> bool) -> Vec<(Asker, usize)> {
        let mut settled = Vec::new();
        for (cause, key) in parks {
            if let Some(Request { asker, payload, .. }) = self.close_request(cause) {
                settled.push((asker, payload.len()));
                if is_connected(asker) {
                    self.parked.entry(key).or_default().push(asker);
                }
            }
        }
        settled
    }

    /// Drops the state and the reservation of a container. The keeper exits if it was the last. Returns the keys of its state, and
    /// `response` for every caller that waits for one of its processes, whose exits will not be reported.
    pub(crate) fn forget_container(&mut self, id: &str, response: &[u8]) -> (Vec<String>, Vec<Due>) {
        self.reservations.remove(id);
        self.drop_ready(id);
        let is_exit_of_it = |open: &Open| matches!(&open.what, What::Exit(exit) if is_of(&exit.key, id));
        let exits: Vec<Cause> = self.causes.iter().filter(|(_, open)| is_exit_of_it(open)).map(|(cause, _)| *cause).collect();
        for exit in exits {
            self.close(exit);
        }
        let mut due = Vec::new();
        for (_, askers) in self.parked.extract_if(.., |key, _| is_of(key, id)) {
            due.extend(askers.into_iter().map(|asker| Due { asker, request_bytes: None, response: response.to_vec() }));
        }
        let keys = self.state.extract_if(.., |key, _| is_of(key, id)).map(|(key, _)| key).collect();
        self.exit_allowed |= self.state.is_empty();
        (keys, due)
    }

    /// Drops the parked callers of a closed connection. Requests under way are completed.
    pub(crate) fn forget(&mut self, is_gone: impl Fn(Asker) -> bool) {
        self.parked.retain(|_, askers| {
            askers.retain(|asker| !is_gone(*asker));
            !askers.is_empty()
        });
    }

    /// The ready-made answer to a request, if there is one.
    pub(crate) fn ready_answer(&self, request: &[u8]) -> Option<&Ready> {
        let view = RequestView::parse(request)?;
        self.ready.get(question(view.service, view.method, view.payload).as_slice())
    }

    /// The answer to what a client asks about the pod, if it is ready: the worker would take it from the same entry.
    pub(crate) fn answer_about_pod(&self, asker: Asker, request: &[u8]) -> Option<Due> {
        if !self.questions.contains_key(POD_KEY) {
            return None;
        }
        let ready = self.ready_answer(request).filter(|ready| ready.key == POD_KEY && !ready.is_fallback && ready.signal.is_none())?;
        Some(Due { asker, request_bytes: Some(request.len()), response: ready.answer.clone() })
    }

    /// Answers that are due because the worker takes too long, or because there is none (`at_once`): a fallback answer waits for the next
    /// worker instead. With each, the operations of its cause that are under way: their outcomes will not be sent.
    ///
    /// An answer with a signal waits for a worker that serves. If an earlier worker has begun with the request, its client has given up, or
    /// `send` fails, it waits for the next worker, which knows the answer.
    pub(crate) fn overdue(
        &mut self,
        now: Instant,
        at_once: bool,
        send: impl Fn(&str, i32) -> io::Result<()>,
    ) -> Vec<(Due, Vec<(Cause, Step)>)> {
        // The older of two requests is due first.
        let late: Vec<_> = self.ready_due.iter().take_while(|(_, at)| at_once || **at <= now).map(|(cause, at)| (*cause, *at)).collect();
        let mut due = Vec::new();
        for (cause, at) in late {
            let Some(Open { what: What::Request(request), operations }) = self.causes.get(&cause) else { continue };
            let timeout = RequestView::parse(&request.payload).and_then(|view| view.timeout);
            let may_act = operations.is_empty() && timeout.is_none_or(|timeout| now.saturating_duration_since(request.arrived) < timeout);
            match self.ready_answer(&request.payload) {
                Some(ready) if ready.is_fallback && at > now => {}
                Some(Ready { signal: Some(_), .. }) if !at_once => {}
                Some(ready) if ready.signal.is_none_or(|signal| may_act && send(&ready.key, signal).is_ok()) => {
                    let pending = operations.iter().filter(|(_, outcome)| outcome.is_none()).map(|(step, _)| (cause, *step)).collect();
                    due.push((request.answered(ready.answer.clone()), pending));
                    self.close(cause);
                }
                // The state has changed since the request arrived, or only a worker can know the answer.
                _ => drop(self.ready_due.remove(&cause)),
            }
        }
        due
    }

    /// When [`Ledger::overdue`] or [`Ledger::expire`] have something to do. What was due by `ticked` and is still there waits for the
    /// end of a worker, not for a time.
    pub(crate) fn deadline(&self, ticked: Instant) -> Option<Instant> {
        let ready = self.ready_due.values().find(|at| **at > ticked);
        ready.into_iter().chain(self.reservations.values()).chain(self.expiring.iter().flat_map(BTreeMap::values)).min().copied()
    }

    /// Reserves a place for a container, unless it exists already.
    pub(crate) fn reserve(&mut self, id: String, now: Instant) {
        if !self.state.contains_key(&id) {
            self.reservations.insert(id, now + RESERVATION);
        }
    }

    /// Drops reservations that have expired. Returns the entries that have.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<String> {
        self.reservations.retain(|_, until| *until > now);
        self.expiring.iter_mut().flat_map(|expiring| expiring.extract_if(.., |_, until| *until <= now)).map(|(key, _)| key).collect()
    }

    /// A client has connected, or has sent a request: it has not forgotten what would expire.
    pub(crate) fn postpone_expiry(&mut self, now: Instant) {
        for (key, at) in self.expiring.iter_mut().flatten() {
            // not of those that a keeper without this has left
            if let Some(seconds) = self.expire_after.as_ref().and_then(|after| after.get(key)) {
                *at = now + Duration::from_secs((*seconds).into());
            }
        }
    }

    /// How long the keeper stays for its clients once it may exit.
    pub(crate) fn linger(&self) -> Duration {
        Duration::from_millis(self.linger_millis.unwrap_or(0).into())
    }

    /// Whether the worker allowed the keeper to exit and nothing here prevents it. `is_failing`: no worker will answer the open causes.
    pub(crate) fn may_exit(&self, is_failing: bool) -> bool {
        self.exit_allowed && self.state.is_empty() && self.reservations.is_empty() && (self.causes.is_empty() || is_failing)
    }

    /// Whether there is no container, no reservation and no open cause.
    pub(crate) fn is_unused(&self) -> bool {
        self.state.is_empty() && self.reservations.is_empty() && self.causes.is_empty()
    }

    /// Lets the keeper exit: no client will call Shutdown.
    pub(crate) fn allow_exit(&mut self) {
        self.exit_allowed = true;
    }

    /// Drops a reservation: the container was deleted before it was created.
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

/// Replaces each by a copy that has a lower address. All copies are made first: the allocator would give out what the one before has left.
fn move_down<T: Clone + AsRef<[u8]>>(kept: Vec<&mut T>) {
    let copies: Vec<T> = kept.iter().map(|one| (**one).clone()).collect();
    for (one, copy) in kept.into_iter().zip(copies) {
        if copy.as_ref().as_ptr() < (*one).as_ref().as_ptr() {
            *one = copy;
        }
    }
}

/// The parts of a request that a ready-made answer depends on, joined.
fn question(service: &[u8], method: &[u8], payload: &[u8]) -> Vec<u8> {
    [service, method, payload].join(&0)
}
