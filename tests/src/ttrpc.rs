//! Raw ttrpc: whole frames, broken frames, and calls on connections on which tests may send anything.
//!
//! ```text
//! Wire        bytes out, frames in: for input that no client sends
//! Connection  calls, any number concurrently, each with a deadline
//! ```
//! Source: ttrpc's PROTOCOL.md: 4 bytes of length, 4 of stream id, both big-endian, then type, flags and payload.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use containerd_shim_protos::ttrpc::{Request, Response};
use protobuf::Message;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, oneshot};
use tokio::task::AbortHandle;

use crate::eventually::{self, within};

/// Length of a frame's header, in bytes.
pub const HEADER_BYTES: usize = 10;
/// The longest payload that ttrpc allows, in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 4 << 20;
/// Frame type of a request.
pub const REQUEST: u8 = 1;
/// Frame type of a response.
pub const RESPONSE: u8 = 2;
/// Frame type of a stream's data.
pub const DATA: u8 = 3;

/// No call takes longer than this, but for those that are given another time.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Status codes that tests look at, as everywhere in gRPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(i32)]
#[expect(missing_docs, reason = "the names are gRPC's")]
pub enum Code {
    Ok = 0,
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
}

impl Code {
    fn from_number(number: i32) -> Self {
        use Code::*;
        let all = [
            Ok,
            Cancelled,
            Unknown,
            InvalidArgument,
            DeadlineExceeded,
            NotFound,
            AlreadyExists,
            PermissionDenied,
            ResourceExhausted,
            FailedPrecondition,
            Aborted,
            OutOfRange,
            Unimplemented,
            Internal,
            Unavailable,
        ];
        usize::try_from(number).ok().and_then(|number| all.get(number).copied()).unwrap_or(Unknown)
    }
}

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallError {
    /// The server refuses.
    Refused {
        /// The status.
        code: Code,
        /// Its message.
        message: String,
    },
    /// The connection has ended.
    Closed,
    /// No answer came in time.
    Silent,
    /// The answer is not the method's message, and why.
    Garbage(String),
}

impl CallError {
    /// The status, if it was refused.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            Self::Closed | Self::Silent | Self::Garbage(_) => None,
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { code, message } => write!(f, "{code:?}: {message}"),
            Self::Closed => f.write_str("the connection has ended"),
            Self::Silent => f.write_str("no answer in time"),
            Self::Garbage(why) => write!(f, "the answer is not the method's message: {why}"),
        }
    }
}

impl std::error::Error for CallError {}

/// The result of a call.
pub type Answer<T> = std::result::Result<T, CallError>;

/// Reads a method's message.
pub fn read_answer<A: Message>(payload: &[u8]) -> Answer<A> {
    A::parse_from_bytes(payload).map_err(|error| CallError::Garbage(error.to_string()))
}

/// The status of a refusal.
///
/// Errors: when it was none.
pub fn refusal<T: fmt::Debug>(answer: Answer<T>) -> Result<(Code, String)> {
    match answer {
        Err(CallError::Refused { code, message }) => Ok((code, message)),
        Ok(answer) => bail!("it was accepted: {answer:?}"),
        Err(error) => bail!("not a refusal: {error}"),
    }
}

