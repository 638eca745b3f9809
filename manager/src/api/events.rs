//! `containerd.services.events.v1.Events`

use std::sync::Arc;

use containerd_client::services::v1::{ForwardRequest, PublishRequest, SubscribeRequest};

use super::call::Call;
use crate::error::{Error, Result};
use crate::events::{self, Client, Subscription};
use crate::manager::Manager;

pub(super) async fn publish(manager: Arc<Manager>, call: Call, request: PublishRequest) -> Result<()> {
    let envelope = events::envelope(&call.namespace()?, request.topic, request.event);
    events::validate(&envelope)?;
    manager.events.forward(envelope);
    Ok(())
}

pub(super) async fn forward(manager: Arc<Manager>, _call: Call, request: ForwardRequest) -> Result<()> {
    let envelope = request.envelope.ok_or_else(|| Error::Invalid("envelope must be set".to_owned()))?;
    events::validate(&envelope)?;
    manager.tasks.receive(envelope).await
}

pub(super) async fn subscribe(manager: Arc<Manager>, call: Call, request: SubscribeRequest) -> Result<Subscription> {
    manager.events.subscribe(Client { pid: call.pid(), filters: request.filters })
}
