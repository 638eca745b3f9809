//! Requests over connections that are kept for the next request.
//!
//! **Invariants:** heads are bounded by size and time, bodies by the time between two of their parts. A connection is used again only after
//! its last answer was read to the end.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::body::{Body as _, Bytes, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, HOST, HeaderMap, HeaderValue, PROXY_AUTHORIZATION, USER_AGENT};
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;

use super::error::Why;
use super::net::{ConnectError, Connector};
use super::options::Limits;
use super::url::{Origin, Url};
use super::{Progress, Source};
use crate::error::chain;

/// A client with the certificates of one configured host. It may be sent elsewhere by redirects.
#[derive(Debug)]
pub(super) struct Client {
    connector: Connector,
    limits: Limits,
    idle: Mutex<HashMap<Origin, Vec<Idle>>>,
}

#[derive(Debug)]
struct Idle {
    since: Instant,
    connection: Connection,
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Outgoing>,
    /// Whether it ends at a proxy that is sent whole URLs, and what is to authorize that.
    proxied: Option<Option<String>>,
}

/// One request.
#[derive(Clone)]
pub(super) struct Request<'a> {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) payload: Payload<'a>,
}

/// The body of a request.
#[derive(Clone)]
pub(super) enum Payload<'a> {
    None,
    Whole(Bytes),
    /// A source from that offset to its size.
    Source {
        source: &'a dyn Source,
        offset: u64,
        size: u64,
        progress: Progress<'a>,
    },
}

/// An answer.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Body,
}

/// The body of an answer.
#[derive(Debug)]
pub(super) struct Body {
    incoming: Incoming,
    idle_limit: Duration,
    /// Where its connection goes when it is read.
    home: Option<(Arc<Client>, Origin, Connection)>,
}

impl Client {
    pub(super) fn new(connector: Connector, limits: Limits) -> Arc<Self> {
        Arc::new(Self { connector, limits, idle: Mutex::default() })
    }

    /// Sends a request, and returns the answer as soon as its head is here.
    pub(super) async fn send(self: &Arc<Self>, request: &Request<'_>) -> Result<Response, SendError> {
        if matches!(request.payload, Payload::None)
            && let Some(connection) = self.kept(&request.url.origin)
        {
            // the server may have closed it meanwhile, without having seen the request
            match self.send_over(connection, request).await {
                Err(SendError::Other(Why::Broken(_))) if request.method.is_idempotent() => {}
                answered => return answered,
            }
        }
        let connection = self.connect(&request.url.origin).await?;
        self.send_over(connection, request).await
    }

    async fn send_over(self: &Arc<Self>, mut connection: Connection, request: &Request<'_>) -> Result<Response, SendError> {
        let (body, feed) = request.payload.body();
        let message = message(request, body, connection.proxied.as_ref()).map_err(SendError::Other)?;
        let broken = |error: hyper::Error| SendError::Other(Why::Broken(format!("no answer: {}", chain(&error))));
        let limit = self.limits.head;
        match tokio::time::timeout(limit, connection.sender.ready()).await {
            Ok(ready) => ready.map_err(broken)?,
            Err(_late) => return Err(SendError::Other(Why::Broken(format!("the connection is not free within {limit:?}")))),
        }
        let mut answer = std::pin::pin!(connection.sender.send_request(message));
        let (mut limit, mut early) = (limit, None);
        if let (Some(feed), Payload::Source { source, offset, size, progress }) = (feed, &request.payload) {
            let mut sent = *offset;
            while sent < *size && early.is_none() {
                let chunk = source.read(sent, CHUNK_BYTES).await.map_err(|error| SendError::Other(Why::Source(error)))?;
                if chunk.is_empty() || chunk.len() as u64 > *size - sent {
                    let why = "what is pushed has not the size that it was announced with";
                    return Err(SendError::Other(Why::Protocol(why.to_owned())));
                }
                let bytes = chunk.len() as u64;
                tokio::select! {
                    answered = &mut answer => early = Some(answered),
                    taken = tokio::time::timeout(self.limits.idle, feed.send(chunk)) => match taken {
                        Ok(Ok(())) => {
                            sent += bytes;
                            progress(sent);
                        }
                        // the connection is broken or the server has answered: both are to be seen next
                        Ok(Err(_closed)) => break,
                        Err(_late) => return Err(SendError::Other(Why::Broken(format!("nothing was taken for {:?}", self.limits.idle)))),
                    },
                }
            }
            // it reads all of it once more before it answers
            limit += Duration::from_secs(size / SERVER_BYTES_PER_SECOND);
        }
        let is_early = early.is_some();
        let answered = match early {
            Some(answered) => answered.map_err(broken)?,
            None => match tokio::time::timeout(limit, answer).await {
                Ok(answered) => answered.map_err(broken)?,
                Err(_late) => return Err(SendError::Other(Why::Broken(format!("no answer within {limit:?}")))),
            },
        };
        let (head, incoming) = answered.into_parts();
        let is_keepable = !is_early && head.version == hyper::Version::HTTP_11;
        let home = is_keepable.then(|| (Arc::clone(self), request.url.origin.clone(), connection));
        let mut body = Body { incoming, idle_limit: self.limits.idle, home };
        body.send_home_at_end();
        Ok(Response { status: head.status, headers: head.headers, body })
    }

