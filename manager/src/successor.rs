//! The process that has taken over, as a client of its API: what this process cannot end by itself goes on there.
//!
//! ```text
//! client ─▶ this process, which serves no new call any more ─▶ socket of the API ─▶ the next process
//! ```
//! The client's connection stays where it is, and it notices nothing but a slower answer. If the next process is replaced as well, it passes on
//! what it gets in the same way.
//!
//! **Invariant:** only what was not done here is passed on: the next process is the one that changes the store.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use containerd_client::services::v1::{DeleteRequest, WriteAction, WriteContentResponse};
use http::uri::PathAndQuery;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use log::debug;
use prost::Message;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;
use tower_service::Service;

use crate::api::uncopied::WriteRequest;
use crate::content::{Digest, Opening};
use crate::error::{Error, Result};
use crate::name::Namespace;

/// Where it serves, whichever process that is.
#[derive(Debug, Clone)]
pub(crate) struct Successor {
    address: Arc<Path>,
}

/// What a call says of itself beside its message.
#[derive(Debug, Clone, Default)]
pub(crate) struct Headers {
    pub(crate) namespace: Option<String>,
    /// The client's lease.
    pub(crate) lease: Option<String>,
    /// The lease of a transfer that goes on, if it has made one.
    pub(crate) transfer: Option<String>,
}

impl Successor {
    /// The process that serves there.
    pub(crate) fn new(address: &Path) -> Self {
        Self { address: address.into() }
    }

    /// A connection of its own: a successor may be replaced, too.
    ///
    /// Errors: nothing was sent.
    pub(crate) async fn connect(&self) -> Result<Connected, Status> {
        let unreachable = |error: &dyn std::error::Error| {
            let address = self.address.display();
            Status::unavailable(format!("another x-manager process has taken over, and cannot be reached at {address}: {error}"))
        };
        let socket = UnixStream::connect(&self.address).await.map_err(|error| unreachable(&error))?;
        let (send, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(socket)).await.map_err(|error| unreachable(&error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                debug!(error:%; "a relayed call has lost its connection");
            }
        });
        let origin = http::Uri::from_static("http://localhost");
        let grpc = Grpc::with_origin(Connection(send), origin);
        let mut grpc = grpc.max_decoding_message_size(MESSAGE_BYTES).max_encoding_message_size(MESSAGE_BYTES);
        grpc.ready().await.map_err(|error| unreachable(&error))?;
        Ok(Connected { grpc })
    }

    /// Ends a lease.
    pub(crate) async fn end_lease(&self, namespace: &Namespace, id: &str) -> Result<()> {
        let headers = Headers { namespace: Some(namespace.to_string()), ..Headers::default() };
        let request = DeleteRequest { id: id.to_owned(), sync: false };
        let connected = self.connect().await.map_err(remote)?;
        connected.unary::<_, ()>("/containerd.services.leases.v1.Leases/Delete", &headers, request).await.map_err(remote)
    }

    /// Opens a reference for writing.
    ///
    /// Errors: those of [`crate::content::Content::write`], by their codes.
    pub(crate) async fn write(&self, opening: &Opening) -> Result<Writing> {
        let headers = Headers { namespace: Some(opening.namespace.to_string()), lease: opening.lease.clone(), ..Headers::default() };
        let first = WriteRequest {
            action: WriteAction::Stat as i32,
            r#ref: opening.reference.clone(),
            total: signed(opening.total),
            expected: opening.expected.as_ref().map(Digest::to_string).unwrap_or_default(),
            ..WriteRequest::default()
        };
        let (relay, last) = Relay::begin(self, &headers, first).await.map_err(remote)?;
        Ok(Writing { relay, last })
    }
}

