//! Decoding of requests.
use std::path::PathBuf;
use std::time::Duration;

use containerd_shim_protos::{api, sandbox_api};
use protobuf::Message;
use serde::Deserialize;

use super::sandbox::{self, PodCall};
use super::{SANDBOX_SERVICE, TASK_SERVICES};
use crate::handover::{CONTROL_SERVICE, Origin};
use crate::options::{CheckpointOptions, RuntimeOptions};
use crate::rootfs::Mount;
use crate::worker::container::{CheckpointCall, CreateCall, ExecCall, KillCall, Streams, Target, UpdateCall};
use crate::worker::error::Error;

/// What a client asks for.
#[derive(Debug)]
pub(in crate::worker) enum Call {
    State(Target),
    Create(Box<CreateCall>),
    Start(Target),
    Delete(Target),
    Pids(String),
    Pause(String),
    Resume(String),
    Checkpoint(Box<CheckpointCall>),
    Kill(KillCall),
    Exec(Box<ExecCall>),
    Resize {
        target: Target,
        rows: u16,
        columns: u16,
    },
    CloseIo {
        target: Target,
        stdin: bool,
    },
    Update(UpdateCall),
    Wait(Target),
    Stats(String),
    Connect(String),
    /// Of the container or pod of this id.
    Shutdown(String),
    /// Of the sandbox service.
    Pod(PodCall),
    /// The command `delete`, over the control socket.
    DeleteForCommand(String),
    /// The same for a pod.
    DeletePodForCommand(String),
}

impl Call {
    /// Whether it must be completed once it was begun.
    pub(in crate::worker) fn must_be_ended(&self) -> bool {
        match self {
            Self::Create(_)
            | Self::Start(_)
            | Self::Delete(_)
            | Self::Pause(_)
            | Self::Resume(_)
            | Self::Checkpoint(_)
            | Self::Kill(_)
            | Self::Update(_)
            | Self::DeleteForCommand(_)
            | Self::DeletePodForCommand(_) => true,
            Self::Pod(call) => call.must_be_ended(),
            // These complete without waiting, or change nothing.
            Self::State(_)
            | Self::Pids(_)
            | Self::Exec(_)
            | Self::Resize { .. }
            | Self::CloseIo { .. }
            | Self::Wait(_)
            | Self::Stats(_)
            | Self::Connect(_) => false,
            // It is performed in any case.
            Self::Shutdown(_) => false,
        }
    }

    /// Whether it is performed though its client has given up: no other request would ever end this shim.
    pub(in crate::worker) fn is_never_too_late(&self) -> bool {
        matches!(self, Self::Shutdown(_) | Self::Pod(PodCall::Shutdown(_)))
    }
}

/// A request as received.
#[derive(Debug)]
pub(in crate::worker) struct Inbound {
    pub(in crate::worker) method: String,
    /// The time left until the client's timeout; absent for a client without one.
    pub(in crate::worker) left: Option<Duration>,
    pub(in crate::worker) call: Result<Call, Error>,
}

impl Inbound {
    /// Decodes a request.
    pub(in crate::worker) fn parse(payload: &[u8], age: Duration, origin: Origin) -> Self {
        let request = match ttrpc::Request::parse_from_bytes(payload) {
            Ok(request) => request,
            Err(source) => return Self { method: String::new(), left: None, call: Err(Error::Envelope { source }) },
        };
        let timeout = u64::try_from(request.timeout_nano).ok().filter(|nanos| *nanos > 0).map(Duration::from_nanos);
        let left = timeout.map(|timeout| timeout.saturating_sub(age));
        let method = METHODS.iter().find(|method| method.name == request.method && method.is_served(&request.service, origin));
        let call = match method {
            Some(method) => (method.read)(&request.payload),
            None => Err(Error::NoMethod { service: request.service, method: request.method.clone() }),
        };
        Self { method: request.method, left, call }
    }
}

/// The service of a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Service {
    Task,
    Sandbox,
    Control,
}

struct Method {
    service: Service,
    name: &'static str,
    read: fn(&[u8]) -> Result<Call, Error>,
}

impl Method {
    fn is_served(&self, service: &str, origin: Origin) -> bool {
        match self.service {
            Service::Task => TASK_SERVICES.contains(&service),
            Service::Sandbox => service == SANDBOX_SERVICE,
            Service::Control => service == CONTROL_SERVICE && origin == Origin::Control,
        }
    }
}

/// A method of a service: its name, its message, and the call it decodes to.
macro_rules! method {
    ($service:ident, $name:literal, $message:ty, $read:expr) => {
        Method {
            service: Service::$service,
            name: $name,
            read: |payload| {
                let read: fn($message) -> Result<Call, Error> = $read;
                read(<$message>::parse_from_bytes(payload).map_err(|source| Error::Payload { method: $name, source })?)
            },
        }
    };
}

