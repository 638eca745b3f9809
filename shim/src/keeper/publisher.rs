//! Publishes events to containerd.
//!
//! Owns the queue and the connection to containerd's ttrpc socket. One event is under way at a time and leaves the queue when it is
//! acknowledged: the order is kept, a lost connection repeats one event at most.
//!
//! ```text
//!  Idle ──(event)──▶ Sending ──(acknowledged)──▶ next
//!   Sending ──(connection lost, refused, or silent)──▶ Waiting ──(back-off)──▶ Sending
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use log::{info, warn};

use super::outbox::Outbox;
use super::poll::{Poll, Source};
use crate::frame;
use crate::inbox::{Inbox, Read};
use crate::saved::saved;

const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// An event that the daemon does not acknowledge within this is sent again over a new connection.
const SILENCE: Duration = Duration::from_secs(60);
/// Status codes for an event that is itself invalid: retrying does not help.
const INVALID_ARGUMENT: u64 = 3;
const UNIMPLEMENTED: u64 = 12;
/// The daemon has no room: never for an event longer than [`LONG_BYTES`], for others perhaps later.
const RESOURCE_EXHAUSTED: u64 = 8;
const LONG_BYTES: usize = 256 << 10;

#[derive(Debug)]
struct Connection {
    socket: UnixStream,
    input: Inbox,
    output: Outbox,
    last_stream: u32,
    /// The stream of the event that awaits its acknowledgement, and since when.
    awaited: Option<(u32, Instant)>,
}

saved!(Connection { socket, input, output, last_stream, awaited });

/// See the module.
#[derive(Debug)]
pub(crate) struct Publisher {
    /// containerd's socket; without one, events are dropped.
    path: Option<String>,
    queue: VecDeque<Vec<u8>>,
    connection: Option<Connection>,
    backoff: Duration,
    retry_at: Option<Instant>,
    pub(crate) sent: u64,
}

saved!(Publisher { queue, connection, backoff, retry_at, sent; path });

impl Publisher {
    pub(crate) fn new(address: Option<&str>) -> Self {
        let path = address.map(|address| address.strip_prefix("unix://").unwrap_or(address).to_owned());
        Self { path, queue: VecDeque::new(), connection: None, backoff: FIRST_BACKOFF, retry_at: None, sent: 0 }
    }

