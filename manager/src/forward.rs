//! The socket to which shims send their events: `containerd.services.events.ttrpc.v1.Events` over ttrpc.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_client::types::Envelope;
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::shim_async::{Events, create_events};
use containerd_shim_protos::ttrpc::{self, Code, get_status};
use log::warn;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};

use crate::error::{Error, Result};
use crate::events;
use crate::guarded::Guarded;
use crate::tasks::Tasks;
use crate::wire;

/// Serves shims until the server is dropped.
pub(crate) async fn serve(listener: UnixListener, tasks: Arc<Tasks>) -> Result<Server> {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accepted = UnixListenerStream::new(listener).then(async |accepted| {
        if let Err(error) = &accepted {
            // out of descriptors: wait for other connections to close
            warn!(error:%; "cannot accept a connection of a shim");
            tokio::time::sleep(ACCEPT_AGAIN).await;
        }
        accepted
    });
    let accepted = accepted.filter_map(move |accepted| {
        // beyond the last place a connection is closed at once
        let place = Arc::clone(&places).try_acquire_owned().ok()?;
        Some(Ok(Guarded::new(accepted.ok()?, place)))
    });
    let services: HashMap<_, _> = create_events(Arc::new(Forward { tasks }));
    let mut server = Server::new().add_listener(Listener::new(accepted)).register_service(services);
    server.start().await.map_err(Error::Serve)?;
    Ok(server)
}

struct Forward {
    tasks: Arc<Tasks>,
}

#[async_trait]
impl Events for Forward {
    async fn forward(&self, _context: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let sent = request.envelope.into_option().unwrap_or_default();
        let envelope = Envelope {
            timestamp: wire::time_from_shim(sent.timestamp.into_option()),
            namespace: sent.namespace,
            topic: sent.topic,
            event: sent.event.into_option().map(wire::from_shim),
        };
        let received = match events::validate(&envelope) {
            // runs to completion, even if the shim disconnects
            Ok(()) => {
                let tasks = Arc::clone(&self.tasks);
                let receive = tokio::spawn(async move { tasks.receive(envelope).await });
                receive.await.unwrap_or_else(|source| Err(Error::Panicked { what: "an event", source }))
            }
            Err(error) => Err(error),
        };
        received.map(|()| Empty::default()).map_err(|error| ttrpc::Error::RpcStatus(status(&error)))
    }
}

fn status(error: &Error) -> ttrpc::Status {
    use protobuf::Enum as _;
    get_status(Code::from_i32(error.code() as i32).unwrap_or(Code::UNKNOWN), error.chain())
}

/// The most shims that send events at the same moment; each keeps its connection.
const MAX_CONNECTIONS: usize = 16384;
/// After a failed accept.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
