//! What the commands of this binary say to a keeper over its control socket. One request a connection, framed like the messages.
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
            .u32(self.connections);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
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
        })
    }
}
