//! What each call answers in each state, beside what the stock shim of containerd 1.6 answers, and under both names of the service.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use protobuf::Message;
use shim_tests::bundle::Container;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::stand::Stand;
use shim_tests::suite::Shim;
use shim_tests::task::{Task, V2, V3, wait};
use shim_tests::ttrpc::{Answer, CallError};

/// The states of a container, and of a process that was added to a running one.
const STATES: [&str; 8] = ["none", "created", "running", "paused", "exited", "exec added", "exec running", "exec exited"];

/// Calls that leave everything as it is, asked one after another.
const LOOKS: [&str; 9] = ["State", "Pids", "ResizePty", "CloseIO", "Update", "Stats", "Connect", "Shutdown", "Wait"];
/// Calls that change something: each gets a container of its own.
const DEEDS: [&str; 6] = ["Start", "Delete", "Pause", "Resume", "Kill", "Exec"];

/// Of a process that was added, only these are asked.
const OF_EXECS: [&str; 8] = ["State", "ResizePty", "CloseIO", "Wait", "Start", "Delete", "Kill", "Exec"];

/// What our shim does otherwise than the stock one, and why.
const INTENDED: &[(&str, &str, &str, &str, &str)] = &[
    ("created", "Pause", "Unknown", "FailedPrecondition", REFUSED),
    ("created", "Resume", "Unknown", "FailedPrecondition", REFUSED),
    ("running", "Start", "Unknown", "FailedPrecondition", REFUSED),
    ("running", "Delete", "Unknown", "FailedPrecondition", REFUSED),
    ("running", "Resume", "Unknown", "FailedPrecondition", REFUSED),
    ("paused", "Start", "Unknown", "FailedPrecondition", REFUSED),
    ("paused", "Delete", "Unknown", "FailedPrecondition", REFUSED),
    ("paused", "Pause", "Unknown", "FailedPrecondition", REFUSED),
    ("paused", "Exec", "Unknown", "FailedPrecondition", REFUSED),
    ("exited", "Start", "Unknown", "FailedPrecondition", REFUSED),
    ("exited", "Pause", "Unknown", "FailedPrecondition", REFUSED),
    ("exited", "Resume", "Unknown", "FailedPrecondition", REFUSED),
    ("exited", "Exec", "Unknown", "FailedPrecondition", REFUSED),
    ("exited", "Update", "Unknown", "FailedPrecondition", REFUSED),
    ("exited", "Pids", "Unknown", "Ok", "an error makes containerd 1.7 and later throw the task and its exit code away when they start"),
    ("exec running", "Start", "Unknown", "FailedPrecondition", REFUSED),
    ("exec running", "Delete", "Unknown", "FailedPrecondition", REFUSED),
    ("exec exited", "Start", "Unknown", "FailedPrecondition", REFUSED),
    ("exec exited", "ResizePty", "Unknown", "Ok", "a client that resizes may come a moment after the end: as harmless as before it"),
];

const REFUSED: &str = "a request that does not fit the state is told from a failure: clients that look at the code take both for an error";

/// What came of a call, short enough for a table: `Ok`, `Pending` or the status.
type Outcome = String;
type Table = BTreeMap<(&'static str, &'static str), Outcome>;

struct Subject {
    container: Option<Container>,
    exec: &'static str,
}

/// Brings a container into a state.
async fn bring(anchor: &Container, state: &str, number: usize) -> Result<Subject> {
    if state == "none" {
        return Ok(Subject { container: None, exec: "" });
    }
    let bundle = anchor.stand().bundle(&format!("c{number}"), &["sleep", "1000"]).group("pod");
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
        "exec added" => container.add("e", &["sleep", "1000"]).await?,
        "exec running" => drop(container.exec("e", &["sleep", "1000"]).await?),
        "exec exited" => {
            container.exec("e", &["true"]).await?;
            task.wait(id, "e").await?;
        }
        _ => {}
    }
    let exec = if state.starts_with("exec") { "e" } else { "" };
    Ok(Subject { container: Some(container), exec })
}

