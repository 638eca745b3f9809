//! Commits: what a handler has decided, sent to the keeper as one message and applied here.
//!
//! **Invariant:** the keeper gets a commit before anything of it is applied in this worker.
use std::rc::Rc;

use super::container::{Change, Reply};
use super::pod::{Apply, PodChange};
use super::{Worker, container, events, pod, server};
use crate::handover::{self, Claim, Commit, POD_KEY};

/// The request or exit that a change completes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ending {
    Request(handover::Cause),
    Exit(handover::Cause),
}

impl Worker {
    /// Commits a change to the keeper, and applies it here.
    pub(super) fn apply(self: &Rc<Self>, ending: Option<Ending>, mut change: Change) {
        let keeper_pid = self.shared.keeper.get().pid;
        let mut commit = Commit { leave: change.leave, ..Commit::default() };
        // A container that was deleted while a handler waited is not saved again and publishes no event.
        if change.save.as_ref().is_some_and(|container| container.is_deleted()) {
            (change.save, change.events) = (None, Vec::new());
        }
        let unsaved = change.save.as_ref().map(|container| container.take_unsaved()).unwrap_or_default();
        if let Some(container) = &change.save {
            let record = container.record();
            commit.state = unsaved.iter().map(|key| (key.to_string(), record.entry(key))).collect();
            let has_turned = container.has_turned(record.execs.are_under_way());
            if unsaved.iter().any(|key| key.exec.is_none()) {
                commit.ready = server::ready(&record, keeper_pid);
            } else if has_turned {
                commit.ready = server::ready_pids(&record, keeper_pid);
            }
            commit.claims.extend(change.claim.map(|(key, pid)| Claim {
                journal: key.exec.is_none().then(|| container::journal_path(&record.bundle).to_string_lossy().into_owned()),
                key: key.to_string(),
                pid,
            }));
        }
        let removed = change.remove.iter().flat_map(|container| container.record().keys());
        commit.state.extend(removed.map(|key| (key.to_string(), None)));
        commit.events = change.events.into_iter().map(|event| events::encode(event, &self.shared.settings.namespace)).collect();
        commit.wakes = change
            .wakes
            .into_iter()
            .map(|(key, result)| (key.to_string(), server::response(result.map(Reply::Exit), keeper_pid)))
            .collect();
        commit.releases = change.releases.iter().map(ToString::to_string).collect();
        match ending {
            Some(Ending::Request(cause)) => {
                commit.parks = change.park.iter().map(|key| (cause, key.to_string())).collect();
                commit.answers = change.reply.map(|reply| (cause, server::response(reply, keeper_pid))).into_iter().collect();
            }
            Some(Ending::Exit(cause)) => commit.ends.push(cause),
            None => {}
        }
        self.add_pod(&mut commit, change.pod, ending);
        self.shared.link.commit(commit);
        if let Some(container) = &change.remove {
            pod::blocking_forget_journal(&self.shared, &container.id);
            self.shared.registry.remove(&container.id);
            container.changed();
        }
        if let Some(container) = change.save {
            self.shared.registry.insert(&container);
            container.changed();
            self.attach(&container, &unsaved);
        }
    }

    /// Adds what changes of the pod to a commit.
    fn add_pod(&self, commit: &mut Commit, change: PodChange, ending: Option<Ending>) {
        let keeper_pid = self.shared.keeper.get().pid;
        let key = || POD_KEY.to_owned();
        if let Some(pod) = self.shared.pod.borrow().as_ref().filter(|_| change.save) {
            let record = pod.record();
            commit.state.push((key(), Some(record.encode())));
            commit.ready.extend(server::ready_of_pod(&record, keeper_pid));
            commit.expiring.extend(change.expires_after_seconds.map(|seconds| (key(), seconds)));
        }
        if change.remove {
            commit.state.push((key(), None));
            commit.linger_millis = u32::try_from(pod::LINGER.as_millis()).unwrap_or(u32::MAX);
        }
        commit.claims.extend(change.claim.map(|pid| Claim { key: key(), pid, journal: None }));
        commit.releases.extend(change.release.then(key));
        if let (Some(Ending::Request(cause)), true) = (ending, change.park) {
            commit.parks.push((cause, key()));
        }
        commit.wakes.extend(change.wake.map(|exit| (key(), server::response(Ok(Reply::Exit(exit)), keeper_pid))));
    }
}

impl Apply for Rc<Worker> {
    fn apply(&self, change: Change) {
        Worker::apply(self, None, change);
    }
}
