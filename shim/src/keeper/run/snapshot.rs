//! The answer to a control request for a snapshot.
use std::time::Instant;

use super::Keeper;
use crate::handover::{MAX_MESSAGE_BYTES, RequestSnapshot, Snapshot};
use crate::keeper::ledger::{Request, What};
use crate::test_identity;

/// The most bytes of state in a snapshot: it shares the message with the other fields.
const SNAPSHOT_STATE_BYTES: usize = MAX_MESSAGE_BYTES / 2;
/// The same for each list that grows with the processes.
const SNAPSHOT_LIST_BYTES: usize = MAX_MESSAGE_BYTES / 8;
/// The most bytes of an item beside its texts.
const ITEM_BYTES: usize = 64;

/// The items that fit, from the first one on. `texts`: those of an item.
fn fitting<T, const N: usize>(items: Vec<T>, texts: impl Fn(&T) -> [&str; N]) -> Vec<T> {
    let mut bytes = 0;
    let fits = |item: &T| {
        bytes += texts(item).iter().map(|text| text.len()).sum::<usize>() + ITEM_BYTES;
        bytes <= SNAPSHOT_LIST_BYTES
    };
    items.into_iter().take_while(fits).collect()
}

impl Keeper {
    /// Every container, without its record if that does not fit into one message; then the exec processes that fit.
    fn snapshot_state(&self) -> Vec<(String, Vec<u8>)> {
        let mut left = SNAPSHOT_STATE_BYTES;
        let mut fits = |key: &str, value: &[u8]| {
            let fits = key.len() + value.len() <= left;
            left -= if fits { key.len() + value.len() } else { 0 };
            fits
        };
        let (added, containers): (Vec<_>, Vec<_>) = self.ledger.state().iter().partition(|(key, _)| key.contains('/'));
        let mut shown: Vec<(String, Vec<u8>)> = Vec::with_capacity(containers.len());
        for (key, value) in containers {
            shown.push((key.clone(), if fits(key, value) { value.clone() } else { Vec::new() }));
        }
        shown.extend(added.into_iter().filter(|(key, value)| fits(key, value)).map(|(key, value)| (key.clone(), value.clone())));
        shown
    }

    pub(super) fn snapshot(&self, now: Instant) -> Snapshot {
        let requests = self.ledger.causes().iter().map(|(cause, open)| {
            let age_nanos = match &open.what {
                What::Request(Request { arrived, .. }) => now.saturating_duration_since(*arrived).as_nanos() as u64,
                What::Exit(_) => 0,
            };
            RequestSnapshot {
                cause: *cause,
                method: open.what.name(),
                age_nanos,
                operations: open.operations.len() as u32,
                operations_done: open.operations.iter().filter(|(_, outcome)| outcome.is_some()).count() as u32,
            }
        });
        let waiters = self.ledger.parked().map(|(key, count)| (key.to_owned(), count as u32));
        let withheld = self.poison.withheld(now).filter_map(|cause| self.ledger.causes().get(&cause)).map(|open| open.what.name());
        Snapshot {
            namespace: self.settings.namespace.clone(),
            group: self.settings.id.clone(),
            keeper_pid: std::process::id(),
            keeper_build: test_identity::build().into(),
            worker_pid: self.supervisor.pid(),
            worker_build: self.supervisor.version().map_or("", |_| &self.supervisor.executable.build).into(),
            generations: self.supervisor.generations,
            uptime_seconds: now.saturating_duration_since(self.started_at).as_secs(),
            state: self.snapshot_state(),
            processes: fitting(self.children.snapshot(), |process| [&process.key, &process.role]),
            requests: requests.collect(),
            streams: fitting(self.streams.snapshot(), |stream| [&stream.key, &stream.stream, &stream.target]),
            waiters: fitting(waiters.collect(), |(key, _)| [key]),
            events_queued: self.publisher.len() as u32,
            events_sent: self.publisher.sent,
            reservations: self.ledger.reservations().map(str::to_owned).collect(),
            processes_started: self.children.started,
            exits_seen: self.children.exits_seen,
            connections: self.relay.count() as u32,
            worker_version: self.supervisor.version().unwrap_or_default(),
            worker_path: self.supervisor.executable.path.clone(),
            fruitless: self.supervisor.fruitless,
            asleep: self.supervisor.is_asleep(),
            last_end: self.supervisor.last_end.clone().unwrap_or_default(),
            previous_build: self.supervisor.previous.as_ref().map(|(previous, _)| previous.build.clone()).unwrap_or_default(),
            upgrade: self.last_upgrade.clone(),
            withheld: withheld.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::{ControlReply, StreamSnapshot};

    #[test]
    fn the_lists_of_many_processes_fit_into_one_message_with_the_state() {
        let stream = |number: u64| StreamSnapshot {
            key: format!("{}/{number:0>64}", "c".repeat(64)),
            stream: "stdout".into(),
            target: "/".repeat(250),
            bytes: u64::MAX - number,
            waiting_bytes: u64::MAX,
            spilled_bytes: u64::MAX,
        };
        let all: Vec<StreamSnapshot> = (0..100_000).map(stream).collect();
        assert_eq!(fitting(all[..100].to_vec(), |stream| [&stream.key, &stream.target]), all[..100]);
        let streams = fitting(all, |stream| [&stream.key, &stream.stream, &stream.target]);
        let waiters: Vec<(String, u32)> = (0..100_000).map(|number| (number.to_string(), u32::MAX)).collect();
        let waiters = fitting(waiters, |(key, _)| [key]);
        assert!(streams.len() > 1000 && waiters.len() > 1000);
        let state = vec![("c1".to_owned(), vec![0; SNAPSHOT_STATE_BYTES])];
        let snapshot = Snapshot { state, streams, waiters, ..Snapshot::default() };
        let bytes = ControlReply::Snapshot(Box::new(snapshot)).encode().len();
        assert!(bytes < MAX_MESSAGE_BYTES / 8 * 7, "{bytes}");
    }
}
