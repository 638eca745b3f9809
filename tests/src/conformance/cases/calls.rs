//! Every call in every state, as a table.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::api;

use crate::bundle::{Bundle, Container, leave};
use crate::clauses;
use crate::conformance::Case;
use crate::eventually::SOON;
use crate::stand::Stand;
use crate::task::{Task, V2, V3, wait};
use crate::ttrpc::{Answer, CallError, Code, DEADLINE, code_of, refusal};

pub(super) fn cases() -> Vec<Case> {
    clauses![calls:
        "T1" => the_task_service_of_v2_is_served;
        "T2" => the_task_service_of_v3_is_served, both_names_of_the_service_give_the_same_answers;
        "T3" => unknown_services_and_methods_are_unimplemented;
        "T4" => missing, deleted, created, running, paused, exited, exec_added, exec_start_failed, exec_running, exec_in_paused, exec_exited, exec_after_init;
        "T5" => a_second_container_of_an_id_is_refused, a_second_exec_of_an_id_already_exists;
        "T6" => codes_when_created, codes_when_running, codes_when_paused, codes_when_exited, codes_of_execs, the_code_of_a_second_container_is_already_exists;
    ]
}

/// The states of a container, and of an exec.
const STATES: [&str; 12] = [
    "missing",
    "deleted",
    "created",
    "running",
    "paused",
    "exited",
    "exec added",
    "exec start failed",
    "exec running",
    "exec in paused",
    "exec exited",
    "exec after init",
];

/// The answer to each call in each of [`STATES`]; those from `Create` on change something, and get a container of their own.
///
/// A lower-case word is an error whose code only T6 requires.
///
/// | | |
/// | --- | --- |
/// | `ok` | accepted |
/// | `wait` | no answer until the process ends |
/// | `NotFound` | refused with that code |
/// | `precondition` | refused, with FailedPrecondition as the better code |
/// | `exists` | refused, with AlreadyExists as the better code |
/// | `refused` | refused, with any code |
/// | `any` | accepted or refused, but answered |
/// | `-` | not called: the call does not apply to execs |
///
/// Kill of an exec that does not run has to be FailedPrecondition: after a success containerd's client waits for an exit that never comes.
#[rustfmt::skip]
const ANSWERS: [(&str, [&str; STATES.len()]); 17] = [
    //              missing      deleted     created         running         paused          exited          added                 start failed          running          in paused        exited           after init
    ("State",      ["NotFound", "NotFound", "ok",           "ok",           "ok",           "ok",           "ok",                 "ok",                 "ok",            "ok",            "ok",            "ok"]),
    ("Pids",       ["NotFound", "NotFound", "ok",           "ok",           "ok",           "ok",           "-",                  "-",                  "-",             "-",             "-",             "-"]),
    ("ResizePty",  ["NotFound", "NotFound", "ok",           "ok",           "ok",           "any",          "any",                "any",                "ok",            "ok",            "any",           "any"]),
    ("CloseIO",    ["NotFound", "NotFound", "ok",           "ok",           "ok",           "ok",           "ok",                 "ok",                 "ok",            "ok",            "ok",            "ok"]),
    ("Update",     ["NotFound", "NotFound", "ok",           "ok",           "any",          "any",          "-",                  "-",                  "-",             "-",             "-",             "-"]),
    ("Stats",      ["NotFound", "NotFound", "ok",           "ok",           "ok",           "any",          "-",                  "-",                  "-",             "-",             "-",             "-"]),
    ("Connect",    ["any",      "any",      "ok",           "ok",           "ok",           "ok",           "-",                  "-",                  "-",             "-",             "-",             "-"]),
    ("Shutdown",   ["ok",       "ok",       "ok",           "ok",           "ok",           "ok",           "-",                  "-",                  "-",             "-",             "-",             "-"]),
    ("Wait",       ["NotFound", "NotFound", "wait",         "wait",         "wait",         "ok",           "wait",               "any",                "wait",          "wait",          "ok",            "ok"]),
    ("Create",     ["ok",       "ok",       "exists",       "exists",       "exists",       "exists",       "-",                  "-",                  "-",             "-",             "-",             "-"]),
    ("Start",      ["NotFound", "NotFound", "ok",           "precondition", "precondition", "precondition", "ok",                 "refused",            "precondition",  "precondition",  "precondition",  "precondition"]),
    ("Delete",     ["NotFound", "any",      "ok",           "precondition", "precondition", "ok",           "ok",                 "ok",                 "precondition",  "precondition",  "ok",            "ok"]),
    ("Pause",      ["NotFound", "NotFound", "precondition", "ok",           "precondition", "precondition", "-",                  "-",                  "-",             "-",             "-",             "-"]),
    ("Resume",     ["NotFound", "NotFound", "precondition", "precondition", "ok",           "precondition", "-",                  "-",                  "-",             "-",             "-",             "-"]),
    ("Kill",       ["NotFound", "NotFound", "ok",           "ok",           "ok",           "NotFound",     "FailedPrecondition", "FailedPrecondition", "ok",            "ok",            "NotFound",      "NotFound"]),
    ("Exec",       ["NotFound", "NotFound", "any",          "ok",           "precondition", "precondition", "AlreadyExists",      "AlreadyExists",      "AlreadyExists", "refused",       "AlreadyExists", "refused"]),
    ("Checkpoint", ["NotFound", "NotFound", "precondition", "any",          "any",          "precondition", "-",                  "-",                  "-",             "-",             "-",             "-"]),
];
/// The number of calls, at the top of the table, that change nothing.
const LOOKS: usize = 9;

