//! The client of one proxy: containerd's Snapshots service on a unix socket of another process.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Response, Status};
use tower_service::Service;

use crate::error::{Error, Result};

/// A connection that is made when it is needed, and again after it was lost; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Client {
    channel: Channel,
    address: Arc<Path>,
    name: Arc<str>,
}

impl Client {
    /// Nothing is connected yet.
    pub(super) fn new(name: &str, address: &Path) -> Self {
        // the address of a socket is no URI: this one is never looked at
        let endpoint = Endpoint::from_static("http://localhost").connect_timeout(CONNECTED);
        let channel = endpoint.connect_with_connector_lazy(Connector(address.into()));
        Self { channel, address: address.into(), name: name.into() }
    }

    /// The service.
    pub(super) fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES)
    }

    /// The answer to a call in a namespace, within a limit.
    ///
    /// Errors: the proxy's own, or that it cannot be reached; they name it.
    pub(super) async fn call<Q, A, F>(&self, limit: Duration, namespace: &str, message: Q, call: impl FnOnce(Request<Q>) -> F) -> Result<A>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let mut request = Request::new(message);
        // namespaces are made of letters, digits and signs that a header can have
        if let Ok(namespace) = AsciiMetadataValue::try_from(namespace) {
            request.metadata_mut().insert("containerd-namespace", namespace);
        }
        match tokio::time::timeout(limit, call(request)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.failed(&status)),
            Err(_elapsed) => Err(self.error(Code::Unavailable, &format!("no answer from {} within {limit:?}", self.address.display()))),
        }
    }

    /// The error that the client of a call receives.
    pub(super) fn failed(&self, status: &Status) -> Error {
        // what the connection has failed with, rather than the proxy
        let mut cause = std::error::Error::source(status);
        while let Some(deeper) = cause.and_then(std::error::Error::source) {
            cause = Some(deeper);
        }
        match cause {
            Some(cause) => self.error(Code::Unavailable, &format!("cannot reach {}: {cause}", self.address.display())),
            None => self.error(status.code(), status.message()),
        }
    }

    fn error(&self, code: Code, why: &str) -> Error {
        Error::Remote { code, message: format!("snapshotter {}: {why}", self.name) }
    }
}

/// Connects to a socket.
#[derive(Debug, Clone)]
struct Connector(PathBuf);

impl Service<Uri> for Connector {
    type Response = TokioIo<UnixStream>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let path = self.0.clone();
        Box::pin(async move { UnixStream::connect(path).await.map(TokioIo::new) })
    }
}

/// To connect.
const CONNECTED: Duration = Duration::from_secs(10);
/// The longest answer, as in containerd.
const ANSWER_BYTES: usize = 16 << 20;
