//! A stream of writes that outlives this process' service: its messages go on to the process that has taken over.
//!
//! ```text
//! client ─▶ this process, which serves no other call any more ─▶ socket of the API ─▶ the next process, which goes on with the ingest
//! ```
//! The client notices nothing but a slower answer: the next process reads and hashes the bytes that the ingest already has, once.

use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use containerd_client::services::v1::WriteContentResponse;
use http::uri::PathAndQuery;
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use log::debug;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;
use tower_service::Service;

use super::body::MESSAGE_BYTES;
use super::uncopied::WriteRequest;

/// A stream of writes at the next process.
#[derive(Debug)]
pub(super) struct Relay {
    requests: mpsc::Sender<WriteRequest>,
    answers: Streaming<WriteContentResponse>,
}

impl Relay {
    /// Begins one with its first message, in a namespace, perhaps under a lease, and returns the answer to that.
    pub(super) async fn begin(
        address: &Path,
        namespace: &str,
        lease: Option<&str>,
        first: WriteRequest,
    ) -> Result<(Self, WriteContentResponse), Status> {
        let unreachable = |error: &dyn std::error::Error| {
            Status::unavailable(format!(
                "another x-manager process has taken over, and cannot be reached at {}: {error}",
                address.display()
            ))
        };
        let socket = UnixStream::connect(address).await.map_err(|error| unreachable(&error))?;
        let (send, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(socket)).await.map_err(|error| unreachable(&error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                debug!(error:%; "a relayed stream has lost its connection");
            }
        });
        let (requests, stream) = mpsc::channel(1);
        // it has room for one
        let _ = requests.send(first).await;
        let mut request = Request::new(ReceiverStream::new(stream));
        let metadata = request.metadata_mut();
        for (key, value) in [("containerd-namespace", Some(namespace)), ("containerd-lease", lease)] {
            if let Some(value) = value.and_then(|value| value.parse().ok()) {
                metadata.insert(key, value);
            }
        }
        let origin = http::Uri::from_static("http://localhost");
        let mut grpc = Grpc::with_origin(Connection(send), origin).max_decoding_message_size(MESSAGE_BYTES);
        grpc.ready().await.map_err(|error| unreachable(&error))?;
        let codec = ProstCodec::<WriteRequest, WriteContentResponse>::default();
        let answers = grpc.streaming(request, PathAndQuery::from_static(WRITE), codec).await?.into_inner();
        let mut relay = Self { requests, answers };
        let answer = relay.answer().await?;
        Ok((relay, answer))
    }

    /// Passes a message on, and returns its answer.
    pub(super) async fn pass(&mut self, request: WriteRequest) -> Result<WriteContentResponse, Status> {
        // if the stream has ended, its answer says why
        let _ = self.requests.send(request).await;
        self.answer().await
    }

    async fn answer(&mut self) -> Result<WriteContentResponse, Status> {
        self.answers.message().await?.ok_or_else(|| Status::unavailable("the stream of the next x-manager process has ended"))
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

/// The only method with streams in both directions that goes on.
const WRITE: &str = "/containerd.services.content.v1.Content/Write";
