//! The clients: their connections, whole frames in and out.
//!
//! Owns every connection on the shim's socket. A frame is read whole and its payload handed on unopened; an answer is written whole.
//!
//! **Invariant:** a client that floods, stalls or lies about a length costs a bounded amount of memory and does not delay other clients.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};

use log::{debug, warn};

use super::outbox::Outbox;
use super::poll::{Poll, Source};
use crate::frame::{self, Code, Header};
use crate::inbox::{Inbox, READ_BYTES, Read};
use crate::saved::saved;

/// The most connections at once; a further one is closed at once.
const MAX_CLIENTS: usize = 256;
/// A client with so many bytes of requests unanswered, or of answers unread, is not read from.
const MAX_UNANSWERED_BYTES: usize = 16 << 20;
/// The same for the number of requests.
const MAX_UNANSWERED: usize = 8192;
/// Frames taken from one client before others get a turn.
const FRAMES_A_TURN: usize = 64;

/// Bytes read from one client before others get a turn.
const BYTES_A_TURN: usize = 256 << 10;
/// A client with no more than this unanswered is read from even while the worker has a large backlog.
const MODEST_BYTES: usize = 64 << 10;

/// Where an answer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) client: u32,
    pub(crate) stream: u32,
}

saved!(Caller { client, stream });

/// A request that has arrived whole.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) caller: Caller,
    /// A ttrpc `Request` message.
    pub(crate) payload: Vec<u8>,
}

#[derive(Debug)]
struct Client {
    socket: UnixStream,
    /// The begin of a frame that has not arrived whole.
    input: Inbox,
    /// Bytes of an oversized frame that are still to be discarded.
    skip: usize,
    output: Outbox,
    /// The highest stream id that was used.
    last_stream: u32,
    unanswered: usize,
    unanswered_bytes: usize,
}

saved!(Client { socket, input, skip, output, last_stream, unanswered, unanswered_bytes });

impl Client {
    fn is_full(&self) -> bool {
        self.unanswered >= MAX_UNANSWERED || self.unanswered_bytes + self.output.bytes() >= MAX_UNANSWERED_BYTES
    }

    /// Takes whole frames out of the input.
    fn take_frames(&mut self, id: u32, limit: usize) -> Vec<Incoming> {
        let mut taken = Vec::new();
        while taken.len() < limit && !self.is_full() {
            let skipped = self.skip.min(self.input.bytes().len());
            self.input.take(skipped);
            self.skip -= skipped;
            match frame::first(self.input.bytes()) {
                Ok(None) => break,
                Ok(Some((header, payload))) => {
                    let payload = payload.to_vec();
                    self.input.take(frame::HEADER_BYTES + payload.len());
                    if let Some(payload) = self.check(header, payload) {
                        self.unanswered += 1;
                        self.unanswered_bytes += payload.len();
                        taken.push(Incoming { caller: Caller { client: id, stream: header.stream }, payload });
                    }
                }
                Err(header) => {
                    let (length, most) = (header.payload_bytes, frame::MAX_PAYLOAD_BYTES);
                    let message = format!("message length {length} exceeds the maximum of {most} bytes");
                    self.refuse(header.stream, Code::ResourceExhausted, &message);
                    self.input.take(frame::HEADER_BYTES);
                    self.skip = length as usize;
                }
            }
        }
        taken
    }

    /// Refuses frames that violate the protocol, as every ttrpc server does.
    fn check(&mut self, header: Header, payload: Vec<u8>) -> Option<Vec<u8>> {
        let refusal = if header.kind != frame::REQUEST {
            "only requests are accepted: this service has no streaming calls"
        } else if header.stream.is_multiple_of(2) {
            "a client's stream id must be odd"
        } else if header.stream <= self.last_stream {
            "a stream id must be higher than the previous ones"
        } else {
            self.last_stream = header.stream;
            return Some(payload);
        };
        self.refuse(header.stream, Code::InvalidArgument, refusal);
        None
    }

    fn refuse(&mut self, stream: u32, code: Code, message: &str) {
        self.output.push(frame::encode(stream, frame::RESPONSE, &frame::error_response(code, message)), None);
    }
}

/// All clients.
#[derive(Debug)]
pub(crate) struct Relay {
    listener: UnixListener,
    clients: BTreeMap<u32, Box<Client>>,
    last_id: u32,
}

saved!(Relay { listener, clients, last_id });

