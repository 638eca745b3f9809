//! How a fault changes an answer.

use std::process::Command;

use anyhow::Result;
use containerd_shim_protos::api;
use containerd_shim_protos::sandbox_api::{PlatformResponse, SandboxStatusResponse};
use containerd_shim_protos::ttrpc::{Code, Response};
use shim_tests::sandbox::READY;

use super::calls::{Call, Link, edit, status};
use super::stdout;

/// Fault, method (none: all), the code that it replaces (none: any error), and the new code.
const REFUSALS: &[(&str, &str, Option<Code>, Code)] = &[
    ("wrong-code", "", Some(Code::NOT_FOUND), Code::UNKNOWN),
    ("wrong-refusal", "", Some(Code::FAILED_PRECONDITION), Code::UNKNOWN),
    ("internal", "", Some(Code::UNIMPLEMENTED), Code::INTERNAL),
    ("create-never-fails", "Create", None, Code::OK),
    ("exec-never-fails", "Exec", None, Code::OK),
    ("exec-never-fails", "Start", None, Code::OK),
    ("sandbox-never-fails", "CreateSandbox", None, Code::OK),
    ("sandbox-never-fails", "StartSandbox", None, Code::OK),
];

/// How it changes a successful answer; an empty exec means the container's init.
type Change = fn(&Call, &mut Vec<u8>) -> Result<()>;

/// Fault, method, and how it changes a successful answer.
const CHANGES: &[(&str, &str, Change)] = &[
    ("wait-137", "Wait", |_, answer| edit(answer, |wait: &mut api::WaitResponse| wait.exit_status = 137)),
    ("bare-signal", "Wait", |_, answer| edit(answer, |wait: &mut api::WaitResponse| wait.exit_status -= signal_bit(wait.exit_status))),
    ("killed-execs-end-well", "Wait", end_well),
    ("wrong-task-pid", "Connect", |_, answer| edit(answer, |connect: &mut api::ConnectResponse| connect.task_pid += 1)),
    ("leak", "Connect", |_, answer| edit(answer, |connect: &mut api::ConnectResponse| connect.shim_pid = std::process::id())),
    ("wrong-exit-time", "State", |_, answer| edit(answer, wrong_time)),
    ("early-running", "State", |_, answer| edit(answer, |state: &mut api::StateResponse| state.status = early(state.status))),
    ("wrong-exec-pid", "State", wrong_exec_pid),
    ("lost-byte", "State", |_, answer| edit(answer, clients_path)),
    ("late-end", "State", |_, answer| edit(answer, clients_path)),
    ("impatient", "State", |_, answer| edit(answer, clients_path)),
    ("quiet-is-the-end", "State", |_, answer| edit(answer, clients_path)),
    ("late-cgroup", "Delete", |call, _| keep_folders(call)),
    ("two-processes", "SandboxStatus", |_, answer| edit(answer, |status: &mut SandboxStatusResponse| status.pid += 1)),
    ("always-ready", "SandboxStatus", |_, answer| edit(answer, |status: &mut SandboxStatusResponse| status.state = READY.to_owned())),
    ("unreadable-info", "SandboxStatus", |_, answer| edit(answer, unreadable_info)),
    ("other-platform", "Platform", |_, answer| edit(answer, other_platform)),
];

/// Applies the fault, and returns whether there was anything to do.
pub(super) fn change(link: &Link, call: &Call, response: &mut Response) -> bool {
    let fault = link.shared.fault.as_str();
    let is_of = |name: &str, method: &str| name == fault && (method.is_empty() || method == call.method);
    let code = response.status.code.value();
    if code == 0 {
        let rule = CHANGES.iter().find(|(name, method, _)| is_of(name, method));
        return rule.is_some_and(|(_, _, change)| change(call, &mut response.payload).is_ok());
    }
    let rule = REFUSALS.iter().find(|(name, method, from, _)| is_of(name, method) && from.is_none_or(|from| from as i32 == code));
    match rule {
        Some((_, _, _, Code::OK)) => response.status = status(Code::OK),
        Some((_, _, _, code)) => {
            if let Some(status) = response.status.as_mut() {
                status.code = protobuf::EnumOrUnknown::new(*code);
            }
        }
        None => return false,
    }
    true
}

fn unreadable_info(status: &mut SandboxStatusResponse) {
    status.info.insert("info".to_owned(), "{".to_owned());
}

fn other_platform(answer: &mut PlatformResponse) {
    answer.platform.mut_or_insert_default().os = "windows".to_owned();
}

/// The exit status of a process killed by SIGTERM.
fn signal_bit(exit_status: u32) -> u32 {
    if exit_status == 128 + 15 { 128 } else { 0 }
}

fn end_well(call: &Call, answer: &mut Vec<u8>) -> Result<()> {
    edit(answer, |wait: &mut api::WaitResponse| {
        if !call.exec.is_empty() && wait.exit_status == 137 {
            wait.exit_status = 0;
        }
    })
}

fn wrong_time(state: &mut api::StateResponse) {
    if let Some(at) = state.exited_at.as_mut() {
        at.nanos = (at.nanos + 1) % 1_000_000_000;
    }
}

fn early(phase: protobuf::EnumOrUnknown<api::Status>) -> protobuf::EnumOrUnknown<api::Status> {
    if phase == api::Status::CREATED.into() { api::Status::RUNNING.into() } else { phase }
}

fn wrong_exec_pid(call: &Call, answer: &mut Vec<u8>) -> Result<()> {
    edit(answer, |state: &mut api::StateResponse| state.pid += u32::from(!call.exec.is_empty()))
}

fn clients_path(state: &mut api::StateResponse) {
    state.stdout = stdout::client_path(&state.stdout);
}

/// Creates them again for a second, in a separate process, because the shim and this proxy may exit before that.
fn keep_folders(call: &Call) -> Result<()> {
    let script = "mkdir -p \"$@\"; (sleep 1; rmdir \"$@\") </dev/null >/dev/null 2>&1 &";
    Command::new("/bin/sh")
        .args(["-c", script, "sh"])
        .args(&call.folders)
        .env_clear()
        .env("PATH", "/bin:/usr/bin")
        .current_dir("/")
        .status()?;
    Ok(())
}