/// The table as Markdown, for the document.
pub fn markdown() -> String {
    let mut text = format!("| | {} |\n| --- |{}\n", STATES.join(" | "), " --- |".repeat(STATES.len()));
    for (call, answers) in ANSWERS {
        let _cannot_fail = writeln!(text, "| {call} | {} |", answers.map(|answer| answer.trim_matches('-')).join(" | "));
    }
    text
}

/// A container in some state, beside an anchor that keeps the shim.
struct Subject {
    bundle: Bundle,
    exec: &'static str,
}

/// Brings a container into a state.
async fn bring(anchor: &Container, state: &str, number: usize) -> Result<Subject> {
    let bundle = anchor.stand().bundle(&format!("c{number}"), &["sleep", "1000"]).group("pod");
    if state == "missing" {
        return Ok(Subject { bundle, exec: "" });
    }
    let container = bundle.create_in(&anchor.task).await?;
    let (task, id) = (&container.task, container.id.as_str());
    if state != "created" {
        container.start().await?;
    }
    match state {
        "paused" => task.pause(id).await?,
        "exited" => {
            task.kill(id, "", 9).await?;
            task.wait(id, "").await?;
        }
        "deleted" => drop(container.destroy().await?),
        "exec added" => container.add("e", &["sleep", "1000"]).await?,
        "exec start failed" => {
            container.add("e", &["/no/such/program"]).await?;
            drop(refusal(task.start(id, "e").await)?);
        }
        "exec running" => drop(container.exec("e", &["sleep", "1000"]).await?),
        "exec in paused" => {
            container.exec("e", &["sleep", "1000"]).await?;
            task.pause(id).await?;
        }
        "exec exited" => {
            container.exec("e", &["true"]).await?;
            task.wait(id, "e").await?;
        }
        "exec after init" => {
            container.exec("e", &["sleep", "1000"]).await?;
            task.kill(id, "", 9).await?;
            task.wait(id, "e").await?;
            task.wait(id, "").await?;
        }
        _ => {}
    }
    let exec = if state.starts_with("exec") { "e" } else { "" };
    Ok(Subject { bundle: container.bundle, exec })
}

/// The outcome of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Accepted,
    Pending,
    Refused(Code),
}

async fn ask(anchor: &Container, subject: &Subject, call: &str) -> Result<Outcome> {
    let (task, bundle, id, exec) = (&anchor.task, &subject.bundle, subject.bundle.id.as_str(), subject.exec);
    let answer = match call {
        "State" => task.state(id, exec).await.map(drop),
        "Create" => task.create(&bundle.write()?.request()).await.map(drop),
        "Start" => task.start(id, exec).await.map(drop),
        "Delete" => task.delete(id, exec).await.map(drop),
        "Pids" => task.pids(id).await.map(drop),
        "Pause" => task.pause(id).await,
        "Resume" => task.resume(id).await,
        "Kill" => task.kill(id, exec, 9).await,
        "Exec" => {
            let exec = if exec.is_empty() { "new" } else { exec };
            task.exec(&bundle.exec_request(exec, &["true"])).await
        }
        "ResizePty" => task.resize(id, exec).await,
        "CloseIO" => task.close_stdin(id, exec).await,
        "Update" => task.update(id, &serde_json::json!({})).await,
        "Stats" => task.stats(id).await.map(drop),
        "Connect" => task.connect_to(id).await.map(drop),
        "Shutdown" => task.shutdown(id).await,
        "Checkpoint" => {
            // a path under which no folder can be created: an image would be written there, not read
            let request = api::CheckpointTaskRequest { id: id.to_owned(), path: "/proc/nowhere/image".to_owned(), ..Default::default() };
            task.call::<api::Empty>("Checkpoint", &request, DEADLINE).await.map(drop)
        }
        "Wait" => {
            // the shim answers at once or not at all
            let answer = task.begin_wait(id, exec).await?.status(Duration::from_millis(150)).await;
            if answer == Err(CallError::Silent) {
                return Ok(Outcome::Pending);
            }
            answer.map(drop)
        }
        _ => bail!("no call {call}"),
    };
    match answer {
        Ok(()) => Ok(Outcome::Accepted),
        Err(CallError::Refused { code, .. }) => Ok(Outcome::Refused(code)),
        Err(error) => Err(error).with_context(|| format!("{call} of {id}/{exec}")),
    }
}

