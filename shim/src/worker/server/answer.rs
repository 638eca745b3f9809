//! Encoding of answers, prepared ones among them.
use containerd_shim_protos::api;
use nix::libc::{SIGKILL, SIGTERM};
use protobuf::{EnumOrUnknown, MessageField};

use super::{TASK_SERVICES, sandbox};
use crate::handover::{Ready, ReportedExit};
use crate::options::process_details;
use crate::worker::container::{Deleted, Record, Reply, StateOf, Status, state_of};
use crate::worker::error::{Code, Error};
use crate::worker::events::{bytes, exited_at, timestamp};
use crate::worker::id::ProcessKey;
use crate::worker::phase::Phase;

/// Encodes an answer: a ttrpc `Response` message.
pub(in crate::worker) fn response(result: Result<Reply, Error>, keeper_pid: u32) -> Vec<u8> {
    let response = match result {
        Ok(reply) => ttrpc::Response { payload: payload(reply, keeper_pid), ..Default::default() },
        Err(error) => ttrpc::Response { status: MessageField::some(status(&error)), ..Default::default() },
    };
    bytes(&response)
}

/// Encodes the answers that the keeper may give while no worker runs: to Connect, State, Pids and Kill, of a container and its init.
///
/// They depend on the container's own entry of the state alone, so that a commit for an exec need not carry them. While execs run, the
/// answer to Pids is incomplete and marked as a fallback: the keeper gives it only if no worker answers in time.
pub(in crate::worker) fn ready(record: &Record, keeper_pid: u32) -> Vec<Ready> {
    let id = record.id.to_string();
    let mut ready = ready_pids(record, keeper_pid);
    let connect = api::ConnectRequest { id: id.clone(), ..Default::default() };
    ready.extend(of_both_services(record, keeper_pid, "Connect", &bytes(&connect), Reply::Connect { task_pid: record.init.pid }, None));
    if let Some(state) = state_of(record, &ProcessKey::init(&record.id)) {
        let request = api::StateRequest { id: id.clone(), ..Default::default() };
        ready.extend(of_both_services(record, keeper_pid, "State", &bytes(&request), Reply::State(Box::new(state)), None));
    }
    for (signal, all) in signals(record) {
        let request = api::KillRequest { id: id.clone(), signal: signal.cast_unsigned(), all, ..Default::default() };
        ready.extend(of_both_services(record, keeper_pid, "Kill", &bytes(&request), Reply::Empty, Some(signal)));
    }
    ready
}

/// Those of [`ready`] that also depend on whether execs run: all that has to be replaced when the first one starts and when the last one has exited.
pub(in crate::worker) fn ready_pids(record: &Record, keeper_pid: u32) -> Vec<Ready> {
    let request = api::PidsRequest { id: record.id.to_string(), ..Default::default() };
    let reply = Reply::Pids(record.init.pid.map(|pid| (pid, None)).into_iter().collect());
    let mut ready = of_both_services(record, keeper_pid, "Pids", &bytes(&request), reply, None);
    ready.iter_mut().for_each(|ready| ready.is_fallback = record.execs.are_under_way());
    ready
}

fn of_both_services(record: &Record, keeper_pid: u32, method: &str, payload: &[u8], reply: Reply, signal: Option<i32>) -> Vec<Ready> {
    let answer = response(Ok(reply), keeper_pid);
    let of = |service: &str| Ready {
        key: record.id.to_string(),
        service: service.to_owned(),
        method: method.to_owned(),
        payload: payload.to_owned(),
        answer: answer.clone(),
        is_fallback: signal.is_some(),
        signal,
    };
    TASK_SERVICES.map(of).into()
}

/// The signals with which clients stop a container that the keeper can send to init by itself, and whether they are for `all`: that is
/// the same where all processes end with init. One that is paused takes more than a signal.
fn signals(record: &Record) -> Vec<(i32, bool)> {
    match (record.init.phase, record.init.pid) {
        (Phase::Created | Phase::Running, Some(_)) => {
            let to_all = (!record.shared_pid_namespace).then_some((SIGKILL, true));
            [(SIGTERM, false), (SIGKILL, false)].into_iter().chain(to_all).collect()
        }
        _ => Vec::new(),
    }
}

