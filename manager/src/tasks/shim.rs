//! A connection to a shim.
//!
//! Task v2 and v3 have the same messages; their services differ in name. The messages are those of `containerd-shim-protos`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::ttrpc::context;
use containerd_shim_protos::ttrpc::{Code, Request};
use protobuf::Message;
use tokio::net::UnixStream;
use tokio::sync::watch;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

use super::bundle::Address;
use crate::error::{Error, Result};
use crate::guarded::Guarded;
use crate::name::Namespace;

/// A shim that answers, or did when last heard of.
#[derive(Clone)]
pub(crate) struct Shim {
    client: Client,
    service: &'static str,
    namespace: Namespace,
    address: String,
    open: watch::Receiver<()>,
}

impl std::fmt::Debug for Shim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shim({} at {})", self.service, self.address)
    }
}

/// Why a call to a shim has no answer.
#[derive(Debug)]
pub(crate) enum Unanswered {
    /// The shim says no.
    Refused(Error),
    /// It did not answer in time.
    Late(Error),
    /// The connection has ended.
    Lost,
}

impl From<Unanswered> for Error {
    fn from(reason: Unanswered) -> Self {
        match reason {
            Unanswered::Refused(error) | Unanswered::Late(error) => error,
            Unanswered::Lost => Self::Unavailable("the shim has ended".to_owned()),
        }
    }
}

impl Shim {
    /// Connects.
    ///
    /// Errors: [`Error::Unimplemented`] or [`Error::Launch`] for an address that cannot be used, [`Error::Io`] when nobody listens there.
    pub(crate) async fn connect(address: &Address, namespace: &Namespace) -> Result<Self> {
        let service = match (address.version, address.protocol.as_str()) {
            (2, "ttrpc") => "containerd.task.v2.Task",
            (3, "ttrpc") => "containerd.task.v3.Task",
            (version, protocol) => {
                let sentence = format!("a shim that speaks version {version} over {protocol:?}, but only 2 and 3 over \"ttrpc\" are known");
                return Err(Error::Unimplemented(sentence));
            }
        };
        let path = socket_path(&address.address)?;
        let connecting = tokio::time::timeout(CONNECT, UnixStream::connect(&path)).await;
        let socket = connecting.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
        let socket = socket.map_err(|source| Error::Io { op: CONNECTING, path, source })?;
        let (guard, open) = watch::channel(());
        let client = Client::new(Socket::new(Guarded::new(socket, guard)));
        Ok(Self { client, service, namespace: namespace.clone(), address: address.address.clone(), open })
    }

    /// Where it serves: tasks with the same address share a shim.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Waits until the connection ends.
    pub(crate) async fn closed(&self) {
        let mut open = self.open.clone();
        // nothing is ever sent; an error means that the socket was dropped
        while open.changed().await.is_ok() {}
    }

    /// Calls a method of the task service; `limit` none for those that take as long as a container lives.
    pub(crate) async fn call<A: Message>(
        &self,
        method: &'static str,
        request: &impl Message,
        limit: Option<Duration>,
    ) -> Result<A, Unanswered> {
        let invalid = |error: protobuf::Error| Unanswered::Refused(Error::Launch(format!("{method} of the shim: {error}")));
        let request = Request {
            service: self.service.to_owned(),
            method: method.to_owned(),
            payload: request.write_to_bytes().map_err(invalid)?,
            metadata: context::to_pb([("containerd-namespace-ttrpc".to_owned(), vec![self.namespace.to_string()])].into()),
            timeout_nano: limit.map_or(0, |limit| i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX)),
            ..Request::default()
        };
        let bytes = request.compute_size();
        if bytes > MESSAGE_BYTES {
            let sentence = format!("{method} takes {bytes} bytes, and a shim takes {MESSAGE_BYTES} at most");
            return Err(Unanswered::Refused(Error::Exhausted(sentence)));
        }
        let late =
            || Unanswered::Late(Error::Unavailable(format!("the shim did not answer {method} within {:?}", limit.unwrap_or_default())));
        let answer = async {
            tokio::select! {
                biased;
                answer = self.client.request(request) => Some(answer),
                () = self.closed() => None,
            }
        };
        // the library's own clock starts when the request is written
        let answer = match limit {
            Some(limit) => tokio::time::timeout(limit + GRACE, answer).await.map_err(|_| late())?,
            None => answer.await,
        };
        match answer {
            Some(Ok(response)) => A::parse_from_bytes(&response.payload).map_err(invalid),
            Some(Err(ttrpc::Error::RpcStatus(status))) if status.code.enum_value() != Ok(Code::OK) => {
                Err(Unanswered::Refused(Error::Shim { code: status.code.value(), message: status.message }))
            }
            Some(Err(_)) if limit.is_some() && !self.is_closed() => Err(late()),
            Some(Err(_)) | None => Err(Unanswered::Lost),
        }
    }

    fn is_closed(&self) -> bool {
        self.open.has_changed().is_err()
    }
}

fn socket_path(address: &str) -> Result<PathBuf> {
    let path = Path::new(address.strip_prefix("unix://").unwrap_or(address));
    if path.is_absolute() && path.as_os_str().len() <= MAX_PATH_BYTES {
        return Ok(path.to_owned());
    }
    let shown: String = address.chars().take(200).collect();
    Err(Error::Launch(format!("a shim says it serves at {shown:?}, which is not the path of a socket")))
}

/// What an error says of an attempt to connect.
pub(super) const CONNECTING: &str = "connect to shim at";
/// The longest message of ttrpc.
const MESSAGE_BYTES: u64 = 4 << 20;
/// To connect: a shim that lives but does not accept has a queue for it.
const CONNECT: Duration = Duration::from_secs(5);
/// Beyond a call's own limit.
const GRACE: Duration = Duration::from_millis(200);
/// Of a socket's path, without the zero at its end.
const MAX_PATH_BYTES: usize = 107;
