//! Bytes on their way to a socket that may not take them all at once.
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// A queue of whole messages, each perhaps with a descriptor.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    messages: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    /// Bytes of the first message that are gone already.
    sent: usize,
    bytes: usize,
}

impl Outbox {
    pub(crate) fn push(&mut self, message: Vec<u8>, descriptor: Option<OwnedFd>) {
        self.bytes += message.len();
        self.messages.push_back((message, descriptor));
    }

    /// A queue of bytes that were on their way already.
    pub(crate) fn of(bytes: Vec<u8>) -> Self {
        let mut outbox = Self::default();
        if !bytes.is_empty() {
            outbox.push(bytes, None);
        }
        outbox
    }

    /// What has not gone out, without the descriptors.
    pub(crate) fn unsent(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.bytes);
        for (message, _) in &self.messages {
            bytes.extend_from_slice(message);
        }
        bytes.drain(..self.sent);
        bytes
    }

    /// Bytes that have not gone out.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Writes as much as the socket takes without waiting.
    ///
    /// Errors: whatever means that the peer is gone (EPIPE, ECONNRESET, …).
    pub(crate) fn flush(&mut self, socket: impl AsFd) -> io::Result<()> {
        while let Some((message, descriptor)) = self.messages.front_mut() {
            let slices = [IoSlice::new(&message[self.sent..])];
            let numbers: Vec<_> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
            let controls = [ControlMessage::ScmRights(&numbers)];
            let controls = if numbers.is_empty() { &controls[..0] } else { &controls[..] };
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match sendmsg::<()>(socket.as_fd().as_raw_fd(), &slices, controls, flags, None) {
                Ok(count) => {
                    *descriptor = None;
                    self.sent += count;
                    self.bytes -= count;
                    if self.sent == message.len() {
                        self.messages.pop_front();
                        self.sent = 0;
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
