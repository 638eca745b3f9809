//! The messages themselves.
mod encodings;

use super::Versions;

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
    /// Waits, 10 s at most, until what a process has written is taken and the last writer has left, or no reader will take it.
    /// → `Done`.
    Drain { key: String },
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
    /// Entries of the state to set, or to remove: one for each container, its id the key, and one for each process that was added to it, with
    /// the process's key. Setting or removing one drops its ready answers.
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
