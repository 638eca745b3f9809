//! One generation of the worker: its process, the link to it, and hang detection.
//!
//! ```text
//!  quiet ──(a message was sent, or a cause is open)──▶ owing ──(no response)──▶ pinged ──(no response)──▶ hangs: killed
//!    ▲                                                 │                          │
//!    └───────────── any message, or bytes read  ───────┴──────────────────────────┘
//! ```
//!
//! **Invariant:** the deadline is on the worker's messages, never on how long a request takes; an idle worker is not pinged.
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use log::warn;

use super::first_worker::FirstWorker;
use super::home::Home;
use super::outbox::Outbox;
use super::poll::{Poll, Source};
use crate::handover::{MAX_MESSAGE_BYTES, Malformed, ToKeeper, ToWorker, Versions};
use crate::inbox::{Inbox, Read};
use crate::saved::saved;
use crate::settings::Settings;
use crate::sys::{
    self,
    spawn::{Command, Failure, spawn},
};

/// A worker that has not sent Hello by then is killed.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// A worker that has not responded to a message by then is pinged.
const PING_AFTER: Duration = Duration::from_secs(1);
/// How often a worker with open causes is pinged.
const PING_EVERY: Duration = Duration::from_secs(5);
/// How long a worker that uses no processor time may take to answer a ping.
const PONG_WITHIN: Duration = Duration::from_secs(5);
/// The processor time that a worker may use until it answers. On an overloaded machine that is long.
const PONG_WITHIN_CPU: Duration = Duration::from_secs(2);
/// How often the processor time is checked after [`PONG_WITHIN`].
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The longest time to answer a ping in any case.
const PONG_AT_MOST: Duration = Duration::from_secs(60);

/// How long a killed worker may take to exit. A thread may be in uninterruptible sleep over a disk that hangs.
const ENDS_WITHIN: Duration = Duration::from_secs(3);

/// The most attached descriptors that wait for their messages.
const MAX_ATTACHED: usize = 4096;

/// The executable of workers, or of the keeper's next re-exec. Held open: its file may be replaced or removed.
#[derive(Debug)]
pub(crate) struct Executable {
    pub(crate) file: OwnedFd,
    /// Its path, for reports.
    pub(crate) path: String,
    /// The message versions of its workers, once one has sent Hello.
    pub(crate) versions: Option<Versions>,
    /// The build that its workers report.
    pub(crate) build: String,
}

saved!(Executable { file, path, versions, build });

impl Executable {
    /// The executable that this process runs.
    pub(crate) fn own() -> io::Result<Self> {
        let path = std::fs::read_link("/proc/self/exe").map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
        let build = crate::test_identity::build().to_owned();
        Ok(Self { file: File::open("/proc/self/exe")?.into(), path, versions: Some(crate::test_identity::versions()), build })
    }

    /// Whether both are the same file. An executable in use cannot be written to, so the content is the same too.
    pub(crate) fn is(&self, other: &Self) -> bool {
        let identity = |file: &OwnedFd| nix::sys::stat::fstat(file).ok().map(|stat| (stat.st_dev, stat.st_ino));
        identity(&self.file).is_some_and(|own| identity(&other.file) == Some(own))
    }
}

/// Why a worker exited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) fault: Fault,
    /// In words: `signal 11`.
    pub(crate) why: String,
}

/// What caused a worker to exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The keeper stopped it on purpose.
    Keeper,
    /// SIGKILL from outside: an operator or the OOM killer.
    Outside,
    /// Its own: it crashed, hung, broke the format, or could not be executed.
    Worker,
}

/// What a worker is started with, whichever it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Surroundings<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) home: &'a Home,
}

