//! The control socket: what the commands of this binary ask a keeper, with or without a worker.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use log::warn;
use minicbor::{Decode, Encode};

use super::inbox::READ_BYTES;
use super::outbox::Outbox;
use super::poll::{Poll, Source};
use super::reexec::Carrier;
use super::relay::accept_all;
use crate::handover::{ControlReply, ControlRequest, first_frame, part};
use crate::sys;

/// The most commands at once.
const MAX_CONTROL_CLIENTS: usize = 64;
/// The longest request, in bytes.
const MAX_REQUEST_BYTES: usize = 64 << 10;

#[derive(Debug, Encode, Decode)]
#[cbor(context_bound = "AsMut<Carrier>")]
struct ControlClient {
    #[cbor(n(0), with = "part")]
    socket: UnixStream,
    /// The descriptor that came along.
    #[cbor(n(1), with = "part")]
    attached: Option<OwnedFd>,
    #[cbor(n(2), with = "part")]
    input: Vec<u8>,
    #[cbor(n(3), with = "part")]
    output: Outbox,
    #[n(4)]
    asked: bool,
}

/// See the module.
#[derive(Debug, Encode, Decode)]
#[cbor(context_bound = "AsMut<Carrier>")]
pub(crate) struct Control {
    #[cbor(n(0), with = "part")]
    listener: UnixListener,
    #[n(1)]
    control_clients: BTreeMap<u32, ControlClient>,
    #[n(2)]
    last_id: u32,
}

impl Control {
    pub(crate) fn new(listener: UnixListener, poll: &Poll) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        poll.add_reader(&listener, Source::ControlListener)?;
        Ok(Self { listener, control_clients: BTreeMap::new(), last_id: 0 })
    }

    /// Goes on in the place of another executable.
    pub(crate) fn resume(&self, poll: &Poll) -> io::Result<()> {
        poll.add_reader(&self.listener, Source::ControlListener)?;
        self.control_clients.iter().try_for_each(|(id, control_client)| poll.add(&control_client.socket, Source::ControlClient(*id)))
    }

    /// Takes new connections in. Errors as of [`super::relay::Relay::accept`].
    pub(crate) fn accept(&mut self, poll: &Poll) -> io::Result<()> {
        let (sockets, result) = accept_all(&self.listener);
        for socket in sockets {
            if self.control_clients.len() >= MAX_CONTROL_CLIENTS {
                // One that asks nothing makes room: the oldest. A client that is hung up on comes again.
                let idle = self.control_clients.iter().find(|(_, control_client)| !control_client.asked).map(|(id, _)| *id);
                let Some(idle) = idle else {
                    warn!(limit = MAX_CONTROL_CLIENTS; "control connection refused, as many are being answered");
                    continue;
                };
                self.control_clients.remove(&idle);
            }
            self.last_id += 1;
            match poll.add(&socket, Source::ControlClient(self.last_id)) {
                Ok(()) => {
                    let control_client =
                        ControlClient { socket, attached: None, input: Vec::new(), output: Outbox::default(), asked: false };
                    self.control_clients.insert(self.last_id, control_client);
                }
                Err(error) => warn!(error:%; "command refused, cannot watch it"),
            }
        }
        result
    }

    /// Reads and writes what can be read and written. Returns the request once it is whole, with the descriptor that came along.
    pub(crate) fn turn(&mut self, id: u32) -> Option<(ControlRequest, Option<OwnedFd>)> {
        let control_client = self.control_clients.get_mut(&id)?;
        match control_client.turn() {
            Ok(request) => request.map(|request| (request, control_client.attached.take())),
            Err(_) => {
                self.control_clients.remove(&id);
                None
            }
        }
    }

    /// Answers a command, if it is still there.
    pub(crate) fn reply(&mut self, id: u32, reply: &ControlReply) {
        if let Some(control_client) = self.control_clients.get_mut(&id) {
            control_client.output.push(reply.encode(), None);
            if control_client.output.flush(&control_client.socket).is_err() {
                self.control_clients.remove(&id);
            }
        }
    }

    pub(crate) fn is_connected(&self, id: u32) -> bool {
        self.control_clients.contains_key(&id)
    }

    pub(crate) fn is_flushed(&self) -> bool {
        self.control_clients.values().all(|control_client| control_client.output.is_empty())
    }
}

impl ControlClient {
    /// Errors: the peer is gone, or says what nobody understands.
    fn turn(&mut self) -> io::Result<Option<ControlRequest>> {
        self.output.flush(&self.socket)?;
        loop {
            let mut buffer = [0; READ_BYTES];
            match sys::descriptors::receive(self.socket.as_fd(), &mut buffer) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if self.asked => return Err(io::ErrorKind::InvalidData.into()),
                Ok((count, attached)) => {
                    self.input.extend_from_slice(&buffer[..count]);
                    self.attached = self.attached.take().or(attached);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            if let Some(message) = first_frame(&self.input, MAX_REQUEST_BYTES).map_err(io::Error::other)? {
                let request = ControlRequest::decode(message).map_err(io::Error::other)?;
                self.input = Vec::new();
                self.asked = true;
                return Ok(Some(request));
            }
        }
    }
}
