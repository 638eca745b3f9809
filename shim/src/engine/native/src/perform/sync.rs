//! What the performer and its child tell each other.
//!
//! ```text
//!  child ── Mounted ──▶ performer ── go ──▶ child ── Ready ──▶ performer ── go ──▶ child ── Prepared ──▶ performer
//!           Filtered, answered by go, between Ready and Prepared, if an agent decides about calls
//!           Failed, at any time; the end of the socket: the child has exited, or executes its program
//! ```
//! An exec that needs nothing of the performer sends Prepared alone, or Failed.
//! In a user namespace init is the child of a leader, which exits: `Entered`, go, `Timed` where there is a new time namespace, go, `Led`; then init waits for
//! a go as its first. `Root` and `Source` are init's, between its mounts: each is answered with a descriptor.
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use minicbor::{Decode, Encode};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::{read, write};

use super::Failure;
use crate::sys;

/// From the child.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) enum Message {
    /// The container's mounts are made: sent if there are hooks that want to see them.
    #[n(3)]
    Mounted,
    /// Everything that limits could hinder is done.
    #[n(0)]
    Ready,
    /// Nothing but the gate and the execution is left.
    #[n(1)]
    Prepared,
    #[n(2)]
    Failed(#[n(0)] Failure),
    /// The leader is in the user namespace of the container.
    #[n(4)]
    Entered,
    /// Its next child will be in a new time namespace.
    #[n(5)]
    Timed,
    /// Init exists: its handle comes with this.
    #[n(6)]
    Led,
    /// The root is to be mounted on itself: the mount is the answer.
    #[n(7)]
    Root,
    /// The source of a mount of the plan, by its index, is to be opened: a tree of mounts is the answer.
    #[n(8)]
    Source(#[n(0)] u32),
    /// The filter is loaded, and this is the child's descriptor for the agent that decides about calls.
    #[n(9)]
    Filtered {
        #[n(0)]
        listener: i32,
    },
}

/// The performer's answers.
const GO: u8 = 1;
const LIMIT_YOURSELF: u8 = 2;

/// What the child may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Go,
    /// The performer may not change limits of a process of another user namespace: the process may lower its own.
    LimitYourself,
    /// The performer has died.
    None,
}

/// The performer's end; each message arrives whole.
#[derive(Debug)]
pub(super) struct PerformerEnd(OwnedFd);

/// The child's end. It uses read(2) and write(2) alone, which every filter of system calls allows.
#[derive(Debug)]
pub(super) struct ChildEnd(OwnedFd);

pub(super) fn pair() -> io::Result<(PerformerEnd, ChildEnd)> {
    let (first, second) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    Ok((PerformerEnd(first), ChildEnd(second)))
}

impl PerformerEnd {
    /// `None` at the end.
    pub(super) fn receive(&self) -> io::Result<Option<Message>> {
        // Most have a few bytes, and after a fork each page of a buffer is a fault.
        let length = once(|| recv(self.0.as_raw_fd(), &mut [], MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC))?;
        let mut buffer = vec![0; length.min(MAX_BYTES)];
        let length = if length == 0 { 0 } else { read_once(&self.0, &mut buffer)? };
        if length == 0 {
            return Ok(None);
        }
        minicbor::decode(&buffer[..length]).map(Some).map_err(|_malformed| io::Error::from_raw_os_error(libc::EIO))
    }

    /// As [`Self::receive`], with the descriptor that came with the message. `None` also if `leader` exited without one.
    pub(super) fn receive_from(&self, leader: BorrowedFd<'_>) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut ends = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN), PollFd::new(leader, PollFlags::POLLIN)];
        while let Err(error) = poll(&mut ends, PollTimeout::NONE) {
            if error != Errno::EINTR {
                return Err(error.into());
            }
        }
        if ends[0].any() != Some(true) {
            return Ok(None);
        }
        let mut buffer = vec![0; MAX_BYTES];
        let (length, descriptor) = sys::receive_descriptor(self.0.as_fd(), &mut buffer)?;
        if length == 0 {
            return Ok(None);
        }
        let message = minicbor::decode(&buffer[..length]).map_err(|_malformed| io::Error::from_raw_os_error(libc::EIO))?;
        Ok(Some((message, descriptor)))
    }

    /// Waits until the child's end is closed, without a wake-up for what it sends before that.
    pub(super) fn wait_for_end(&self) -> io::Result<()> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        // A hang-up is reported whatever is asked for.
        let mut own = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        loop {
            match poll(&mut own, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                other => return Ok(other.map(drop)?),
            }
        }
    }

    /// The child may have been killed: no signal is to tell.
    pub(super) fn go(&self) -> io::Result<()> {
        self.answer(GO)
    }

    pub(super) fn limit_yourself(&self) -> io::Result<()> {
        self.answer(LIMIT_YOURSELF)
    }

    fn answer(&self, answer: u8) -> io::Result<()> {
        send(self.0.as_raw_fd(), &[answer], MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }

    /// Answers with a descriptor.
    pub(super) fn give(&self, descriptor: &OwnedFd) -> io::Result<()> {
        sys::send_descriptor(self.0.as_fd(), &[GO], descriptor.as_fd()).map(drop)
    }
}

impl AsRawFd for ChildEnd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl ChildEnd {
    /// Without a performer the signal of a broken pipe ends the child, as it should.
    pub(super) fn send(&self, message: &Message) -> io::Result<()> {
        let bytes = minicbor::to_vec(message).map_err(|_infallible| io::Error::from_raw_os_error(libc::EIO))?;
        write(&self.0, &bytes)?;
        Ok(())
    }

    /// Sends a message with a descriptor.
    pub(super) fn send_with(&self, message: &Message, descriptor: &OwnedFd) -> io::Result<()> {
        let bytes = minicbor::to_vec(message).map_err(|_infallible| io::Error::from_raw_os_error(libc::EIO))?;
        sys::send_descriptor(self.0.as_fd(), &bytes, descriptor.as_fd()).map(drop)
    }

    /// Waits until the performer lets the child go on.
    pub(super) fn answer(&self) -> io::Result<Answer> {
        let mut answer = [0];
        Ok(match (read_once(&self.0, &mut answer)?, answer[0]) {
            (1, LIMIT_YOURSELF) => Answer::LimitYourself,
            (1, _) => Answer::Go,
            _ => Answer::None,
        })
    }

    /// Sends a message that is answered with a descriptor.
    ///
    /// Errors: EPIPE if the performer has died.
    pub(super) fn ask(&self, message: &Message) -> io::Result<OwnedFd> {
        self.send(message)?;
        let (_, descriptor) = sys::receive_descriptor(self.0.as_fd(), &mut [0])?;
        descriptor.ok_or_else(|| io::Error::from_raw_os_error(libc::EPIPE))
    }
}

fn read_once(end: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    once(|| read(end, buffer))
}

fn once(mut receive: impl FnMut() -> nix::Result<usize>) -> io::Result<usize> {
    loop {
        match receive() {
            Err(Errno::EINTR) => {}
            // The other end was closed with something unread in it.
            Err(Errno::ECONNRESET) => return Ok(0),
            other => return Ok(other?),
        }
    }
}

/// More than a message has: paths are limited.
const MAX_BYTES: usize = 16 << 10;
