//! Exits: of a container's processes, of helpers, of workers.
use std::time::Instant;

use log::error;

use super::Keeper;
use crate::frame::{self, Code};
use crate::handover::{Cause, ToWorker};
use crate::keeper::children::Found;
use crate::keeper::generation::End;
use crate::keeper::poll::Source;
use crate::keeper::supervisor::Ended;

impl Keeper {
    pub(super) fn reap(&mut self) {
        let ours: Vec<u32> = self.supervisor.pids().collect();
        let found = self.children.reap(self.ledger.awaits_pid(), &ours, &mut self.streams, &mut self.poll);
        for found in found {
            self.found(found);
        }
    }

    pub(super) fn found(&mut self, found: Found) {
        let now = Instant::now();
        match found {
            Found::Outcome { cause, step, outcome } => {
                if self.ledger.settle(cause, step, &outcome) {
                    self.supervisor.send(&ToWorker::Done { cause, step, outcome }, None, now);
                }
            }
            Found::Exit(exit) => {
                self.streams.exited(&exit.key, &mut self.poll);
                self.ledger.open_exit(exit);
                self.send_causes(now);
            }
            Found::Other { pid, status } => {
                let ended = self.supervisor.ended(pid, status, now);
                self.ended(ended, now);
            }
            Found::ReaderGone { key, stream } => self.streams.reader_gone(&key, stream, &mut self.poll),
        }
    }

    pub(super) fn ended(&mut self, ended: Ended, now: Instant) {
        match ended {
            Ended::Worker(end) => self.worker_ended(&end, false, now),
            Ended::RolledBack(end) => self.worker_ended(&end, true, now),
            Ended::Candidate(end) => self.candidate_ended(end),
            Ended::Other => {}
        }
    }

    fn worker_ended(&mut self, end: &End, rolled_back: bool, now: Instant) {
        // The messages that it had not read are gone.
        for id in self.timers.paused.drain(..) {
            self.poll.again(Source::Client(id));
        }
        let sent = self.ledger.sent();
        self.ledger.begin_generation();
        if rolled_back {
            self.rolled_back(end);
        } else if let Some(poisoned) = self.poison.ended(sent, end, now) {
            self.poisoned(poisoned, end);
        }
    }

    /// A cause crashes every worker. A request is answered with an error; an exit is a fact, so it is withheld and retried later.
    fn poisoned(&mut self, cause: Cause, end: &End) {
        let method = self.ledger.causes().get(&cause).map(|open| open.what.name()).unwrap_or_default();
        let why = format!("every worker of this shim crashes over this request ({method}; last: {})", end.why);
        match self.ledger.give_up(cause, frame::error_response(Code::Internal, &why)) {
            Some(due) => {
                error!(method:%, why:% = end.why; "every worker crashes over a request, it is answered with an error");
                self.children.end_helpers_of(cause);
                self.answer(due);
                // Zombies that were kept because it might have reported their pid can be reaped.
                self.reap();
            }
            None => error!(what:% = method, why:% = end.why; "every worker crashes over an exit, it is withheld and retried later"),
        }
    }
}
