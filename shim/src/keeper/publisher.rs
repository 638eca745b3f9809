//! Events on their way to containerd.
//!
//! Owns the queue and the connection to containerd's ttrpc socket. One event is under way at a time and leaves the queue when it is
//! acknowledged: the order is kept, a lost connection repeats one event at most.
//!
//! ```text
//!  Idle ──(event)──▶ Sending ──(acknowledged)──▶ next
//!   Sending ──(connection lost, refused, or silent)──▶ Waiting ──(back-off)──▶ Sending
//! ```
mod saved;

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use log::{info, warn};

use super::inbox::{Read, read_some};
use super::outbox::Outbox;
use super::poll::{Poll, Source};
use crate::frame::{self, Header};

const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// A daemon that has taken an event and says nothing is asked again over a new connection.
const SILENCE: Duration = Duration::from_secs(60);
/// Status codes that say that the event itself is wrong: it will not get better. InvalidArgument, Unimplemented.
const HOPELESS: [u64; 2] = [3, 12];

#[derive(Debug)]
struct Connection {
    socket: UnixStream,
    input: Vec<u8>,
    output: Outbox,
    last_stream: u32,
    /// The stream of the event under way, and since when.
    awaited: Option<(u32, Instant)>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Publisher {
    /// containerd's socket; without one, events go nowhere.
    path: Option<String>,
    queue: VecDeque<Vec<u8>>,
    connection: Option<Connection>,
    backoff: Duration,
    retry_at: Option<Instant>,
    pub(crate) sent: u64,
}

impl Publisher {
    pub(crate) fn new(address: Option<&str>) -> Self {
        let path = address.map(|address| address.strip_prefix("unix://").unwrap_or(address).to_owned());
        Self { path, queue: VecDeque::new(), connection: None, backoff: FIRST_BACKOFF, retry_at: None, sent: 0 }
    }

    /// Queues an event: a ttrpc `Request` message.
    pub(crate) fn push(&mut self, event: Vec<u8>) {
        if self.path.is_some() {
            self.queue.push_back(event);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Sends what can be sent and takes acknowledgements in.
    pub(crate) fn turn(&mut self, now: Instant, poll: &Poll) {
        loop {
            if self.retry_at.is_some_and(|at| at > now) || (self.queue.is_empty() && self.connection.is_none()) {
                return;
            }
            self.retry_at = None;
            if let Err(error) = self.advance(now, poll) {
                if self.connection.take().is_some_and(|connection| connection.awaited.is_none()) && self.queue.is_empty() {
                    // An idle connection that the daemon has closed is nothing.
                    return;
                }
                if self.backoff == FIRST_BACKOFF {
                    info!(error:%, queued = self.queue.len(); "cannot publish an event, will retry");
                }
                self.retry_at = Some(now + self.backoff);
                self.backoff = (self.backoff * 2).min(MAX_BACKOFF);
                return;
            }
            let waits = self.connection.as_ref().is_none_or(|connection| connection.awaited.is_some());
            if waits || self.queue.is_empty() {
                return;
            }
        }
    }

    fn advance(&mut self, now: Instant, poll: &Poll) -> io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        if self.connection.is_none() {
            let socket = crate::sys::socket::connect(path)?;
            poll.add(&socket, Source::Publisher)?;
            self.connection = Some(Connection { socket, input: Vec::new(), output: Outbox::default(), last_stream: 0, awaited: None });
        }
        let Some(connection) = &mut self.connection else { return Ok(()) };
        connection.read()?;
        if let Some((stream, since)) = connection.awaited {
            match connection.take_response(stream)? {
                Some(code) if code == 0 || HOPELESS.contains(&code) => {
                    if code != 0 {
                        warn!(code; "the daemon refuses an event for good, dropping it");
                    }
                    connection.awaited = None;
                    self.queue.pop_front();
                    self.sent += 1;
                    self.backoff = FIRST_BACKOFF;
                }
                Some(code) => return Err(io::Error::other(format!("status code {code}"))),
                None if now >= since + SILENCE => return Err(io::Error::from(io::ErrorKind::TimedOut)),
                None => {}
            }
        }
        if let (None, Some(event)) = (connection.awaited, self.queue.front()) {
            // A client's stream ids are odd and rise.
            let stream = if connection.last_stream == 0 { 1 } else { connection.last_stream + 2 };
            connection.last_stream = stream;
            connection.awaited = Some((stream, now));
            connection.output.push(frame::encode(stream, frame::REQUEST, event), None);
        }
        connection.output.flush(&connection.socket)
    }

    /// When [`Publisher::turn`] has something to do though nothing happens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let silence = self.connection.as_ref().and_then(|connection| connection.awaited).map(|(_, since)| since + SILENCE);
        self.retry_at.or(silence)
    }
}

impl Connection {
    /// Errors: UnexpectedEof when the daemon has closed.
    fn read(&mut self) -> io::Result<()> {
        loop {
            match read_some(&self.socket, &mut self.input)? {
                Read::Some => {}
                Read::Empty => return Ok(()),
                Read::End => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
            if self.input.len() > frame::MAX_PAYLOAD_BYTES {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
    }

    /// The status code of the answer on `stream`, if it is there; others are thrown away.
    fn take_response(&mut self, stream: u32) -> io::Result<Option<u64>> {
        loop {
            let Some(header) = Header::parse(&self.input) else { return Ok(None) };
            if header.payload_bytes as usize > frame::MAX_PAYLOAD_BYTES {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let end = frame::HEADER_BYTES + header.payload_bytes as usize;
            let Some(payload) = self.input.get(frame::HEADER_BYTES..end) else { return Ok(None) };
            let code = frame::response_code(payload);
            self.input.drain(..end);
            if header.kind == frame::RESPONSE && header.stream == stream {
                return code.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into());
            }
        }
    }
}