async fn ask(anchor: &Container, subject: &Subject, call: &str) -> Result<Outcome> {
    let task = &anchor.task;
    let bundle = subject.container.as_ref().map_or(&anchor.bundle, |container| &container.bundle);
    let id = subject.container.as_ref().map_or("nobody", |container| &container.id);
    let exec = subject.exec;
    let answer = match call {
        "State" => task.state(id, exec).await.map(drop),
        "Start" => task.start(id, exec).await.map(drop),
        "Delete" => task.delete(id, exec).await.map(drop),
        "Pids" => task.pids(id).await.map(drop),
        "Pause" => task.pause(id).await,
        "Resume" => task.resume(id).await,
        "Kill" => task.kill(id, exec, 9).await,
        "Exec" => {
            let exec = if exec.is_empty() { "new" } else { exec };
            task.exec(&api::ExecProcessRequest { id: id.to_owned(), ..bundle.exec_request(exec, &["true"]) }).await
        }
        "ResizePty" => task.resize(id, exec).await,
        "CloseIO" => task.close_stdin(id, exec).await,
        "Update" => task.update(id, &serde_json::json!({})).await,
        "Stats" => task.stats(id).await.map(drop),
        "Connect" => task.connect_to(id).await.map(drop),
        "Shutdown" => task.shutdown(id).await,
        "Wait" => {
            // one that is answered is answered at once
            let answer = task.begin_wait(id, exec).await?.status(Duration::from_millis(150)).await;
            if answer == Err(CallError::Silent) {
                return Ok("Pending".to_owned());
            }
            answer.map(drop)
        }
        _ => anyhow::bail!("no call {call}"),
    };
    match answer {
        Ok(()) => Ok("Ok".to_owned()),
        Err(CallError::Refused { code, .. }) => Ok(format!("{code:?}")),
        Err(error) => Err(error).with_context(|| format!("{call} of {id}/{exec}")),
    }
}

async fn clean_up(subject: Subject) -> Result<()> {
    let Some(container) = subject.container else { return Ok(()) };
    let (task, id) = (&container.task, container.id.as_str());
    if task.state(id, "").await.is_err() {
        return Ok(());
    }
    let _unless_paused = task.resume(id).await;
    let _unless_dead = task.kill(id, "", 9).await;
    task.wait(id, "").await?;
    task.delete(id, "").await?;
    Ok(())
}

async fn table(stand: &Stand) -> Result<Table> {
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    let (mut table, mut number) = (Table::new(), 0);
    for state in STATES {
        let concerns = |call: &&str| !state.starts_with("exec") || OF_EXECS.contains(call);
        number += 1;
        let subject = bring(&anchor, state, number).await.with_context(|| state.to_owned())?;
        for call in LOOKS.iter().filter(|call| concerns(call)) {
            table.insert((state, call), ask(&anchor, &subject, call).await.with_context(|| format!("{state}: {call}"))?);
        }
        clean_up(subject).await.with_context(|| state.to_owned())?;
        for call in DEEDS.iter().filter(|call| concerns(call)) {
            number += 1;
            let subject = bring(&anchor, state, number).await.with_context(|| state.to_owned())?;
            table.insert((state, call), ask(&anchor, &subject, call).await.with_context(|| format!("{state}: {call}"))?);
            clean_up(subject).await.with_context(|| format!("{state}: {call}"))?;
        }
    }
    ensure!(anchor.destroy().await? == 137);
    let _it_may_be_gone_before_it_answers = anchor.task.shutdown("anchor").await;
    Ok(table)
}

pub(crate) async fn every_call_in_every_state_answers_as_the_stock_shim_does(stand: Stand) -> Result<()> {
    let theirs_stand = stand.with_shim(&Shim::stock())?;
    let (ours, theirs) = tokio::join!(table(&stand), table(&theirs_stand));
    let (ours, theirs) = (ours.context("the shim on trial")?, theirs.context("the stock shim")?);
    theirs_stand.leaves_nothing().await?;
    let mut surprises = Vec::new();
    for (at @ (state, call), theirs) in &theirs {
        let ours = &ours[at];
        let intended = INTENDED.iter().find(|(of, to, ..)| of == state && to == call);
        match intended {
            Some((_, _, stock, own, _)) if stock == theirs && own == ours => {}
            Some(recorded) => {
                surprises.push(format!("{state}: {call}: {theirs} of the stock shim, {ours} of ours, recorded is {recorded:?}"))
            }
            None if ours == theirs => {}
            None => surprises.push(format!("(\"{state}\", \"{call}\", \"{theirs}\", \"{ours}\", \"\"),")),
        }
    }
    ensure!(surprises.is_empty() || !stand.shim().is_ours(), "not as recorded:\n{}", surprises.join("\n"));
    Ok(())
}

