//! Execs: with and without terminal, their ids, their order among the events.

use anyhow::{Result, ensure};
use prost::Message as _;
use shim_tests::container::{Stdio, code_of};
use shim_tests::context::Context;
use shim_tests::events::init_is_the_last_of;
use shim_tests::messages::ProcessDetails;
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
