//! The messages themselves and their encodings.
use super::{Malformed, Reader, Versions, Writer};

/// What made the worker act: a request or an exit. Numbered by the keeper, never reused in its life.
pub(crate) type Cause = u64;

/// Which operation of a cause; chosen by the worker, the same again on replay.
pub(crate) type Step = u32;

/// From keeper to worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ToWorker {
    /// Who the keeper is, and the version that both speak from now on. `life` counts workers from 1.
    Welcome { version: u16, keeper_pid: u32, life: u32 },
    /// One entry of the committed state.
    State { key: String, value: Vec<u8> },
    /// A request that has no answer yet. `payload` is a ttrpc `Request` message. `age_nanos` is the time since it arrived.
    Request { cause: Cause, age_nanos: u64, origin: Origin, payload: Vec<u8> },
    /// A claimed process ended; sent until a commit ends the cause.
    Exit { cause: Cause, exit: ProcessExit },
    /// Everything that was known when this worker said hello has been sent.
    CaughtUp,
    /// What became of an operation. [`Outcome::Descriptor`] has a descriptor attached to the message.
    Done { cause: Cause, step: Step, outcome: Outcome },
    /// One entry of the state, to be read on trial: before the Welcome, to a worker that may take over.
    Try { key: String, value: Vec<u8> },
    /// That was all of the state. → [`ToKeeper::Fit`]
    Tried,
    /// Asks for a sign of life. → [`ToKeeper::Pong`]
    Ping { number: u32 },
    /// Nothing is to be done: may this worker end until something is? → [`ToKeeper::Watch`]*, [`ToKeeper::Rest`]
    MayRest,
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A ttrpc client on the shim's socket.
    Client,
    /// A command of this binary on the keeper's control socket. The request's service is [`CONTROL_SERVICE`].
    Control,
}

/// Service name of requests that come through the control socket.
pub(crate) const CONTROL_SERVICE: &str = "x.shim.control.v1";

/// How a claimed process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcessExit {
    /// The key under which it was claimed.
    pub(crate) key: String,
    pub(crate) pid: u32,
    /// 0–255, or 128 + signal number.
    pub(crate) status: u32,
    /// Unix time in nanoseconds, taken when the exit was seen.
    pub(crate) at_nanos: i64,
}

/// What the keeper does on the worker's order, once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Op {
    /// Starts a process and reports its end (or its readiness). → `Exited`, `Ready` or `Failed`.
    Spawn(Spawn),
    /// Signals a claimed process through its pidfd. → `Done`, or `Failed` with ESRCH once it has exited or was never claimed.
    Signal { key: String, signal: i32 },
    /// Does nothing, and so tells whether it was asked before. → `Done` the first time in all lives, `Failed` with EALREADY after.
    Once,
    /// Makes the pipes of a process and connects the client's fifos. → `Done` or `Failed`.
    OpenStdio(Stdio),
    /// The client will write no more to stdin: what is in the fifo still goes through, then the process reads EOF. → `Done`.
    CloseStdin { key: String },
    /// Sets the size of a process's terminal. → `Done`, or `Failed` with ENOTTY if it has none (yet).
    Resize { key: String, rows: u16, columns: u16 },
    /// Writes the body of a container's journal (see `journal`), creating the file. → `Done` or `Failed`.
    WriteJournal { path: String, body: Vec<u8> },
    /// Hands the worker a copy of the read end of an output opened as [`Output::Pipe`]. Not remembered: each ask gives a new copy.
    /// → `Descriptor`, or `Failed` with ENOENT.
    ReadEnd { key: String, stream: Stream },
    /// Kills the helpers that work for a process, or for a container and its execs. → `Done`; their own operations end as killed.
    EndHelpers { key: String },
}

/// A process to start. It gets exactly the descriptors named here, default signal dispositions, an empty mask, a process group of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Spawn {
    /// What it works for: a container, or `container/exec`. Shown by `ps`; helpers of a container end with it.
    pub(crate) key: String,
    /// Absolute path first. An argument [`LOG_ARGUMENT`] is replaced by the path of a pipe whose content becomes [`Exited::log`].
    pub(crate) argv: Vec<Vec<u8>>,
    /// `NAME=value`; nothing is inherited.
    pub(crate) env: Vec<Vec<u8>>,
    /// Working directory.
    pub(crate) cwd: String,
    /// Descriptors from 0 upwards.
    pub(crate) fds: Vec<Fd>,
    /// The process will leave a child behind and name its pid in a file: unclaimed children stay unreaped until the commit
    /// that ends this cause.
    pub(crate) reports_pid: bool,
    /// Where the process will deliver a terminal for `key` (`--console-socket`). The keeper listens there and takes the terminal in.
    pub(crate) console_socket: Option<String>,
}

