//! The worker: what it is sent, and its operations and commits.
use std::time::Instant;

use nix::errno::Errno;

use super::Keeper;
use super::upgrade::SETTLED;
use crate::handover::{Cause, Commit, Op, Outcome, Step, ToKeeper, ToWorker};
use crate::journal::Journal;
use crate::keeper::ledger::{Asked, Asker};
use crate::keeper::poison::Open;
use crate::keeper::upgrade::Stage;

impl Keeper {
    /// Sends the worker the causes that it has not been sent, as far as [`Poison`](crate::keeper::poison::Poison) allows.
    pub(super) fn send_causes(&mut self, now: Instant) {
        if !self.supervisor.is_serving() || (self.ledger.unsent().is_empty() && !self.poison.is_isolating()) {
            return;
        }
        let is_open = |cause: Cause| self.ledger.causes().contains_key(&cause);
        let open = Open { unsent: self.ledger.unsent(), exits: self.ledger.exits(), is_open: &is_open };
        for cause in self.poison.next(&open, self.supervisor.is_lively(), now) {
            if let Some(message) = self.ledger.message(cause, now) {
                self.supervisor.send(&message, None, now);
            }
        }
    }

    /// Sends everything to a worker that has sent Hello: state, requests, exits, in this order.
    pub(super) fn welcome(&mut self, now: Instant) {
        self.supervisor.welcome(now);
        for (key, value) in self.ledger.state() {
            self.supervisor.send(&ToWorker::State { key: key.clone(), value: value.clone() }, None, now);
        }
        self.ledger.begin_generation();
        self.send_causes(now);
        self.supervisor.send(&ToWorker::CaughtUp, None, now);
        if self.upgrade.as_ref().is_some_and(|upgrade| upgrade.stage == Stage::Settling) {
            self.supervisor.send(&ToWorker::Ping { number: SETTLED }, None, now);
        }
        self.supervisor.flush(now);
    }

    /// Handles what the worker or the candidate with this number has sent.
    pub(super) fn worker_sent(&mut self, number: u32, now: Instant) {
        let is_candidate = self.supervisor.number() != Some(number);
        for message in self.supervisor.receive(number, now, &mut self.poll) {
            if is_candidate {
                self.candidate_sent(message, now);
            } else {
                self.take(message);
            }
        }
    }

    fn take(&mut self, message: ToKeeper) {
        match message {
            ToKeeper::Hello { versions, build } => {
                if self.supervisor.hello(versions, build) {
                    self.welcome(Instant::now());
                }
            }
            ToKeeper::Pong { number: SETTLED } => self.settled(Instant::now()),
            ToKeeper::Fit { .. } | ToKeeper::Pong { .. } => {}
            ToKeeper::Watch => self.supervisor.watch(),
            ToKeeper::Hibernate { may } => {
                let is_needed = self.ledger.is_busy() || self.upgrade.is_some();
                self.supervisor.hibernate(may, is_needed, &self.poll);
            }
            ToKeeper::Operation { cause, step, op } => self.operation(cause, step, op),
            ToKeeper::Commit(commit) => self.commit(commit),
        }
    }

    fn operation(&mut self, cause: Cause, step: Step, op: Op) {
        // Handing out a descriptor changes nothing, and its outcome cannot be stored.
        if let Op::ReadEnd { key, stream } = op {
            let (outcome, descriptor) = match self.streams.read_end(&key, stream) {
                Ok(end) => (Outcome::Descriptor, Some(end)),
                Err(error) => (Outcome::failed(&error, format!("read end of {stream:?} of {key}")), None),
            };
            self.supervisor.send(&ToWorker::Done { cause, step, outcome }, descriptor, Instant::now());
            return;
        }
        let reports_pid = match &op {
            Op::Spawn(spawn) => spawn.reports_pid,
            Op::Perform(order) => order.kind.makes_process(),
            _ => false,
        };
        let outcome = match self.ledger.ask(cause, step, reports_pid) {
            Asked::Known(outcome) => Some(if op == Op::Once { Outcome::failed(&Errno::EALREADY.into(), "once".into()) } else { outcome }),
            Asked::Pending => None,
            Asked::Over => Some(Outcome::failed(&Errno::EINVAL.into(), format!("operation of cause {cause}, which is over"))),
            Asked::New => {
                let outcome = self.perform(cause, step, op);
                if let Some(outcome) = &outcome {
                    self.ledger.settle(cause, step, outcome);
                }
                outcome
            }
        };
        if let Some(outcome) = outcome {
            self.supervisor.send(&ToWorker::Done { cause, step, outcome }, None, Instant::now());
        }
    }

