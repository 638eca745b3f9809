//! The worker dies at every single message between it and the keeper, over a container's whole life: nobody notices.
//!
//! Needs a shim built with the feature `fault-injection`, named by `X_SHIM_FAULTY`; `X_FAULT=LIVES:DIRECTION:N:WHEN` in its
//! environment says which of its workers die and when.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use shim_tests::container::Stdio;
use shim_tests::context::Context;
use shim_tests::isolation;
use shim_tests::runner::skip;
use shim_tests::suite::Shim;

/// No life of a container takes more messages than that.
const ENOUGH: u32 = 500;

pub(crate) async fn a_worker_that_dies_before_it_sends_is_not_noticed(cx: Context) -> Result<()> {
    every_message(&cx, "out", "before").await
}

pub(crate) async fn a_worker_that_dies_while_it_sends_is_not_noticed(cx: Context) -> Result<()> {
    every_message(&cx, "out", "torn").await
}

pub(crate) async fn a_worker_that_dies_after_it_sent_is_not_noticed(cx: Context) -> Result<()> {
    every_message(&cx, "out", "after").await
}

pub(crate) async fn a_worker_that_dies_before_it_acts_is_not_noticed(cx: Context) -> Result<()> {
    every_message(&cx, "in", "before").await
}

pub(crate) async fn a_worker_that_dies_while_it_reads_is_not_noticed(cx: Context) -> Result<()> {
    every_message(&cx, "in", "torn").await
}

pub(crate) async fn a_worker_that_dies_after_it_acted_is_not_noticed(cx: Context) -> Result<()> {
    every_message(&cx, "in", "after").await
}

/// Lets the first worker die at its first message, then at its second, until none dies any more.
async fn every_message(cx: &Context, direction: &str, when: &str) -> Result<()> {
    let Some(binary) = env::var_os("X_SHIM_FAULTY") else {
        return skip("X_SHIM_FAULTY names no shim with the feature fault-injection");
    };
    if !cx.shim().is_ours() {
        return skip("the stock shim has no worker to kill");
    }
    let binary = PathBuf::from(binary).canonicalize().context("X_SHIM_FAULTY")?;
    let shim = Shim { binary: Some(binary), ..cx.shim().clone() };
    for message in 1..=ENOUGH {
        let fault = format!("1:{direction}:{message}:{when}");
        let lives = one_life(cx, &shim, &fault).await.with_context(|| format!("X_FAULT={fault}"))?;
        ensure!(lives > 0, "X_FAULT={fault}: no life was counted: is this shim built with fault-injection?");
        if lives == 1 {
            ensure!(message > 10, "only {} messages were seen: faults are not injected", message - 1);
            return Ok(());
        }
    }
    anyhow::bail!("more than {ENOUGH} messages")
}

/// The life of one container, as if nothing were wrong; returns how many workers its keeper has had.
async fn one_life(cx: &Context, shim: &Shim, fault: &str) -> Result<u32> {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    // a folder of sockets of its own, in which nobody else's workers are counted
    let sockets = PathBuf::from(format!("{}/f{}", isolation::RUN, NEXT.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir_all(&sockets)?;
    let environment = [("X_FAULT", fault), ("X_SHIM_RUN_DIR", &sockets.display().to_string())];
    let cx = cx.with_own_shim(shim, &environment).await?;
    let events = cx.events().await?;
    let script = "trap 'exit 7' TERM; echo up; sleep 1000 & wait";
    let container = cx.container(&["sh", "-c", script]).stdio(Stdio::OUTPUT).create().await.context("create")?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let waiting = tokio::spawn(async move { client.wait(&id, "").await });
    container.start().await.context("start")?;
    container.io.out().until("up").await?;
    let exec = container.exec("e", &["sh", "-c", "echo hello; exit 4"]).stdio(Stdio::OUTPUT).add().await.context("exec")?;
    let status = exec.run().await.context("the exec")?;
    ensure!(status == 4, "the exec ended with {status}");
    let text = exec.io.out().to_end().await?;
    ensure!(text == "hello\n", "the exec printed {text:?}");
    container.kill(15).await.context("kill")?;
    let waited = waiting.await?.context("wait")?.exit_status;
    ensure!(waited == 7, "wait says {waited}");
    let deleted = container.delete().await.context("delete")?.exit_status;
    ensure!(deleted == 7, "delete says {deleted}");
    let told = cx.history(&events, &container.id).await?;
    let expected = ["create", "start", "exec-added(e)", "exec-started(e)", "exit(e)", "exit", "delete"];
    ensure!(told == expected, "{told:?}");
    let text = container.io.out().to_end().await?;
    ensure!(text == "up\n", "{text:?}");
    cx.leaves_nothing().await?;
    lives(&sockets)
}

/// How many lives have been counted in a folder: the highest, should there be several keepers.
fn lives(folder: &Path) -> Result<u32> {
    let mut found = 0;
    for entry in fs::read_dir(folder)?.flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "lives") {
            found = found.max(fs::read_to_string(entry.path())?.trim().parse()?);
        } else if entry.file_type()?.is_dir() {
            found = found.max(lives(&entry.path())?);
        }
    }
    Ok(found)
}