    async fn connect(&self, origin: &Origin) -> Result<Connection, SendError> {
        let connected = self.connector.connect(origin).await.map_err(|error| match error {
            ConnectError::Lasting(why) => SendError::Other(Why::Unreachable(why)),
            ConnectError::Passing(why) => SendError::Other(Why::Broken(why)),
            ConnectError::NotTls(why) => SendError::NotTls(why),
        })?;
        let mut builder = Builder::new();
        builder.max_headers(HEADERS).max_buf_size(BUFFER_BYTES);
        let (sender, driver) =
            builder.handshake(TokioIo::new(connected.stream)).await.map_err(|error| SendError::Other(Why::Broken(chain(&error))))?;
        // it ends with the sender; why a connection broke is what its request reports
        tokio::spawn(async move {
            let _ = driver.await;
        });
        Ok(Connection { sender, proxied: connected.proxied })
    }

    /// A connection to a server that a former request has left.
    fn kept(&self, origin: &Origin) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = idle.get_mut(origin)?;
        kept.retain(Idle::is_usable);
        kept.pop().map(|one| one.connection)
    }

    fn keep(&self, origin: Origin, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // also those of servers that no request goes to any more: redirects may lead to others each time
        idle.retain(|_origin, kept| {
            kept.retain(Idle::is_usable);
            !kept.is_empty()
        });
        if idle.values().map(Vec::len).sum::<usize>() >= KEPT_IN_ALL || connection.sender.is_closed() {
            return;
        }
        let kept = idle.entry(origin).or_default();
        if kept.len() < KEPT {
            kept.push(Idle { since: Instant::now(), connection });
        }
    }
}