/// See [`Spawn::argv`].
pub(crate) const LOG_ARGUMENT: &[u8] = b"@log@";

/// The longest [`Exited::log`] and [`Exited::output`], in bytes; of a longer one, the end is kept.
pub(crate) const MAX_OUTPUT_BYTES: usize = 256 << 10;

/// Where a descriptor of a new process comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fd {
    /// `/dev/null`.
    Null,
    /// The process's side of a stream opened by [`Op::OpenStdio`] under this key; `/dev/null` where that stream is none.
    /// The keeper gives its own copy of it up once the process was started.
    Process(String, Stream),
    /// The read end of an output opened as [`Output::Pipe`]: for a logger.
    ReadEnd(String, Stream),
    /// Collected into [`Exited::output`].
    Output,
    /// The write end of a pipe: a byte or its closing makes the outcome [`Outcome::Ready`].
    Ready,
}

/// The three streams of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stream {
    Stdin,
    Stdout,
    Stderr,
}

/// The streams of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stdio {
    pub(crate) key: String,
    /// The client's fifo, if there is one.
    pub(crate) stdin: Option<String>,
    pub(crate) stdout: Output,
    pub(crate) stderr: Output,
    /// Streams go through a terminal that a [`Spawn::console_socket`] will deliver; no pipes are made.
    pub(crate) terminal: bool,
    /// Owner of the pipes.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Bytes to keep in a file beside [`Stdio::key`]'s journal while no reader takes them; 0 for none. See `docs/stdio.md`.
    pub(crate) spill_bytes: u64,
    /// Folder for the spill file.
    pub(crate) spill_folder: String,
}

/// Where an output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Output {
    /// `/dev/null`.
    None,
    /// A client's fifo, spliced by the keeper.
    Fifo(String),
    /// A pipe that the keeper only holds: a logger or the worker reads it.
    Pipe,
}

/// What became of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// A system call failed. `what` says what was tried on what.
    Failed {
        errno: i32,
        what: String,
    },
    Exited(Exited),
    /// A [`Fd::Ready`] pipe was written to (`byte`) or closed; the process goes on.
    Ready {
        byte: bool,
    },
    /// The descriptor attached to this message.
    Descriptor,
}

/// The end of a spawned process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Exited {
    /// 0–255, or 128 + signal number.
    pub(crate) status: u32,
    /// What it wrote to [`LOG_ARGUMENT`].
    pub(crate) log: Vec<u8>,
    /// What it wrote to [`Fd::Output`].
    pub(crate) output: Vec<u8>,
    /// A terminal arrived on [`Spawn::console_socket`].
    pub(crate) terminal: bool,
}

/// From worker to keeper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ToKeeper {
    /// The first message. `versions`: what this worker speaks.
    Hello {
        versions: Versions,
        build: String,
    },
    Operation {
        cause: Cause,
        step: Step,
        op: Op,
    },
    Commit(Commit),
    /// Whether this worker can go on with the state that it was shown, or why not.
    Fit {
        refusal: Option<String>,
    },
    /// The sign of life that was asked for.
    Pong {
        number: u32,
    },
    /// A descriptor is attached that can be read when a worker is needed again.
    Watch,
    /// Whether this worker may end for a while.
    Rest {
        may: bool,
    },
}

/// The end of a step. Applied whole, in the order of the fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Commit {
    /// Entries of the state to set, or to remove. An entry per container, its id the key. Setting or removing one drops its ready answers.
    pub(crate) state: Vec<(String, Option<Vec<u8>>)>,
    /// Children to own: their exit becomes a cause.
    pub(crate) claims: Vec<Claim>,
    /// Events to send, in this order, each a ttrpc `Request` message.
    pub(crate) events: Vec<Vec<u8>>,
    /// Answers, each a ttrpc `Response` message. Each ends its cause.
    pub(crate) answers: Vec<(Cause, Vec<u8>)>,
    /// Requests that wait for a key. Each ends as a cause: only where its answer goes is kept.
    pub(crate) parks: Vec<(Cause, String)>,
    /// Answers for everyone who waits for a key.
    pub(crate) wakes: Vec<(String, Vec<u8>)>,
    /// Exits that were taken in.
    pub(crate) ends: Vec<Cause>,
    /// Processes that are forgotten: claim, streams (after their drain), helpers.
    pub(crate) releases: Vec<String>,
    /// Answers that the keeper may give by itself while no worker does.
    pub(crate) ready: Vec<Ready>,
    /// Leave as soon as there is no state, no reservation and nothing left to write. Stays in force until state is set again.
    pub(crate) leave: bool,
}