macro_rules! task {
    ($name:literal, $message:ty, $read:expr) => {
        method!(Task, $name, $message, $read)
    };
}

macro_rules! sandbox {
    ($name:literal, $message:ident, $read:expr) => {
        method!(Sandbox, $name, sandbox_api::$message, $read)
    };
}

/// Every method of every service.
const METHODS: &[Method] = &[
    task!("State", api::StateRequest, |m| Ok(Call::State(Target { id: m.id, exec: m.exec_id }))),
    task!("Create", api::CreateTaskRequest, create),
    task!("Start", api::StartRequest, |m| Ok(Call::Start(Target { id: m.id, exec: m.exec_id }))),
    task!("Delete", api::DeleteRequest, |m| Ok(Call::Delete(Target { id: m.id, exec: m.exec_id }))),
    task!("Pids", api::PidsRequest, |m| Ok(Call::Pids(m.id))),
    task!("Pause", api::PauseRequest, |m| Ok(Call::Pause(m.id))),
    task!("Resume", api::ResumeRequest, |m| Ok(Call::Resume(m.id))),
    task!("Checkpoint", api::CheckpointTaskRequest, checkpoint),
    task!("Kill", api::KillRequest, kill),
    task!("Exec", api::ExecProcessRequest, exec),
    task!("ResizePty", api::ResizePtyRequest, resize),
    task!("CloseIO", api::CloseIORequest, |m| Ok(Call::CloseIo { target: Target { id: m.id, exec: m.exec_id }, stdin: m.stdin })),
    task!("Update", api::UpdateTaskRequest, update),
    task!("Wait", api::WaitRequest, |m| Ok(Call::Wait(Target { id: m.id, exec: m.exec_id }))),
    task!("Stats", api::StatsRequest, |m| Ok(Call::Stats(m.id))),
    task!("Connect", api::ConnectRequest, |m| Ok(Call::Connect(m.id))),
    task!("Shutdown", api::ShutdownRequest, |m| Ok(Call::Shutdown(m.id))),
    sandbox!("CreateSandbox", CreateSandboxRequest, |m| Ok(sandbox::create(m))),
    sandbox!("StartSandbox", StartSandboxRequest, |m| Ok(Call::Pod(PodCall::Start(m.sandbox_id)))),
    sandbox!("Platform", PlatformRequest, |m| Ok(Call::Pod(PodCall::Platform(m.sandbox_id)))),
    sandbox!("StopSandbox", StopSandboxRequest, |m| Ok(Call::Pod(PodCall::Stop(m.sandbox_id)))),
    sandbox!("WaitSandbox", WaitSandboxRequest, |m| Ok(Call::Pod(PodCall::Wait(m.sandbox_id)))),
    sandbox!("SandboxStatus", SandboxStatusRequest, |m| Ok(Call::Pod(PodCall::Status { id: m.sandbox_id, is_verbose: m.verbose }))),
    sandbox!("PingSandbox", PingRequest, |m| Ok(Call::Pod(PodCall::Ping(m.sandbox_id)))),
    sandbox!("ShutdownSandbox", ShutdownSandboxRequest, |m| Ok(Call::Pod(PodCall::Shutdown(m.sandbox_id)))),
    sandbox!("SandboxMetrics", SandboxMetricsRequest, |m| Ok(Call::Pod(PodCall::Metrics(m.sandbox_id)))),
    Method { service: Service::Control, name: "Delete", read: |payload| delete_for_command(payload).map(Call::DeleteForCommand) },
    Method { service: Service::Control, name: "DeletePod", read: |payload| delete_for_command(payload).map(Call::DeletePodForCommand) },
];

fn create(message: api::CreateTaskRequest) -> Result<Call, Error> {
    if !message.parent_checkpoint.is_empty() {
        return Err(Error::Parent { method: "Create", field: "parent_checkpoint" });
    }
    let mount = |mount: api::Mount| Mount { kind: mount.type_, source: mount.source, target: mount.target, options: mount.options };
    Ok(Call::Create(Box::new(CreateCall {
        id: message.id,
        bundle: PathBuf::from(message.bundle),
        mounts: message.rootfs.into_iter().map(mount).collect(),
        stdio: Streams { stdin: message.stdin, stdout: message.stdout, stderr: message.stderr, terminal: message.terminal },
        checkpoint: message.checkpoint,
        options: RuntimeOptions::blocking_read(message.options.as_ref())?,
    })))
}

fn checkpoint(message: api::CheckpointTaskRequest) -> Result<Call, Error> {
    let options = CheckpointOptions::read(message.options.as_ref())?;
    Ok(Call::Checkpoint(Box::new(CheckpointCall { id: message.id, path: message.path, options })))
}

