//! Many containers, several at a time, with execs and, in our shim, crashing workers: nothing is left behind.

use std::env;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use shim_tests::audit::Audit;
use shim_tests::container::Stdio;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually_true};
use shim_tests::isolation;
use shim_tests::proc;
use tokio::task::{JoinSet, LocalSet};

/// `X_CHURN` containers, 60 without it.
fn rounds() -> u64 {
    env::var("X_CHURN").ok().and_then(|text| text.parse().ok()).unwrap_or(60)
}

/// Two seconds for each, and a minute.
pub(crate) fn deadline() -> Duration {
    Duration::from_secs(60 + 2 * rounds())
}

#[derive(Debug, Default)]
struct Counts {
    started: AtomicU64,
    exited: AtomicU64,
    written: AtomicU64,
    read: AtomicU64,
}

pub(crate) async fn no_resource_grows_over_many_containers(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let daemon = cx.daemon().pid().context("it runs")?;
    // permanent files and threads are created with the first container
    one(cx.clone(), 0, Arc::default()).await?;
    cx.leaves_nothing().await?;
    // orphans of earlier tests reach init a little later
    eventually_true("init has reaped all orphans", SOON, || isolation::unreaped().is_empty()).await?;
    let stay = [daemon];
    let (before, orphans) = (Audit::take(&stay), isolation::orphans().len());
    let events = cx.events().await?;
    let counts = Arc::new(Counts::default());
    LocalSet::new().run_until(churn(&cx, &counts)).await?;
    let (started, exited) = (counts.started.load(Ordering::Relaxed), counts.exited.load(Ordering::Relaxed));
    ensure!(started == exited, "{started} processes started, {exited} exits seen");
    let (written, read) = (counts.written.load(Ordering::Relaxed), counts.read.load(Ordering::Relaxed));
    ensure!(written == read, "{written} bytes written, {read} read");
    let all = events
        .until("an exit event for each process", |all| all.iter().filter(|event| event.topic == "exit").count() as u64 >= started)
        .await?;
    let published = all.iter().filter(|event| event.topic == "exit").count() as u64;
    ensure!(published == started, "{published} exits published of {started} processes");
    Audit::nothing_more_than(&before, &stay, SOON).await?;
    // shims are children of init; any other orphan was not reaped by its shim
    let strangers: Vec<_> = isolation::orphans().into_iter().skip(orphans).filter(|comm| !comm.starts_with("containerd-shim")).collect();
    ensure!(strangers.is_empty(), "not reaped by their shim: {strangers:?}");
    Ok(())
}

/// Runs them all, eight at a time.
async fn churn(cx: &Context, counts: &Arc<Counts>) -> Result<()> {
    let mut running = JoinSet::new();
    for number in 1..=rounds() {
        running.spawn_local(one(cx.clone(), number, Arc::clone(counts)));
        if running.len() == 8 {
            running.join_next().await.expect("eight are running")??;
        }
        if cx.shim().is_ours() && number % 3 == 0 {
            kill_some_worker(cx, number);
        }
    }
    while let Some(done) = running.join_next().await {
        done??;
    }
    Ok(())
}

/// One container with two execs, whose output is counted.
async fn one(cx: Context, number: u64, counts: Arc<Counts>) -> Result<()> {
    let status = u32::try_from(number % 200)?;
    let size = 1000 + number * 37 % 200_000;
    let script = format!("head -c {size} /dev/zero; read go; exit {status}");
    let container = cx.container(&["sh", "-c", &script]).stdio(Stdio::ALL).start().await?;
    counts.started.fetch_add(1, Ordering::Relaxed);
    counts.written.fetch_add(size, Ordering::Relaxed);
    for exec in ["a", "b"] {
        let process = container.exec(exec, &["sh", "-c", &format!("echo {exec}; exit {status}")]).stdio(Stdio::OUTPUT);
        let process = process.start().await?;
        counts.started.fetch_add(1, Ordering::Relaxed);
        counts.written.fetch_add(2, Ordering::Relaxed);
        ensure!(process.finish().await? == status);
        counts.exited.fetch_add(1, Ordering::Relaxed);
        process.io.out().to_end().await?;
        counts.read.fetch_add(process.io.out().count(), Ordering::Relaxed);
    }
    container.io.stdin().await?.write_all(b"go\n")?;
    ensure!(container.finish().await? == status);
    counts.exited.fetch_add(1, Ordering::Relaxed);
    container.io.out().to_end().await?;
    counts.read.fetch_add(container.io.out().count(), Ordering::Relaxed);
    Ok(())
}

/// Kills the worker of the shim that `number` selects.
fn kill_some_worker(cx: &Context, number: u64) {
    let shims = cx.shims();
    if shims.is_empty() {
        return;
    }
    let shim = &shims[usize::try_from(number).unwrap_or(0) * 7919 % shims.len()];
    for child in proc::children(shim.pid) {
        if child.command.split(' ').any(|word| word == "worker") {
            proc::kill_hard(child.pid);
        }
    }
}