/// The status code of a refusal.
///
/// Errors: when it was none.
pub fn code_of<T: fmt::Debug>(answer: Answer<T>) -> Result<Code> {
    refusal(answer).map(|(code, _)| code)
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Its stream.
    pub stream: u32,
    /// Its type.
    pub kind: u8,
    /// The bytes after the header.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A request as clients send it.
    pub fn request(stream: u32, service: &str, method: &str, message: &impl Message) -> Self {
        let payload = message.write_to_bytes().expect("a message without required fields is always complete");
        Self::request_of_bytes(stream, service, method, payload, None)
    }

    /// A request whose message is given as it is.
    pub fn request_of_bytes(stream: u32, service: &str, method: &str, payload: Vec<u8>, timeout: Option<Duration>) -> Self {
        let request = Request {
            service: service.to_owned(),
            method: method.to_owned(),
            payload,
            timeout_nano: timeout.map_or(0, |timeout| i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX)),
            ..Request::default()
        };
        let payload = request.write_to_bytes().expect("a message without required fields is always complete");
        Self { stream, kind: REQUEST, payload }
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = header(u32::try_from(self.payload.len()).expect("shorter than 4 GiB"), self.stream, self.kind);
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// The answer in a response.
    pub fn answer(&self) -> Answer<Vec<u8>> {
        let silly = |message: String| CallError::Refused { code: Code::Unknown, message };
        let response = Response::parse_from_bytes(&self.payload).map_err(|error| silly(format!("not a response: {error}")))?;
        match response.status.as_ref() {
            Some(status) if status.code.value() != 0 => {
                Err(CallError::Refused { code: Code::from_number(status.code.value()), message: status.message.clone() })
            }
            _ => Ok(response.payload),
        }
    }
}

/// The header of a frame; the length may be wrong.
pub fn header(length: u32, stream: u32, kind: u8) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(&[kind, 0]);
    bytes
}

/// A connection that sends arbitrary bytes.
#[derive(Debug)]
pub struct Wire {
    reader: Incoming,
    writer: OwnedWriteHalf,
}

/// The reading half of a [`Wire`].
#[derive(Debug)]
pub struct Incoming {
    socket: OwnedReadHalf,
    input: Vec<u8>,
}

impl Wire {
    /// Connects.
    pub async fn connect(path: &Path) -> Result<Self> {
        let socket = within("connect", DEADLINE, UnixStream::connect(path)).await?;
        let (reader, writer) = socket.with_context(|| format!("connect {}", path.display()))?.into_split();
        Ok(Self { reader: Incoming { socket: reader, input: Vec::new() }, writer })
    }

    /// Sends bytes; the deadline is for each part of them.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        for part in bytes.chunks(1 << 16) {
            within("send", DEADLINE, self.writer.write_all(part)).await?.context("the connection has ended")?;
        }
        Ok(())
    }

    /// Sends as much as the peer accepts without waiting, and returns the number of bytes.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.writer.try_write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => result,
        }
    }

    /// Waits for the next frame; none when the peer has closed the connection.
    pub async fn receive(&mut self) -> Result<Option<Frame>> {
        self.reader.receive().await
    }

    /// Waits for the answer on `stream`, and drops others.
    pub async fn answer(&mut self, stream: u32) -> Result<Answer<Vec<u8>>> {
        loop {
            match self.receive().await? {
                Some(frame) if frame.stream == stream => return Ok(frame.answer()),
                Some(_) => {}
                None => return Ok(Err(CallError::Closed)),
            }
        }
    }

    /// Sends a request and waits for its answer.
    pub async fn call(&mut self, stream: u32, service: &str, method: &str, message: &impl Message) -> Result<Answer<Vec<u8>>> {
        self.send(&Frame::request(stream, service, method, message).encode()).await?;
        self.answer(stream).await
    }

    /// The two halves, for concurrent use.
    pub fn split(self) -> (Incoming, OwnedWriteHalf) {
        (self.reader, self.writer)
    }
}

impl Incoming {
    /// Waits for the next frames and looks at each; false when the peer has closed the connection. For many small ones.
    pub async fn receive_all(&mut self, mut look: impl FnMut(u32, &[u8]) -> Result<()>) -> Result<bool> {
        let read = within("receive frames", DEADLINE, self.socket.read_buf(&mut self.input)).await??;
        let mut at = 0;
        while let Some((stream, _kind, payload)) = first_frame(&self.input[at..]) {
            look(stream, payload)?;
            at += HEADER_BYTES + payload.len();
        }
        self.input.drain(..at);
        self.input.reserve(1 << 17);
        Ok(read > 0)
    }

