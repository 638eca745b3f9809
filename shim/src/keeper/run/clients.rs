//! Requests of clients and control clients, and their answers.
use std::time::{Duration, Instant};

use log::warn;

use super::{Keeper, MAX_BACKLOG_BYTES};
use crate::frame::{self, Code};
use crate::handover::{ControlReply, ControlRequest};
use crate::keeper::ledger::{Asker, Due};

/// When to retry accepting connections after a lack of descriptors or memory.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

impl Keeper {
    pub(super) fn client(&mut self, id: u32, now: Instant) {
        // Other clients are still read from: their requests may have a ready-made answer.
        if self.supervisor.backlog_bytes() > MAX_BACKLOG_BYTES && !self.relay.is_modest(id) {
            if !self.timers.paused.contains(&id) {
                self.timers.paused.push(id);
            }
            return;
        }
        let (requests, is_connected) = self.relay.turn(id, &mut self.poll);
        if !requests.is_empty() {
            self.ledger.postpone_expiry(now);
        }
        for request in requests {
            let asker = Asker::Client(request.caller);
            match self.ledger.answer_about_pod(asker, &request.payload) {
                Some(due) => self.answer(due),
                None => drop(self.ledger.open_request(asker, request.payload, now)),
            }
        }
        self.send_causes(now);
        if !is_connected {
            self.ledger.forget(|asker| matches!(asker, Asker::Client(caller) if caller.client == id));
        }
    }

    /// Accepts new connections. A failure is retried on a timer: the listener is edge-triggered and does not report them again.
    pub(super) fn accept(&mut self, now: Instant) {
        let was_well = self.timers.accept_at.take().is_none();
        let before = self.relay.count();
        let (clients, control_clients) = (self.relay.accept(&self.poll), self.control.accept(&self.poll));
        if self.relay.count() > before {
            self.ledger.postpone_expiry(now);
        }
        if let Err(error) = clients.and(control_clients) {
            if was_well {
                warn!(error:%; "cannot accept a connection, will retry");
            }
            self.timers.accept_at = Some(now + ACCEPT_AGAIN_AFTER);
        }
    }

    pub(super) fn answer(&mut self, due: Due) {
        match due.asker {
            Asker::Client(caller) => self.relay.answer(caller, due.request_bytes, &due.response, &mut self.poll),
            Asker::ControlClient(id) => self.control.reply(id, &ControlReply::Answer { response: due.response }),
        }
    }

    pub(super) fn control_client(&mut self, id: u32, now: Instant) {
        let Some((request, attached)) = self.control.turn(id) else { return };
        match request {
            ControlRequest::Describe => self.describe(id, now),
            ControlRequest::Join { id: container } => {
                // A keeper that is about to exit stays for it.
                self.ledger.reserve(container, now);
                self.describe(id, now);
            }
            ControlRequest::Forget { id: container } => {
                self.forget(&container, now);
                self.control.reply(id, &ControlReply::Done);
            }
            ControlRequest::Upgrade { path, keeper_too } => match attached {
                Some(file) => self.begin_upgrade(id, file, path, keeper_too, now),
                None => self.control.reply(id, &ControlReply::Refused { why: "the request has no executable attached".into() }),
            },
            ControlRequest::Ask { payload } => {
                self.ledger.open_request(Asker::ControlClient(id), payload, now);
                self.send_causes(now);
            }
        }
    }

    fn describe(&mut self, asker: u32, now: Instant) {
        let snapshot = Box::new(self.snapshot(now));
        self.control.reply(asker, &ControlReply::Snapshot(snapshot));
    }

    /// Drops a container that was cleaned up manually, or that will not be created.
    fn forget(&mut self, container: &str, now: Instant) {
        let why = format!("container {container} was cleaned up manually: its exit status is unknown");
        self.forget_for(container, &why, now);
    }

    /// Drops the entries of the state that have expired: a pod that was never started, and about which no client has asked since.
    pub(super) fn expire(&mut self, now: Instant) {
        for key in self.ledger.expire(now) {
            self.forget_for(
                &key,
                &format!("{key} has expired: it was created and never started, and no client has asked about it since"),
                now,
            );
        }
    }

    fn forget_for(&mut self, key: &str, why: &str, now: Instant) {
        let (keys, waiting) = self.ledger.forget_container(key, &frame::error_response(Code::NotFound, why));
        for due in waiting {
            self.answer(due);
        }
        if !keys.is_empty() {
            warn!(container:% = key, why; "forgetting it");
            self.children.end_helpers(key);
            for key in keys {
                self.children.release(&key);
                self.streams.release(&key, now, &mut self.poll);
            }
            // The running worker still holds it in memory; the next one does not.
            self.supervisor.kill();
        }
    }
}