    /// Performs an operation for the first and only time. `None`: the outcome follows later.
    fn perform(&mut self, cause: Cause, step: Step, op: Op) -> Option<Outcome> {
        let result = match op {
            Op::Spawn(order) => match self.children.start(cause, step, order, &mut self.streams, &self.poll) {
                Ok(()) => return None,
                failed => failed,
            },
            Op::Perform(order) => match self.children.perform(cause, step, order, &mut self.streams, &self.poll) {
                Ok(()) => return None,
                failed => failed,
            },
            Op::OpenGate { key } => self.children.open_gate(&key).map_err(|error| (format!("start {key}"), error)),
            Op::Signal { key, signal } => {
                self.children.signal(&key, signal).map_err(|error| (format!("send signal {signal} to {key}"), error))
            }
            Op::Once => Ok(()),
            Op::EnterPod { plan } => {
                // It takes a while, in which the worker makes the rest.
                self.supervisor.flush(Instant::now());
                self.children.home.enter(&plan)
            }
            Op::LeavePod => self.children.home.leave().map_err(|error| ("return from the namespaces of the pod".to_owned(), error)),
            Op::Drain { key } => {
                self.streams.drain(&key, (cause, step), Instant::now(), &mut self.poll);
                return None;
            }
            Op::OpenStdio(stdio) => self.streams.open(stdio, &mut self.poll),
            Op::CloseStdin { key } => {
                self.streams.close_stdin(&key, &mut self.poll);
                Ok(())
            }
            Op::Resize { key, rows, columns } => {
                self.streams.resize(&key, rows, columns).map_err(|error| (format!("resize the terminal of {key}"), error))
            }
            Op::WriteJournal { path, body } => Journal::open(path.as_ref())
                .and_then(|journal| journal.write_body(&body))
                .map_err(|error| (format!("write journal {path}"), error)),
            Op::EndHelpers { key } => {
                self.children.end_helpers(&key);
                Ok(())
            }
            Op::ReadEnd { .. } => Err(("remember a descriptor".into(), Errno::EINVAL.into())),
        };
        Some(match result {
            Ok(()) => Outcome::Done,
            Err((what, error)) => Outcome::failed(&error, what),
        })
    }

    fn commit(&mut self, mut commit: Commit) {
        self.supervisor.fruitless = 0;
        let now = Instant::now();
        let (claims, awaited_pid) = (!commit.claims.is_empty(), self.ledger.awaits_pid());
        for claim in std::mem::take(&mut commit.claims) {
            self.children.claim(claim, &self.poll);
        }
        for event in std::mem::take(&mut commit.events) {
            self.publisher.push(event);
        }
        for cause in commit.answers.iter().map(|(cause, _)| *cause).chain(commit.ends.iter().copied()) {
            self.children.end_placeholders_of(cause);
        }
        for due in self.ledger.commit(&mut commit, now) {
            self.answer(due);
        }
        let (relay, control) = (&self.relay, &self.control);
        let is_connected = |asker| match asker {
            Asker::Client(caller) => relay.is_connected(caller.client),
            Asker::ControlClient(id) => control.is_connected(id),
        };
        for (asker, bytes) in self.ledger.park(std::mem::take(&mut commit.parks), is_connected) {
            if let Asker::Client(caller) = asker {
                self.relay.settle(caller, Some(bytes), &mut self.poll);
            }
        }
        for key in std::mem::take(&mut commit.releases) {
            self.children.release(&key);
            self.streams.release(&key, now, &mut self.poll);
            self.ledger.release_reservation(&key);
        }
        self.publisher.turn(now, &self.poll);
        // A claimed process may have exited already, and zombies that were kept for this commit can be reaped.
        if claims || (awaited_pid && !self.ledger.awaits_pid()) {
            self.reap();
        }
    }
}