    /// Waits for the next frame; none when the peer has closed the connection.
    pub async fn receive(&mut self) -> Result<Option<Frame>> {
        loop {
            if let Some(frame) = take_frame(&mut self.input) {
                return Ok(Some(frame));
            }
            let read = within("receive a frame", DEADLINE, self.socket.read_buf(&mut self.input)).await?;
            match read {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Takes a whole frame from the input buffer.
pub fn take_frame(input: &mut Vec<u8>) -> Option<Frame> {
    let (stream, kind, payload) = first_frame(input)?;
    let frame = Frame { stream, kind, payload: payload.to_vec() };
    input.drain(..HEADER_BYTES + frame.payload.len());
    Some(frame)
}

/// The frame that `input` begins with, if it is whole: stream, type and payload.
fn first_frame(input: &[u8]) -> Option<(u32, u8, &[u8])> {
    let ([a, b, c, d, e, f, g, h, kind, _flags], rest) = input.split_first_chunk::<HEADER_BYTES>()?;
    let payload = rest.get(..u32::from_be_bytes([*a, *b, *c, *d]) as usize)?;
    Some((u32::from_be_bytes([*e, *f, *g, *h]), *kind, payload))
}

/// A client like containerd's: any number of concurrent calls. Cheap to clone; the last one closes it.
#[derive(Debug, Clone)]
pub struct Connection(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    writer: AsyncMutex<(OwnedWriteHalf, u32)>,
    waiting: Arc<Mutex<Waiting>>,
    reader: AbortHandle,
}

#[derive(Debug, Default)]
struct Waiting {
    calls: BTreeMap<u32, oneshot::Sender<Frame>>,
    closed: bool,
}

impl Connection {
    /// Connects.
    pub async fn connect(path: &Path) -> Result<Self> {
        let (mut incoming, writer) = Wire::connect(path).await?.split();
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let theirs = Arc::clone(&waiting);
        let reader = tokio::spawn(async move {
            // a quiet connection is no error: callers have deadlines of their own
            loop {
                match incoming.receive().await {
                    Ok(Some(frame)) => {
                        let call = theirs.lock().expect("no panic under this lock").calls.remove(&frame.stream);
                        if let Some(call) = call {
                            let _caller_gave_up = call.send(frame);
                        }
                    }
                    Err(error) if error.downcast_ref::<io::Error>().is_none() => {}
                    Ok(None) | Err(_) => break,
                }
            }
            let mut waiting = theirs.lock().expect("no panic under this lock");
            waiting.closed = true;
            waiting.calls.clear();
        });
        Ok(Self(Arc::new(Inner { writer: AsyncMutex::new((writer, 1)), waiting, reader: reader.abort_handle() })))
    }

    /// Calls a method with its message encoded, and waits no longer than `deadline`.
    pub async fn call(&self, service: &str, method: &str, payload: Vec<u8>, deadline: Duration) -> Answer<Vec<u8>> {
        let call = self.begin(service, method, payload).await?;
        match eventually::timeout(deadline, call).await {
            Ok(Ok(frame)) => frame.answer(),
            Ok(Err(_)) => Err(CallError::Closed),
            Err(_) => Err(CallError::Silent),
        }
    }

    /// Sends a request; its answer comes later.
    pub async fn begin(&self, service: &str, method: &str, payload: Vec<u8>) -> Answer<oneshot::Receiver<Frame>> {
        let (sender, receiver) = oneshot::channel();
        let mut writer = self.0.writer.lock().await;
        let stream = writer.1;
        writer.1 += 2;
        {
            let mut waiting = self.0.waiting.lock().expect("no panic under this lock");
            if waiting.closed {
                return Err(CallError::Closed);
            }
            waiting.calls.insert(stream, sender);
        }
        let frame = Frame::request_of_bytes(stream, service, method, payload, None).encode();
        match eventually::timeout(DEADLINE, writer.0.write_all(&frame)).await {
            Ok(Ok(())) => Ok(receiver),
            Ok(Err(_)) => Err(CallError::Closed),
            Err(_) => Err(CallError::Silent),
        }
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&self) -> bool {
        self.0.waiting.lock().expect("no panic under this lock").closed
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.reader.abort();
    }
}