fn payload(reply: Reply, keeper_pid: u32) -> Vec<u8> {
    match reply {
        Reply::Empty => Vec::new(),
        // Create and Start answer with the same message.
        Reply::Pid(pid) => bytes(&api::StartResponse { pid: pid.unwrap_or(0), ..Default::default() }),
        Reply::Deleted(Deleted { pid, exit }) => bytes(&api::DeleteResponse {
            pid: pid.unwrap_or(0),
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exited_at(exit),
            ..Default::default()
        }),
        Reply::DeletedForCommand(Deleted { pid, exit }) => {
            ReportedExit { pid, status: exit.map(|exit| exit.status), at_nanos: exit.map(|exit| exit.at_nanos) }.encode()
        }
        Reply::State(state) => bytes(&state_response(*state)),
        Reply::Pids(pids) => {
            let process = |(pid, exec): (u32, Option<String>)| api::ProcessInfo {
                pid,
                info: exec.map(|exec| process_details(&exec)).into(),
                ..Default::default()
            };
            bytes(&api::PidsResponse { processes: pids.into_iter().map(process).collect(), ..Default::default() })
        }
        Reply::Exit(exit) => bytes(&api::WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at_nanos)),
            ..Default::default()
        }),
        Reply::Connect { task_pid } => bytes(&api::ConnectResponse {
            shim_pid: keeper_pid,
            task_pid: task_pid.unwrap_or(0),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        Reply::Pod(reply) => sandbox::payload(reply),
        Reply::Stats(metrics) => bytes(&api::StatsResponse { stats: MessageField::some(metrics), ..Default::default() }),
    }
}

fn state_response(state: StateOf) -> api::StateResponse {
    let status = match state.status {
        Status::Created => api::Status::CREATED,
        Status::Running => api::Status::RUNNING,
        Status::Paused => api::Status::PAUSED,
        Status::Stopped => api::Status::STOPPED,
    };
    api::StateResponse {
        id: state.id,
        bundle: state.bundle.to_string_lossy().into_owned(),
        pid: state.pid.unwrap_or(0),
        status: EnumOrUnknown::new(status),
        stdin: state.stdio.stdin,
        stdout: state.stdio.stdout,
        stderr: state.stdio.stderr,
        terminal: state.stdio.terminal,
        exit_status: state.exit.map_or(0, |exit| exit.status),
        exited_at: exited_at(state.exit),
        exec_id: state.exec,
        ..Default::default()
    }
}

fn status(error: &Error) -> ttrpc::Status {
    let code = match error.code() {
        Code::Unknown => ttrpc::Code::UNKNOWN,
        Code::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
        Code::DeadlineExceeded => ttrpc::Code::DEADLINE_EXCEEDED,
        Code::Unavailable => ttrpc::Code::UNAVAILABLE,
        Code::NotFound => ttrpc::Code::NOT_FOUND,
        Code::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
        Code::ResourceExhausted => ttrpc::Code::RESOURCE_EXHAUSTED,
        Code::FailedPrecondition => ttrpc::Code::FAILED_PRECONDITION,
        Code::Unimplemented => ttrpc::Code::UNIMPLEMENTED,
        Code::Internal => ttrpc::Code::INTERNAL,
    };
    let mut message = error.chain();
    if message.len() > MAX_SENTENCE_BYTES {
        message.truncate(message.floor_char_boundary(MAX_SENTENCE_BYTES));
        message.push('…');
    }
    ttrpc::Status { code: EnumOrUnknown::new(code), message, ..Default::default() }
}

/// The longest error text for a client: longer than any runtime's message, shorter than what a client can make us quote.
const MAX_SENTENCE_BYTES: usize = 64 << 10;
