//! Output on full disks, to slow loggers, and of a shim that is given up or killed while a Delete waits for it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use containerd_shim_protos::api::DeleteResponse;
use shim_tests::bundle::Container;
use shim_tests::eventually::{SOON, eventually, eventually_true, within};
use shim_tests::stand::Stand;
use shim_tests::stdio::{self, Pace, Reader};
use shim_tests::ttrpc::{Answer, CallError, refusal};
use shim_tests::witness::Witness;
use shim_tests::{proc, programs, workloads};
use tokio::task::JoinHandle;

fn text(path: &Path) -> String {
    path.display().to_string()
}

pub(crate) async fn what_a_full_disk_costs_is_counted_in_the_log(stand: Stand) -> Result<()> {
    workloads::full_disk(&stand).await?;
    let log = stand.log_of("c1");
    ensure!(log.contains("lost_bytes="), "{log}");
    Ok(())
}

/// A program for `binary://` that is a script.
fn logger(stand: &Stand, name: &str, script: &str) -> Result<String> {
    let path = programs::script(stand.folder(), name, &format!("#!/bin/sh\n{script}\n"))?;
    Ok(format!("binary://{}", text(&path)))
}

pub(crate) async fn a_slow_logger_holds_up_its_own_container_only_and_gets_everything(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let out = stand.folder().join("out");
    let script = format!("sleep 1; exec 5>&-; sleep 1; cat <&3 > {0}.part; mv {0}.part {0}", text(&out));
    let uri = logger(&stand, "slow", &script)?;
    let bundle = witness.sibling("c1", &["sh", "-c", "seq 1 50000; exit 3"]).stdio("", &uri, &uri);
    let task = witness.container.task.another().await?;
    let begin = Instant::now();
    let create = tokio::spawn(async move { bundle.run_in(&task).await });
    while !create.is_finished() {
        witness.is_untouched().await?;
    }
    let container = create.await??;
    ensure!(begin.elapsed() >= Duration::from_secs(1), "Create did not wait for the logger");
    // half a megabyte does not fit the pipe: the container waits for the logger, and nothing is lost
    ensure!(container.finish().await? == 3);
    eventually("the logger has everything", SOON, async || {
        let seen = fs::read_to_string(&out)?;
        ensure!(seen.lines().count() == 50_000 && seen.ends_with("50000\n"), "{} bytes", seen.len());
        Ok(())
    })
    .await?;
    witness.dismiss().await
}

/// Create waits for a logger that will never be ready: containerd gives up, and `delete` ends it.
pub(crate) async fn a_logger_that_is_never_ready_is_ended_by_delete(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let mark = stand.folder().join("mark");
    let uri = logger(&stand, "never", &format!("echo > {}; exec sleep 1000", text(&mark)))?;
    let bundle = witness.sibling("c1", &["true"]).stdio("", &uri, &uri);
    bundle.start_shim().await?;
    let (task, request) = (witness.container.task.another().await?, bundle.request());
    let create = tokio::spawn(async move { task.create(&request).await });
    eventually("the logger runs", SOON, async || Ok(fs::metadata(&mark)?)).await?;
    witness.is_untouched().await?;
    let begin = Instant::now();
    ensure!(bundle.delete_command().await?.exit_status == 137);
    ensure!(begin.elapsed() < Duration::from_secs(5), "it took {:?}", begin.elapsed());
    refusal(within("create", SOON, create).await??)?;
    // and the id is free
    let again = witness.sibling("c1", &["sh", "-c", "exit 3"]).run_in(&witness.container.task).await?;
    ensure!(again.finish().await? == 3);
    witness.dismiss().await
}

/// What an exec of [`drain`] writes: more than its fifo holds.
fn numbers() -> String {
    (1..=20_000).map(|number| format!("{number}\n")).collect()
}

/// Begins a Delete of an exec that has ended. It waits for a child that holds the output, and for a reader that waits for its cue.
async fn drain(container: &Container) -> Result<(Reader, JoinHandle<Answer<DeleteResponse>>)> {
    let stand = container.stand();
    let fifo = stand.folder().join("output");
    stdio::fifo(&fifo)?;
    let reader = Reader::open(&fifo, Pace::OnCue)?;
    let mut request = container.bundle.exec_request("e", &["sh", "-c", "sleep 1000 & seq 20000"]);
    request.stdout = text(&fifo);
    container.task.exec(&request).await?;
    container.task.start(&container.id, "e").await?;
    ensure!(container.task.wait(&container.id, "e").await? == 0);
    let (task, id) = (container.task.another().await?, container.id.clone());
    let deleting = tokio::spawn(async move { task.delete(&id, "e").await });
    eventually("the Delete waits", SOON, async || {
        let output = stand.command(&["inspect", "--json", "--namespace", stand.namespace(), &container.id]).output().await?;
        let shown: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let open = shown["shim"]["requests"].as_array().cloned().unwrap_or_default();
        ensure!(open.iter().any(|request| request["method"].as_str().is_some_and(|method| method.ends_with("Delete"))), "{shown:#}");
        Ok(())
    })
    .await?;
    Ok((reader, deleting))
}

pub(crate) async fn the_command_delete_does_not_wait_for_an_output_and_its_reader_gets_all_of_it(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let shim = container.shim_pid()?;
    let (reader, deleting) = drain(&container).await?;
    let begin = Instant::now();
    ensure!(container.bundle.delete_command().await?.exit_status == 137);
    ensure!(begin.elapsed() < Duration::from_secs(5), "it took {:?}", begin.elapsed());
    ensure!(!proc::is_alive(container.pid.cast_signed()));
    // what the daemon asks next
    match container.task.shutdown(&container.id).await {
        Ok(()) | Err(CallError::Closed) => {}
        Err(error) => return Err(error.into()),
    }
    reader.proceed();
    let output = reader.to_end().await?;
    ensure!(output == numbers(), "{} of {} bytes", output.len(), numbers().len());
    let answer = within("the Delete that has waited", SOON, deleting).await??;
    ensure!(matches!(&answer, Ok(deleted) if deleted.exit_status == 0) || answer.is_err(), "{answer:?}");
    eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await
}

pub(crate) async fn a_keeper_killed_while_a_delete_waits_for_an_output_ends_the_output(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let (reader, deleting) = drain(&container).await?;
    proc::kill_hard(container.shim_pid()?);
    ensure!(matches!(within("the Delete", SOON, deleting).await??, Err(CallError::Closed)));
    // containerd runs it when the connection ends
    ensure!(container.bundle.delete_command().await?.exit_status == 137);
    ensure!(!proc::is_alive(container.pid.cast_signed()));
    // what was in the fifo is still there
    reader.proceed();
    let output = reader.to_end().await?;
    ensure!(output.len() >= 65_536 && numbers().starts_with(&output), "{} bytes", output.len());
    Ok(())
}
