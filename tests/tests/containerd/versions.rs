//! Changes by an operator under running containers: the daemon's version, and the path of the shim's binary.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use containerd_client::types::v1::Status as Phase;
use shim_tests::builds;
use shim_tests::container::{Container, Stdio, code_of};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually_true};
use shim_tests::proc;
use shim_tests::programs;
use shim_tests::runner::skip;
use shim_tests::suite::{self, Suite};
use tonic::Code;

/// Only containerd has several versions here that read each other's state.
fn needs_containerd() -> Result<()> {
    if suite::manager().is_some() { skip("x-manager has only one version, and forgets no container") } else { Ok(()) }
}

/// Exits with 3 when it reads a line.
const ON_COMMAND: [&str; 3] =
    ["sh", "-c", "echo up; while read line; do case $line in go) exit 3;; *) echo got $line;; esac; done; exit 9"];

async fn on_command(cx: &Context) -> Result<Container> {
    let container = cx.container(&ON_COMMAND).stdio(Stdio::ALL).start().await?;
    container.io.out().until("up").await?;
    Ok(container)
}

/// Checks that it has not changed, can run an exec, and its output arrives.
async fn is_the_same(container: &Container, word: &str) -> Result<()> {
    let state = container.state().await?;
    ensure!(state.status() == Phase::Running && state.pid == container.pid, "{state:?}");
    let exec = container.exec(word, &["sh", "-c", "echo hello; exit 4"]).stdio(Stdio::OUTPUT).start().await?;
    ensure!(exec.finish().await? == 4);
    ensure!(exec.io.out().to_end().await? == "hello\n");
    container.io.stdin().await?.write_all(format!("{word}\n").as_bytes())?;
    container.io.out().until(&format!("got {word}\n")).await?;
    Ok(())
}

/// From the newest to the oldest and back, each on the state of the previous one.
pub(crate) async fn containers_outlive_a_downgrade_and_an_upgrade_of_their_daemon(cx: Context) -> Result<()> {
    needs_containerd()?;
    let cx = cx.with_own_daemon().await?;
    let container = on_command(&cx).await?;
    let member = |spec: shim_tests::spec::Spec| spec.annotation("io.kubernetes.cri.sandbox-id", "pod");
    let pod = cx.container(&["sleep", "1000"]).id("pod").spec(member).start().await?;
    let mut alive = Vec::new();
    for version in [Suite::Trixie, Suite::Bookworm, Suite::Trixie, Suite::Forky] {
        let word = format!("{version}-{}", alive.len());
        // exits while no daemon runs
        let ends = on_command(&cx).await?;
        let mut stdin = ends.io.stdin().await?;
        let killed = cx.container(&["sleep", "1000"]).spec(member).start().await?;
        cx.daemon().stop()?;
        stdin.write_all(b"go\n")?;
        let pid = ends.pid.cast_signed();
        eventually_true("it has exited", SOON, || !proc::is_alive(pid)).await?;
        cx.daemon().becomes(version).await?;
        cx.client().reconnected().await?;
        let inside = async {
            let version = cx.client().version().await?;
            is_the_same(&container, &word).await.context(version)?;
            ensure!(ends.finish().await? == 3);
            ensure!(killed.destroy().await? == 137);
            eventually_true("one shim each", SOON, || cx.shims().len() == 2 + alive.len()).await?;
            anyhow::Ok(())
        };
        inside.await.with_context(|| format!("after the change to {version}"))?;
        // created under this daemon, deleted under another
        alive.push(on_command(&cx).await?);
    }
    container.io.stdin().await?.write_all(b"go\n")?;
    ensure!(container.finish().await? == 3);
    for container in alive {
        container.io.stdin().await?.write_all(b"go\n")?;
        ensure!(container.finish().await? == 3);
    }
    ensure!(pod.destroy().await? == 137);
    cx.leaves_nothing().await
}

/// The shim's binary where the daemon of this test finds it: a copy of its own.
async fn with_a_binary_of_its_own(cx: &Context) -> Result<(Context, PathBuf)> {
    let cx = cx.with_own_daemon().await?;
    let name = cx.shim().binary_name();
    let original = cx.shim().binary.clone().unwrap_or_else(|| cx.suite().program(&name)).canonicalize()?;
    let path = cx.daemon().bin().join(&name);
    programs::copy(&original, &path)?;
    Ok((cx, path))
}

/// Everything but another start works without it, and with a link in its place a daemon that loads finds it, too.
pub(crate) async fn a_shim_whose_binary_has_moved_is_found_by_a_link(cx: Context) -> Result<()> {
    let (cx, path) = with_a_binary_of_its_own(&cx).await?;
    let (container, other) = (on_command(&cx).await?, on_command(&cx).await?);
    let moved = cx.folder().join(cx.shim().binary_name());
    programs::copy(&path, &moved)?;
    fs::remove_file(&path)?;
    is_the_same(&container, "gone").await?;
    ensure!(other.destroy().await? == 137);
    symlink(&moved, &path)?;
    cx.crash_daemon().await?;
    is_the_same(&container, "linked").await?;
    container.io.stdin().await?.write_all(b"go\n")?;
    ensure!(container.finish().await? == 3);
    cx.leaves_nothing().await
}

/// containerd records the path of the binary and forgets a container whose shim it cannot find: it removes the bundle and leaves the
/// processes alone. Our shim keeps the container, and refuses another one with its id; the error names the command that removes it.
pub(crate) async fn a_container_whose_shim_binary_is_missing_keeps_running_and_keeps_its_id(cx: Context) -> Result<()> {
    if !cx.shim().is_ours() {
        return skip("the stock shim may do anything then");
    }
    needs_containerd()?;
    let (cx, path) = with_a_binary_of_its_own(&cx).await?;
    let container = on_command(&cx).await?;
    let (keeper, pid) = (cx.shim_pid(&container.id)?, container.pid.cast_signed());
    let moved = cx.folder().join("moved");
    fs::rename(&path, &moved)?;
    cx.crash_daemon().await?;
    ensure!(code_of(container.state().await)? == Code::NotFound && !container.bundle().exists(), "containerd still knows the container");
    // it keeps running, and its shim answers
    container.io.stdin().await?.write_all(b"still\n")?;
    container.io.out().until("got still\n").await?;
    let shims = builds::ps(&cx, &moved).await?;
    ensure!(shims.len() == 1 && shims[0]["group"] == *container.id, "{shims:#?}");
    // another container with its id is refused; the error says what to do
    fs::rename(&moved, &path)?;
    let id = container.id.clone();
    container.remove().await?;
    let build = || cx.container(&["sh", "-c", "exit 5"]).id(&id);
    let message = format!("{:#}", build().create().await.err().context("a second container with the id was created")?);
    let command = message.split_once("remove it first: ").with_context(|| message.clone())?.1;
    let words: Vec<_> = command.split_whitespace().take_while(|word| !word.starts_with("exit") && *word != ":").collect();
    ensure!(words.last().is_some_and(|word| word.starts_with("delete")), "{message}");
    ensure!(proc::is_alive(pid) && proc::is_alive(keeper), "the container or its shim was killed");
    let arguments = words[1..].iter().map(|word| word.trim_end_matches("\\n:"));
    let done = tokio::process::Command::new(&path).args(arguments).stdin(std::process::Stdio::null()).output().await?;
    ensure!(done.status.success(), "{done:?}");
    eventually_true("it has exited", SOON, || !proc::is_alive(pid)).await?;
    let again = build().create().await?;
    ensure!(again.run().await? == 5);
    cx.leaves_nothing().await
}
