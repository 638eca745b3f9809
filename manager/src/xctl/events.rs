//! `events`: what the daemon publishes, as it happens.

use clap::Args;
use containerd_client::events::{
    ContainerCreate, ContainerDelete, ContainerUpdate, NamespaceCreate, NamespaceDelete, NamespaceUpdate, SnapshotCommit, SnapshotPrepare,
    SnapshotRemove, TaskCheckpointed, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOom, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_client::services::v1::{ImageCreate, ImageDelete, ImageUpdate, SubscribeRequest};
use containerd_client::types::Envelope;
use prost::Message as _;
use serde_json::{Value, json};

use crate::client::{Client, call};
use crate::error::{Error, Result};
use crate::output::{self, Format};

/// Arguments of `events`.
#[derive(Debug, Clone, Args)]
pub(crate) struct EventsArgs {
    /// Of every namespace
    #[arg(short, long)]
    all: bool,
    /// Filters as containerd knows them, like topic==/tasks/exit; an event that passes one is printed
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,
}

/// Prints events until the connection ends.
pub(crate) async fn run(client: &Client, format: Format, args: EventsArgs) -> Result<u8> {
    let doing = "subscribe to events";
    let request = client.request(SubscribeRequest { filters: args.filters });
    let mut stream = call(doing, client.api().events().subscribe(request)).await?;
    loop {
        match stream.message().await {
            Ok(Some(event)) if args.all || event.namespace == client.namespace() => output::print(&line(format, &event))?,
            Ok(Some(_of_another_namespace)) => {}
            Ok(None) => return Err(Error::refused("the daemon has ended the stream of events; subscribe again")),
            Err(status) => return Err(Error::Call { doing: "receive events".to_owned(), status }),
        }
    }
}

fn line(format: Format, event: &Envelope) -> String {
    let time = output::timestamp(event.timestamp.as_ref()).unwrap_or_default();
    let content = event.event.as_ref().map_or(Value::Null, |event| content(&event.type_url, &event.value));
    match format {
        Format::Table => format!("{time} {} {} {content}\n", output::printable(&event.namespace), output::printable(&event.topic)),
        Format::Json => {
            let whole = json!({ "timestamp": time, "namespace": event.namespace, "topic": event.topic, "event": content });
            format!("{whole}\n")
        }
    }
}

/// Its fields; the name of the type alone for one that is not known here.
fn content(kind: &str, bytes: &[u8]) -> Value {
    macro_rules! fields {
        ($message:ident { $($name:literal: $field:ident),* }) => {
            $message::decode(bytes).map(|message| json!({ $($name: message.$field),* }))
        };
    }
    let name = kind.rsplit('/').next().unwrap_or_default();
    let is_known = name.starts_with("containerd.events.") || name.starts_with("containerd.services.images.v1.");
    let decoded = match name.rsplit('.').next().filter(|_| is_known).unwrap_or_default() {
        "TaskCreate" => fields!(TaskCreate { "container_id": container_id, "bundle": bundle, "pid": pid }),
        "TaskStart" => fields!(TaskStart { "container_id": container_id, "pid": pid }),
        "TaskExit" => fields!(TaskExit { "container_id": container_id, "id": id, "pid": pid, "exit_status": exit_status }),
        "TaskDelete" => fields!(TaskDelete { "container_id": container_id, "id": id, "pid": pid, "exit_status": exit_status }),
        "TaskOOM" => fields!(TaskOom { "container_id": container_id }),
        "TaskExecAdded" => fields!(TaskExecAdded { "container_id": container_id, "exec_id": exec_id }),
        "TaskExecStarted" => fields!(TaskExecStarted { "container_id": container_id, "exec_id": exec_id, "pid": pid }),
        "TaskPaused" => fields!(TaskPaused { "container_id": container_id }),
        "TaskResumed" => fields!(TaskResumed { "container_id": container_id }),
        "TaskCheckpointed" => fields!(TaskCheckpointed { "container_id": container_id, "checkpoint": checkpoint }),
        "ContainerCreate" => fields!(ContainerCreate { "id": id, "image": image }),
        "ContainerUpdate" => fields!(ContainerUpdate { "id": id, "image": image, "labels": labels, "snapshot_key": snapshot_key }),
        "ContainerDelete" => fields!(ContainerDelete { "id": id }),
        "ImageCreate" => fields!(ImageCreate { "name": name, "labels": labels }),
        "ImageUpdate" => fields!(ImageUpdate { "name": name, "labels": labels }),
        "ImageDelete" => fields!(ImageDelete { "name": name }),
        "NamespaceCreate" => fields!(NamespaceCreate { "name": name, "labels": labels }),
        "NamespaceUpdate" => fields!(NamespaceUpdate { "name": name, "labels": labels }),
        "NamespaceDelete" => fields!(NamespaceDelete { "name": name }),
        "SnapshotPrepare" => fields!(SnapshotPrepare { "key": key, "parent": parent, "snapshotter": snapshotter }),
        "SnapshotCommit" => fields!(SnapshotCommit { "key": key, "name": name, "snapshotter": snapshotter }),
        "SnapshotRemove" => fields!(SnapshotRemove { "key": key, "snapshotter": snapshotter }),
        _ => Ok(json!({ "type": kind })),
    };
    decoded.unwrap_or_else(|error| json!({ "type": kind, "unreadable": error.to_string() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_shown_and_unknown_events_are_named() {
        let exit = TaskExit { container_id: "c".to_owned(), exit_status: 3, ..TaskExit::default() };
        assert_eq!(content("containerd.events.TaskExit", &exit.encode_to_vec())["exit_status"], 3);
        assert_eq!(content("x/containerd.events.TaskOOM", b"\x0a\x01c")["container_id"], "c");
        assert_eq!(content("some.other", b"\xff"), json!({ "type": "some.other" }));
        assert!(content("containerd.events.TaskExit", b"\xff").get("unreadable").is_some());
    }
}
