//! The client of one proxy (`[proxy_plugins]`): a service of containerd's on a unix socket of another process.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Response, Status};
use tower_service::Service;

use crate::error::{Error, Result};

/// A connection that is made when it is needed, and again after it was lost; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    channel: Channel,
    address: Arc<Path>,
    /// What it is, and its name, as errors have it.
    name: Arc<str>,
}

impl Client {
    /// Nothing is connected yet. `name` says what it is, too.
    pub(crate) fn new(name: &str, address: &Path) -> Self {
        // the address of a socket is no URI: this one is never looked at
        let endpoint = Endpoint::from_static("http://localhost").connect_timeout(CONNECTED);
        let endpoint = endpoint.initial_stream_window_size(UNREAD_BYTES).initial_connection_window_size(4 * UNREAD_BYTES);
        let channel = endpoint.connect_with_connector_lazy(Connector(address.into()));
        Self { channel, address: address.into(), name: name.into() }
    }

    /// For a service.
    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// The answer to a call in a namespace, within a limit.
    ///
    /// Errors: the proxy's own, or that it cannot be reached; they name it.
    pub(crate) async fn call<Q, A, F>(&self, limit: Duration, namespace: &str, message: Q, call: impl FnOnce(Request<Q>) -> F) -> Result<A>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        self.ask(limit, namespace, message, call).await.map_err(|status| self.failed(&status))
    }

    /// The same with the status as it came.
    pub(crate) async fn ask<Q, A, F>(
        &self,
        limit: Duration,
        namespace: &str,
        message: Q,
        call: impl FnOnce(Request<Q>) -> F,
    ) -> Result<A, Status>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let mut request = Request::new(message);
        // namespaces are made of letters, digits and signs that a header can have
        if let Ok(namespace) = AsciiMetadataValue::try_from(namespace) {
            request.metadata_mut().insert("containerd-namespace", namespace);
        }
        within(limit, call(request)).await.map(Response::into_inner)
    }

    /// The error that the client of a call receives.
    pub(crate) fn failed(&self, status: &Status) -> Error {
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

    /// An error that names it.
    pub(crate) fn error(&self, code: Code, why: &str) -> Error {
        Error::Remote { code, message: format!("{}: {why}", self.name) }
    }
}

/// What comes within a limit. That nothing comes is an error of the connection.
pub(crate) async fn within<T>(limit: Duration, answer: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = || Status::from_error(Box::new(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {limit:?}"))));
    tokio::time::timeout(limit, answer).await.unwrap_or_else(|_elapsed| Err(late()))
}

/// Whether the proxy itself has answered that, rather than its connection.
pub(crate) fn is_answer(status: &Status) -> bool {
    std::error::Error::source(status).is_none()
}

/// Connects to a socket.
#[derive(Debug, Clone)]
struct Connector(PathBuf);

impl Service<Uri> for Connector {
    type Response = TokioIo<UnixStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let path = self.0.clone();
        Box::pin(async move { UnixStream::connect(path).await.map(TokioIo::new) })
    }
}

/// What a proxy may send of an answer before it is read: content comes in messages of a MiB.
const UNREAD_BYTES: u32 = 1 << 20;
/// To connect.
const CONNECTED: Duration = Duration::from_secs(10);
/// The longest answer, as in containerd.
pub(crate) const ANSWER_BYTES: usize = 16 << 20;
/// For calls that look something up, or remove it.
pub(crate) const SHORT: Duration = Duration::from_secs(60);
/// For calls that may fetch, copy or measure files.
pub(crate) const LONG: Duration = Duration::from_secs(600);
