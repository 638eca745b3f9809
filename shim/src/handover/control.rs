//! What the commands of this binary say to a keeper over its control socket. One request a connection, framed like the messages.
use serde::{Deserialize, Serialize};

use super::{Malformed, Reader, Writer};

/// From a command to a keeper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ControlRequest {
    /// Everything that is known. → `Snapshot`
    Describe,
    /// A place for a container that is about to be created in this group. → `Done`.
    Reserve { id: String },
    /// A container was removed by hand, or will not be made: its record and its place go, and the keeper with them if they were the
    /// last. → `Done`
    Forget { id: String },
    /// Handed to the worker as a request of origin `Control`: a ttrpc `Request` message. → `Answer`
    Ask { payload: Vec<u8> },
    /// Another program for the worker and, if wanted, for the keeper: the descriptor attached to this message. `path` is for people.
    /// → `Upgraded`, or `Refused` while another upgrade is under way.
    Upgrade { path: String, keeper_too: bool },
}

/// From a keeper to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ControlReply {
    Snapshot(Box<Snapshot>),
    Done,
    Refused {
        why: String,
    },
    /// A ttrpc `Response` message.
    Answer {
        response: Vec<u8>,
    },
    /// What came of an upgrade.
    Upgraded(Box<UpgradeReport>),
}

/// How a container ended: what the worker answers to a command that has it deleted. JSON; fields are only ever added.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ToldEnd {
    pub(crate) pid: Option<u32>,
    /// Absent for one that never ran.
    pub(crate) status: Option<u32>,
    /// Unix time.
    pub(crate) at_nanos: Option<i64>,
}

impl ToldEnd {
    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a struct of numbers has a JSON form")
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

/// What came of an upgrade.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct UpgradeReport {
    /// What the worker called itself before, and what the new one calls itself; empty if it never said.
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) path: String,
    /// Unix time.
    pub(crate) at_seconds: u64,
    pub(crate) worker: PartResult,
    pub(crate) keeper: PartResult,
    /// The longest time for which no worker answered.
    pub(crate) pause_nanos: u64,
}

/// What came of the upgrade of one part.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum PartResult {
    /// It was not asked for, or not come to.
    #[default]
    Unasked,
    /// It was that program already.
    Unchanged,
    Upgraded,
    /// The new one never took over, for this.
    Kept(String),
    /// The new one took over and failed, for this.
    RolledBack(String),
}

/// What a keeper knows, for people. Later versions append fields; a reader fills in what an older keeper left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) namespace: String,
    /// The id that the shim was started for: a container's, or the group's.
    pub(crate) group: String,
    pub(crate) keeper_pid: u32,
    pub(crate) keeper_build: String,
    pub(crate) worker_pid: Option<u32>,
    pub(crate) worker_build: String,
    /// How many workers there have been.
    pub(crate) lives: u32,
    pub(crate) uptime_seconds: u64,
    /// The committed state: an entry per container (JSON, the worker's).
    pub(crate) state: Vec<(String, Vec<u8>)>,
    pub(crate) processes: Vec<ProcessSnapshot>,
    pub(crate) requests: Vec<RequestSnapshot>,
    pub(crate) streams: Vec<StreamSnapshot>,
    /// Requests that wait: key and how many.
    pub(crate) waiters: Vec<(String, u32)>,
    pub(crate) events_queued: u32,
    pub(crate) events_sent: u64,
    pub(crate) reservations: Vec<String>,
    pub(crate) processes_started: u64,
    pub(crate) exits_seen: u64,
    pub(crate) connections: u32,
    /// The version of the messages that keeper and worker speak; 0 while there is no worker.
    pub(crate) worker_version: u16,
    /// The program of the worker.
    pub(crate) worker_path: String,
    /// How many workers in a row got nothing done.
    pub(crate) fruitless: u32,
    /// How the last worker ended that was not wanted to; empty if none did.
    pub(crate) last_end: String,
    /// The program before, while it is kept.
    pub(crate) previous_build: String,
    pub(crate) upgrade: Option<UpgradeReport>,
    /// Exits that no worker lives through, withheld for now.
    pub(crate) withheld: Vec<String>,
    /// There is no worker because none is needed.
    pub(crate) asleep: bool,
}