/// A ping that is unanswered.
#[derive(Debug, Clone, Copy)]
struct Ping {
    at: Instant,
    /// The processor time of the worker at that time.
    used: Duration,
    /// When to check next, and the processor time at the last check.
    look_at: Instant,
    used_then: Duration,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Generation {
    pub(crate) number: u32,
    pub(crate) pid: u32,
    /// The agreed message version, once it has sent Hello.
    pub(crate) version: Option<u16>,
    link: UnixStream,
    input: Inbox,
    output: Outbox,
    started_at: Instant,
    /// Absent for a worker that was forked and executes nothing.
    failure: Option<Failure>,
    /// The keeper killed it: why and when. Its messages are ignored from then on.
    killed: Option<(End, Instant)>,
    /// When it last sent a message, or when a message to it became unanswered.
    quiet_since: Instant,
    /// It was sent a message since its last one.
    owing: bool,
    ping: Option<Ping>,
    /// It was asked whether it may hibernate, and nothing has happened since.
    asked_to_hibernate: bool,
    /// Descriptors attached to messages that were read.
    attached: VecDeque<OwnedFd>,
}

impl Generation {
    /// Starts a child of `executable`, in the mode that `words` name. `attached`: its descriptor 4; 3 is the link.
    pub(crate) fn start(
        number: u32,
        Surroundings { settings, home }: Surroundings<'_>,
        words: &[&str],
        executable: &Executable,
        attached: Option<&OwnedFd>,
        now: Instant,
        poll: &Poll,
    ) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let descriptors: Vec<_> = [theirs.as_fd()].into_iter().chain(attached.map(AsFd::as_fd)).collect();
        let (argv, env) = (settings.command_line(words)?, sys::exec::environment());
        let command = Command::of_executable(executable.file.as_fd(), argv, env, &descriptors)?;
        let started = spawn(&Command { namespaces: home.namespaces(), ..command })?;
        Self::of(number, started.pid, ours, Some(started.failure), now, poll)
    }

    /// The generation of a worker that was [forked](super::first_worker).
    pub(crate) fn of_forked(number: u32, worker: FirstWorker, now: Instant, poll: &Poll) -> io::Result<Self> {
        worker.link.set_nonblocking(true)?;
        Self::of(number, worker.pid, worker.link, None, now, poll)
    }

    fn of(number: u32, pid: u32, link: UnixStream, failure: Option<Failure>, now: Instant, poll: &Poll) -> io::Result<Self> {
        poll.add(&link, Source::Worker(number))?;
        Ok(Self {
            number,
            pid,
            version: None,
            link,
            input: Inbox::default(),
            output: Outbox::default(),
            started_at: now,
            failure,
            killed: None,
            quiet_since: now,
            owing: false,
            ping: None,
            asked_to_hibernate: false,
            attached: VecDeque::new(),
        })
    }

    /// Kills it; its exit is handled like any other. Messages that were not read yet are ignored.
    pub(crate) fn kill(&mut self, fault: Fault, why: String) {
        if self.killed.is_none() {
            self.killed = Some((End { fault, why }, Instant::now()));
            // It is our child and not reaped: the number is its own.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid as i32), nix::sys::signal::Signal::SIGKILL);
        }
    }

    pub(crate) fn is_killed(&self) -> bool {
        self.killed.is_some()
    }

    /// Whether it was killed [`ENDS_WITHIN`] ago and has not exited.
    pub(crate) fn is_stuck(&self, now: Instant) -> bool {
        self.killed.as_ref().is_some_and(|(_, at)| now >= *at + ENDS_WITHIN)
    }

    /// Why it exited. `status` as in [`sys::process::Ended`].
    pub(crate) fn end(self, status: u32) -> End {
        if let Some(error) = self.failure.and_then(Failure::error) {
            return End { fault: Fault::Worker, why: format!("it cannot be executed: {error}") };
        }
        self.killed.map(|(end, _)| end).unwrap_or_else(|| match status {
            137 => End { fault: Fault::Outside, why: "signal 9".into() },
            129.. => End { fault: Fault::Worker, why: format!("signal {}", status - 128) },
            _ => End { fault: Fault::Worker, why: format!("exit status {status}") },
        })
    }

    /// It sent Hello: agrees on a message version. Returns whether there is one. `executable`: the one that it runs.
    pub(crate) fn greet(&mut self, theirs: Versions, build: String, executable: &mut Executable) -> bool {
        if self.version.is_some() {
            return false;
        }
        // It runs: the pipe has nothing to report any more.
        self.failure = None;
        (executable.versions, executable.build) = (Some(theirs), build);
        let ours = crate::test_identity::versions();
        self.version = ours.agree(theirs);
        if self.version.is_none() {
            self.kill(Fault::Worker, format!("it speaks message version {theirs}, this keeper version {ours}"));
        }
        self.version.is_some()
    }

    /// Whether it was sent a message since its last one.
    pub(crate) fn is_owing(&self) -> bool {
        self.owing
    }

    /// Queues a message.
    pub(crate) fn send(&mut self, message: &ToWorker, descriptor: Option<OwnedFd>, now: Instant) {
        if self.killed.is_some() {
            return;
        }
        self.asked_to_hibernate = matches!(message, ToWorker::MayHibernate);
        if !self.owing {
            self.quiet_since = now;
            self.owing = true;
        }
        self.output.push(message.encode(), descriptor);
    }

