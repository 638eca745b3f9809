//! The messages themselves.
use std::io;

use minicbor::{Decode, Encode};
use nix::errno::Errno;

use super::{Versions, part};

/// What made the worker act: a request or an exit. Numbered by the keeper, never reused by the same keeper.
pub(crate) type Cause = u64;

/// Which operation of a cause; chosen by the worker, the same again on replay.
pub(crate) type Step = u32;

/// The key of the pod that a shim is, and of the process that holds its namespaces. No container has this id.
pub(crate) const POD_KEY: &str = "@pod";

/// Whether a process key belongs to this container: `ID` for init, `ID/EXEC` for execs.
pub(crate) fn is_of(key: &str, id: &str) -> bool {
    key.strip_prefix(id).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// From keeper to worker.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum ToWorker {
    /// The keeper accepts the worker. `version`: spoken by both from now on. `generation` counts workers from 1.
    #[n(0)]
    Welcome {
        #[n(0)]
        version: u16,
        #[n(1)]
        keeper_pid: u32,
        #[n(2)]
        generation: u32,
    },
    /// One entry of the committed state.
    #[n(1)]
    State {
        #[n(0)]
        key: String,
        #[cbor(n(1), with = "part")]
        value: Vec<u8>,
    },
    /// A request that has no answer yet. `payload` is a ttrpc `Request` message. `age_nanos` is the time since it arrived.
    #[n(2)]
    Request {
        #[n(0)]
        cause: Cause,
        #[n(1)]
        age_nanos: u64,
        #[n(2)]
        origin: Origin,
        #[cbor(n(3), with = "part")]
        payload: Vec<u8>,
    },
    /// A claimed process ended; sent until a commit ends the cause.
    #[n(3)]
    Exit {
        #[n(0)]
        cause: Cause,
        #[n(1)]
        exit: ProcessExit,
    },
    /// Everything that the keeper held when this worker sent Hello has been sent.
    #[n(4)]
    CaughtUp,
    /// The outcome of an operation. [`Outcome::Descriptor`] has a descriptor attached to the message.
    #[n(5)]
    Done {
        #[n(0)]
        cause: Cause,
        #[n(1)]
        step: Step,
        #[n(2)]
        outcome: Outcome,
    },
    /// One entry of the state for a candidate to check, before its Welcome.
    #[n(6)]
    Try {
        #[n(0)]
        key: String,
        #[cbor(n(1), with = "part")]
        value: Vec<u8>,
    },
    /// The state is complete. → [`ToKeeper::Fit`]
    #[n(7)]
    Tried,
    /// Asks for a response. → [`ToKeeper::Pong`]
    #[n(8)]
    Ping {
        #[n(0)]
        number: u32,
    },
    /// No cause is open: may this worker hibernate? → [`ToKeeper::Watch`]*, [`ToKeeper::Hibernate`]
    #[n(9)]
    MayHibernate,
}

/// Where a request came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub(crate) enum Origin {
    /// A ttrpc client on the shim's socket.
    #[n(0)]
    Client,
    /// A command of this binary on the keeper's control socket. The request's service is [`CONTROL_SERVICE`].
    #[n(1)]
    Control,
}

/// Service name of requests that come through the control socket.
pub(crate) const CONTROL_SERVICE: &str = "x.shim.control.v1";

/// How a claimed process ended.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct ProcessExit {
    /// The key under which it was claimed.
    #[n(0)]
    pub(crate) key: String,
    #[n(1)]
    pub(crate) pid: u32,
    /// 0–255, or 128 + signal number.
    #[n(2)]
    pub(crate) status: u32,
    /// Unix time in nanoseconds, taken when the exit was seen.
    #[n(3)]
    pub(crate) at_nanos: i64,
}

