//! What the performer and its child tell each other.
//!
//! ```text
//!  child ── Mounted ──▶ performer ── go ──▶ child ── Ready ──▶ performer ── go ──▶ child ── Prepared ──▶ performer
//!           Failed, at any time; the end of the socket: the child has exited, or executes its program
//! ```
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use minicbor::{Decode, Encode};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

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
}

/// One of the two ends; each message arrives whole.
#[derive(Debug)]
pub(super) struct End(OwnedFd);

/// The performer's end, and the child's.
pub(super) fn pair() -> io::Result<(End, End)> {
    let (first, second) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    Ok((End(first), End(second)))
}

impl End {
    pub(super) fn send(&self, message: &Message) -> io::Result<()> {
        let bytes = minicbor::to_vec(message).map_err(|_infallible| io::Error::from_raw_os_error(libc::EIO))?;
        send(self.0.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }

    /// `None` at the end.
    pub(super) fn receive(&self) -> io::Result<Option<Message>> {
        let mut buffer = vec![0; MAX_BYTES];
        let length = self.read(&mut buffer)?;
        if length == 0 {
            return Ok(None);
        }
        minicbor::decode(&buffer[..length]).map(Some).map_err(|_malformed| io::Error::from_raw_os_error(libc::EIO))
    }

    pub(super) fn go(&self) -> io::Result<()> {
        send(self.0.as_raw_fd(), &[1], MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }

    /// Whether the performer let the child go on; it has died if not.
    pub(super) fn may_go(&self) -> io::Result<bool> {
        Ok(self.read(&mut [0; 1])? == 1)
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(self.0.as_raw_fd(), buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                // The other end was closed with something unread in it.
                Err(Errno::ECONNRESET) => return Ok(0),
                other => return Ok(other?),
            }
        }
    }
}

/// More than a message has: paths are limited.
const MAX_BYTES: usize = 16 << 10;
