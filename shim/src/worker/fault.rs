//! Crashes of the worker at chosen messages, for the tests. Does nothing unless built with the feature `fault-injection`.
//!
//! `X_FAULT` names a folder. In it, the file named like the container or group that the shim was started for holds the
//! plan: items `DIRECTION:N:WHEN`, the first for the first worker generation, the second for the second, and so on. A worker kills itself
//! at the N-th message, counted from 1, that it sends (`out`, the first is Hello) or receives (`in`): `before` it, with half of it
//! written or read (`torn`), or `after` it. With `:keeper` at its end, an item kills the keeper first. Generations without an item, or without a plan, do not
//! crash.
//!
//! `PLAN.trace` beside the plan gets a line per generation (`life`), per message that was sent or received whole (`out commit`), and per
//! crash (`dies`).
#[cfg(feature = "fault-injection")]
pub(crate) use active::Faults;
#[cfg(not(feature = "fault-injection"))]
pub(crate) use inert::Faults;

#[cfg(not(feature = "fault-injection"))]
mod inert {
    use std::cell::RefCell;
    use std::collections::VecDeque;
    use std::os::fd::OwnedFd;

    use crate::handover::ToWorker;

    /// No faults.
    #[derive(Debug)]
    pub(crate) struct Faults;

    impl Faults {
        pub(crate) fn from_environment(_id: &str) -> Self {
            Self
        }
        pub(crate) fn sending(&self, _socket: &OwnedFd, _queue: &RefCell<VecDeque<u8>>, _frame: &[u8]) {}
        pub(crate) fn sent(&self, _socket: &OwnedFd, _queue: &RefCell<VecDeque<u8>>) {}
        pub(crate) fn received(&self, _message: &ToWorker) {}
        pub(crate) fn acted(&self) {}
        pub(crate) fn limit_read(&self, _buffer: &[u8], _missing: usize) -> Option<usize> {
            None
        }
        pub(crate) fn read(&self, _buffer: &[u8]) {}
    }
}

#[cfg(feature = "fault-injection")]
mod active {
    use std::cell::{Cell, RefCell};
    use std::collections::VecDeque;
    use std::fs::{self, File};
    use std::io::Write;
    use std::os::fd::{AsFd, AsRawFd, OwnedFd};
    use std::path::{Path, PathBuf};

    use nix::errno::Errno;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::signal::{Signal, kill, raise};
    use nix::sys::socket::{MsgFlags, send};
    use nix::unistd::getppid;

