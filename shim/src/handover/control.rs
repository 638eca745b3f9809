//! The protocol of the control socket, used by the commands of this binary. One request per connection, framed like the messages.
use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::part;

/// From a command to a keeper.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum ControlRequest {
    /// Asks for a snapshot. → `Snapshot`
    #[n(0)]
    Describe,
    /// Reserves a place for a container that is about to be created in this group, unless it exists already. → `Snapshot`
    #[n(1)]
    Join {
        #[n(0)]
        id: String,
    },
    /// A container was cleaned up manually, or will not be created: drops its state and reservation. The keeper exits if it was the last.
    /// → `Done`
    #[n(2)]
    Forget {
        #[n(0)]
        id: String,
    },
    /// Handed to the worker as a request of origin `Control`: a ttrpc `Request` message. → `Answer`
    #[n(3)]
    Ask {
        #[cbor(n(0), with = "part")]
        payload: Vec<u8>,
    },
    /// Upgrades the worker and, with `keeper_too`, the keeper to the attached executable. `path`: where it was opened, for reports.
    /// → `Upgraded`, or `Refused` while another upgrade is under way.
    #[n(4)]
    Upgrade {
        #[n(0)]
        path: String,
        #[n(1)]
        keeper_too: bool,
    },
}

/// From a keeper to a command.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum ControlReply {
    #[n(0)]
    Snapshot(#[n(0)] Box<Snapshot>),
    #[n(1)]
    Done,
    #[n(2)]
    Refused {
        #[n(0)]
        why: String,
    },
    /// A ttrpc `Response` message.
    #[n(3)]
    Answer {
        #[cbor(n(0), with = "part")]
        response: Vec<u8>,
    },
    /// The result of an upgrade.
    #[n(4)]
    Upgraded(#[n(0)] Box<UpgradeReport>),
}

/// The exit of a container's init: the worker's answer to the `delete` command. JSON; fields are only ever added.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ReportedExit {
    pub(crate) pid: Option<u32>,
    /// Absent for one that never ran.
    pub(crate) status: Option<u32>,
    /// Unix time.
    pub(crate) at_nanos: Option<i64>,
}

impl ReportedExit {
    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a struct of numbers has a JSON form")
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

/// The result of an upgrade.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct UpgradeReport {
    /// The builds of the previous and the new worker; empty if it never sent Hello.
    #[n(0)]
    pub(crate) from: String,
    #[n(1)]
    pub(crate) to: String,
    #[n(2)]
    pub(crate) path: String,
    /// Unix time.
    #[n(3)]
    pub(crate) at_seconds: u64,
    #[n(4)]
    pub(crate) worker: PartResult,
    #[n(5)]
    pub(crate) keeper: PartResult,
    /// The longest time for which no worker answered.
    #[n(6)]
    pub(crate) pause_nanos: u64,
}

/// The result for one part, worker or keeper.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) enum PartResult {
    /// Not requested, or not reached.
    #[default]
    #[n(0)]
    Unasked,
    /// It runs that executable already.
    #[n(1)]
    Unchanged,
    #[n(2)]
    Upgraded,
    /// The new one never took over, for this reason.
    #[n(3)]
    Kept(#[n(0)] String),
    /// The new one took over and failed, for this reason.
    #[n(4)]
    RolledBack(#[n(0)] String),
}

/// The state of a keeper, for `ps` and `inspect`. Later versions append fields; a reader fills in those that an older keeper lacks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Snapshot {
    #[n(0)]
    pub(crate) namespace: String,
    /// The id that the shim was started for: a container's, or the group's.
    #[n(1)]
    pub(crate) group: String,
    #[n(2)]
    pub(crate) keeper_pid: u32,
    #[n(3)]
    pub(crate) keeper_build: String,
    #[n(4)]
    pub(crate) worker_pid: Option<u32>,
    #[n(5)]
    pub(crate) worker_build: String,
    /// How many workers there have been.
    #[n(6)]
    pub(crate) generations: u32,
    #[n(7)]
    pub(crate) uptime_seconds: u64,
    /// The committed state: an entry per container (JSON, the worker's).
    #[cbor(n(8), with = "part")]
    pub(crate) state: Vec<(String, Vec<u8>)>,
    /// Of processes, streams and waiters, as many as fit into one message.
    #[n(9)]
    pub(crate) processes: Vec<ProcessSnapshot>,
    #[n(10)]
    pub(crate) requests: Vec<RequestSnapshot>,
    #[n(11)]
    pub(crate) streams: Vec<StreamSnapshot>,
    /// Parked requests: key and how many.
    #[n(12)]
    pub(crate) waiters: Vec<(String, u32)>,
    #[n(13)]
    pub(crate) events_queued: u32,
    #[n(14)]
    pub(crate) events_sent: u64,
    #[n(15)]
    pub(crate) reservations: Vec<String>,
    #[n(16)]
    pub(crate) processes_started: u64,
    #[n(17)]
    pub(crate) exits_seen: u64,
    #[n(18)]
    pub(crate) connections: u32,
    /// The version of the messages that keeper and worker speak; 0 while there is no worker.
    #[n(19)]
    pub(crate) worker_version: u16,
    /// The path of the worker's executable.
    #[n(20)]
    pub(crate) worker_path: String,
    /// How many generations in a row committed nothing.
    #[n(21)]
    pub(crate) fruitless: u32,
    /// Why the last worker failed; empty if none did.
    #[n(22)]
    pub(crate) last_end: String,
    /// The build of the previous executable, while it is kept.
    #[n(23)]
    pub(crate) previous_build: String,
    #[n(24)]
    pub(crate) upgrade: Option<UpgradeReport>,
    /// Poisoned exits, withheld for now.
    #[n(25)]
    pub(crate) withheld: Vec<String>,
    /// There is no worker because it hibernates.
    #[n(26)]
    pub(crate) asleep: bool,
}

/// A child of the keeper.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct ProcessSnapshot {
    #[n(0)]
    pub(crate) key: String,
    #[n(1)]
    pub(crate) pid: u32,
    /// `claimed` (a container's process), or the executable of a helper.
    #[n(2)]
    pub(crate) role: String,
}

/// A request that has no answer yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct RequestSnapshot {
    #[n(0)]
    pub(crate) cause: u64,
    #[n(1)]
    pub(crate) method: String,
    #[n(2)]
    pub(crate) age_nanos: u64,
    /// Operations requested, and how many of them are done.
    #[n(3)]
    pub(crate) operations: u32,
    #[n(4)]
    pub(crate) operations_done: u32,
}

/// A stream that is being moved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct StreamSnapshot {
    #[n(0)]
    pub(crate) key: String,
    /// `stdin`, `stdout` or `stderr`.
    #[n(1)]
    pub(crate) stream: String,
    #[n(2)]
    pub(crate) target: String,
    /// Bytes taken from one side and given to the other.
    #[n(3)]
    pub(crate) bytes: u64,
    /// Bytes that wait in the client's fifo.
    #[n(4)]
    pub(crate) waiting_bytes: u64,
    /// Bytes in the spill file.
    #[n(5)]
    pub(crate) spilled_bytes: u64,
}