    /// Writes what can be written. A worker that is gone is noticed by its exit.
    pub(crate) fn flush(&mut self, now: Instant) {
        let before = self.output.bytes();
        let _ = self.output.flush(&self.link);
        if self.output.bytes() < before && self.ping.is_none() {
            // A worker that reads does not hang; the next ping shows whether it also acts.
            self.quiet_since = now;
        }
    }

    /// Bytes that it has not read yet.
    pub(crate) fn backlog_bytes(&self) -> usize {
        self.output.bytes()
    }

    /// Reads whole messages. A worker that sends a malformed message is killed.
    pub(crate) fn receive(&mut self, now: Instant, poll: &mut Poll) -> Vec<ToKeeper> {
        let mut messages = Vec::new();
        while self.killed.is_none() {
            let read = self.input.receive(&self.link);
            let is_over = !matches!(&read, Ok((Read::Some, _)));
            if let Ok((_, attached)) = read {
                self.attached.extend(attached.filter(|_| self.attached.len() < MAX_ATTACHED));
            }
            match take_messages(&mut self.input, &mut messages) {
                // The link is closed and the rest torn; the exit follows.
                Ok(()) if is_over => break,
                Ok(()) if messages.len() < 64 => {}
                Ok(()) => {
                    poll.again(Source::Worker(self.number));
                    break;
                }
                Err(error) => self.kill(Fault::Worker, format!("it sent a malformed message: {error}")),
            }
        }
        if messages.iter().any(|message| matches!(message, ToKeeper::Commit(_))) {
            self.asked_to_hibernate = false;
        }
        if !messages.is_empty() {
            (self.quiet_since, self.owing, self.ping) = (now, false, None);
        }
        messages
    }

    /// The descriptor of the next message that has one.
    pub(crate) fn take_attached(&mut self) -> Option<OwnedFd> {
        self.attached.pop_front()
    }

    /// Pings the worker when that is due, kills one that does not respond, and asks an idle one whether it may hibernate.
    /// `is_busy`: a cause is open. `idle_after`: after how long without one; never if it is absent.
    pub(crate) fn check(&mut self, now: Instant, is_busy: bool, idle_after: Option<Duration>) {
        if self.killed.is_some() || self.deadline(is_busy, idle_after).is_none_or(|at| at > now) {
            return;
        }
        if self.version.is_none() {
            self.kill(Fault::Worker, format!("it sent no message within {HELLO_WITHIN:?}"));
        } else if let Some(ping) = &mut self.ping {
            let used = sys::process::cpu_time(self.pid);
            let has_run = used > ping.used_then;
            let is_out_of_time = used.saturating_sub(ping.used) >= PONG_WITHIN_CPU || now >= ping.at + PONG_AT_MOST;
            if has_run && !is_out_of_time {
                // It did not have a processor for itself.
                (ping.look_at, ping.used_then) = (now + LOOK_AGAIN, used);
                return;
            }
            let within = now.saturating_duration_since(ping.at).as_secs();
            warn!(pid = self.pid, generation = self.number, within; "the worker hangs, killing it");
            self.kill(Fault::Worker, format!("it did not respond within {within} s"));
        } else if !self.owing && !is_busy {
            self.send(&ToWorker::MayHibernate, None, now);
        } else {
            let used = sys::process::cpu_time(self.pid);
            self.ping = Some(Ping { at: now, used, look_at: now + PONG_WITHIN, used_then: used });
            self.send(&ToWorker::Ping { number: 0 }, None, now);
        }
    }

    /// When [`Generation::check`] has something to do.
    pub(crate) fn deadline(&self, is_busy: bool, idle_after: Option<Duration>) -> Option<Instant> {
        if let Some((_, at)) = &self.killed {
            return Some(*at + ENDS_WITHIN);
        }
        if self.version.is_none() {
            return Some(self.started_at + HELLO_WITHIN);
        }
        match self.ping {
            Some(ping) => Some(ping.look_at),
            None if self.owing => Some(self.quiet_since + PING_AFTER),
            None if is_busy => Some(self.quiet_since + PING_EVERY),
            None => idle_after.filter(|_| !self.asked_to_hibernate).map(|idle_after| self.quiet_since + idle_after),
        }
    }
}

fn take_messages(input: &mut Inbox, messages: &mut Vec<ToKeeper>) -> Result<(), Malformed> {
    while let Some(message) = input.message(MAX_MESSAGE_BYTES, ToKeeper::decode)? {
        messages.push(message);
    }
    Ok(())
}