async fn clean_up(task: &Task, subject: Subject) -> Result<()> {
    let id = subject.bundle.id.as_str();
    if task.state(id, "").await.is_err() {
        return Ok(());
    }
    let _unless_paused = task.resume(id).await;
    let _unless_dead = task.kill(id, "", 9).await;
    task.wait(id, "").await?;
    task.delete(id, "").await?;
    Ok(())
}

/// Whether an answer matches the table; with `codes` the error code must match too.
fn fits(expected: &str, found: &Outcome, codes: bool) -> bool {
    match (expected, found) {
        ("any", _) | ("ok", Outcome::Accepted) | ("wait", Outcome::Pending) => true,
        ("refused", Outcome::Refused(_)) => true,
        ("precondition", Outcome::Refused(code)) => !codes || *code == Code::FailedPrecondition,
        ("exists", Outcome::Refused(code)) => !codes || *code == Code::AlreadyExists,
        (name, Outcome::Refused(code)) => name == format!("{code:?}"),
        _ => false,
    }
}

/// Makes every call in one state.
async fn column(stand: &Stand, state: &str, codes: bool) -> Result<()> {
    let place = STATES.iter().position(|name| *name == state).context("a state of the table")?;
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    let mut wrong = Vec::new();
    let mut subject = Some(bring(&anchor, state, 0).await?);
    for (index, (call, answers)) in ANSWERS.iter().enumerate() {
        let expected = answers[place];
        if expected == "-" || codes && !["precondition", "exists"].contains(&expected) {
            continue;
        }
        if index >= LOOKS {
            // the previous call has changed the container
            if let Some(spent) = subject.take() {
                clean_up(&anchor.task, spent).await?;
            }
        }
        let current = match subject.take() {
            Some(current) => current,
            None => bring(&anchor, state, index).await.with_context(|| format!("{state}, for {call}"))?,
        };
        let found = ask(&anchor, &current, call).await.with_context(|| format!("{state}: {call}"))?;
        if !fits(expected, &found, codes) {
            wrong.push(format!("{call}: {expected} expected, {found:?} found"));
        }
        subject = Some(current);
    }
    if let Some(spent) = subject {
        clean_up(&anchor.task, spent).await?;
    }
    anchor.shut_down().await?;
    ensure!(wrong.is_empty(), "{state}: {}", wrong.join("; "));
    Ok(())
}

async fn missing(stand: Stand) -> Result<()> {
    column(&stand, "missing", false).await
}

async fn created(stand: Stand) -> Result<()> {
    column(&stand, "created", false).await
}

async fn running(stand: Stand) -> Result<()> {
    column(&stand, "running", false).await
}

async fn paused(stand: Stand) -> Result<()> {
    column(&stand, "paused", false).await
}

async fn exited(stand: Stand) -> Result<()> {
    column(&stand, "exited", false).await
}

async fn exec_added(stand: Stand) -> Result<()> {
    column(&stand, "exec added", false).await
}

async fn exec_running(stand: Stand) -> Result<()> {
    column(&stand, "exec running", false).await
}

async fn exec_exited(stand: Stand) -> Result<()> {
    column(&stand, "exec exited", false).await
}

async fn deleted(stand: Stand) -> Result<()> {
    column(&stand, "deleted", false).await
}

async fn exec_start_failed(stand: Stand) -> Result<()> {
    column(&stand, "exec start failed", false).await
}

async fn exec_in_paused(stand: Stand) -> Result<()> {
    column(&stand, "exec in paused", false).await
}

async fn exec_after_init(stand: Stand) -> Result<()> {
    column(&stand, "exec after init", false).await
}

async fn codes_when_created(stand: Stand) -> Result<()> {
    column(&stand, "created", true).await
}

async fn codes_when_running(stand: Stand) -> Result<()> {
    column(&stand, "running", true).await
}

async fn codes_when_paused(stand: Stand) -> Result<()> {
    column(&stand, "paused", true).await
}

async fn codes_when_exited(stand: Stand) -> Result<()> {
    column(&stand, "exited", true).await
}

