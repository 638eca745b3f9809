//! Output on full disks and to slow loggers.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use shim_tests::eventually::{SOON, eventually, within};
use shim_tests::programs;
use shim_tests::stand::Stand;
use shim_tests::ttrpc::refusal;
use shim_tests::witness::Witness;
use shim_tests::workloads;

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
