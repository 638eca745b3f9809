//! The shim's own log: complete for its reader, and it never blocks the shim.

use anyhow::{Context as _, Result, ensure};
use shim_tests::bundle::Container;
use shim_tests::eventually::{SOON, a_second, eventually};
use shim_tests::stand::Stand;
use shim_tests::stdio::{Pace, Reader};
use shim_tests::task::Task;
use shim_tests::ttrpc::Code;

/// Makes calls that the shim logs with one line or more.
async fn log_many_lines(container: &Container, rounds: usize) -> Result<()> {
    for round in 0..rounds {
        let second = a_second();
        container.task.state_within(&container.id, "", second).await?;
        let refused = container.task.kill("missing", "", 9).await;
        ensure!(refused.is_err_and(|error| error.code() == Some(Code::NotFound)), "round {round}");
    }
    Ok(())
}

pub(crate) async fn a_log_without_a_reader_blocks_nothing_and_reports_dropped_lines(stand: Stand) -> Result<()> {
    let bundle = stand.bundle("c1", &["sleep", "1000"]).without_log_reader();
    let task = Task::connect(&bundle.start_shim_with(&["-debug"], &[]).await?).await?;
    let container = bundle.run_in(&task).await?;
    // more than a fifo holds, which is 64 KiB
    log_many_lines(&container, 2000).await?;
    ensure!(container.run("e", &["sh", "-c", "exit 4"]).await? == 4);
    // a reader that opens it gets whole lines, and the count of missed ones
    let reader = Reader::open(&container.bundle.folder.join("log"), Pace::Keep)?;
    log_many_lines(&container, 20).await?;
    let text = reader.until("dropped=").await?;
    ensure!(text.len() > 60_000, "{} bytes", text.len());
    check_format(&text)?;
    drop(reader);
    // and one that closes it again leaves a log without a reader
    log_many_lines(&container, 1000).await?;
    container.shut_down().await.map(drop)
}

fn check_format(text: &str) -> Result<()> {
    // the last line may not have arrived yet
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    ensure!(!whole.is_empty(), "{text:?}");
    for line in whole.lines() {
        let rest = line.strip_prefix("time=\"").with_context(|| line.to_owned())?;
        let (time, rest) = rest.split_once("\" level=").with_context(|| line.to_owned())?;
        let digits = time.chars().filter(char::is_ascii_digit).count();
        ensure!(time.len() == 30 && digits == 23 && time.ends_with('Z') && time.as_bytes()[10] == b'T', "{line}");
        let (level, rest) = rest.split_once(" msg=\"").with_context(|| line.to_owned())?;
        ensure!(["error", "warning", "info", "debug", "trace"].contains(&level), "{line}");
        ensure!(rest.contains('"'), "{line}");
    }
    Ok(())
}

pub(crate) async fn the_log_records_each_change_in_containerds_format(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sh", "-c", "exit 3"]).run().await?;
    ensure!(container.finish().await? == 3);
    let shim = container.shim_pid()?;
    let _it_may_leave_at_once = container.task.shutdown("c1").await;
    eventually("the last lines", SOON, async || {
        let log = stand.log_of("c1");
        for words in ["keeper started", "process exited\" container=c1", "status=3", "container deleted", "keeper exits"] {
            ensure!(log.contains(words), "no {words:?} in {log}");
        }
        Ok(())
    })
    .await?;
    let log = stand.log_of("c1");
    check_format(&log)?;
    ensure!(!log.contains("level=debug"), "{log}");
    // neither the environment nor the configuration of a container is logged
    ensure!(!log.contains("SECRET") && !log.contains("ociVersion"), "{log}");
    shim_tests::eventually::eventually_true("the shim has exited", SOON, || !shim_tests::proc::is_alive(shim)).await
}