impl Idle {
    fn is_usable(&self) -> bool {
        self.since.elapsed() < KEPT_FOR && !self.connection.sender.is_closed()
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum SendError {
    /// The server has answered with something that is no TLS.
    NotTls(String),
    Other(Why),
}

impl SendError {
    pub(super) fn into_why(self) -> Why {
        match self {
            Self::NotTls(why) => Why::Broken(why),
            Self::Other(why) => why,
        }
    }
}

/// A request as it is sent.
fn message(request: &Request<'_>, body: Outgoing, proxied: Option<&Option<String>>) -> Result<hyper::Request<Outgoing>, Why> {
    let url = &request.url;
    let target =
        if proxied.is_some() { format!("{}://{}{}", url.origin.scheme.name(), url.origin.authority(), url.target()) } else { url.target() };
    let value = |text: &str| HeaderValue::from_str(text).map_err(|_error| Why::Protocol("a header cannot be sent".to_owned()));
    let mut headers = request.headers.clone();
    headers.insert(HOST, value(&url.origin.authority())?);
    headers.entry(USER_AGENT).or_insert(HeaderValue::from_static(concat!("x-manager/", env!("CARGO_PKG_VERSION"))));
    if let Some(Some(authorization)) = proxied {
        headers.insert(PROXY_AUTHORIZATION, value(authorization)?);
    }
    if matches!(request.payload, Payload::None) && !matches!(request.method, Method::GET | Method::HEAD) {
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
    let mut message = hyper::Request::new(body);
    *message.uri_mut() = target.parse().map_err(|_error| Why::Protocol("the URL cannot be sent".to_owned()))?;
    *message.method_mut() = request.method.clone();
    *message.headers_mut() = headers;
    Ok(message)
}

impl Payload<'_> {
    fn body(&self) -> (Outgoing, Option<mpsc::Sender<Bytes>>) {
        match self {
            Self::None => (Outgoing::Whole(Bytes::new()), None),
            Self::Whole(bytes) => (Outgoing::Whole(bytes.clone()), None),
            Self::Source { offset, size, .. } => {
                let (feed, parts) = mpsc::channel(1);
                (Outgoing::Parts { parts, left: size.saturating_sub(*offset) }, Some(feed))
            }
        }
    }
}

/// The body of a request, as a connection takes it.
#[derive(Debug)]
enum Outgoing {
    Whole(Bytes),
    Parts { parts: mpsc::Receiver<Bytes>, left: u64 },
}

impl hyper::body::Body for Outgoing {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.get_mut() {
            Self::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Parts { left: 0, .. } => Poll::Ready(None),
            Self::Parts { parts, left } => parts.poll_recv(context).map(|part| match part {
                Some(part) => {
                    *left = left.saturating_sub(part.len() as u64);
                    Some(Ok(Frame::data(part)))
                }
                None => Some(Err(std::io::ErrorKind::BrokenPipe.into())),
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_empty(),
            Self::Parts { left, .. } => *left == 0,
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match self {
            Self::Whole(bytes) => bytes.len() as u64,
            Self::Parts { left, .. } => *left,
        })
    }
}

impl Response {
    /// The value of a header, if it has it once and as text.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

impl Body {
    /// The next bytes; none at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Why> {
        loop {
            let frame = std::future::poll_fn(|context| Pin::new(&mut self.incoming).poll_frame(context));
            let frame = match tokio::time::timeout(self.idle_limit, frame).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => return Err(Why::Broken(format!("the body ended early: {}", chain(&error)))),
                Ok(None) => {
                    self.send_home();
                    return Ok(None);
                }
                Err(_late) => return Err(Why::Broken(format!("no data within {:?}", self.idle_limit))),
            };
            // trailers are passed over
            if let Ok(bytes) = frame.into_data()
                && !bytes.is_empty()
            {
                self.send_home_at_end();
                return Ok(Some(bytes));
            }
        }
    }

    /// All of a short body; none if it is longer.
    pub(super) async fn all(&mut self, most: usize) -> Result<Option<Vec<u8>>, Why> {
        let mut all = Vec::new();
        let started = Instant::now();
        while let Some(bytes) = self.next().await? {
            if all.len() + bytes.len() > most {
                return Ok(None);
            }
            all.extend_from_slice(&bytes);
            if started.elapsed() > DOCUMENT_LIMIT {
                return Err(Why::Broken(format!("the body is not complete after {DOCUMENT_LIMIT:?}")));
            }
        }
        Ok(Some(all))
    }

    /// Reads what is left, if it is short, so that the connection can be used again.
    pub(super) async fn pass_over(&mut self) {
        if self.home.is_some() {
            // one that takes longer is closed
            let _ = tokio::time::timeout(PASS_OVER_LIMIT, self.all(PASS_OVER_BYTES)).await;
        }
    }

    /// How many bytes there are, if the server says so.
    pub(super) fn announced(&self) -> Option<u64> {
        self.incoming.size_hint().exact()
    }

    /// One with a length ends with its last byte already.
    fn send_home_at_end(&mut self) {
        if self.incoming.is_end_stream() {
            self.send_home();
        }
    }

    fn send_home(&mut self) {
        if let Some((client, origin, connection)) = self.home.take() {
            client.keep(origin, connection);
        }
    }
}

/// `Authorization` is a secret, also for what logs headers.
pub(super) fn authorize(headers: &mut HeaderMap, value: &str) -> Result<(), Why> {
    let mut value =
        HeaderValue::from_str(value).map_err(|_error| Why::Unauthorized("the credential cannot be sent in a header".to_owned()))?;
    value.set_sensitive(true);
    headers.insert(AUTHORIZATION, value);
    Ok(())
}

/// What is read of a source at once.
const CHUNK_BYTES: usize = 256 << 10;
/// Connections to one server that wait for another request, and for how long.
const KEPT: usize = 8;
/// The same of all servers that the requests of one client were redirected to.
const KEPT_IN_ALL: usize = 32;
const KEPT_FOR: Duration = Duration::from_secs(30);
/// Of an answer.
const HEADERS: usize = 128;
/// A connection buffers so much at most, and a head is no longer. Of larger buffers the allocator would map and unmap each.
const BUFFER_BYTES: usize = 64 << 10;
/// How fast a server is expected to verify what was pushed.
const SERVER_BYTES_PER_SECOND: u64 = 16 << 20;
/// Of a body that is not needed: a longer one costs more than a new connection.
const PASS_OVER_BYTES: usize = 64 << 10;
const PASS_OVER_LIMIT: Duration = Duration::from_secs(1);
/// For all of a manifest, a token, or an error.
const DOCUMENT_LIMIT: Duration = Duration::from_secs(120);