/// An operation that the keeper performs for the worker, once.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Op {
    /// Starts a process and reports its end (or its readiness). → `Exited`, `Ready` or `Failed`.
    #[n(0)]
    Spawn(#[n(0)] Spawn),
    /// Signals a claimed process through its pidfd. → `Done`, or `Failed` with ESRCH once it has exited or was never claimed.
    #[n(1)]
    Signal {
        #[n(0)]
        key: String,
        #[n(1)]
        signal: i32,
    },
    /// Does nothing; its outcome shows whether it was requested before. → `Done` the first time in all generations, `Failed` with EALREADY
    /// after.
    #[n(2)]
    Once,
    /// Makes the pipes of a process and connects the client's fifos. → `Done` or `Failed`.
    #[n(3)]
    OpenStdio(#[n(0)] Stdio),
    /// The client will write no more to stdin: the content of the fifo is still delivered, then the process reads EOF. → `Done`.
    #[n(4)]
    CloseStdin {
        #[n(0)]
        key: String,
    },
    /// Sets the size of a process's terminal. → `Done`, or `Failed` with ENOTTY if it has none (yet).
    #[n(5)]
    Resize {
        #[n(0)]
        key: String,
        #[n(1)]
        rows: u16,
        #[n(2)]
        columns: u16,
    },
    /// Writes the body of a container's journal (see `journal`), creating the file. → `Done` or `Failed`.
    #[n(6)]
    WriteJournal {
        #[n(0)]
        path: String,
        #[cbor(n(1), with = "part")]
        body: Vec<u8>,
    },
    /// Hands the worker a copy of the read end of an output opened as [`Output::Pipe`]. Not stored: each request returns a new copy.
    /// → `Descriptor`, or `Failed` with ENOENT.
    #[n(7)]
    ReadEnd {
        #[n(0)]
        key: String,
        #[n(1)]
        stream: Stream,
    },
    /// Kills the helpers that work for a process, or for a container and its execs. → `Done`; their own operations end as killed.
    #[n(8)]
    EndHelpers {
        #[n(0)]
        key: String,
    },
    /// Waits, 10 s at most, until the output of a process is read and its last writer is gone, or there is no reader.
    /// → `Done`.
    #[n(9)]
    Drain {
        #[n(0)]
        key: String,
    },
    /// Performs a plan of the native engine in a fork of the keeper. → `Exited`, whose output is the report of the performer: none if it was
    /// killed. `Failed` if it cannot be forked, with ESRCH if the process that it needs has exited. Since version 2.
    #[n(10)]
    Perform(#[n(0)] Perform),
    /// Lets an init that a plan has made execute its program. → `Done`, or `Failed` with ESRCH if it does not wait for that (any more).
    /// Since version 2.
    #[n(11)]
    OpenGate {
        #[n(0)]
        key: String,
    },
    /// Has the keeper enter the namespaces of a pod, an encoded `x_engine::plan::Pod`. What it starts is in its own all the same. → `Done`, or
    /// `Failed`: then it is in its own. Since version 3.
    #[n(12)]
    EnterPod {
        #[cbor(n(0), with = "part")]
        plan: Vec<u8>,
    },
    /// Has the keeper return to its own namespaces. → `Done`. Since version 3.
    #[n(13)]
    LeavePod,
}

/// A plan to perform: see `x_engine::perform`.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Perform {
    /// The process that it makes, or whose hooks it runs. As [`Spawn::key`].
    #[n(0)]
    pub(crate) key: String,
    #[n(1)]
    pub(crate) kind: PlanKind,
    /// The encoded plan.
    #[cbor(n(2), with = "part")]
    pub(crate) plan: Vec<u8>,
    /// The key of the container's init: the process whose namespaces an exec joins, or whose start the hooks follow.
    #[n(3)]
    pub(crate) init: String,
    /// The process gets a terminal, which the keeper takes over, and not the streams of its key.
    #[n(4)]
    pub(crate) terminal: bool,
    /// The pid of the init that has started, for hooks that follow its start: it may have exited by now. Absent from a worker of an earlier version, whose hooks
    /// are not run then.
    #[n(5)]
    pub(crate) pid: Option<u32>,
}

/// What a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub(crate) enum PlanKind {
    /// Makes a container. Its init waits for [`Op::OpenGate`].
    #[n(0)]
    Create,
    /// Adds a process to a container.
    #[n(1)]
    Exec,
    /// Runs the hooks that follow a start.
    #[n(2)]
    Poststart,
    /// Runs the hooks that follow a deletion.
    #[n(3)]
    Poststop,
    /// Has criu save the processes of a container. Since version 3.
    #[n(4)]
    Checkpoint,
    /// Has criu make a container, which runs. Since version 3.
    #[n(5)]
    Restore,
    /// Makes a process that does nothing, for systemd to start a unit with.
    #[n(6)]
    Placeholder,
    /// Makes a process that holds the namespaces of a pod.
    #[n(7)]
    Holder,
}

impl PlanKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Exec => "exec",
            Self::Poststart => "poststart hooks",
            Self::Poststop => "poststop hooks",
            Self::Checkpoint => "checkpoint",
            Self::Restore => "restore",
            Self::Placeholder => "placeholder",
            Self::Holder => "holder",
        }
    }

    /// Whether it leaves a process behind whose pid its report names.
    pub(crate) fn makes_process(self) -> bool {
        matches!(self, Self::Create | Self::Exec | Self::Restore | Self::Placeholder | Self::Holder)
    }

    /// Whether that process waits at a gate.
    pub(crate) fn has_gate(self) -> bool {
        matches!(self, Self::Create | Self::Placeholder)
    }

    /// Whether that process has the streams of its key.
    pub(crate) fn has_streams(self) -> bool {
        matches!(self, Self::Create | Self::Exec | Self::Restore)
    }
}