impl Relay {
    pub(crate) fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener, clients: BTreeMap::new(), last_id: 0 })
    }

    /// Watches the listener, and the clients that were taken over.
    pub(crate) fn watch(&self, poll: &mut Poll) -> io::Result<()> {
        poll.add_reader(&self.listener, Source::Listener)?;
        for (id, client) in &self.clients {
            poll.add(&client.socket, Source::Client(*id))?;
            // What was read already may be whole requests.
            poll.again(Source::Client(*id));
        }
        Ok(())
    }

    /// Accepts new connections.
    ///
    /// Errors: more connections wait, but there are no descriptors or there is no memory for them.
    pub(crate) fn accept(&mut self, poll: &Poll) -> io::Result<()> {
        let (sockets, result) = accept_all(&self.listener);
        for socket in sockets {
            if self.clients.len() >= MAX_CLIENTS {
                warn!(limit = MAX_CLIENTS; "connection refused, too many are open");
                continue;
            }
            self.last_id += 1;
            if let Err(error) = poll.add(&socket, Source::Client(self.last_id)) {
                warn!(error:%; "connection refused, cannot watch it");
                continue;
            }
            let client = Client {
                socket,
                input: Inbox::default(),
                skip: 0,
                output: Outbox::default(),
                last_stream: 0,
                unanswered: 0,
                unanswered_bytes: 0,
            };
            self.clients.insert(self.last_id, Box::new(client));
        }
        result
    }

    /// Reads and writes what can be read and written. Returns requests, and whether the client is still connected.
    pub(crate) fn turn(&mut self, id: u32, poll: &mut Poll) -> (Vec<Incoming>, bool) {
        let Some(client) = self.clients.get_mut(&id) else { return (Vec::new(), false) };
        let mut incoming = client.take_frames(id, FRAMES_A_TURN);
        let mut alive = client.output.flush(&client.socket).is_ok();
        let mut left = BYTES_A_TURN;
        while alive && left > 0 && incoming.len() < FRAMES_A_TURN && !client.is_full() {
            left = left.saturating_sub(READ_BYTES);
            let read = client.input.read(&client.socket);
            incoming.extend(client.take_frames(id, FRAMES_A_TURN - incoming.len()));
            match read {
                Ok(Read::Some) => {}
                Ok(Read::Empty) => break,
                Ok(Read::End) | Err(_) => alive = false,
            }
        }
        if alive && (left == 0 || incoming.len() >= FRAMES_A_TURN) {
            poll.again(Source::Client(id));
        }
        // Refusals that were made while reading.
        alive = alive && client.output.flush(&client.socket).is_ok();
        if !alive {
            debug!(client = id; "connection closed");
            self.clients.remove(&id);
        }
        (incoming, alive)
    }

    /// Writes an answer. It is dropped if the client is gone.
    ///
    /// `request_bytes` is the length of the request's payload, given back to the client's allowance; `None` for one that was parked.
    pub(crate) fn answer(&mut self, caller: Caller, request_bytes: Option<usize>, response: &[u8], poll: &mut Poll) {
        self.settle(caller, request_bytes, poll);
        if let Some(client) = self.clients.get_mut(&caller.client) {
            client.output.push(frame::encode(caller.stream, frame::RESPONSE, response), None);
            if client.output.flush(&client.socket).is_err() {
                poll.again(Source::Client(caller.client));
            }
        }
    }

    /// A request no longer counts as unanswered: it was answered, or parked.
    pub(crate) fn settle(&mut self, caller: Caller, request_bytes: Option<usize>, poll: &mut Poll) {
        if let (Some(client), Some(bytes)) = (self.clients.get_mut(&caller.client), request_bytes) {
            let was_full = client.is_full();
            client.unanswered = client.unanswered.saturating_sub(1);
            client.unanswered_bytes = client.unanswered_bytes.saturating_sub(bytes);
            if was_full {
                poll.again(Source::Client(caller.client));
            }
        }
    }

    /// Whether a client has at most [`MODEST_BYTES`] unanswered.
    pub(crate) fn is_modest(&self, client: u32) -> bool {
        self.clients.get(&client).is_none_or(|client| client.unanswered_bytes <= MODEST_BYTES)
    }

    pub(crate) fn is_connected(&self, client: u32) -> bool {
        self.clients.contains_key(&client)
    }

    pub(crate) fn count(&self) -> usize {
        self.clients.len()
    }

    /// Whether a client has sent the begin of a request, and not yet its end.
    pub(crate) fn is_receiving(&self) -> bool {
        self.clients.values().any(|client| !client.input.bytes().is_empty())
    }

    /// Whether every answer was written.
    pub(crate) fn is_flushed(&self) -> bool {
        self.clients.values().all(|client| client.output.is_empty())
    }
}

/// Accepts every waiting connection. After an error more may wait, which the edge-triggered listener will not report.
pub(crate) fn accept_all(listener: &UnixListener) -> (Vec<UnixStream>, io::Result<()>) {
    let mut sockets = Vec::new();
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                if socket.set_nonblocking(true).is_ok() {
                    sockets.push(socket);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return (sockets, Ok(())),
            Err(error) => return (sockets, Err(error)),
        }
    }
}
