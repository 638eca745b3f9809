//! The sandbox service: its messages, decoded and encoded.
use std::path::PathBuf;

use containerd_shim_protos::{api as task, sandbox_api as api};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;

use super::answer::response;
use super::call::Call;
use super::{SANDBOX_SERVICE, TASK_SERVICES};
use crate::handover::{POD_KEY, Ready};
use crate::worker::container::{PodReply, Reply};
use crate::worker::error::Error;
use crate::worker::events::{bytes, timestamp};
use crate::worker::pod::{CreateCall, Record, Status};

/// A call of the sandbox service.
#[derive(Debug)]
pub(in crate::worker) enum PodCall {
    Create(Box<CreateCall>),
    Start(String),
    Platform(String),
    Stop(String),
    Wait(String),
    Status { id: String, is_verbose: bool },
    Ping(String),
    Shutdown(String),
    Metrics(String),
}

impl PodCall {
    /// Whether it must be completed once it was begun.
    pub(super) fn must_be_ended(&self) -> bool {
        match self {
            Self::Start(_) | Self::Stop(_) => true,
            // These complete without waiting, change nothing, or are performed in any case.
            Self::Shutdown(_)
            | Self::Create(_)
            | Self::Platform(_)
            | Self::Wait(_)
            | Self::Status { .. }
            | Self::Ping(_)
            | Self::Metrics(_) => false,
        }
    }
}

pub(super) fn create(message: api::CreateSandboxRequest) -> Call {
    Call::Pod(PodCall::Create(Box::new(CreateCall {
        id: message.sandbox_id,
        bundle: PathBuf::from(message.bundle_path),
        has_rootfs: !message.rootfs.is_empty(),
        options: message.options.into_option(),
        network: message.netns_path,
    })))
}

/// The content of an answer.
pub(super) fn payload(reply: PodReply) -> Vec<u8> {
    match reply {
        PodReply::Started { pid, since_nanos, spec } => bytes(&api::StartSandboxResponse {
            pid,
            created_at: MessageField::some(timestamp(since_nanos)),
            spec: MessageField::some(Any { type_url: SPEC.to_owned(), value: spec.to_string().into_bytes(), ..Any::default() }),
            ..Default::default()
        }),
        PodReply::Platform => {
            let mut message = api::PlatformResponse::default();
            let platform = message.platform.mut_or_insert_default();
            platform.os = "linux".to_owned();
            platform.architecture = architecture().to_owned();
            bytes(&message)
        }
        PodReply::Status(status) => bytes(&status_response(*status)),
        PodReply::Metrics { id, at_nanos, metrics } => {
            let mut message = api::SandboxMetricsResponse::default();
            let metric = message.metrics.mut_or_insert_default();
            metric.timestamp = MessageField::some(timestamp(at_nanos));
            metric.id = id;
            metric.data = MessageField::some(metrics);
            bytes(&message)
        }
    }
}

fn status_response(status: Status) -> api::SandboxStatusResponse {
    let time = |nanos: Option<i64>| nanos.map(timestamp).into();
    api::SandboxStatusResponse {
        sandbox_id: status.id,
        pid: status.pid.unwrap_or(0),
        state: if status.is_ready { READY } else { NOT_READY }.to_owned(),
        info: status.info.map(|info| ("info".to_owned(), info.to_string())).into_iter().collect(),
        created_at: time(status.created_nanos),
        exited_at: time(status.exited_nanos),
        ..Default::default()
    }
}

/// The answers that the keeper may give while no worker runs: to what containerd asks about a pod when it starts, and for each container.
pub(in crate::worker) fn ready_of_pod(record: &Record, keeper_pid: u32) -> Vec<Ready> {
    let id = record.id.to_string();
    let status = bytes(&api::SandboxStatusRequest { sandbox_id: id.clone(), ..Default::default() });
    let platform = bytes(&api::PlatformRequest { sandbox_id: id.clone(), ..Default::default() });
    let connect = bytes(&task::ConnectRequest { id: id.clone(), ..Default::default() });
    let pids = bytes(&task::PidsRequest { id: id.clone(), ..Default::default() });
    let no_container = || Err(Error::NoContainer { id: id.clone() });
    let answers = [
        (SANDBOX_SERVICE, "SandboxStatus", status, Ok(Reply::Pod(PodReply::Status(Box::new(record.status(false)))))),
        (SANDBOX_SERVICE, "Platform", platform, Ok(Reply::Pod(PodReply::Platform))),
        (TASK_SERVICES[0], "Connect", connect.clone(), Ok(Reply::Connect { task_pid: None })),
        (TASK_SERVICES[1], "Connect", connect, Ok(Reply::Connect { task_pid: None })),
        // The pod's own id is that of no container.
        (TASK_SERVICES[0], "Pids", pids.clone(), no_container()),
        (TASK_SERVICES[1], "Pids", pids, no_container()),
    ];
    let ready = |(service, method, payload, reply): (&str, &str, Vec<u8>, Result<Reply, Error>)| Ready {
        key: POD_KEY.to_owned(),
        service: service.to_owned(),
        method: method.to_owned(),
        payload,
        answer: response(reply, keeper_pid),
        is_fallback: false,
        signal: None,
    };
    answers.into_iter().map(ready).collect()
}

/// As Go names it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The type of a runtime specification, as containerd writes it.
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