/// A child that a runtime left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) key: String,
    pub(crate) pid: u32,
    /// Journal whose exit slot records its end.
    pub(crate) journal: Option<String>,
}

/// A ready-made answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ready {
    /// The state entry that it depends on.
    pub(crate) key: String,
    pub(crate) service: String,
    pub(crate) method: String,
    /// The request's payload, byte for byte.
    pub(crate) payload: Vec<u8>,
    /// A ttrpc `Response` message.
    pub(crate) answer: Vec<u8>,
}

// --- encodings -------------------------------------------------------------------------------------------------------

impl ToWorker {
    /// Encodes the message with its frame.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w;
        match self {
            Self::Welcome { version, keeper_pid, life } => {
                w = Writer::message(1);
                w.u16(*version).u32(*keeper_pid).u32(*life);
            }
            Self::State { key, value } => {
                w = Writer::message(2);
                w.str(key).bytes(value);
            }
            Self::Request { cause, age_nanos, origin, payload } => {
                w = Writer::message(3);
                w.u64(*cause).u64(*age_nanos).u8(match origin {
                    Origin::Client => 0,
                    Origin::Control => 1,
                });
                w.bytes(payload);
            }
            Self::Exit { cause, exit } => {
                w = Writer::message(4);
                w.u64(*cause).str(&exit.key).u32(exit.pid).u32(exit.status).i64(exit.at_nanos);
            }
            Self::CaughtUp => w = Writer::message(5),
            Self::Done { cause, step, outcome } => {
                w = Writer::message(6);
                w.u64(*cause).u32(*step);
                outcome.write(&mut w);
            }
            Self::Try { key, value } => {
                w = Writer::message(7);
                w.str(key).bytes(value);
            }
            Self::Tried => w = Writer::message(8),
            Self::Ping { number } => {
                w = Writer::message(9);
                w.u32(*number);
            }
            Self::MayRest => w = Writer::message(10),
        }
        w.finish()
    }

    /// Decodes a message without the length of its frame.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        Ok(match r.u8()? {
            1 => Self::Welcome { version: r.u16()?, keeper_pid: r.u32()?, life: r.u32()? },
            2 => Self::State { key: r.string()?, value: r.bytes()? },
            3 => Self::Request {
                cause: r.u64()?,
                age_nanos: r.u64()?,
                origin: match r.u8()? {
                    0 => Origin::Client,
                    1 => Origin::Control,
                    _ => return Err(Malformed { what: "an origin" }),
                },
                payload: r.bytes()?,
            },
            4 => {
                Self::Exit { cause: r.u64()?, exit: ProcessExit { key: r.string()?, pid: r.u32()?, status: r.u32()?, at_nanos: r.i64()? } }
            }
            5 => Self::CaughtUp,
            6 => Self::Done { cause: r.u64()?, step: r.u32()?, outcome: Outcome::read(&mut r)? },
            7 => Self::Try { key: r.string()?, value: r.bytes()? },
            8 => Self::Tried,
            9 => Self::Ping { number: r.u32()? },
            10 => Self::MayRest,
            _ => return Err(Malformed { what: "a message for a worker" }),
        })
    }
}

