//! Records of containers, and the labels that `xctl` and the restart monitor find there.

use std::collections::HashMap;

use containerd_client::services::v1::{
    Container, CreateContainerRequest, DeleteContainerRequest, GetContainerRequest, ListContainersRequest, UpdateContainerRequest,
};
use oci_spec::runtime::Spec;
use prost_types::FieldMask;
use tonic::Code;

use crate::client::{Client, call};
use crate::error::{Error, Result};

/// The record of a container.
pub(crate) async fn get(client: &Client, id: &str) -> Result<Container> {
    let request = client.request(GetContainerRequest { id: id.to_owned() });
    match call(format!("get container {id}"), client.containers().get(request)).await {
        Ok(answer) => answer.container.ok_or_else(|| Error::unreadable(format!("container {id}"), "the answer has no container")),
        Err(error) if error.code() == Some(Code::NotFound) => {
            Err(Error::NoContainer { id: id.to_owned(), namespace: client.namespace().to_owned() })
        }
        Err(error) => Err(error),
    }
}

/// All of the namespace.
pub(crate) async fn list(client: &Client) -> Result<Vec<Container>> {
    let request = client.request(ListContainersRequest { filters: Vec::new() });
    Ok(call("list containers", client.containers().list(request)).await?.containers)
}

/// Records a new one.
pub(crate) async fn create(client: &Client, container: Container) -> Result<()> {
    let id = container.id.clone();
    let request = client.request(CreateContainerRequest { container: Some(container) });
    match call(format!("create container {id}"), client.containers().create(request)).await {
        Err(Error::Call { status, .. }) if status.code() == Code::AlreadyExists => Err(Error::refused(format!(
            "the name {id} is in use by another container of namespace {}; `xctl rm {id}` removes it, --name chooses another name",
            client.namespace()
        ))),
        other => other.map(drop),
    }
}

/// Replaces the labels of one.
pub(crate) async fn set_labels(client: &Client, id: &str, labels: HashMap<String, String>) -> Result<()> {
    let container = Container { id: id.to_owned(), labels, ..Container::default() };
    let mask = FieldMask { paths: vec!["labels".to_owned()] };
    let request = client.request(UpdateContainerRequest { container: Some(container), update_mask: Some(mask) });
    call(format!("label container {id}"), client.containers().update(request)).await.map(drop)
}

/// Removes the record of one.
pub(crate) async fn delete(client: &Client, id: &str) -> Result<()> {
    let request = client.request(DeleteContainerRequest { id: id.to_owned() });
    call(format!("delete container {id}"), client.containers().delete(request)).await
}

/// The OCI spec of one.
pub(crate) fn spec(container: &Container) -> Result<Spec> {
    let bytes = container.spec.as_ref().map(|spec| spec.value.as_slice()).unwrap_or_default();
    serde_json::from_slice(bytes).map_err(|error| Error::unreadable(format!("the spec of container {}", container.id), error))
}

/// The restart monitor leaves the container alone until it is started again: it was stopped for good. Nothing changes without a policy.
pub(crate) async fn suspend_restarts(client: &Client, container: &Container) -> Result<()> {
    if !container.labels.contains_key(RESTART_POLICY) {
        return Ok(());
    }
    let mut labels = container.labels.clone();
    labels.remove(RESTART_STATUS);
    labels.insert(RESTART_STOPPED.to_owned(), "true".to_owned());
    set_labels(client, &container.id, labels).await
}

/// The restart monitor keeps the container running again, if it has a policy.
pub(crate) async fn resume_restarts(client: &Client, container: &Container) -> Result<()> {
    if !container.labels.contains_key(RESTART_POLICY) || container.labels.contains_key(RESTART_STATUS) {
        return Ok(());
    }
    let mut labels = container.labels.clone();
    labels.insert(RESTART_STATUS.to_owned(), "running".to_owned());
    labels.remove(RESTART_STOPPED);
    labels.remove(RESTART_COUNT);
    set_labels(client, &container.id, labels).await
}

/// Where the output of a detached container goes: the URI of a file.
pub(crate) const LOG_URI: &str = "xctl/log-uri";
/// Whether a detached container keeps its stdin open: `true`.
pub(crate) const INTERACTIVE: &str = "xctl/interactive";
/// The signal that `stop` sends; written by ctr and nerdctl too.
pub(crate) const STOP_SIGNAL: &str = "io.containerd.image.config.stop-signal";
/// What the restart monitor shall keep: its absence means nothing.
pub(crate) const RESTART_STATUS: &str = "containerd.io/restart.status";
/// When the restart monitor starts a container again.
pub(crate) const RESTART_POLICY: &str = "containerd.io/restart.policy";
/// Where the restart monitor directs output.
pub(crate) const RESTART_LOG_URI: &str = "containerd.io/restart.loguri";
const RESTART_STOPPED: &str = "containerd.io/restart.explicitly-stopped";
const RESTART_COUNT: &str = "containerd.io/restart.count";
