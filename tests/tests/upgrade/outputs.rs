//! Upgrades while a Delete waits for an output: its last writer lives on, or its reader has not taken everything.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use containerd_client::services::v1::DeleteResponse;
use shim_tests::builds;
use shim_tests::container::{Container, Process, Stdio};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true, within};
use shim_tests::stdio::Pace;
use tokio::task::JoinHandle;

use crate::crashes::inspected;
use crate::{build, on_build};

/// Writes once more when the container runs no `sleep` any more.
const LATE: &str = "while pidof sleep >/dev/null; do usleep 20000; done; echo late";

/// An exec that has ended, and the Delete that waits for its output.
struct Waiting {
    exec: Process,
    delete: JoinHandle<std::result::Result<DeleteResponse, tonic::Status>>,
}

impl Waiting {
    async fn begin(cx: &Context, container: &Container, name: &str, script: &str, stdio: Stdio, is_terminal: bool) -> Result<Self> {
        let exec = container.exec(name, &["sh", "-c", script]).stdio(stdio);
        let exec = if is_terminal { exec.terminal() } else { exec }.start().await?;
        ensure!(exec.wait().await? == 0, "{name}");
        let (client, id, name) = (cx.client().clone(), container.id.clone(), name.to_owned());
        let delete = tokio::spawn(async move { client.delete_exec(&id, &name).await });
        Ok(Self { exec, delete })
    }

    /// Waits for the answer of the Delete.
    async fn answered(self) -> Result<Process> {
        let answer = within(format!("Delete of {}", self.exec.exec), SOON, self.delete).await???;
        ensure!(answer.exit_status == 0, "{answer:?}");
        Ok(self.exec)
    }
}

/// How many Deletes the shim has not answered yet.
async fn open_deletes(cx: &Context, id: &str) -> Result<usize> {
    let shown = inspected(cx, id).await?;
    let requests = shown["shim"]["requests"].as_array().cloned().unwrap_or_default();
    Ok(requests.iter().filter(|request| request["method"].as_str().is_some_and(|method| method.ends_with("Delete"))).count())
}

pub(crate) async fn a_delete_that_waits_for_output_is_answered_after_an_upgrade_and_no_byte_is_lost(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let container = cx.container(&["tail", "-f", "/dev/null"]).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let gate = container.exec("gate", &["sleep", "1000"]).start().await?;
    let (file, folder) = (cx.folder().join("file"), cx.folder().join("logger"));
    fs::create_dir_all(&folder)?;
    let logger = format!("binary://{}?folder={}", cx.program("log-sink").display(), folder.display());
    let unread = Stdio::Fifos { stdin: false, pace: Some(Pace::OnCue) };
    let held = format!("({LATE}) & echo now");
    let elsewhere = format!("setsid sh -c '({LATE}) &'; echo now");
    let mut waiting = Vec::new();
    for (name, script, stdio, is_terminal) in [
        ("fifo", held.as_str(), Stdio::OUTPUT, false),
        ("terminal", elsewhere.as_str(), Stdio::OUTPUT, true),
        ("file", held.as_str(), Stdio::uri(format!("file://{}", file.display())), false),
        ("logger", held.as_str(), Stdio::uri(logger), false),
        // as much as the fifo holds, and more
        ("unread", "seq 20000", unread, false),
    ] {
        waiting.push(Waiting::begin(&cx, &container, name, script, stdio, is_terminal).await?);
    }
    eventually("all Deletes wait", SOON, async || {
        let open = open_deletes(&cx, &container.id).await?;
        ensure!(open == 5, "{open} are open");
        Ok(())
    })
    .await?;
    builds::upgrade(&cx, &build(&cx, "new", "build=new")?, &["--all"]).await?.is_done()?;
    for one in &waiting {
        ensure!(!one.delete.is_finished(), "the Delete of {} has not waited", one.exec.exec);
    }
    ensure!(cx.shim_pid(&container.id)? == keeper && open_deletes(&cx, &container.id).await? == 5);
    gate.kill(9).await?;
    waiting[4].exec.io.out().proceed();
    let mut execs = Vec::new();
    for one in waiting {
        execs.push(one.answered().await?);
    }
    ensure!(execs[0].io.out().to_end().await? == "now\nlate\n");
    ensure!(execs[1].io.out().to_end().await? == "now\r\nlate\r\n");
    ensure!(text(&file) == "now\nlate\n", "{:?}", text(&file));
    eventually_true("the logger is done", SOON, || folder.join("done").exists()).await?;
    ensure!(text(&folder.join("stdout")) == "now\nlate\n", "{:?}", text(&folder.join("stdout")));
    let expected: String = (1..=20_000).map(|number| format!("{number}\n")).collect();
    let unread = execs[4].io.out().to_end().await?;
    ensure!(unread == expected, "{} of {} bytes", unread.len(), expected.len());
    gate.finish().await?;
    ensure!(container.destroy().await? == 137);
    cx.leaves_nothing().await
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