/// An error of another process.
pub(crate) fn remote(status: Status) -> Error {
    Error::Remote { code: status.code(), message: status.message().to_owned() }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// A connection for one call.
pub(crate) struct Connected {
    grpc: Grpc<Connection>,
}

impl Connected {
    /// A call with one message and one answer.
    pub(crate) async fn unary<Q, A>(mut self, path: &str, headers: &Headers, message: Q) -> Result<A, Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let answer = self.grpc.unary(headers.request(message), method(path)?, ProstCodec::<Q, A>::default()).await?;
        Ok(answer.into_inner())
    }

    /// A call with streams of messages in both directions, which begins with one.
    pub(crate) async fn duplex<Q, A>(mut self, path: &str, headers: &Headers, first: Q) -> Result<(mpsc::Sender<Q>, Streaming<A>), Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let (requests, stream) = mpsc::channel(1);
        // it has room for one
        let _ = requests.send(first).await;
        let request = headers.request(ReceiverStream::new(stream));
        let answers = self.grpc.streaming(request, method(path)?, ProstCodec::<Q, A>::default()).await?;
        Ok((requests, answers.into_inner()))
    }
}

fn method(path: &str) -> Result<PathAndQuery, Status> {
    path.parse().map_err(|_| Status::unimplemented(format!("x-manager does not serve {path:?}")))
}

impl Headers {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        for (key, value) in [("containerd-namespace", &self.namespace), ("containerd-lease", &self.lease), (TRANSFER_LEASE, &self.transfer)]
        {
            if let Some(value) = value.as_ref().and_then(|value| value.parse().ok()) {
                metadata.insert(key, value);
            }
        }
        request
    }
}

/// A stream of writes at the next process.
#[derive(Debug)]
pub(crate) struct Relay {
    requests: mpsc::Sender<WriteRequest>,
    answers: Streaming<WriteContentResponse>,
}

impl Relay {
    /// Begins one with its first message, in a namespace, perhaps under a lease, and returns the answer to that.
    pub(crate) async fn begin(
        successor: &Successor,
        headers: &Headers,
        first: WriteRequest,
    ) -> Result<(Self, WriteContentResponse), Status> {
        let (requests, answers) = successor.connect().await?.duplex(WRITE, headers, first).await?;
        let mut relay = Self { requests, answers };
        let answer = relay.answer().await?;
        Ok((relay, answer))
    }

    /// Passes a message on, and returns its answer.
    pub(crate) async fn pass(&mut self, request: WriteRequest) -> Result<WriteContentResponse, Status> {
        // if the stream has ended, its answer says why
        let _ = self.requests.send(request).await;
        self.answer().await
    }

    async fn answer(&mut self) -> Result<WriteContentResponse, Status> {
        self.answers.message().await?.ok_or_else(|| Status::unavailable("the stream of the next x-manager process has ended"))
    }
}

/// The writer of a reference at the next process.
#[derive(Debug)]
pub(crate) struct Writing {
    relay: Relay,
    last: WriteContentResponse,
}

impl Writing {
    /// How much is written.
    pub(crate) fn offset(&self) -> u64 {
        u64::try_from(self.last.offset).unwrap_or_default()
    }

    /// The digest of what is written.
    pub(crate) fn digest(&self) -> Result<Digest> {
        Digest::parse(&self.last.digest)
    }

    /// Writes bytes there; at 0 in place of everything that is there.
    pub(crate) async fn write(&mut self, offset: u64, data: Bytes) -> Result<()> {
        let action = WriteAction::Write as i32;
        let request = WriteRequest { action, offset: signed(offset), data, ..WriteRequest::default() };
        self.last = self.relay.pass(request).await.map_err(remote)?;
        Ok(())
    }

    /// Makes content of it, and returns its digest.
    pub(crate) async fn commit(mut self, size: u64, expected: Option<&Digest>) -> Result<Digest> {
        let request = WriteRequest {
            action: WriteAction::Commit as i32,
            offset: self.last.offset,
            total: signed(size),
            expected: expected.map(Digest::to_string).unwrap_or_default(),
            ..WriteRequest::default()
        };
        let answer = self.relay.pass(request).await.map_err(remote)?;
        Digest::parse(&answer.digest)
    }
}

/// A connection as tonic calls it.
struct Connection(SendRequest<Body>);

impl Service<http::Request<Body>> for Connection {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// The longest message in either direction, as clients of the API have it.
pub(crate) const MESSAGE_BYTES: usize = 16 << 20;
/// The lease that a transfer had made when another process took over: the transfer that goes on owns it.
pub(crate) const TRANSFER_LEASE: &str = "x-manager-transfer-lease";
const WRITE: &str = "/containerd.services.content.v1.Content/Write";