impl ToKeeper {
    /// Encodes the message with its frame.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w;
        match self {
            Self::Hello { versions, build } => {
                w = Writer::message(1);
                w.u16(versions.newest).str(build).u16(versions.oldest);
            }
            Self::Operation { cause, step, op } => {
                w = Writer::message(2);
                w.u64(*cause).u32(*step);
                op.write(&mut w);
            }
            Self::Commit(commit) => {
                w = Writer::message(3);
                commit.write(&mut w);
            }
            Self::Fit { refusal } => {
                w = Writer::message(4);
                w.option(refusal.as_ref(), |w, why| {
                    w.str(why);
                });
            }
            Self::Pong { number } => {
                w = Writer::message(5);
                w.u32(*number);
            }
            Self::Watch => w = Writer::message(6),
            Self::Rest { may } => {
                w = Writer::message(7);
                w.bool(*may);
            }
        }
        w.finish()
    }

    /// Decodes a message without the length of its frame.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        Ok(match r.u8()? {
            1 => {
                let (newest, build) = (r.u16()?, r.string()?);
                Self::Hello { versions: Versions { oldest: r.u16()?, newest }, build }
            }
            2 => Self::Operation { cause: r.u64()?, step: r.u32()?, op: Op::read(&mut r)? },
            3 => Self::Commit(Commit::read(&mut r)?),
            4 => Self::Fit { refusal: r.option(Reader::string)? },
            5 => Self::Pong { number: r.u32()? },
            6 => Self::Watch,
            7 => Self::Rest { may: r.bool()? },
            _ => return Err(Malformed { what: "a message for a keeper" }),
        })
    }
}

impl Op {
    fn write(&self, w: &mut Writer) {
        match self {
            Self::Spawn(spawn) => spawn.write(w.u8(1)),
            Self::Signal { key, signal } => {
                w.u8(2).str(key).i32(*signal);
            }
            Self::Once => {
                w.u8(3);
            }
            Self::OpenStdio(stdio) => stdio.write(w.u8(4)),
            Self::CloseStdin { key } => {
                w.u8(5).str(key);
            }
            Self::Resize { key, rows, columns } => {
                w.u8(6).str(key).u16(*rows).u16(*columns);
            }
            Self::WriteJournal { path, body } => {
                w.u8(7).str(path).bytes(body);
            }
            Self::ReadEnd { key, stream } => stream.write(w.u8(8).str(key)),
            Self::EndHelpers { key } => {
                w.u8(9).str(key);
            }
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match r.u8()? {
            1 => Self::Spawn(Spawn::read(r)?),
            2 => Self::Signal { key: r.string()?, signal: r.i32()? },
            3 => Self::Once,
            4 => Self::OpenStdio(Stdio::read(r)?),
            5 => Self::CloseStdin { key: r.string()? },
            6 => Self::Resize { key: r.string()?, rows: r.u16()?, columns: r.u16()? },
            7 => Self::WriteJournal { path: r.string()?, body: r.bytes()? },
            8 => Self::ReadEnd { key: r.string()?, stream: Stream::read(r)? },
            9 => Self::EndHelpers { key: r.string()? },
            _ => return Err(Malformed { what: "an operation" }),
        })
    }
}

impl Spawn {
    fn write(&self, w: &mut Writer) {
        w.str(&self.key)
            .list(&self.argv, |w, a| {
                w.bytes(a);
            })
            .list(&self.env, |w, e| {
                w.bytes(e);
            })
            .str(&self.cwd)
            .list(&self.fds, |w, fd| fd.write(w))
            .bool(self.reports_pid)
            .option(self.console_socket.as_ref(), |w, p| {
                w.str(p);
            });
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            key: r.string()?,
            argv: r.list(Reader::bytes)?,
            env: r.list(Reader::bytes)?,
            cwd: r.string()?,
            fds: r.list(Fd::read)?,
            reports_pid: r.bool()?,
            console_socket: r.option(Reader::string)?,
        })
    }
}

impl Fd {
    fn write(&self, w: &mut Writer) {
        match self {
            Self::Null => {
                w.u8(1);
            }
            Self::Process(key, stream) => stream.write(w.u8(2).str(key)),
            Self::ReadEnd(key, stream) => stream.write(w.u8(3).str(key)),
            Self::Output => {
                w.u8(4);
            }
            Self::Ready => {
                w.u8(5);
            }
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match r.u8()? {
            1 => Self::Null,
            2 => Self::Process(r.string()?, Stream::read(r)?),
            3 => Self::ReadEnd(r.string()?, Stream::read(r)?),
            4 => Self::Output,
            5 => Self::Ready,
            _ => return Err(Malformed { what: "a descriptor's source" }),
        })
    }
}

impl Stream {
    fn write(self, w: &mut Writer) {
        w.u8(match self {
            Self::Stdin => 0,
            Self::Stdout => 1,
            Self::Stderr => 2,
        });
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match r.u8()? {
            0 => Self::Stdin,
            1 => Self::Stdout,
            2 => Self::Stderr,
            _ => return Err(Malformed { what: "a stream" }),
        })
    }
}