/// A child of the keeper.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ProcessSnapshot {
    pub(crate) key: String,
    pub(crate) pid: u32,
    /// `claimed` (a container's process), or the program's name of a helper.
    pub(crate) role: String,
}

/// A request that has no answer yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RequestSnapshot {
    pub(crate) cause: u64,
    pub(crate) method: String,
    pub(crate) age_nanos: u64,
    /// Operations asked for, and how many of them are done.
    pub(crate) operations: u32,
    pub(crate) operations_done: u32,
}

/// A stream that is being moved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct StreamSnapshot {
    pub(crate) key: String,
    /// `stdin`, `stdout` or `stderr`.
    pub(crate) stream: String,
    pub(crate) target: String,
    /// Bytes taken from one side and given to the other.
    pub(crate) bytes: u64,
    /// Bytes that wait in the client's fifo.
    pub(crate) waiting_bytes: u64,
    /// Bytes in the spill file.
    pub(crate) spilled_bytes: u64,
}

impl ControlRequest {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w;
        match self {
            Self::Describe => w = Writer::message(1),
            Self::Reserve { id } => {
                w = Writer::message(2);
                w.str(id);
            }
            Self::Ask { payload } => {
                w = Writer::message(3);
                w.bytes(payload);
            }
            Self::Forget { id } => {
                w = Writer::message(4);
                w.str(id);
            }
            Self::Upgrade { path, keeper_too } => {
                w = Writer::message(5);
                w.str(path).bool(*keeper_too);
            }
        }
        w.finish()
    }

    /// Decodes a message without the length of its frame.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        Ok(match r.u8()? {
            1 => Self::Describe,
            2 => Self::Reserve { id: r.string()? },
            3 => Self::Ask { payload: r.bytes()? },
            4 => Self::Forget { id: r.string()? },
            5 => Self::Upgrade { path: r.string()?, keeper_too: r.bool()? },
            _ => return Err(Malformed { what: "a control request" }),
        })
    }
}

impl ControlReply {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w;
        match self {
            Self::Snapshot(snapshot) => {
                w = Writer::message(1);
                snapshot.write(&mut w);
            }
            Self::Done => w = Writer::message(2),
            Self::Refused { why } => {
                w = Writer::message(3);
                w.str(why);
            }
            Self::Answer { response } => {
                w = Writer::message(4);
                w.bytes(response);
            }
            Self::Upgraded(report) => {
                w = Writer::message(5);
                report.write(&mut w);
            }
        }
        w.finish()
    }

    /// Decodes a message without the length of its frame.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        Ok(match r.u8()? {
            1 => Self::Snapshot(Box::new(Snapshot::read(&mut r)?)),
            2 => Self::Done,
            3 => Self::Refused { why: r.string()? },
            4 => Self::Answer { response: r.bytes()? },
            5 => Self::Upgraded(Box::new(UpgradeReport::read(&mut r)?)),
            _ => return Err(Malformed { what: "a control reply" }),
        })
    }
}

