//! The worker: its lives and the link to the one that lives.
//!
//! ```text
//!  Absent ──(start)──▶ Starting ──(hello)──▶ Serving ──(dies, or breaks the format)──▶ Absent ──(back-off)──▶ …
//! ```
//!
//! **Invariant:** a life that got nothing done makes the next one wait longer; one that committed anything does not.
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use log::{info, warn};

use super::capture::Capture;
use super::inbox::{Read, read_some};
use super::outbox::Outbox;
use super::poll::{Poll, Source};
use crate::handover::{MAX_MESSAGE_BYTES, ToKeeper, ToWorker, VERSION};
use crate::settings::Settings;
use crate::sys;

/// A worker that has not said hello by then is killed.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// So many lives in a row may achieve nothing before the next one has to wait.
const FREE_RETRIES: u32 = 3;
const FIRST_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Life {
    pid: u32,
    link: UnixStream,
    input: Vec<u8>,
    output: Outbox,
    /// What it said it is; `None` until its hello.
    build: Option<String>,
    born: Instant,
    failure: Capture,
    /// It was killed by us: nothing that it says counts any more.
    condemned: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Supervisor {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    /// Our own executable, held open: it may be replaced or removed under us.
    executable: OwnedFd,
    life: Option<Life>,
    pub(crate) lives: u32,
    fruitless: u32,
    retry_at: Option<Instant>,
}

impl Supervisor {
    pub(crate) fn new(settings: &Settings) -> io::Result<Self> {
        let executable: OwnedFd = std::fs::File::open("/proc/self/exe")?.into();
        let text = |text: String| CString::new(text).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
        let name = std::env::args().next().unwrap_or_else(|| "containerd-shim-x-v2".into());
        let arguments = std::iter::once(name).chain(settings.to_arguments()).chain(["worker".into()]);
        let environment = std::env::vars().map(|(name, value)| format!("{name}={value}"));
        Ok(Self {
            // Resolved by the child, whose descriptors are still a copy of ours then.
            program: text(format!("/proc/self/fd/{}", executable.as_raw_fd()))?,
            arguments: arguments.map(text).collect::<Result<_, _>>()?,
            environment: environment.map(text).collect::<Result<_, _>>()?,
            executable,
            life: None,
            lives: 0,
            fruitless: 0,
            retry_at: None,
        })
    }

    /// Starts a worker if there is none and its time has come.
    pub(crate) fn ensure(&mut self, now: Instant, poll: &Poll) {
        if let Some(life) = &self.life {
            if life.build.is_none() && !life.condemned && now >= life.born + HELLO_WITHIN {
                warn!(pid = life.pid; "the worker has not said hello, killing it");
                self.kill();
            }
            return;
        }
        if self.retry_at.is_some_and(|at| at > now) {
            return;
        }
        self.lives += 1;
        if let Err(error) = self.start(now, poll) {
            warn!(error:%; "cannot start a worker, will retry");
            self.failed(now);
        }
    }

    fn start(&mut self, now: Instant, poll: &Poll) -> io::Result<()> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let null: OwnedFd = std::fs::File::options().read(true).write(true).open("/dev/null")?.into();
        let command = sys::spawn::Command {
            program: self.program.clone(),
            argv: self.arguments.clone(),
            env: self.environment.clone(),
            cwd: c"/".into(),
            descriptors: vec![null.as_fd(), null.as_fd(), null.as_fd(), theirs.as_fd()],
            dies_with_parent: true,
        };
        let started = sys::spawn::spawn(&command)?;
        poll.add(&ours, Source::Worker(self.lives))?;
        self.life = Some(Life {
            pid: started.pid,
            link: ours,
            input: Vec::new(),
            output: Outbox::default(),
            build: None,
            born: now,
            failure: Capture::from_pipe(started.failure),
            condemned: false,
        });
        Ok(())
    }

    fn failed(&mut self, now: Instant) {
        self.fruitless += 1;
        let doublings = self.fruitless.saturating_sub(FREE_RETRIES).min(16);
        let wait = if doublings == 0 { Duration::ZERO } else { (FIRST_BACKOFF * (1 << (doublings - 1))).min(MAX_BACKOFF) };
        self.retry_at = Some(now + wait);
    }

    /// Kills the worker; its death is seen like any other. What it has said and we have not read is as if it had died before.
    pub(crate) fn kill(&mut self) {
        if let Some(life) = &mut self.life {
            life.condemned = true;
            // It is our child and not reaped: the number is its own.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(life.pid as i32), nix::sys::signal::Signal::SIGKILL);
        }
    }

    /// A child has ended. Returns whether it was the worker.
    pub(crate) fn ended(&mut self, pid: u32, now: Instant) -> bool {
        if self.life.as_ref().is_none_or(|life| life.pid != pid) {
            return false;
        }
        if let Some(life) = self.life.take() {
            let failure = life.failure.finish();
            match failure.first_chunk() {
                Some(errno) => {
                    let error = io::Error::from_raw_os_error(i32::from_ne_bytes(*errno));
                    warn!(error:%, executable = self.executable.as_raw_fd(); "cannot execute a worker");
                }
                None => info!(pid, life = self.lives; "the worker has ended, starting the next one"),
            }
        }
        self.failed(now);
        true
    }

    /// Something was committed: the worker is of use.
    pub(crate) fn committed(&mut self) {
        self.fruitless = 0;
    }

    /// The worker has said hello. Returns whether it may stay.
    pub(crate) fn hello(&mut self, version: u16, build: String) -> bool {
        let Some(life) = &mut self.life else { return false };
        if version != VERSION {
            warn!(version, expected = VERSION; "the worker speaks another version, killing it");
            return false;
        }
        life.build = Some(build);
        let welcome = ToWorker::Welcome { version: VERSION, keeper_pid: std::process::id(), life: self.lives };
        life.output.push(welcome.encode(), None);
        true
    }

    /// Whether there is a worker that has been told everything.
    pub(crate) fn is_serving(&self) -> bool {
        self.life.as_ref().is_some_and(|life| life.build.is_some() && !life.condemned)
    }

    /// Whether one life after the other gets nothing done.
    pub(crate) fn is_hopeless(&self) -> bool {
        self.fruitless > FREE_RETRIES
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.life.as_ref().map(|life| life.pid)
    }

    pub(crate) fn build(&self) -> Option<&str> {
        self.life.as_ref()?.build.as_deref()
    }

    /// Queues a message, if there is somebody to read it; a later life is told by the replay.
    pub(crate) fn send(&mut self, message: &ToWorker, descriptor: Option<OwnedFd>) {
        if let Some(life) = self.life.as_mut().filter(|life| life.build.is_some()) {
            life.output.push(message.encode(), descriptor);
        }
    }

    /// Writes what can be written. A worker that is gone is noticed by its end.
    pub(crate) fn flush(&mut self) {
        if let Some(life) = &mut self.life {
            let _ = life.output.flush(&life.link);
        }
    }

    /// Bytes that the worker has not taken yet.
    pub(crate) fn backlog_bytes(&self) -> usize {
        self.life.as_ref().map_or(0, |life| life.output.bytes())
    }

    /// Reads whole messages. A worker that breaks the format is killed: what it meant cannot be known.
    pub(crate) fn receive(&mut self, id: u32, poll: &mut Poll) -> Vec<ToKeeper> {
        let mut messages = Vec::new();
        if id != self.lives {
            return messages;
        }
        let Some(life) = self.life.as_mut().filter(|life| !life.condemned) else { return messages };
        loop {
            let read = read_some(&life.link, &mut life.input);
            match take_messages(&mut life.input, &mut messages) {
                // Of what has ended the rest is torn; the process's end follows.
                Ok(()) if !matches!(read, Ok(Read::Some)) => return messages,
                Ok(()) if messages.len() < 64 => {}
                Ok(()) => {
                    poll.again(Source::Worker(id));
                    return messages;
                }
                Err(error) => {
                    warn!(pid = life.pid, error:%; "the worker breaks the format, killing it");
                    self.kill();
                    return messages;
                }
            }
        }
    }

    /// When [`Supervisor::ensure`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.life {
            Some(life) if life.build.is_none() && !life.condemned => Some(life.born + HELLO_WITHIN),
            Some(_) => None,
            None => self.retry_at,
        }
    }
}

fn take_messages(input: &mut Vec<u8>, messages: &mut Vec<ToKeeper>) -> Result<(), crate::handover::Malformed> {
    let mut at = 0;
    while let Some((length, rest)) = input[at..].split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_MESSAGE_BYTES {
            return Err(crate::handover::Malformed { what: "a message of bounded length" });
        }
        let Some(message) = rest.get(..length) else { break };
        messages.push(ToKeeper::decode(message)?);
        at += 4 + length;
    }
    input.drain(..at);
    if input.is_empty() {
        *input = Vec::new();
    }
    Ok(())
}
