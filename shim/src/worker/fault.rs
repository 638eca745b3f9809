//! Deaths of the worker at chosen messages, for the tests. Does nothing unless built with the feature `fault-injection`.
//!
//! `X_FAULT=LIVES:DIRECTION:N:WHEN` makes the first LIVES workers of a keeper kill themselves at their N-th message, counted from 1,
//! that they send (`out`, the first is the hello) or receive (`in`), `before` it, with half of it written or read (`torn`), or
//! `after` it. Lives are counted in a file beside the control socket, since the hello is sent before the keeper has told the life.
#[cfg(feature = "fault-injection")]
pub(crate) use active::Faults;
#[cfg(not(feature = "fault-injection"))]
pub(crate) use inert::Faults;

/// Which messages are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    In,
    #[cfg_attr(not(feature = "fault-injection"), expect(dead_code, reason = "sending is looked at by the active kind only"))]
    Out,
}

#[cfg(not(feature = "fault-injection"))]
mod inert {
    use std::cell::RefCell;
    use std::os::fd::OwnedFd;
    use std::path::Path;

    use super::Direction;

    /// No faults.
    #[derive(Debug)]
    pub(crate) struct Faults;

    impl Faults {
        pub(crate) fn from_environment(_control_path: &Path) -> Self {
            Self
        }
        pub(crate) fn around_send(&self, _socket: &OwnedFd, _queue: &RefCell<Vec<u8>>, _frame: &[u8]) {}
        pub(crate) fn after_send(&self, _socket: &OwnedFd, _queue: &RefCell<Vec<u8>>) {}
        pub(crate) fn before(&self, _direction: Direction) {}
        pub(crate) fn after(&self, _direction: Direction) {}
        pub(crate) fn limit_read(&self, _buffer: &[u8], _missing: usize) -> Option<usize> {
            None
        }
        pub(crate) fn after_read(&self, _buffer: &[u8]) {}
    }
}

#[cfg(feature = "fault-injection")]
mod active {
    use std::cell::{Cell, RefCell};
    use std::fs;
    use std::os::fd::{AsFd, OwnedFd};
    use std::path::Path;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::signal::{Signal, raise};

    use super::Direction;
    use crate::worker::link::write;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum When {
        Before,
        Torn,
        After,
    }

    #[derive(Debug, Clone, Copy)]
    struct Plan {
        direction: Direction,
        at: u32,
        when: When,
    }

    /// Where this life ends, and how far it has come.
    #[derive(Debug, Default)]
    pub(crate) struct Faults {
        plan: Option<Plan>,
        sent: Cell<u32>,
        received: Cell<u32>,
    }

    impl Faults {
        /// Reads the plan and counts this life.
        pub(crate) fn from_environment(control_path: &Path) -> Self {
            let Some((lives, plan)) = std::env::var("X_FAULT").ok().and_then(|text| parse(&text)) else { return Self::default() };
            let counter = control_path.with_extension("lives");
            let life = fs::read_to_string(&counter).ok().and_then(|text| text.trim().parse::<u32>().ok()).unwrap_or(0) + 1;
            let counted = fs::write(&counter, life.to_string()).is_ok();
            Self { plan: (counted && life <= lives).then_some(plan), ..Self::default() }
        }

        fn is_now(&self, direction: Direction, count: u32) -> Option<When> {
            self.plan.filter(|plan| plan.direction == direction && plan.at == count).map(|plan| plan.when)
        }

        pub(crate) fn around_send(&self, socket: &OwnedFd, queue: &RefCell<Vec<u8>>, frame: &[u8]) {
            self.sent.set(self.sent.get() + 1);
            match self.is_now(Direction::Out, self.sent.get()) {
                Some(When::Before) => {
                    flush(socket, &mut queue.borrow_mut());
                    die();
                }
                Some(When::Torn) => {
                    let mut queue = queue.borrow_mut();
                    queue.extend_from_slice(&frame[..frame.len() / 2]);
                    flush(socket, &mut queue);
                    die();
                }
                Some(When::After) | None => {}
            }
        }

        pub(crate) fn after_send(&self, socket: &OwnedFd, queue: &RefCell<Vec<u8>>) {
            if self.is_now(Direction::Out, self.sent.get()) == Some(When::After) {
                flush(socket, &mut queue.borrow_mut());
                die();
            }
        }

        /// A whole message has come and nobody has acted on it.
        pub(crate) fn before(&self, direction: Direction) {
            if direction == Direction::In {
                self.received.set(self.received.get() + 1);
                if self.is_now(Direction::In, self.received.get()) == Some(When::Before) {
                    die();
                }
            }
        }

        /// The message was acted on, as far as that went without waiting.
        pub(crate) fn after(&self, direction: Direction) {
            if direction == Direction::In && self.is_now(Direction::In, self.received.get()) == Some(When::After) {
                die();
            }
        }

        /// Reads message by message, and half of the one that shall be torn.
        pub(crate) fn limit_read(&self, buffer: &[u8], missing: usize) -> Option<usize> {
            self.plan?;
            let torn = self.is_now(Direction::In, self.received.get() + 1) == Some(When::Torn);
            Some(if torn && buffer.len() >= 4 { (missing / 2).max(1) } else { missing })
        }

        pub(crate) fn after_read(&self, buffer: &[u8]) {
            if buffer.len() > 4 && self.is_now(Direction::In, self.received.get() + 1) == Some(When::Torn) {
                die();
            }
        }
    }

    fn parse(text: &str) -> Option<(u32, Plan)> {
        let mut parts = text.split(':');
        let lives = parts.next()?.parse().ok()?;
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
        Some((lives, Plan { direction, at, when }))
    }

    fn flush(socket: &OwnedFd, queue: &mut Vec<u8>) {
        while !queue.is_empty() {
            match write(socket, queue) {
                Ok(count) => drop(queue.drain(..count)),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
                    if poll(&mut fds, PollTimeout::NONE).is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }

    fn die() -> ! {
        // A failure of raise(3) leaves the loop.
        while raise(Signal::SIGKILL).is_ok() {}
        std::process::abort()
    }
}
