//! `containerd.services.events.v1.Events`

use std::sync::Arc;

use containerd_client::services::v1::{ForwardRequest, PublishRequest, SubscribeRequest};

use super::call::Call;
use crate::error::{Error, Result};
use crate::events::{self, Client, Exchange, Subscription};
use crate::tasks::Tasks;

/// The service.
#[derive(Debug)]
pub(crate) struct Events {
    pub(crate) events: Arc<Exchange>,
    /// Shims' events may come this way too.
    pub(crate) tasks: Arc<Tasks>,
}

impl Events {
    pub(super) async fn publish(self: Arc<Self>, call: Call, request: PublishRequest) -> Result<()> {
        let envelope = events::envelope(&call.namespace()?, request.topic, request.event);
        events::validate(&envelope)?;
        self.events.forward(envelope);
        Ok(())
    }

    pub(super) async fn forward(self: Arc<Self>, _call: Call, request: ForwardRequest) -> Result<()> {
        let envelope = request.envelope.ok_or_else(|| Error::Invalid("envelope must be set".to_owned()))?;
        events::validate(&envelope)?;
        self.tasks.receive(envelope).await
    }

    pub(super) async fn subscribe(self: Arc<Self>, call: Call, request: SubscribeRequest) -> Result<Subscription> {
        self.events.subscribe(Client { pid: call.pid(), filters: request.filters })
    }
}