    use crate::handover::{ToKeeper, ToWorker};

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Direction {
        In,
        Out,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum When {
        Before,
        Torn,
        After,
    }

    #[derive(Debug, Clone, Copy)]
    struct Fault {
        direction: Direction,
        at: u32,
        when: When,
        /// The keeper is killed first.
        with_keeper: bool,
    }

    /// Where this worker crashes, and its progress.
    #[derive(Debug, Default)]
    pub(crate) struct Faults {
        trace: Option<File>,
        fault: Option<Fault>,
        sent: Cell<u32>,
        received: Cell<u32>,
    }

    impl Faults {
        /// Reads the plan for the shim that was started for `id`, and counts this generation.
        pub(crate) fn from_environment(id: &str) -> Self {
            std::env::var_os("X_FAULT").and_then(|folder| Self::read_plan(&PathBuf::from(folder).join(id))).unwrap_or_default()
        }

        fn read_plan(path: &Path) -> Option<Self> {
            let plan = fs::read_to_string(path).ok()?;
            let trace_path = path.with_extension("trace");
            let earlier = fs::read_to_string(&trace_path).unwrap_or_default();
            let life = earlier.lines().filter(|line| *line == "life").count();
            let trace = File::options().append(true).create(true).open(trace_path).ok()?;
            let fault = plan.split_whitespace().nth(life).map(|item| parse(item).expect("a plan is made of DIRECTION:N:WHEN"));
            let faults = Self { trace: Some(trace), fault, ..Self::default() };
            faults.note("life");
            Some(faults)
        }

        /// In one write, so that no line is torn.
        fn note(&self, line: &str) {
            if let Some(mut trace) = self.trace.as_ref() {
                trace.write_all(format!("{line}\n").as_bytes()).expect("a trace can be written");
            }
        }

        fn is_now(&self, direction: Direction, count: u32) -> Option<When> {
            self.fault.filter(|fault| fault.direction == direction && fault.at == count).map(|fault| fault.when)
        }

        /// A message is about to leave.
        pub(crate) fn sending(&self, socket: &OwnedFd, queue: &RefCell<VecDeque<u8>>, frame: &[u8]) {
            self.sent.set(self.sent.get() + 1);
            let half = match self.is_now(Direction::Out, self.sent.get()) {
                Some(When::Before) => 0,
                Some(When::Torn) => frame.len() / 2,
                Some(When::After) | None => {
                    self.note(&format!("out {}", outgoing(frame)));
                    return;
                }
            };
            let mut queue = queue.borrow_mut();
            queue.extend(&frame[..half]);
            flush(socket, &mut queue);
            self.die();
        }

        /// A message has left, or is queued.
        pub(crate) fn sent(&self, socket: &OwnedFd, queue: &RefCell<VecDeque<u8>>) {
            if self.is_now(Direction::Out, self.sent.get()) == Some(When::After) {
                flush(socket, &mut queue.borrow_mut());
                self.die();
            }
        }

        /// A whole message has arrived and is not handled yet.
        pub(crate) fn received(&self, message: &ToWorker) {
            self.received.set(self.received.get() + 1);
            if self.is_now(Direction::In, self.received.get()) == Some(When::Before) {
                self.die();
            }
            self.note(&format!("in {}", incoming(message)));
        }

        /// The message was handled up to the first wait.
        pub(crate) fn acted(&self) {
            if self.is_now(Direction::In, self.received.get()) == Some(When::After) {
                self.die();
            }
        }

        /// Reads message by message, and half of the one to be torn.
        pub(crate) fn limit_read(&self, buffer: &[u8], missing: usize) -> Option<usize> {
            self.fault?;
            let torn = self.is_now(Direction::In, self.received.get() + 1) == Some(When::Torn);
            Some(if torn && buffer.len() >= 4 { (missing / 2).max(1) } else { missing })
        }

        /// A part of a message has been read.
        pub(crate) fn read(&self, buffer: &[u8]) {
            if buffer.len() > 4 && self.is_now(Direction::In, self.received.get() + 1) == Some(When::Torn) {
                self.die();
            }
        }

        fn die(&self) -> ! {
            self.note("dies");
            if self.fault.is_some_and(|fault| fault.with_keeper) {
                // The worker ends too, as after any other death of its keeper.
                kill(getppid(), Signal::SIGKILL).expect("a worker may signal its keeper");
            }
            // A failure of raise(3) leaves the loop.
            while raise(Signal::SIGKILL).is_ok() {}
            std::process::abort()
        }
    }

    fn parse(item: &str) -> Option<Fault> {
        let mut parts = item.split(':');
        let direction = match parts.next()? {
            "in" => Direction::In,
            "out" => Direction::Out,
            _ => return None,
        };
        let at = parts.next()?.parse().ok()?;
        let when = match parts.next()? {
            "before" => When::Before,
            "torn" => When::Torn,
            "after" => When::After,
            _ => return None,
        };
        let with_keeper = match parts.next() {
            None => false,
            Some("keeper") => true,
            Some(_) => return None,
        };
        Some(Fault { direction, at, when, with_keeper })
    }

    fn outgoing(frame: &[u8]) -> String {
        match ToKeeper::decode(frame.get(4..).unwrap_or_default()) {
            Ok(ToKeeper::Hello { .. }) => "hello".into(),
            Ok(ToKeeper::Operation { cause, step, .. }) => format!("operation {cause}.{step}"),
            Ok(ToKeeper::Commit(commit)) => {
                let parks = commit.parks.iter().map(|(cause, _)| *cause);
                let causes: Vec<_> = commit.answers.iter().map(|(cause, _)| *cause).chain(commit.ends).chain(parks).collect();
                format!("commit {causes:?}")
            }
            Ok(ToKeeper::Fit { .. }) => "fit".into(),
            Ok(ToKeeper::Pong { .. }) => "pong".into(),
            Ok(ToKeeper::Watch | ToKeeper::Hibernate { .. }) => "rest".into(),
            Err(error) => format!("nonsense: {error}"),
        }
    }

    fn incoming(message: &ToWorker) -> String {
        match message {
            ToWorker::Welcome { .. } => "welcome".into(),
            ToWorker::State { key, .. } => format!("state {key}"),
            ToWorker::Request { cause, payload, .. } => {
                let method = crate::frame::RequestView::parse(payload).map(|view| String::from_utf8_lossy(view.method).into_owned());
                format!("request {cause} {}", method.unwrap_or_default())
            }
            ToWorker::Exit { cause, exit } => format!("exit {cause} {}", exit.key),
            ToWorker::CaughtUp => "caught-up".into(),
            ToWorker::Done { cause, step, .. } => format!("done {cause}.{step}"),
            ToWorker::Try { key, .. } => format!("try {key}"),
            ToWorker::Tried => "tried".into(),
            ToWorker::Ping { .. } => "ping".into(),
            ToWorker::MayHibernate => "may-rest".into(),
        }
    }

    fn flush(socket: &OwnedFd, queue: &mut VecDeque<u8>) {
        while !queue.is_empty() {
            match send(socket.as_raw_fd(), queue.as_slices().0, MsgFlags::MSG_NOSIGNAL) {
                Ok(count) => drop(queue.drain(..count)),
                Err(Errno::EAGAIN) => {
                    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
                    if poll(&mut fds, PollTimeout::NONE).is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }
}
