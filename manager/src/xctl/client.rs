//! A connection to the daemon, bound to one namespace. Every call has a deadline but Wait and Subscribe.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::tasks_client::TasksClient;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use crate::error::{Error, Result};

/// A connection; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    channel: Channel,
    namespace: String,
    header: AsciiMetadataValue,
    lease: Option<AsciiMetadataValue>,
}

impl Client {
    /// Connects to the daemon at `address`, or to x-manager or else containerd where it usually is.
    pub(crate) async fn connect(address: Option<&Path>, namespace: &str) -> Result<Self> {
        let header = namespace.parse().map_err(|error| Error::unreadable(format!("the namespace {namespace:?}"), error))?;
        let address = address.map_or_else(usual_address, Path::to_owned);
        let path = address.clone();
        let connector = Connector(path);
        // the address of a socket is no URI: this one is never looked at
        let endpoint = Endpoint::from_static("http://localhost").connect_timeout(CONNECTED);
        let channel =
            endpoint.connect_with_connector(connector).await.map_err(|error| Error::NoDaemon { address, source: deepest(error) })?;
        Ok(Self { channel, namespace: namespace.to_owned(), header, lease: None })
    }

    /// The same, with what its calls make kept by a lease.
    pub(crate) fn with_lease(&self, id: &str) -> Result<Self> {
        let lease = id.parse().map_err(|error| Error::unreadable(format!("the lease {id:?}"), error))?;
        Ok(Self { lease: Some(lease), ..self.clone() })
    }

    /// The namespace of every call.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// A request in this namespace.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.header.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        request
    }

    /// The services.
    pub(crate) fn api(&self) -> containerd_client::Client {
        self.channel.clone().into()
    }

    /// The service for images; its lists may be long.
    pub(crate) fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone()).max_decoding_message_size(LONGEST_ANSWER)
    }

    /// The service for content; parts of blobs may be long.
    pub(crate) fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone()).max_decoding_message_size(LONGEST_ANSWER)
    }

    /// The service for tasks; its lists may be long.
    pub(crate) fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone()).max_decoding_message_size(LONGEST_ANSWER)
    }

    /// The service for containers; its lists may be long.
    pub(crate) fn containers(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel.clone()).max_decoding_message_size(LONGEST_ANSWER)
    }
}

/// Waits for the answer to a call, which `doing` names in a message.
pub(crate) async fn call<T>(doing: impl Into<String>, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T> {
    call_within(ANSWERED, doing, call).await
}

/// The same, for a call that may take longer.
pub(crate) async fn call_within<T>(
    limit: Duration,
    doing: impl Into<String>,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(Error::Call { doing: doing.into(), status }),
        Err(_elapsed) => Err(Error::Late { doing: doing.into(), limit }),
    }
}

/// Connects to a socket, whatever URI it is asked for.
struct Connector(PathBuf);

impl tower_service::Service<http::Uri> for Connector {
    type Response = hyper_util::rt::TokioIo<tokio::net::UnixStream>;
    type Error = std::io::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = std::io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let path = self.0.clone();
        Box::pin(async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) })
    }
}

/// The error that the others wrap: "transport error" says nothing to an operator.
fn deepest(error: tonic::transport::Error) -> Box<dyn std::error::Error + Send + Sync> {
    let mut deepest: &dyn std::error::Error = &error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string().into()
}

fn usual_address() -> PathBuf {
    let manager = Path::new(MANAGER);
    if manager.exists() { manager.to_owned() } else { PathBuf::from(CONTAINERD) }
}

/// The socket of x-manager.
pub(crate) const MANAGER: &str = "/run/x-manager/x-manager.sock";
/// The socket of containerd.
const CONTAINERD: &str = "/run/containerd/containerd.sock";
const CONNECTED: Duration = Duration::from_secs(10);
const ANSWERED: Duration = Duration::from_secs(120);
/// As large as x-manager's answers are.
const LONGEST_ANSWER: usize = 16 << 20;