/// A process to start. It gets exactly the descriptors named here, default signal dispositions, an empty mask, a process group of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Spawn {
    /// What it works for: a container, or `container/exec`. Shown by `ps`; helpers of a container end with it.
    #[n(0)]
    pub(crate) key: String,
    /// Absolute path first. An argument [`LOG_ARGUMENT`] is replaced by the path of a pipe whose content becomes [`Exited::log`].
    #[cbor(n(1), with = "part")]
    pub(crate) argv: Vec<Vec<u8>>,
    /// `NAME=value`; nothing is inherited.
    #[cbor(n(2), with = "part")]
    pub(crate) env: Vec<Vec<u8>>,
    /// Working directory.
    #[n(3)]
    pub(crate) cwd: String,
    /// Descriptors from 0 upwards.
    #[n(4)]
    pub(crate) fds: Vec<Fd>,
    /// The process will leave a child behind and write its pid to a file: unclaimed children stay unreaped until the commit
    /// that ends this cause.
    #[n(5)]
    pub(crate) reports_pid: bool,
    /// Where the process will deliver a terminal for `key` (`--console-socket`). The keeper listens there and takes over the terminal.
    #[n(6)]
    pub(crate) console_socket: Option<String>,
}

/// See [`Spawn::argv`].
pub(crate) const LOG_ARGUMENT: &[u8] = b"@log@";

/// The longest [`Exited::log`] and [`Exited::output`], in bytes; of a longer one, the end is kept.
pub(crate) const MAX_OUTPUT_BYTES: usize = 256 << 10;

/// Where a descriptor of a new process comes from.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Fd {
    /// `/dev/null`.
    #[n(0)]
    Null,
    /// The process's side of a stream opened by [`Op::OpenStdio`] under this key; `/dev/null` where that stream is none.
    /// The keeper closes its own copy once the process was started.
    #[n(1)]
    Process(#[n(0)] String, #[n(1)] Stream),
    /// The read end of an output opened as [`Output::Pipe`]: for a logger.
    #[n(2)]
    ReadEnd(#[n(0)] String, #[n(1)] Stream),
    /// Collected into [`Exited::output`].
    #[n(3)]
    Output,
    /// The write end of a pipe: a byte or its closing makes the outcome [`Outcome::Ready`].
    #[n(4)]
    Ready,
}

/// The three streams of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(index_only)]
pub(crate) enum Stream {
    #[n(0)]
    Stdin,
    #[n(1)]
    Stdout,
    #[n(2)]
    Stderr,
}

/// The streams of a process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Stdio {
    #[n(0)]
    pub(crate) key: String,
    /// The client's fifo, if there is one.
    #[n(1)]
    pub(crate) stdin: Option<String>,
    #[n(2)]
    pub(crate) stdout: Output,
    #[n(3)]
    pub(crate) stderr: Output,
    /// Streams go through a terminal that a [`Spawn::console_socket`] will deliver; no pipes are made.
    #[n(4)]
    pub(crate) terminal: bool,
    /// Owner of the pipes.
    #[n(5)]
    pub(crate) uid: u32,
    #[n(6)]
    pub(crate) gid: u32,
    /// Bytes to keep in a file beside [`Stdio::key`]'s journal while no reader takes them; 0 for none. See `docs/stdio.md`.
    #[n(7)]
    pub(crate) spill_bytes: u64,
    /// Folder for the spill file.
    #[n(8)]
    pub(crate) spill_folder: String,
}

/// Where an output goes.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Output {
    /// `/dev/null`.
    #[n(0)]
    None,
    /// A client's fifo, spliced by the keeper.
    #[n(1)]
    Fifo(#[n(0)] String),
    /// A pipe that the keeper only holds: a logger or the worker reads it.
    #[n(2)]
    Pipe,
}

/// The outcome of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Outcome {
    #[n(0)]
    Done,
    /// A system call failed. `what`: the attempted action and its object.
    #[n(1)]
    Failed {
        #[n(0)]
        errno: i32,
        #[n(1)]
        what: String,
    },
    #[n(2)]
    Exited(#[n(0)] Exited),
    /// A [`Fd::Ready`] pipe was written to (`byte`) or closed; the process keeps running.
    #[n(3)]
    Ready {
        #[n(0)]
        byte: bool,
    },
    /// The descriptor attached to this message.
    #[n(4)]
    Descriptor,
}

impl Outcome {
    /// `what`: the attempted action and its object.
    pub(crate) fn failed(error: &io::Error, what: String) -> Self {
        Self::Failed { errno: error.raw_os_error().unwrap_or(Errno::EINVAL as i32), what }
    }
}

