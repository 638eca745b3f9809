//! Messages queued for a socket that may not take them all at once.
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use minicbor::decode;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::saved::{Reader, Saved, Writer};

/// A queue of whole messages, each perhaps with a descriptor.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    messages: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    /// Bytes of the first message that were sent already.
    sent: usize,
    bytes: usize,
}

impl Outbox {
    pub(crate) fn push(&mut self, message: Vec<u8>, descriptor: Option<OwnedFd>) {
        self.bytes += message.len();
        self.messages.push_back((message, descriptor));
    }

    /// Bytes that were not sent yet.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Writes as much as the socket takes without waiting.
    ///
    /// Errors: the peer is gone (EPIPE, ECONNRESET, …).
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

/// The bytes that were not sent yet, without the descriptors.
impl Saved for Outbox {
    fn save(&self, writer: &mut Writer) {
        let mut unsent: Vec<u8> = Vec::with_capacity(self.bytes + self.sent);
        self.messages.iter().for_each(|(message, _)| unsent.extend_from_slice(message));
        unsent.drain(..self.sent);
        unsent.save(writer);
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, decode::Error> {
        let mut outbox = Self::default();
        let unsent = Vec::<u8>::load(reader)?;
        if !unsent.is_empty() {
            outbox.push(unsent, None);
        }
        Ok(outbox)
    }
}