    /// Resumes after a re-exec. `address`: as for [`Publisher::new`].
    pub(crate) fn resume(&mut self, address: Option<&str>, poll: &mut Poll) -> io::Result<()> {
        self.path = Self::new(address).path;
        if let Some(connection) = &self.connection {
            poll.add(&connection.socket, Source::Publisher)?;
        }
        poll.again(Source::Publisher);
        Ok(())
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

    /// Does what is due though nothing has happened on the connection: see [`Publisher::turn`].
    pub(crate) fn tick(&mut self, now: Instant, poll: &Poll) {
        let may_send = self.retry_at.is_none() && self.connection.as_ref().is_none_or(|connection| connection.awaited.is_none());
        if self.deadline().is_some_and(|at| at <= now) || (may_send && !self.queue.is_empty()) {
            self.turn(now, poll);
        }
    }

    /// Sends the next event when possible, and reads acknowledgements.
    pub(crate) fn turn(&mut self, now: Instant, poll: &Poll) {
        loop {
            if self.retry_at.is_some_and(|at| at > now) || (self.queue.is_empty() && self.connection.is_none()) {
                return;
            }
            self.retry_at = None;
            if let Err(error) = self.advance(now, poll) {
                if self.connection.take().is_some_and(|connection| connection.awaited.is_none()) && self.queue.is_empty() {
                    // The daemon closed an idle connection.
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
            self.connection =
                Some(Connection { socket, input: Inbox::default(), output: Outbox::default(), last_stream: 0, awaited: None });
        }
        let Some(connection) = &mut self.connection else { return Ok(()) };
        // What came before the end counts: an event that was acknowledged is not sent again.
        let has_ended = connection.read()?;
        if let Some((stream, since)) = connection.awaited {
            match connection.take_response(stream)? {
                Some(code) if code == 0 || self.queue.front().is_some_and(|event| is_invalid(code, event)) => {
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
        if has_ended {
            return Err(io::ErrorKind::UnexpectedEof.into());
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

fn is_invalid(code: u64, event: &[u8]) -> bool {
    match code {
        INVALID_ARGUMENT | UNIMPLEMENTED => true,
        RESOURCE_EXHAUSTED => event.len() > LONG_BYTES,
        _ => false,
    }
}

impl Connection {
    /// Reads what has come. Returns whether the daemon has closed behind it.
    fn read(&mut self) -> io::Result<bool> {
        loop {
            match self.input.read(&self.socket)? {
                Read::Some => {}
                Read::Empty => return Ok(false),
                Read::End => return Ok(true),
            }
            if self.input.bytes().len() > frame::MAX_PAYLOAD_BYTES {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
    }

    /// The status code of the answer on `stream`, if it is there; others are discarded.
    fn take_response(&mut self, stream: u32) -> io::Result<Option<u64>> {
        while let Some((header, payload)) = frame::first(self.input.bytes()).map_err(|_| io::ErrorKind::InvalidData)? {
            let (code, length) = (frame::response_code(payload), frame::HEADER_BYTES + payload.len());
            self.input.take(length);
            if header.kind == frame::RESPONSE && header.stream == stream {
                return code.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into());
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::frame::Header;

    /// Waits for the next request, answers it with a status code, and closes at once. Returns its payload.
    fn answer_and_close(listener: &UnixListener, code: u8) -> Vec<u8> {
        let (mut socket, _) = listener.accept().expect("a connection");
        let mut head = [0; frame::HEADER_BYTES];
        socket.read_exact(&mut head).expect("a header");
        let header = Header::parse(&head).expect("a header");
        let mut payload = vec![0; header.payload_bytes as usize];
        socket.read_exact(&mut payload).expect("a payload");
        // Response { status: Status { code } }
        let response = [0x0a, 0x02, 0x08, code];
        socket.write_all(&frame::encode(header.stream, frame::RESPONSE, &response)).expect("an answer");
        payload
    }

    /// Gives a publisher turns until its queue is empty, while a daemon answers `codes`, one to a connection.
    fn publish(name: &str, events: &[Vec<u8>], codes: &'static [u8]) -> Vec<Vec<u8>> {
        let folder = scratch::Folder::new(name);
        let path = folder.join("socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        let daemon = std::thread::spawn(move || codes.iter().map(|code| answer_and_close(&listener, *code)).collect());
        let mut poll = Poll::new().expect("an epoll set");
        let mut publisher = Publisher::new(Some(&path.display().to_string()));
        for event in events {
            publisher.push(event.clone());
        }
        let limit = Instant::now() + Duration::from_secs(10);
        while publisher.len() > 0 {
            assert!(Instant::now() < limit, "{} events are left", publisher.len());
            publisher.turn(Instant::now(), &poll);
            // An acknowledgement and the end behind it are met together.
            std::thread::sleep(Duration::from_millis(30));
            poll.wait(Some(Instant::now())).expect("a wait");
        }
        daemon.join().expect("no panic")
    }

    #[test]
    fn an_event_acknowledged_as_the_connection_closes_is_not_sent_again() {
        let events = [b"one".to_vec(), b"two".to_vec()];
        assert_eq!(publish("end", &events, &[0, 0]), events);
    }

    #[test]
    fn an_event_that_is_too_long_for_the_daemon_holds_nothing_back() {
        let long = vec![b'x'; LONG_BYTES + 1];
        let events = [long.clone(), b"two".to_vec()];
        // The short one comes again: there may be room for it later.
        let sent = publish("long", &events, &[RESOURCE_EXHAUSTED as u8, RESOURCE_EXHAUSTED as u8, 0]);
        assert!(sent == [long, b"two".to_vec(), b"two".to_vec()], "{} events", sent.len());
    }
}
