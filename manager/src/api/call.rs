//! The metadata of a call.

use tonic::Request;

use super::body::Share;
use crate::error::{Error, Result};
use crate::images::ahead::Connection;
use crate::layers::Cancel;
use crate::name::Namespace;
use crate::successor::{Headers, TRANSFER_LEASE};

/// The metadata of a call, and its request's share of the budget: kept until the call is answered.
#[derive(Debug)]
pub(super) struct Call {
    namespace: Option<String>,
    lease: Option<String>,
    transfer: Option<String>,
    pid: i32,
    share: Share,
    connection: Option<Connection>,
    gone: Cancel,
}

/// The process at the other end of a connection; 0 if that is not known.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Peer(pub(super) i32);

/// The connection that a call came over.
#[derive(Debug, Clone)]
pub(super) struct Client(pub(super) Connection);

impl Call {
    pub(super) fn of<Q>(request: &Request<Q>) -> Self {
        let text = |name: &str| request.metadata().get(name).and_then(|value| value.to_str().ok()).map(ToOwned::to_owned);
        let share = request.extensions().get::<Share>().cloned().unwrap_or_default();
        let Peer(pid) = request.extensions().get::<Peer>().copied().unwrap_or_default();
        let lease = text("containerd-lease").filter(|lease| !lease.is_empty());
        let transfer = text(TRANSFER_LEASE).filter(|lease| !lease.is_empty());
        let connection = request.extensions().get::<Client>().map(|client| client.0.clone());
        let gone = request.extensions().get::<Cancel>().cloned().unwrap_or_default();
        Self { namespace: text("containerd-namespace"), lease, transfer, pid, share, connection, gone }
    }

    /// Cancelled when the client does not wait any more: what is copied for it need not be.
    pub(super) fn gone(&self) -> Cancel {
        self.gone.clone()
    }

    /// The client's process; 0 if that is not known.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Gives back what the last message of its request's stream holds of the budget: it has been answered.
    pub(super) fn answered(&self) {
        self.share.release();
    }

    /// Ends with the client's connection.
    pub(super) fn connection(&self) -> Option<&Connection> {
        self.connection.as_ref()
    }

    /// The lease that is to hold what the call creates.
    pub(super) fn lease(&self) -> Option<String> {
        self.lease.clone()
    }

    /// The lease that another process has made for the transfer which goes on with this call.
    pub(super) fn transfer_lease(&self) -> Option<String> {
        self.transfer.clone()
    }

    /// What is passed on when another process has to answer it.
    pub(super) fn headers(&self) -> Headers {
        Headers { namespace: self.namespace.clone(), lease: self.lease.clone(), transfer: self.transfer.clone() }
    }

    /// The namespace that it is about.
    ///
    /// Errors: when it names none, or an impossible one.
    pub(super) fn namespace(&self) -> Result<Namespace> {
        let name = self.namespace.as_deref().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| Error::Precondition("namespace is required".to_owned()))?;
        Namespace::parse(name)
    }
}
