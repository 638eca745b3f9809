//! The control socket: requests from the commands of this binary, answered with or without a worker.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use log::warn;

use super::outbox::Outbox;
use super::poll::{Poll, Source};
use super::relay::accept_all;
use crate::handover::{ControlReply, ControlRequest};
use crate::inbox::{Inbox, Read};
use crate::saved::saved;

/// The most connections at once.
const MAX_CONTROL_CLIENTS: usize = 64;
/// The longest request, in bytes.
const MAX_REQUEST_BYTES: usize = 64 << 10;

#[derive(Debug)]
struct ControlClient {
    socket: UnixStream,
    /// The descriptor attached to the request.
    attached: Option<OwnedFd>,
    input: Inbox,
    output: Outbox,
    asked: bool,
}

saved!(ControlClient { socket, attached, input, output, asked });

/// See the module.
#[derive(Debug)]
pub(crate) struct Control {
    listener: UnixListener,
    /// Each in a block of its own: a node of the map has room for eleven, and stays.
    clients: BTreeMap<u32, Box<ControlClient>>,
    last_id: u32,
}

saved!(Control { listener, clients, last_id });

impl Control {
    pub(crate) fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener, clients: BTreeMap::new(), last_id: 0 })
    }

    /// Watches the listener, and the clients that were taken over.
    pub(crate) fn watch(&self, poll: &Poll) -> io::Result<()> {
        poll.add_reader(&self.listener, Source::ControlListener)?;
        self.clients.iter().try_for_each(|(id, client)| poll.add(&client.socket, Source::ControlClient(*id)))
    }

    /// Accepts new connections. Errors as of [`super::relay::Relay::accept`].
    pub(crate) fn accept(&mut self, poll: &Poll) -> io::Result<()> {
        let (sockets, result) = accept_all(&self.listener);
        for socket in sockets {
            if self.clients.len() >= MAX_CONTROL_CLIENTS {
                // The oldest connection without a request makes room; its client connects again.
                let idle = self.clients.iter().find(|(_, client)| !client.asked).map(|(id, _)| *id);
                let Some(idle) = idle else {
                    warn!(limit = MAX_CONTROL_CLIENTS; "control connection refused, too many requests are pending");
                    continue;
                };
                self.clients.remove(&idle);
            }
            self.last_id += 1;
            match poll.add(&socket, Source::ControlClient(self.last_id)) {
                Ok(()) => {
                    let client = ControlClient { socket, attached: None, input: Inbox::default(), output: Outbox::default(), asked: false };
                    self.clients.insert(self.last_id, Box::new(client));
                }
                Err(error) => warn!(error:%; "control connection refused, cannot watch it"),
            }
        }
        result
    }

    /// Reads and writes what can be read and written. Returns the request once it is whole, with its attached descriptor.
    pub(crate) fn turn(&mut self, id: u32) -> Option<(ControlRequest, Option<OwnedFd>)> {
        let client = self.clients.get_mut(&id)?;
        match client.turn() {
            Ok(request) => request.map(|request| (request, client.attached.take())),
            Err(_) => {
                self.clients.remove(&id);
                None
            }
        }
    }

    /// Answers a control client, if it is still connected.
    pub(crate) fn reply(&mut self, id: u32, reply: &ControlReply) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.output.push(reply.encode(), None);
            if client.output.flush(&client.socket).is_err() {
                self.clients.remove(&id);
            }
        }
    }

    pub(crate) fn is_connected(&self, id: u32) -> bool {
        self.clients.contains_key(&id)
    }

    pub(crate) fn is_flushed(&self) -> bool {
        self.clients.values().all(|client| client.output.is_empty())
    }
}

impl ControlClient {
    /// Errors: the peer is gone, or sent a malformed request.
    fn turn(&mut self) -> io::Result<Option<ControlRequest>> {
        self.output.flush(&self.socket)?;
        loop {
            match self.input.receive(&self.socket)? {
                (Read::Empty, _) => return Ok(None),
                (Read::End, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
                (Read::Some, _) if self.asked => return Err(io::ErrorKind::InvalidData.into()),
                (Read::Some, attached) => self.attached = self.attached.take().or(attached),
            }
            if let Some(request) = self.input.message(MAX_REQUEST_BYTES, ControlRequest::decode).map_err(io::Error::other)? {
                self.input = Inbox::default();
                self.asked = true;
                return Ok(Some(request));
            }
        }
    }
}
