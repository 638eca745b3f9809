//! The set of descriptors that the keeper waits on.
use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::stat::SFlag;

/// What woke the keeper: a class and an id within it. An event of a source that is gone is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Signals,
    Listener,
    ControlListener,
    Publisher,
    Fifos,
    /// The socketpair to a worker, by its number.
    Worker(u32),
    Client(u32),
    ControlClient(u32),
    /// A pipe of a helper, by its pid.
    Helper(u32),
    /// A stream, by its number.
    Stream(u32),
    /// A descriptor that a hibernating worker left to be watched.
    Watch,
    /// A claimed process that is not our child, by its pid.
    Foreign(u32),
}

impl Source {
    fn token(self) -> u64 {
        let (class, id) = match self {
            Self::Signals => (0, 0),
            Self::Listener => (1, 0),
            Self::ControlListener => (2, 0),
            Self::Publisher => (3, 0),
            Self::Fifos => (4, 0),
            Self::Worker(id) => (5, id),
            Self::Client(id) => (6, id),
            Self::ControlClient(id) => (7, id),
            Self::Helper(id) => (8, id),
            Self::Stream(id) => (9, id),
            Self::Foreign(id) => (10, id),
            Self::Watch => (11, 0),
        };
        u64::from(id) | class << 32
    }

    fn from_token(token: u64) -> Option<Self> {
        let id = token as u32;
        Some(match token >> 32 {
            0 => Self::Signals,
            1 => Self::Listener,
            2 => Self::ControlListener,
            3 => Self::Publisher,
            4 => Self::Fifos,
            5 => Self::Worker(id),
            6 => Self::Client(id),
            7 => Self::ControlClient(id),
            8 => Self::Helper(id),
            9 => Self::Stream(id),
            10 => Self::Foreign(id),
            11 => Self::Watch,
            _ => return None,
        })
    }
}

/// An epoll set, edge-triggered throughout: a hang-up that is not handled cannot make the loop spin.
#[derive(Debug)]
pub(crate) struct Poll {
    epoll: Epoll,
    /// Tokens of sources that stopped with work left, so that others get their turn.
    again: BTreeSet<u64>,
}

impl Poll {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, again: BTreeSet::new() })
    }

    /// Watches `fd` until it is closed: readable, writable and hung up.
    pub(crate) fn add(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        Ok(self.epoll.add(fd, EpollEvent::new(flags, source.token()))?)
    }

    /// Watches `fd` for being writable only.
    pub(crate) fn add_writer(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(WRITABLE, source.token()))?)
    }

    /// Watches `fd` for being readable only.
    pub(crate) fn add_reader(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(READABLE, source.token()))?)
    }

    /// Watches `fd`, which is watched, for nothing but its hang-up.
    pub(crate) fn pause(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        Ok(self.epoll.modify(fd, &mut EpollEvent::new(EpollFlags::EPOLLET, source.token()))?)
    }

    /// Watches `fd` for being writable again. If it is, that is reported.
    pub(crate) fn resume_writer(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        Ok(self.epoll.modify(fd, &mut EpollEvent::new(WRITABLE, source.token()))?)
    }

    /// Watches `fd` for being readable again. If it is, that is reported.
    pub(crate) fn resume_reader(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        Ok(self.epoll.modify(fd, &mut EpollEvent::new(READABLE, source.token()))?)
    }

    /// Watches `fd` for a change: for being readable, or for priority data where it is a file, which is always readable.
    pub(crate) fn add_watch(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        let is_file = SFlag::from_bits_truncate(nix::sys::stat::fstat(&fd)?.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFREG;
        let flags = if is_file { EpollFlags::EPOLLPRI } else { EpollFlags::EPOLLIN };
        Ok(self.epoll.add(fd, EpollEvent::new(flags | EpollFlags::EPOLLET, source.token()))?)
    }

    /// Gives `source` another turn.
    pub(crate) fn again(&mut self, source: Source) {
        self.again.insert(source.token());
    }

    /// Waits until something happens or `deadline`. Returns each source once; there may be none.
    pub(crate) fn wait(&mut self, deadline: Option<Instant>) -> io::Result<Vec<Source>> {
        let timeout =
            if self.again.is_empty() { deadline.map(|at| at.saturating_duration_since(Instant::now())) } else { Some(Duration::ZERO) };
        let timeout = match timeout {
            None => EpollTimeout::NONE,
            // Shorter than epoll_wait(2) can wait.
            Some(left) if !left.is_zero() && left < Duration::from_millis(1) => {
                let mut own = [PollFd::new(self.epoll.0.as_fd(), PollFlags::POLLIN)];
                match ppoll(&mut own, Some(left.into()), None) {
                    Ok(0) | Err(Errno::EINTR) => return Ok(Vec::new()),
                    Ok(_) => EpollTimeout::ZERO,
                    Err(error) => return Err(error.into()),
                }
            }
            // Rounded up, so that a deadline has passed when it wakes us.
            Some(left) => EpollTimeout::try_from(left.as_nanos().div_ceil(1_000_000).min(3_600_000) as u32).unwrap_or(EpollTimeout::MAX),
        };
        let mut events = [EpollEvent::empty(); 32];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let mut tokens = std::mem::take(&mut self.again);
        tokens.extend(events[..count].iter().map(EpollEvent::data));
        Ok(tokens.into_iter().filter_map(Source::from_token).collect())
    }
}

const READABLE: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLRDHUP).union(EpollFlags::EPOLLET);
const WRITABLE: EpollFlags = EpollFlags::EPOLLOUT.union(EpollFlags::EPOLLET);
