//! Encoding of events for containerd.
//!
//! **Invariant:** the keeper publishes an event as it is encoded here, in the order of the commits.
use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::events::task as message;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::{api, topics};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};

use super::container::{Deleted, Event, EventKind, Streams};
use super::phase::Exit;
use crate::rootfs::Mount;

/// Encodes an event: a whole ttrpc `Request` message.
pub(super) fn encode(event: Event, namespace: &str) -> Vec<u8> {
    let id = event.container;
    let (topic, name, value) = match event.kind {
        EventKind::Created { bundle, mounts, stdio, checkpoint, pid } => {
            let created = message::TaskCreate {
                container_id: id,
                bundle: bundle.to_string_lossy().into_owned(),
                rootfs: mounts.into_iter().map(mount).collect(),
                io: MessageField::some(task_io(stdio)),
                checkpoint,
                pid: pid.unwrap_or(0),
                ..Default::default()
            };
            (topics::TASK_CREATE_EVENT_TOPIC, "TaskCreate", bytes(&created))
        }
        EventKind::Started { pid } => {
            let started = message::TaskStart { container_id: id, pid, ..Default::default() };
            (topics::TASK_START_EVENT_TOPIC, "TaskStart", bytes(&started))
        }
        EventKind::ExecAdded { exec } => {
            let added = message::TaskExecAdded { container_id: id, exec_id: exec, ..Default::default() };
            (topics::TASK_EXEC_ADDED_EVENT_TOPIC, "TaskExecAdded", bytes(&added))
        }
        EventKind::ExecStarted { exec, pid } => {
            let started = message::TaskExecStarted { container_id: id, exec_id: exec, pid, ..Default::default() };
            (topics::TASK_EXEC_STARTED_EVENT_TOPIC, "TaskExecStarted", bytes(&started))
        }
        EventKind::Exited { process, pid, exit } => {
            let exited = message::TaskExit {
                container_id: id,
                id: process,
                pid,
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at_nanos)),
                ..Default::default()
            };
            (topics::TASK_EXIT_EVENT_TOPIC, "TaskExit", bytes(&exited))
        }
        EventKind::Deleted(Deleted { pid, exit }) => {
            let deleted = message::TaskDelete {
                container_id: id,
                pid: pid.unwrap_or(0),
                exit_status: exit.map_or(0, |exit| exit.status),
                exited_at: exited_at(exit),
                ..Default::default()
            };
            (topics::TASK_DELETE_EVENT_TOPIC, "TaskDelete", bytes(&deleted))
        }
        EventKind::Paused => {
            (topics::TASK_PAUSED_EVENT_TOPIC, "TaskPaused", bytes(&message::TaskPaused { container_id: id, ..Default::default() }))
        }
        EventKind::Resumed => {
            (topics::TASK_RESUMED_EVENT_TOPIC, "TaskResumed", bytes(&message::TaskResumed { container_id: id, ..Default::default() }))
        }
        EventKind::Checkpointed { path } => {
            let checkpointed = message::TaskCheckpointed { container_id: id, checkpoint: path, ..Default::default() };
            (topics::TASK_CHECKPOINTED_EVENT_TOPIC, "TaskCheckpointed", bytes(&checkpointed))
        }
        EventKind::OutOfMemory => {
            (topics::TASK_OOM_EVENT_TOPIC, "TaskOOM", bytes(&message::TaskOOM { container_id: id, ..Default::default() }))
        }
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i64);
    let event = Any { type_url: format!("containerd.events.{name}"), value, ..Default::default() };
    let envelope = Envelope {
        timestamp: MessageField::some(timestamp(now)),
        namespace: namespace.to_owned(),
        topic: topic.to_owned(),
        event: MessageField::some(event),
        ..Default::default()
    };
    let forward = api::ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
    bytes(&ttrpc::Request {
        service: EVENTS_SERVICE.to_owned(),
        method: "Forward".to_owned(),
        payload: bytes(&forward),
        ..Default::default()
    })
}

/// When a process exited; absent if it did not, which Go reads as its zero time.
pub(super) fn exited_at(exit: Option<Exit>) -> MessageField<Timestamp> {
    exit.map(|exit| timestamp(exit.at_nanos)).into()
}

pub(super) fn timestamp(nanos: i64) -> Timestamp {
    let (seconds, nanos) = (nanos.div_euclid(1_000_000_000), nanos.rem_euclid(1_000_000_000) as i32);
    Timestamp { seconds, nanos, ..Default::default() }
}

/// Encodes a message.
pub(super) fn bytes(message: &impl Message) -> Vec<u8> {
    message.write_to_bytes().expect("a message without required fields is always complete")
}

fn task_io(stdio: Streams) -> message::TaskIO {
    let Streams { stdin, stdout, stderr, terminal } = stdio;
    message::TaskIO { stdin, stdout, stderr, terminal, ..Default::default() }
}

fn mount(mount: Mount) -> containerd_shim_protos::types::mount::Mount {
    let Mount { kind, source, target, options } = mount;
    containerd_shim_protos::types::mount::Mount { type_: kind, source, target, options, ..Default::default() }
}

const EVENTS_SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";