async fn codes_of_execs(stand: Stand) -> Result<()> {
    for state in ["exec running", "exec in paused", "exec exited", "exec after init"] {
        column(&stand, state, true).await?;
    }
    Ok(())
}

async fn a_second_container_of_an_id_is_refused(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    drop(refusal(container.task.create(&container.bundle.request()).await)?);
    ensure!(container.task.state("c1", "").await?.pid == container.pid, "the first container or exec has changed");
    container.shut_down().await.map(drop)
}

async fn the_code_of_a_second_container_is_already_exists(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let code = code_of(container.task.create(&container.bundle.request()).await)?;
    container.shut_down().await?;
    ensure!(code == Code::AlreadyExists, "{code:?}");
    Ok(())
}

async fn a_second_exec_of_an_id_already_exists(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let first = container.exec("e", &["sleep", "1000"]).await?;
    let code = code_of(container.task.exec(&container.bundle.exec_request("e", &["true"])).await)?;
    ensure!(code == Code::AlreadyExists, "{code:?}");
    ensure!(container.task.state("c1", "e").await?.pid == first, "the first container or exec has changed");
    container.shut_down().await.map(drop)
}

/// A container's lifecycle under one name of the service.
async fn life(stand: Stand, service: &'static str) -> Result<()> {
    let bundle = stand.bundle("c1", &["sleep", "1000"]);
    let task = bundle.shim().await?.service(service);
    let container = bundle.run_in(&task).await?;
    ensure!(container.run("e", &["sh", "-c", "exit 4"]).await? == 4);
    ensure!(task.connect_to("c1").await?.task_pid == container.pid);
    container.shut_down().await.map(drop)
}

async fn the_task_service_of_v2_is_served(stand: Stand) -> Result<()> {
    life(stand, V2).await
}

async fn the_task_service_of_v3_is_served(stand: Stand) -> Result<()> {
    life(stand, V3).await
}

/// One daemon creates a container, another one deletes it.
async fn both_names_of_the_service_give_the_same_answers(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    container.exec("e", &["sleep", "1000"]).await?;
    let bytes = |message: &dyn protobuf::MessageDyn| message.write_to_bytes_dyn().expect("complete");
    let mut requests = Vec::new();
    for (id, exec) in [("c1", ""), ("c1", "e"), ("c1", "missing"), ("missing", "")] {
        let (id, exec_id) = (id.to_owned(), exec.to_owned());
        requests.extend([
            ("State", bytes(&api::StateRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() })),
            ("Start", bytes(&api::StartRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() })),
            ("Delete", bytes(&api::DeleteRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() })),
            ("Pids", bytes(&api::PidsRequest { id: id.clone(), ..Default::default() })),
            ("Resume", bytes(&api::ResumeRequest { id: id.clone(), ..Default::default() })),
            ("Connect", bytes(&api::ConnectRequest { id: id.clone(), ..Default::default() })),
            ("Shutdown", bytes(&api::ShutdownRequest { id: id.clone(), ..Default::default() })),
        ]);
        if id != "c1" {
            requests.push(("Wait", bytes(&wait(&id, &exec_id))));
        }
    }
    let nameless = |answer: Answer<Vec<u8>>| match answer {
        // the name of the service may be repeated
        Err(CallError::Refused { code, message }) => Err(CallError::Refused { code, message: message.replace(V3, V2) }),
        answer => answer,
    };
    let connection = container.task.connection();
    for (method, payload) in requests {
        let mut answers = Vec::new();
        for service in [V2, V3] {
            answers.push(nameless(connection.call(service, method, payload.clone(), SOON).await));
        }
        ensure!(answers[0] == answers[1], "{method} {payload:?}: {answers:?}");
        ensure!(!matches!(answers[0], Err(CallError::Silent | CallError::Closed)), "{method}: {answers:?}");
    }
    // created under one name, deleted under the other
    let v3 = container.task.clone().service(V3);
    let waiting = container.task.begin_wait("c1", "").await?;
    v3.kill("c1", "", 9).await?;
    ensure!(waiting.status(SOON).await? == 137 && v3.wait("c1", "").await? == 137);
    ensure!(v3.delete("c1", "").await?.exit_status == 137);
    leave(&v3, container.shim_pid()?, "c1").await
}

async fn unknown_services_and_methods_are_unimplemented(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let task = Task::connect(container.task.socket()).await?;
    for (service, method) in [(task.service_name(), "Fly"), ("containerd.task.v9.Task", "State")] {
        let answer = task.connection().call(service, method, Vec::new(), SOON).await;
        ensure!(answer.as_ref().err().and_then(CallError::code) == Some(Code::Unimplemented), "{service}/{method}: {answer:?}");
    }
    container.shut_down().await.map(drop)
}