/// The end of a spawned process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Exited {
    /// 0–255, or 128 + signal number.
    #[n(0)]
    pub(crate) status: u32,
    /// What it wrote to [`LOG_ARGUMENT`].
    #[cbor(n(1), with = "part")]
    pub(crate) log: Vec<u8>,
    /// What it wrote to [`Fd::Output`].
    #[cbor(n(2), with = "part")]
    pub(crate) output: Vec<u8>,
    /// A terminal arrived on [`Spawn::console_socket`].
    #[n(3)]
    pub(crate) terminal: bool,
}

/// From worker to keeper.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum ToKeeper {
    /// The first message. `versions`: the message versions of this worker.
    #[n(0)]
    Hello {
        #[n(0)]
        versions: Versions,
        #[n(1)]
        build: String,
    },
    #[n(1)]
    Operation {
        #[n(0)]
        cause: Cause,
        #[n(1)]
        step: Step,
        #[n(2)]
        op: Op,
    },
    #[n(2)]
    Commit(#[n(0)] Commit),
    /// Whether this worker, or this rehearsal of the keeper, can take over with the state that it was sent, or why not.
    #[n(3)]
    Fit {
        #[n(0)]
        refusal: Option<String>,
    },
    /// The answer to a Ping.
    #[n(4)]
    Pong {
        #[n(0)]
        number: u32,
    },
    /// The attached descriptor becomes readable when a worker is needed again.
    #[n(5)]
    Watch,
    /// Whether this worker may hibernate.
    #[n(6)]
    Hibernate {
        #[n(0)]
        may: bool,
    },
}

/// The end of a step. Applied whole, in the order of the fields.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Commit {
    /// Entries of the state to set, or to remove: one for each container, its id the key, and one for each process that was added to it, with
    /// the process's key. Setting or removing one drops its ready answers.
    #[cbor(n(0), with = "part")]
    pub(crate) state: Vec<(String, Option<Vec<u8>>)>,
    /// Children to own: their exit becomes a cause.
    #[n(1)]
    pub(crate) claims: Vec<Claim>,
    /// Events to send, in this order, each a ttrpc `Request` message.
    #[cbor(n(2), with = "part")]
    pub(crate) events: Vec<Vec<u8>>,
    /// Answers, each a ttrpc `Response` message. Each ends its cause.
    #[cbor(n(3), with = "part")]
    pub(crate) answers: Vec<(Cause, Vec<u8>)>,
    /// Requests that wait for a key. Each ends as a cause; only its caller is kept.
    #[n(4)]
    pub(crate) parks: Vec<(Cause, String)>,
    /// Answers for all requests that wait for a key.
    #[cbor(n(5), with = "part")]
    pub(crate) wakes: Vec<(String, Vec<u8>)>,
    /// Exits that were handled.
    #[n(6)]
    pub(crate) ends: Vec<Cause>,
    /// Processes to forget: claim, streams (after their drain), helpers.
    #[n(7)]
    pub(crate) releases: Vec<String>,
    /// Answers that the keeper may give while no worker does.
    #[n(8)]
    pub(crate) ready: Vec<Ready>,
    /// Exit as soon as there is no state, no reservation and nothing left to write. Stays in force until state is set again.
    #[n(9)]
    pub(crate) leave: bool,
    /// Entries of the state that expire: key and seconds. One that is set again does not, unless it is named again. The keeper drops one that has
    /// expired, with its container or pod. Since version 3.
    #[n(10)]
    #[cbor(default)]
    pub(crate) expiring: Vec<(String, u32)>,
    /// With `leave`: how long the keeper stays for its clients to close their connections. Since version 3.
    #[n(11)]
    #[cbor(default)]
    pub(crate) linger_millis: u32,
}

/// A child that a runtime left behind.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Claim {
    #[n(0)]
    pub(crate) key: String,
    #[n(1)]
    pub(crate) pid: u32,
    /// Journal whose exit slot records its end.
    #[n(2)]
    pub(crate) journal: Option<String>,
}

/// A ready-made answer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Ready {
    /// The state entry that it depends on.
    #[n(0)]
    pub(crate) key: String,
    #[n(1)]
    pub(crate) service: String,
    #[n(2)]
    pub(crate) method: String,
    /// The request's payload, byte for byte.
    #[cbor(n(3), with = "part")]
    pub(crate) payload: Vec<u8>,
    /// A ttrpc `Response` message.
    #[cbor(n(4), with = "part")]
    pub(crate) answer: Vec<u8>,
    /// A worker has a better answer: this one is given only if none answers in time.
    #[n(5)]
    pub(crate) is_fallback: bool,
    /// What the request does: the process claimed under `key` gets this signal. The keeper sends it, and then gives the answer, only
    /// while no worker serves.
    #[n(6)]
    pub(crate) signal: Option<i32>,
}