impl Snapshot {
    fn write(&self, w: &mut Writer) {
        w.str(&self.namespace)
            .str(&self.group)
            .u32(self.keeper_pid)
            .str(&self.keeper_build)
            .option(self.worker_pid.as_ref(), |w, p| {
                w.u32(*p);
            })
            .str(&self.worker_build)
            .u32(self.lives)
            .u64(self.uptime_seconds)
            .list(&self.state, |w, (k, v)| {
                w.str(k).bytes(v);
            })
            .list(&self.processes, |w, p| {
                w.str(&p.key).u32(p.pid).str(&p.role);
            })
            .list(&self.requests, |w, q| {
                w.u64(q.cause).str(&q.method).u64(q.age_nanos).u32(q.operations).u32(q.operations_done);
            })
            .list(&self.streams, |w, s| {
                w.str(&s.key).str(&s.stream).str(&s.target).u64(s.bytes).u64(s.waiting_bytes).u64(s.spilled_bytes);
            })
            .list(&self.waiters, |w, (k, n)| {
                w.str(k).u32(*n);
            })
            .u32(self.events_queued)
            .u64(self.events_sent)
            .list(&self.reservations, |w, id| {
                w.str(id);
            })
            .u64(self.processes_started)
            .u64(self.exits_seen)
            .u32(self.connections)
            .u16(self.worker_version)
            .str(&self.worker_path)
            .u32(self.fruitless)
            .str(&self.last_end)
            .str(&self.previous_build)
            .option(self.upgrade.as_ref(), |w, report| report.write(w))
            .list(&self.withheld, |w, exit| {
                w.str(exit);
            })
            .bool(self.asleep);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let first = Self {
            namespace: r.string()?,
            group: r.string()?,
            keeper_pid: r.u32()?,
            keeper_build: r.string()?,
            worker_pid: r.option(Reader::u32)?,
            worker_build: r.string()?,
            lives: r.u32()?,
            uptime_seconds: r.u64()?,
            state: r.list(|r| Ok((r.string()?, r.bytes()?)))?,
            processes: r.list(|r| Ok(ProcessSnapshot { key: r.string()?, pid: r.u32()?, role: r.string()? }))?,
            requests: r.list(|r| {
                Ok(RequestSnapshot {
                    cause: r.u64()?,
                    method: r.string()?,
                    age_nanos: r.u64()?,
                    operations: r.u32()?,
                    operations_done: r.u32()?,
                })
            })?,
            streams: r.list(|r| {
                Ok(StreamSnapshot {
                    key: r.string()?,
                    stream: r.string()?,
                    target: r.string()?,
                    bytes: r.u64()?,
                    waiting_bytes: r.u64()?,
                    spilled_bytes: r.u64()?,
                })
            })?,
            waiters: r.list(|r| Ok((r.string()?, r.u32()?)))?,
            events_queued: r.u32()?,
            events_sent: r.u64()?,
            reservations: r.list(Reader::string)?,
            processes_started: r.u64()?,
            exits_seen: r.u64()?,
            connections: r.u32()?,
            ..Self::default()
        };
        // What keepers have said from the first version on ends here.
        if r.is_empty() {
            return Ok(first);
        }
        Ok(Self {
            worker_version: r.u16()?,
            worker_path: r.string()?,
            fruitless: r.u32()?,
            last_end: r.string()?,
            previous_build: r.string()?,
            upgrade: r.option(UpgradeReport::read)?,
            withheld: r.list(Reader::string)?,
            asleep: r.bool()?,
            ..first
        })
    }
}

impl UpgradeReport {
    pub(crate) fn write(&self, w: &mut Writer) {
        w.str(&self.from).str(&self.to).str(&self.path).u64(self.at_seconds);
        self.worker.write(w);
        self.keeper.write(w);
        w.u64(self.pause_nanos);
    }

    pub(crate) fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            from: r.string()?,
            to: r.string()?,
            path: r.string()?,
            at_seconds: r.u64()?,
            worker: PartResult::read(r)?,
            keeper: PartResult::read(r)?,
            pause_nanos: r.u64()?,
        })
    }
}

impl PartResult {
    fn write(&self, w: &mut Writer) {
        match self {
            Self::Unasked => w.u8(0),
            Self::Unchanged => w.u8(1),
            Self::Upgraded => w.u8(2),
            Self::Kept(why) => w.u8(3).str(why),
            Self::RolledBack(why) => w.u8(4).str(why),
        };
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match r.u8()? {
            0 => Self::Unasked,
            1 => Self::Unchanged,
            2 => Self::Upgraded,
            3 => Self::Kept(r.string()?),
            4 => Self::RolledBack(r.string()?),
            _ => return Err(Malformed { what: "the result of an upgrade" }),
        })
    }
}
