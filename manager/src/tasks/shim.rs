//! A shim, over its current connection.
//!
//! Task v2 and v3 have the same messages; their services differ in name. A shim may serve sandboxes as well, over the same connection. The messages
//! are those of `containerd-shim-protos`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::ttrpc::context;
use containerd_shim_protos::ttrpc::{Code, Request, Response};
use log::{debug, warn};
use protobuf::Message;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::LONGEST_PAUSE;
use super::bundle::Address;
use super::connection::{Calls, NoAnswer};
use crate::error::{Error, Result};
use crate::name::Namespace;

/// A shim that is running, as far as is known. A lost connection is made again for as long as the shim's socket accepts.
#[derive(Clone)]
pub(crate) struct Shim {
    service: &'static str,
    namespace: Namespace,
    at: Address,
    link: watch::Receiver<Link>,
}

/// How a shim is reached.
#[derive(Debug, Clone)]
enum Link {
    /// Over this connection, which may have ended a moment ago.
    Open(Calls),
    /// Not at present: it is being connected to again.
    Broken,
    /// No longer: its socket refuses connections or is gone.
    Dead,
}

impl std::fmt::Debug for Shim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shim({} at {})", self.service, self.at.address)
    }
}

/// Why a call to a shim has no answer.
#[derive(Debug)]
pub(crate) enum Unanswered {
    /// The shim refused the call.
    Refused(Error),
    /// It did not answer in time, or the connection ended before its answer came: it may have done what it was asked.
    Late(Error),
    /// It is dead.
    Lost,
}

impl Unanswered {
    /// Whether the shim does not know what was asked for.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused(Error::Remote { code: tonic::Code::NotFound, .. }))
    }

    /// Whether the shim does not serve the method.
    pub(crate) fn is_unimplemented(&self) -> bool {
        // the ttrpc library for Rust has InvalidArgument for a service that it does not know
        matches!(self, Self::Refused(Error::Remote { code: tonic::Code::Unimplemented | tonic::Code::InvalidArgument, .. }))
    }

    /// Whether it has what was to be made.
    pub(crate) fn is_already_exists(&self) -> bool {
        matches!(self, Self::Refused(Error::Remote { code: tonic::Code::AlreadyExists, .. }))
    }
}

impl From<Unanswered> for Error {
    fn from(reason: Unanswered) -> Self {
        match reason {
            Unanswered::Refused(error) | Unanswered::Late(error) => error,
            Unanswered::Lost => Self::ShimEnded,
        }
    }
}

impl Shim {
    /// Connects.
    ///
    /// Errors: [`Error::Unimplemented`] or [`Error::ShimAddress`] for an address that cannot be used, [`Error::ShimDead`] when the socket refuses or is
    /// gone, [`Error::ShimUnreachable`] when that cannot be said.
    pub(crate) async fn connect(address: &Address, namespace: &Namespace) -> Result<Self> {
        let service = match (address.version, address.protocol.as_str()) {
            (2, "ttrpc") => "containerd.task.v2.Task",
            (3, "ttrpc") => "containerd.task.v3.Task",
            (version, protocol) => {
                let sentence = format!("the shim uses version {version} over {protocol:?}; supported are 2 and 3 over \"ttrpc\"");
                return Err(Error::Unimplemented(sentence));
            }
        };
        let path = socket_path(&address.address)?;
        let socket = open(&path).await?;
        let calls = Calls::default();
        let (send, link) = watch::channel(Link::Open(calls.clone()));
        tokio::spawn(keep_connected(path, socket, calls, send));
        Ok(Self { service, namespace: namespace.clone(), at: address.clone(), link })
    }

    /// One that is dead.
    #[cfg(test)]
    pub(super) fn unconnected() -> Self {
        let namespace = Namespace::parse("ns").expect("a name");
        let at = Address { version: 2, address: String::new(), protocol: String::new() };
        Self { service: "", namespace, at, link: watch::channel(Link::Dead).1 }
    }

    /// Where it serves: tasks with the same address share a shim.
    pub(crate) fn at(&self) -> &Address {
        &self.at
    }

    /// Waits until it is dead. A closed connection alone is no crash.
    pub(crate) async fn closed(&self) {
        let mut link = self.link.clone();
        // the sender is dropped only after the shim is dead
        let _ = link.wait_for(|link| matches!(link, Link::Dead)).await;
    }

    /// Calls a method of the task service; `limit` none for those that last as long as a container.
    ///
    /// A call that the end of a connection interrupts is made again on the next one when nothing of it was sent, or when it changes nothing.
    pub(crate) async fn call<A: Message>(
        &self,
        method: &'static str,
        request: &impl Message,
        limit: Option<Duration>,
    ) -> Result<A, Unanswered> {
        self.call_service(self.service, method, request, limit).await
    }

    /// The same for the sandbox service.
    pub(crate) async fn call_sandbox<A: Message>(
        &self,
        method: &'static str,
        request: &impl Message,
        limit: Option<Duration>,
    ) -> Result<A, Unanswered> {
        self.call_service(SANDBOX_SERVICE, method, request, limit).await
    }