fn kill(message: api::KillRequest) -> Result<Call, Error> {
    let target = Target { id: message.id, exec: message.exec_id };
    Ok(Call::Kill(KillCall { target, signal: message.signal, all: message.all }))
}

fn exec(message: api::ExecProcessRequest) -> Result<Call, Error> {
    Ok(Call::Exec(Box::new(ExecCall {
        id: message.id,
        exec: message.exec_id,
        stdio: Streams { stdin: message.stdin, stdout: message.stdout, stderr: message.stderr, terminal: message.terminal },
        spec: message.spec.into_option().map(|any| any.value).unwrap_or_default(),
    })))
}

fn resize(message: api::ResizePtyRequest) -> Result<Call, Error> {
    // Of larger ones, the stock shim takes the low 16 bits.
    let (rows, columns) = (message.height as u16, message.width as u16);
    Ok(Call::Resize { target: Target { id: message.id, exec: message.exec_id }, rows, columns })
}

fn update(message: api::UpdateTaskRequest) -> Result<Call, Error> {
    let resources = message.resources.into_option().map(|any| any.value);
    Ok(Call::Update(UpdateCall { id: message.id, resources }))
}

/// The id in the request of the command.
fn delete_for_command(payload: &[u8]) -> Result<String, Error> {
    #[derive(Deserialize)]
    struct Delete {
        id: String,
    }
    let delete: Delete = serde_json::from_slice(payload).map_err(|source| Error::Json { method: "Delete", source })?;
    Ok(delete.id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::error::Code;

    fn request(service: &str, method: &str, payload: Vec<u8>, timeout_nano: i64) -> Vec<u8> {
        let request = ttrpc::Request { service: service.into(), method: method.into(), payload, timeout_nano, ..Default::default() };
        request.write_to_bytes().expect("a complete message")
    }

    fn code(service: &str, method: &str, payload: &[u8], origin: Origin) -> Option<Code> {
        let bytes = request(service, method, payload.to_vec(), 0);
        Inbound::parse(&bytes, Duration::ZERO, origin).call.err().map(|error| error.code())
    }

    #[test]
    fn every_method_of_the_task_service_is_served_under_both_names() {
        let names: Vec<_> = METHODS.iter().filter(|method| method.service == Service::Task).map(|method| method.name).collect();
        assert_eq!(names.len(), 17);
        for service in TASK_SERVICES {
            for name in &names {
                assert_eq!(code(service, name, &[], Origin::Client), None, "{service}/{name}");
            }
        }
    }

    #[test]
    fn every_method_of_the_sandbox_service_is_served_under_its_own_name() {
        let names: Vec<_> = METHODS.iter().filter(|method| method.service == Service::Sandbox).map(|method| method.name).collect();
        assert_eq!(names.len(), 9);
        for name in names {
            assert_eq!(code(SANDBOX_SERVICE, name, &[], Origin::Client), None, "{name}");
            assert_eq!(code(TASK_SERVICES[0], name, &[], Origin::Client), Some(Code::Unimplemented), "{name}");
        }
    }

    #[test]
    fn an_unknown_method_or_service_is_unimplemented() {
        for (service, method) in [("containerd.task.v2.Task", "Fly"), ("containerd.task.v4.Task", "State"), ("", "")] {
            assert_eq!(code(service, method, &[], Origin::Client), Some(Code::Unimplemented));
        }
    }

    #[test]
    fn the_control_service_is_for_commands_only() {
        let payload = br#"{"id":"c1"}"#;
        assert_eq!(code(CONTROL_SERVICE, "Delete", payload, Origin::Control), None);
        assert_eq!(code(CONTROL_SERVICE, "Delete", b"{}", Origin::Control), Some(Code::InvalidArgument));
        assert_eq!(code(CONTROL_SERVICE, "Delete", payload, Origin::Client), Some(Code::Unimplemented));
    }

    #[test]
    fn a_payload_that_is_no_message_is_an_invalid_argument() {
        assert_eq!(code(TASK_SERVICES[0], "State", &[0xff; 7], Origin::Client), Some(Code::InvalidArgument));
        let call = Inbound::parse(&[0xff; 7], Duration::ZERO, Origin::Client).call;
        assert_eq!(call.err().map(|error| error.code()), Some(Code::InvalidArgument));
    }

    #[test]
    fn time_that_a_request_has_waited_is_taken_off_its_deadline() {
        let left = |timeout, age| Inbound::parse(&request("", "", vec![], timeout), age, Origin::Client).left;
        assert_eq!(left(0, Duration::from_secs(9)), None);
        assert_eq!(left(5_000_000_000, Duration::from_secs(3)), Some(Duration::from_secs(2)));
        assert_eq!(left(5_000_000_000, Duration::from_secs(9)), Some(Duration::ZERO));
    }
}