impl Stdio {
    fn write(&self, w: &mut Writer) {
        w.str(&self.key).option(self.stdin.as_ref(), |w, p| {
            w.str(p);
        });
        self.stdout.write(w);
        self.stderr.write(w);
        w.bool(self.terminal).u32(self.uid).u32(self.gid).u64(self.spill_bytes).str(&self.spill_folder);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            key: r.string()?,
            stdin: r.option(Reader::string)?,
            stdout: Output::read(r)?,
            stderr: Output::read(r)?,
            terminal: r.bool()?,
            uid: r.u32()?,
            gid: r.u32()?,
            spill_bytes: r.u64()?,
            spill_folder: r.string()?,
        })
    }
}

impl Output {
    fn write(&self, w: &mut Writer) {
        match self {
            Self::None => {
                w.u8(1);
            }
            Self::Fifo(path) => {
                w.u8(2).str(path);
            }
            Self::Pipe => {
                w.u8(3);
            }
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match r.u8()? {
            1 => Self::None,
            2 => Self::Fifo(r.string()?),
            3 => Self::Pipe,
            _ => return Err(Malformed { what: "an output" }),
        })
    }
}

impl Outcome {
    pub(crate) fn write(&self, w: &mut Writer) {
        match self {
            Self::Done => {
                w.u8(1);
            }
            Self::Failed { errno, what } => {
                w.u8(2).i32(*errno).str(what);
            }
            Self::Exited(exited) => {
                w.u8(3).u32(exited.status).bytes(&exited.log).bytes(&exited.output).bool(exited.terminal);
            }
            Self::Ready { byte } => {
                w.u8(4).bool(*byte);
            }
            Self::Descriptor => {
                w.u8(5);
            }
        }
    }

    pub(crate) fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match r.u8()? {
            1 => Self::Done,
            2 => Self::Failed { errno: r.i32()?, what: r.string()? },
            3 => Self::Exited(Exited { status: r.u32()?, log: r.bytes()?, output: r.bytes()?, terminal: r.bool()? }),
            4 => Self::Ready { byte: r.bool()? },
            5 => Self::Descriptor,
            _ => return Err(Malformed { what: "an outcome" }),
        })
    }
}

impl Commit {
    fn write(&self, w: &mut Writer) {
        w.list(&self.state, |w, (key, value)| {
            w.str(key).option(value.as_ref(), |w, v| {
                w.bytes(v);
            });
        })
        .list(&self.claims, |w, c| {
            w.str(&c.key).u32(c.pid).option(c.journal.as_ref(), |w, j| {
                w.str(j);
            });
        })
        .list(&self.events, |w, e| {
            w.bytes(e);
        })
        .list(&self.answers, |w, (cause, answer)| {
            w.u64(*cause).bytes(answer);
        })
        .list(&self.parks, |w, (cause, key)| {
            w.u64(*cause).str(key);
        })
        .list(&self.wakes, |w, (key, answer)| {
            w.str(key).bytes(answer);
        })
        .list(&self.ends, |w, cause| {
            w.u64(*cause);
        })
        .list(&self.releases, |w, key| {
            w.str(key);
        })
        .list(&self.ready, |w, x| {
            w.str(&x.key).str(&x.service).str(&x.method).bytes(&x.payload).bytes(&x.answer);
        })
        .bool(self.leave);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            state: r.list(|r| Ok((r.string()?, r.option(Reader::bytes)?)))?,
            claims: r.list(|r| Ok(Claim { key: r.string()?, pid: r.u32()?, journal: r.option(Reader::string)? }))?,
            events: r.list(Reader::bytes)?,
            answers: r.list(|r| Ok((r.u64()?, r.bytes()?)))?,
            parks: r.list(|r| Ok((r.u64()?, r.string()?)))?,
            wakes: r.list(|r| Ok((r.string()?, r.bytes()?)))?,
            ends: r.list(Reader::u64)?,
            releases: r.list(Reader::string)?,
            ready: r.list(|r| {
                Ok(Ready { key: r.string()?, service: r.string()?, method: r.string()?, payload: r.bytes()?, answer: r.bytes()? })
            })?,
            leave: r.bool()?,
        })
    }
}