    async fn call_service<A: Message>(
        &self,
        service: &str,
        method: &'static str,
        request: &impl Message,
        limit: Option<Duration>,
    ) -> Result<A, Unanswered> {
        let invalid = |error: protobuf::Error| Unanswered::Refused(Error::ShimAnswer { method, source: error.into() });
        let request = Request {
            service: service.to_owned(),
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
        let answer = self.answer(method, request.write_to_bytes().map_err(invalid)?);
        let answer = match limit {
            // the shim's own clock starts when it has read the request
            Some(limit) => tokio::time::timeout(limit + GRACE, answer)
                .await
                .unwrap_or_else(|_elapsed| Err(Unanswered::Late(Error::ShimLate { method, limit }))),
            None => answer.await,
        };
        let response = Response::parse_from_bytes(&answer?).map_err(invalid)?;
        match response.status.into_option() {
            Some(status) if status.code.enum_value() != Ok(Code::OK) => {
                Err(Unanswered::Refused(Error::Remote { code: status.code.value().into(), message: status.message }))
            }
            _ => A::parse_from_bytes(&response.payload).map_err(invalid),
        }
    }

    async fn answer(&self, method: &'static str, request: Vec<u8>) -> Result<Vec<u8>, Unanswered> {
        let mut link = self.link.clone();
        loop {
            let current = link.borrow_and_update().clone();
            if let Link::Open(calls) = &current {
                match calls.call(request.clone()).await {
                    Ok(answer) => return Ok(answer),
                    Err(NoAnswer::Unusable(error)) => {
                        return Err(Unanswered::Refused(Error::ShimAnswer { method, source: error.into() }));
                    }
                    Err(NoAnswer::Unsent) => {}
                    Err(NoAnswer::Interrupted) if CHANGES_NOTHING.contains(&method) => {}
                    Err(NoAnswer::Interrupted) => return Err(self.interrupted(method).await),
                }
            }
            if matches!(current, Link::Dead) || link.changed().await.is_err() {
                return Err(Unanswered::Lost);
            }
        }
    }

    /// What became of a call whose connection ended, once it is known whether the shim did.
    async fn interrupted(&self, method: &'static str) -> Unanswered {
        let mut link = self.link.clone();
        let known = link.wait_for(|link| match link {
            Link::Open(calls) => !calls.is_closed(),
            Link::Broken => false,
            Link::Dead => true,
        });
        match known.await {
            Ok(link) if matches!(*link, Link::Open(_)) => Unanswered::Late(Error::ShimInterrupted { method }),
            _ => Unanswered::Lost,
        }
    }
}

/// Connects again each time a connection ends, until the shim is dead or no longer of interest.
async fn keep_connected(path: PathBuf, mut socket: UnixStream, mut calls: Calls, link: watch::Sender<Link>) {
    let mut pause = Duration::ZERO;
    loop {
        let has_answered = tokio::select! {
            has_answered = calls.run(socket) => has_answered,
            () = link.closed() => return,
        };
        link.send_replace(Link::Broken);
        if has_answered {
            pause = Duration::ZERO;
        }
        socket = loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = link.closed() => return,
            }
            // at once after a success, so that a crash is noticed immediately
            pause = (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            match open(&path).await {
                Ok(socket) => break socket,
                Err(Error::ShimDead { .. }) => {
                    link.send_replace(Link::Dead);
                    return;
                }
                Err(error) => warn!(error = error.chain(); "cannot connect to a shim again, will retry"),
            }
        };
        debug!(socket:% = path.display(); "connected to a shim again");
        calls = Calls::default();
        link.send_replace(Link::Open(calls.clone()));
    }
}

async fn open(path: &Path) -> Result<UnixStream> {
    let connecting = tokio::time::timeout(CONNECT, UnixStream::connect(path)).await;
    let socket = connecting.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    // any other error is a lack of resources, and no reason to end a container
    socket.map_err(|source| match source.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Error::ShimDead { path: path.to_owned(), source },
        _ => Error::ShimUnreachable { path: path.to_owned(), source },
    })
}

fn socket_path(address: &str) -> Result<PathBuf> {
    let path = Path::new(address.strip_prefix("unix://").unwrap_or(address));
    if path.is_absolute() && path.as_os_str().len() <= MAX_PATH_BYTES {
        return Ok(path.to_owned());
    }
    let shown: String = address.chars().take(200).collect();
    Err(Error::ShimAddress(shown))
}

/// Methods that can be called twice.
const CHANGES_NOTHING: [&str; 10] =
    ["Connect", "Pids", "State", "Stats", "Wait", "PingSandbox", "Platform", "SandboxMetrics", "SandboxStatus", "WaitSandbox"];
const SANDBOX_SERVICE: &str = "containerd.runtime.sandbox.v1.Sandbox";
/// Between attempts to connect again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// The longest message of ttrpc.
const MESSAGE_BYTES: u64 = 4 << 20;
/// For a connect: a shim that is running but does not accept has a backlog.
const CONNECT: Duration = Duration::from_secs(5);
/// Beyond a call's own limit.
const GRACE: Duration = Duration::from_millis(200);
/// Of a socket's path, without the zero at its end.
const MAX_PATH_BYTES: usize = 107;