pub(crate) async fn both_names_of_the_service_give_the_same_answers(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    container.exec("e", &["sleep", "1000"]).await?;
    let request = |method: &'static str, message: Vec<u8>| (method, message);
    let bytes = |message: &dyn protobuf::MessageDyn| message.write_to_bytes_dyn().expect("complete");
    let mut requests = Vec::new();
    for (id, exec) in [("c1", ""), ("c1", "e"), ("c1", "nobody"), ("nobody", ""), ("", "")] {
        let (id, exec_id) = (id.to_owned(), exec.to_owned());
        requests.extend([
            request("State", bytes(&api::StateRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() })),
            request("Start", bytes(&api::StartRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() })),
            request("Delete", bytes(&api::DeleteRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() })),
            request("Pids", bytes(&api::PidsRequest { id: id.clone(), ..Default::default() })),
            request("Resume", bytes(&api::ResumeRequest { id: id.clone(), ..Default::default() })),
            request("ResizePty", bytes(&api::ResizePtyRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() })),
            request("CloseIO", bytes(&api::CloseIORequest { id: id.clone(), exec_id: exec_id.clone(), stdin: true, ..Default::default() })),
            request("Connect", bytes(&api::ConnectRequest { id: id.clone(), ..Default::default() })),
            request("Shutdown", bytes(&api::ShutdownRequest { id: id.clone(), ..Default::default() })),
            request("Exec", bytes(&api::ExecProcessRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() })),
            request("Create", bytes(&api::CreateTaskRequest { id: id.clone(), bundle: "/no/such".into(), ..Default::default() })),
            request("Checkpoint", bytes(&api::CheckpointTaskRequest { id: id.clone(), ..Default::default() })),
            request("Fly", vec![]),
            request("State", vec![0xff; 3]),
        ]);
        if id != "c1" {
            requests.push(request("Wait", bytes(&wait(&id, &exec_id))));
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
    // one begins under one name what the other ends
    let v3 = container.task.clone().service(V3);
    let waiting = container.task.begin_wait("c1", "").await?;
    v3.kill("c1", "", 9).await?;
    ensure!(waiting.status(SOON).await? == 137 && v3.wait("c1", "").await? == 137);
    ensure!(v3.delete("c1", "").await?.exit_status == 137);
    shim_tests::bundle::leave(&v3, container.shim_pid()?, "c1").await
}

/// What `Connect`, `State` and `Pids` say without a worker has to be what they say with one.
pub(crate) async fn ready_made_answers_are_those_of_the_worker(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).create().await?;
    let task = &container.task;
    let all = async |task: &Task, has_exec: bool| -> Result<Vec<Vec<u8>>> {
        let exec = async { if has_exec { task.state("c1", "e").await.map(Some) } else { Ok(None) } };
        let (connect, state, pids, exec) = tokio::join!(task.connect_to("c1"), task.state("c1", ""), task.pids("c1"), exec);
        let mut answers = vec![connect?.write_to_bytes()?, state?.write_to_bytes()?, format!("{:?}", pids?).into_bytes()];
        if let Some(state) = exec? {
            answers.push(state.write_to_bytes()?);
        }
        Ok(answers)
    };
    let mut has_exec = false;
    for step in ["created", "running", "with an exec", "paused", "exited"] {
        match step {
            "running" => container.start().await?,
            "with an exec" => drop(container.exec("e", &["sleep", "1000"]).await?),
            "paused" => task.pause("c1").await?,
            "exited" => {
                task.kill("c1", "", 9).await?;
                task.wait("c1", "e").await?;
                task.wait("c1", "").await?;
            }
            _ => {}
        }
        has_exec |= step == "with an exec";
        let fresh = all(task, has_exec).await?;
        let worker = container.worker_pid().await?;
        shim_tests::proc::signal(worker, nix::sys::signal::Signal::SIGSTOP)?;
        let ready = all(task, has_exec).await;
        shim_tests::proc::signal(worker, nix::sys::signal::Signal::SIGCONT)?;
        ensure!(ready? == fresh, "{step}: not the same");
    }
    eventually("deleted", SOON, async || Ok(task.delete("c1", "").await?)).await?;
    shim_tests::bundle::leave(task, container.shim_pid()?, "c1").await
}
