//! Execs: with and without terminal, their ids, their order among the events.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, ensure};
use prost::Message as _;
use shim_tests::container::{Stdio, code_of};
use shim_tests::context::Context;
use shim_tests::events::init_is_the_last_of;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::messages::ProcessDetails;
use shim_tests::proc;
use shim_tests::runner::skip;
use shim_tests::suite::Runtime;
use tokio::task::JoinSet;
use tonic::Code;

pub(crate) async fn an_exec_has_its_own_output_and_exit_code(cx: Context) -> Result<()> {
    let events = cx.events().await?;
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let exec = container.exec("e1", &["sh", "-c", "echo out; echo err >&2; exit 4"]).stdio(Stdio::OUTPUT).start().await?;
    ensure!(exec.finish().await? == 4);
    ensure!(exec.io.out().to_end().await? == "out\n");
    ensure!(exec.io.err().to_end().await? == "err\n");
    container.destroy().await?;
    let published = cx.history(&events, &container.id).await?;
    let expected = ["create", "start", "exec-added(e1)", "exec-started(e1)", "exit(e1)", "exit", "delete"];
    ensure!(published == expected, "{published:?}");
    Ok(())
}

pub(crate) async fn an_exec_with_a_terminal_has_one(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let exec = container.exec("tty", &["sh", "-c", "test -t 0 && test -t 1 && tty && read x && echo got $x; exit 6"]);
    let exec = exec.stdio(Stdio::ALL).terminal().start().await?;
    exec.io.out().until("/dev/pts/").await?;
    exec.io.stdin().await?.write_all(b"this\n")?;
    ensure!(exec.finish().await? == 6);
    let text = exec.io.out().to_end().await?;
    ensure!(text.contains("got this"), "{text:?}");
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn an_exec_gets_its_user_folder_and_environment(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let exec = container.exec("e", &["sh", "-c", "id -u; pwd; echo $COLOUR"]).stdio(Stdio::OUTPUT).process(|process| {
        process["user"] = serde_json::json!({ "uid": 1000, "gid": 1000 });
        process["cwd"] = serde_json::json!("/tmp");
        process["env"] = serde_json::json!(["PATH=/bin", "COLOUR=green"]);
    });
    let exec = exec.start().await?;
    ensure!(exec.finish().await? == 0);
    let text = exec.io.out().to_end().await?;
    ensure!(text == "1000\n/tmp\ngreen\n", "{text:?}");
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn an_exec_id_is_free_again_after_delete(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    for status in 0..4 {
        ensure!(container.exec("again", &["sh", "-c", &format!("exit {status}")]).run().await? == status);
    }
    let never_started = container.exec("again", &["true"]).add().await?;
    never_started.delete().await?;
    ensure!(container.exec("again", &["true"]).run().await? == 0);
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn an_exec_of_a_missing_program_fails_and_can_be_deleted(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let exec = container.exec("e", &["/no/such/program"]).stdio(Stdio::OUTPUT).add().await?;
    let Err(error) = exec.start().await else { anyhow::bail!("it was accepted") };
    ensure!(error.message().contains("/no/such/program"), "{error:?}");
    exec.close_stdin().await?;
    exec.delete().await?;
    ensure!(container.exec("e", &["sh", "-c", "exit 3"]).run().await? == 3);
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn an_exec_is_killed_alone(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let exec = container.exec("e", &["sleep", "1000"]).start().await?;
    let other = container.exec("o", &["sleep", "1000"]).start().await?;
    exec.kill(15).await?;
    ensure!(exec.wait().await? == 143);
    ensure!(code_of(exec.kill(15).await)? == Code::NotFound);
    exec.delete().await?;
    ensure!(other.state().await?.pid > 0);
    other.kill(9).await?;
    ensure!(other.finish().await? == 137);
    container.destroy().await?;
    Ok(())
}

/// How a process leaves the exec that it descends from.
const WAYS: [(&str, &str); 5] = [
    ("a child", "SLEEP &"),
    ("an orphan", "(SLEEP &)"),
    ("a session", "setsid SLEEP &"),
    ("an orphan in a session, with the output", "(setsid sh -c 'SLEEP & exit' &)"),
    ("an orphan in a session, without the output", "(setsid sh -c '(SLEEP &) & exit' <&- >&- 2>&- &)"),
];

/// Sleeps of a length that no other has, by which their processes are found.
fn sleeps<const N: usize>() -> [String; N] {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    std::array::from_fn(|_| format!("sleep {}", 100_000 + NEXT.fetch_add(1, Ordering::Relaxed)))
}

fn runs(command: &str) -> bool {
    proc::all().into_values().any(|process| process.command == command)
}

async fn all_run(commands: &[String]) -> Result<()> {
    eventually("all of them run", SOON, async || {
        let missing: Vec<_> = commands.iter().filter(|command| !runs(command)).collect();
        ensure!(missing.is_empty(), "not yet: {missing:?}");
        Ok(())
    })
    .await
}

/// What the engine cannot follow: only the native one marks its execs.
fn is_followed(cx: &Context, way: &str) -> bool {
    cx.runtime() == Runtime::Native || way != WAYS[4].0
}

pub(crate) async fn a_killed_exec_takes_its_descendants_and_nothing_else(cx: Context) -> Result<()> {
    if !cx.shim().is_ours() {
        return skip("the stock shim kills the exec alone");
    }
    let others = sleeps::<4>();
    let both = |sleeps: &[String]| format!("{} & (setsid {} <&- >&- 2>&- &); exec sleep 1000", sleeps[0], sleeps[1]);
    let container = cx.container(&["sh", "-c", &both(&others[..2])]).start().await?;
    let other = container.exec("o", &["sh", "-c", &both(&others[2..])]).stdio(Stdio::OUTPUT).start().await?;
    let own = sleeps::<5>();
    let script: String = WAYS.iter().zip(&own).map(|((_, script), sleep)| format!("{}\n", script.replace("SLEEP", sleep))).collect();
    let script = format!("trap '' HUP INT TERM\n{script} exec sleep 1000");
    let exec = container.exec("e", &["sh", "-c", &script]).stdio(Stdio::OUTPUT).start().await?;
    all_run(&[&own[..], &others].concat()).await?;
    exec.kill(9).await?;
    ensure!(exec.wait().await? == 137);
    // the processes that held the output are dead, so it ends
    exec.io.out().to_end().await?;
    ensure!(exec.delete().await?.exit_status == 137);
    for ((way, _), sleep) in WAYS.iter().zip(&own).filter(|((way, _), _)| is_followed(&cx, way)) {
        eventually_true(format!("{way} is gone"), SOON, || !runs(sleep)).await?;
    }
    ensure!(others.iter().all(|sleep| runs(sleep)) && other.state().await?.pid > 0, "another process was killed, too");
    ensure!(container.exec("after", &["sh", "-c", "exit 4"]).run().await? == 4);
    container.destroy().await?;
    Ok(())
}

/// A probe may start what is to stay. containerd's CRI plugin kills every exec before it deletes it, also one that has exited.
pub(crate) async fn what_an_exec_has_left_behind_outlives_its_deletion(cx: Context) -> Result<()> {
    let [stays] = sleeps::<1>();
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let exec = container.exec("e", &["sh", "-c", &format!("(setsid {stays} <&- >&- 2>&- &)")]).stdio(Stdio::OUTPUT).start().await?;
    ensure!(exec.wait().await? == 0);
    all_run(std::slice::from_ref(&stays)).await?;
    ensure!(code_of(exec.kill(9).await)? == Code::NotFound);
    ensure!(exec.delete().await?.exit_status == 0);
    ensure!(runs(&stays), "it was killed");
    container.destroy().await?;
    eventually_true("it ends with the container", SOON, || !runs(&stays)).await
}

/// Processes that live for a moment, each of which starts the next: whatever looks at them one by one comes too late.
pub(crate) async fn a_killed_exec_takes_descendants_that_never_stop_forking(cx: Context) -> Result<()> {
    if !cx.shim().is_ours() || cx.runtime() != Runtime::Native {
        return skip("only the native engine marks its execs");
    }
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let hop = r#"export hop='(eval "$hop" &)'; for i in 1 2 3 4 5 6 7 8; do (setsid sh -c "$hop" <&- >&- 2>&- &); done"#;
    let exec = container.exec("e", &["sh", "-c", &format!("{hop}; echo ready; exec sleep 1000")]).stdio(Stdio::OUTPUT).start().await?;
    exec.io.out().until("ready").await?;
    exec.kill(9).await?;
    ensure!(exec.finish().await? == 137);
    eventually("init is left alone", SOON, async || {
        let pids = cx.client().pids(&container.id).await?;
        ensure!(pids.len() == 1, "{pids:?}");
        Ok(())
    })
    .await?;
    // and is not frozen
    ensure!(container.exec("after", &["sh", "-c", "exit 4"]).run().await? == 4);
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn execs_end_before_init_does(cx: Context) -> Result<()> {
    let events = cx.events().await?;
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let mut execs = Vec::new();
    for number in 0..5 {
        execs.push(container.exec(&format!("e{number}"), &["sleep", "1000"]).start().await?);
    }
    container.kill(9).await?;
    ensure!(container.wait().await? == 137);
    for exec in &execs {
        ensure!(exec.finish().await? == 137);
    }
    container.delete().await?;
    events.until("six exits", |all| all.iter().filter(|event| event.topic == "exit").count() == 6).await?;
    init_is_the_last_of(6, &events.of(&container.id))
}

pub(crate) async fn pids_name_every_process_and_its_exec(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let exec = container.exec("e", &["sleep", "1000"]).start().await?;
    let exec_pid = exec.state().await?.pid;
    let pids = cx.client().pids(&container.id).await?;
    ensure!(pids.iter().any(|process| process.pid == container.pid), "{pids:?}");
    let named = pids.iter().find(|process| process.pid == exec_pid).and_then(|process| process.info.as_ref());
    let details = ProcessDetails::decode(named.map_or(&[][..], |info| &info.value))?;
    ensure!(details.exec_id == "e", "{pids:?}");
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn events_of_two_hundred_short_execs_are_published_in_order(cx: Context) -> Result<()> {
    let events = cx.events().await?;
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let mut running = JoinSet::new();
    for number in 0..200u32 {
        let exec = container.exec(&format!("e{number}"), &["sh", "-c", &format!("exit {}", number % 100)]);
        running.spawn(async move { anyhow::Ok((number, exec.run().await?)) });
        if running.len() == 8 {
            let (number, status) = running.join_next().await.expect("eight are running")??;
            ensure!(status == number % 100, "exec {number}: {status}");
        }
    }
    while let Some(done) = running.join_next().await {
        let (number, status) = done??;
        ensure!(status == number % 100, "exec {number}: {status}");
    }
    container.destroy().await?;
    events.until("the exit of init", |_| !events.exits(&container.id, "").is_empty()).await?;
    for number in 0..200 {
        let mut of_exec = events.of(&container.id);
        of_exec.retain(|event| event.ends_with(&format!("(e{number})")));
        let expected = ["exec-added", "exec-started", "exit"].map(|topic| format!("{topic}(e{number})"));
        ensure!(of_exec == expected, "{of_exec:?}");
    }
    Ok(())
}

pub(crate) async fn no_open_file_but_stdio_reaches_a_container(cx: Context) -> Result<()> {
    // the listing itself holds one descriptor, 3; sh holds 10 for its script, hence exec
    let list = ["sh", "-c", "exec ls /proc/self/fd"];
    let container = cx.container(&["sh", "-c", "ls /proc/self/fd; sleep 1000"]).stdio(Stdio::OUTPUT).start().await?;
    let text = container.io.out().until("3\n").await?;
    ensure!(text == "0\n1\n2\n3\n", "init: {text:?}");
    let exec = container.exec("e", &list).stdio(Stdio::OUTPUT).start().await?;
    ensure!(exec.finish().await? == 0);
    let text = exec.io.out().to_end().await?;
    ensure!(text == "0\n1\n2\n3\n", "exec: {text:?}");
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn an_exec_may_begin_before_init(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).create().await?;
    let exec = container.exec("early", &["sh", "-c", "exit 3"]).add().await?;
    container.start().await?;
    ensure!(exec.run().await? == 3);
    container.destroy().await?;
    Ok(())
}
