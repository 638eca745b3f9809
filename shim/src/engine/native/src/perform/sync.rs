//! What the performer and its child tell each other.
//!
//! ```text
//!  child ── Mounted ──▶ performer ── go ──▶ child ── Ready ──▶ performer ── go ──▶ child ── Prepared ──▶ performer
//!           Filtered, answered by go, between Ready and Prepared, if an agent decides about calls
//!           Failed, at any time; the end of the socket: the child has exited, or executes its program
//! ```
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use minicbor::{Decode, Encode};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use nix::unistd::{read, write};

use super::Failure;

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
    /// The filter is loaded, and this is the child's descriptor for the agent that decides about calls.
    #[n(4)]
    Filtered {
        #[n(0)]
        listener: i32,
    },
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
        let mut buffer = vec![0; MAX_BYTES];
        let length = read_once(&self.0, &mut buffer)?;
        if length == 0 {
            return Ok(None);
        }
        minicbor::decode(&buffer[..length]).map(Some).map_err(|_malformed| io::Error::from_raw_os_error(libc::EIO))
    }

    /// The child may have been killed: no signal is to tell.
    pub(super) fn go(&self) -> io::Result<()> {
        send(self.0.as_raw_fd(), &[1], MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }
}

impl ChildEnd {
    /// Without a performer the signal of a broken pipe ends the child, as it should.
    pub(super) fn send(&self, message: &Message) -> io::Result<()> {
        let bytes = minicbor::to_vec(message).map_err(|_infallible| io::Error::from_raw_os_error(libc::EIO))?;
        write(&self.0, &bytes)?;
        Ok(())
    }

    /// Whether the performer let the child go on; it has died if not.
    pub(super) fn may_go(&self) -> io::Result<bool> {
        Ok(read_once(&self.0, &mut [0; 1])? == 1)
    }
}

fn read_once(end: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match read(end, buffer) {
            Err(Errno::EINTR) => {}
            // The other end was closed with something unread in it.
            Err(Errno::ECONNRESET) => return Ok(0),
            other => return Ok(other?),
        }
    }
}

/// More than a message has: paths are limited.
const MAX_BYTES: usize = 16 << 10;
