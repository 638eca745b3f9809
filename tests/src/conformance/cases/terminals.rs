//! Terminals: size, stdin, last output.

use anyhow::{Result, ensure};
use containerd_shim_protos::api;

use super::{Streams, sleeper};
use crate::bundle::leave;
use crate::clauses;
use crate::conformance::Case;
use crate::eventually::SOON;
use crate::stand::Stand;
use crate::task::{Task, any_json};
use crate::{messages, spec};

pub(super) fn cases() -> Vec<Case> {
    clauses![terminals:
        "S14" => a_terminal_has_the_requested_size, a_size_can_be_requested_before_the_start;
        "S15" => an_exec_with_a_terminal_has_one;
        "S16" => a_terminals_last_output_is_not_cut;
        "S17" => a_size_can_be_requested_at_any_time;
    ]
}

async fn resize(task: &Task, exec: &str, width: u32, height: u32) -> Result<()> {
    let request = api::ResizePtyRequest { id: "c1".to_owned(), exec_id: exec.to_owned(), width, height, ..Default::default() };
    task.call::<api::Empty>("ResizePty", &request, SOON).await?;
    Ok(())
}

async fn a_terminal_has_the_requested_size(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let script = "test -t 0 && test -t 1 && test -t 2 && echo terminal; read go; stty size; exit 3";
    let container = streams.all(stand.bundle("c1", &["sh", "-c", script]).terminal()).run().await?;
    streams.out.until("terminal").await?;
    resize(&container.task, "", 111, 42).await?;
    streams.writer().await?.write_all(b"go\n")?;
    streams.out.until("42 111").await?;
    ensure!(container.finish().await? == 3);
    streams.out.to_end().await?;
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn a_size_can_be_requested_before_the_start(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let container = streams.all(stand.bundle("c1", &["sh", "-c", "stty size"]).terminal()).create().await?;
    resize(&container.task, "", 100, 30).await?;
    container.start().await?;
    streams.out.until("30 100").await?;
    ensure!(container.finish().await? == 0);
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn an_exec_with_a_terminal_has_one(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let container = sleeper(&stand, "c1").await?;
    let mut process = spec::process(&["sh", "-c", "tty && read x && echo got $x; exit 6"]);
    process["terminal"] = true.into();
    let request = streams.exec(container.bundle.exec_request("e", &[]));
    let spec = protobuf::MessageField::some(any_json(messages::PROCESS, &process));
    container.task.exec(&api::ExecProcessRequest { terminal: true, spec, ..request }).await?;
    container.task.start("c1", "e").await?;
    ensure!(container.task.state("c1", "e").await?.terminal, "State does not report it");
    streams.out.until("/dev/pts/").await?;
    resize(&container.task, "e", 80, 24).await?;
    streams.writer().await?.write_all(b"this\n")?;
    ensure!(container.task.wait("c1", "e").await? == 6);
    container.task.delete("c1", "e").await?;
    let text = streams.out.to_end().await?;
    ensure!(text.contains("got this"), "{text:?}");
    container.shut_down().await.map(drop)
}

async fn a_terminals_last_output_is_not_cut(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let script = "i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done";
    let container = streams.output(stand.bundle("c1", &["sh", "-c", script]).terminal()).run().await?;
    ensure!(container.finish().await? == 0);
    let text = streams.out.to_end().await?;
    let lines: Vec<_> = text.lines().collect();
    ensure!(lines.len() == 5000 && lines[4999] == "line 4999", "{} lines, the last is {:?}", lines.len(), lines.last());
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// A client's window may change a moment before or after the end.
async fn a_size_can_be_requested_at_any_time(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let container = streams.all(stand.bundle("c1", &["sh", "-c", "read go; exit 3"]).terminal()).run().await?;
    let task = container.task.another().await?;
    let resizing = tokio::spawn(async move {
        for round in 0..200 {
            // it may be refused, but has to be answered
            let request = api::ResizePtyRequest { id: "c1".to_owned(), width: 80 + round, height: 24, ..Default::default() };
            if let Err(error) = task.call::<api::Empty>("ResizePty", &request, SOON).await {
                ensure!(error.code().is_some(), "round {round}: {error}");
            }
        }
        Ok(())
    });
    streams.writer().await?.write_all(b"go\n")?;
    ensure!(container.task.wait("c1", "").await? == 3);
    resizing.await??;
    ensure!(container.finish().await? == 3);
    leave(&container.task, container.shim_pid()?, "c1").await
}
