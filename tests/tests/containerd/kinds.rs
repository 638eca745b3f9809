//! Kinds of containers: namespaces, user mappings, hooks.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use shim_tests::container::Stdio;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually_true};
use shim_tests::proc;
use shim_tests::programs;
use shim_tests::suite::Runtime;
use shim_tests::times::repeated;

fn namespace_of(pid: u32, kind: &str) -> Result<String> {
    Ok(fs::read_link(format!("/proc/{pid}/ns/{kind}"))?.display().to_string())
}

pub(crate) async fn a_private_pid_namespace_begins_with_init(cx: Context) -> Result<()> {
    let container = cx.container(&["sh", "-c", "echo I am $$; sleep 1000"]).stdio(Stdio::OUTPUT).start().await?;
    ensure!(container.io.out().until("\n").await? == "I am 1\n");
    ensure!(namespace_of(container.pid, "pid")? != namespace_of(1, "pid")?);
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn a_container_in_the_hosts_pid_namespace_leaves_no_survivor(cx: Context) -> Result<()> {
    let script = "sleep 1000 & (sleep 1000 & sleep 1000 & wait) & echo ready; wait";
    let container = cx.container(&["sh", "-c", script]).spec(|spec| spec.host_pids()).stdio(Stdio::OUTPUT);
    let container = container.start().await?;
    container.io.out().until("ready").await?;
    ensure!(namespace_of(container.pid, "pid")? == namespace_of(1, "pid")?);
    ensure!(container.exec("e", &["sh", "-c", "exit 4"]).run().await? == 4);
    container.kill(9).await?;
    ensure!(container.finish().await? == 137);
    cx.leaves_nothing().await
}

pub(crate) async fn a_container_joins_anothers_pid_namespace_and_leaves_no_survivor(cx: Context) -> Result<()> {
    let first = cx.container(&["sleep", "1000"]).start().await?;
    let join = |spec: shim_tests::spec::Spec| spec.join_pids(first.pid);
    let script = "sleep 1001 & sleep 1001 & echo ready; wait";
    let second = cx.container(&["sh", "-c", script]).spec(join).stdio(Stdio::OUTPUT).start().await?;
    second.io.out().until("ready").await?;
    ensure!(namespace_of(first.pid, "pid")? == namespace_of(second.pid, "pid")?);
    second.kill(9).await?;
    ensure!(second.finish().await? == 137);
    let alive = || proc::all().into_values().any(|process| process.command == "sleep 1001");
    eventually_true("no process of the second is left", SOON, || !alive()).await?;
    ensure!(proc::is_alive(first.pid.cast_signed()));
    first.destroy().await?;
    Ok(())
}

pub(crate) async fn root_in_a_user_namespace_is_unprivileged_outside(cx: Context) -> Result<()> {
    let rootfs = cx.folder().join("rootfs");
    shim_tests::rootfs::make(&rootfs)?;
    let mounts = vec![shim_tests::container::bind(&rootfs.display().to_string())];
    let container = cx.container(&["sh", "-c", "id -u; sleep 1000"]).spec(|spec| spec.user_namespace(200_000));
    let container = container.rootfs(mounts).stdio(Stdio::OUTPUT).start().await?;
    ensure!(container.io.out().until("\n").await? == "0\n");
    let uid = proc::status_field(container.pid.cast_signed(), "Uid")?;
    ensure!(uid.starts_with("200000"), "{uid}");
    let exec = container.exec("e", &["id", "-u"]).stdio(Stdio::OUTPUT).start().await?;
    ensure!(exec.finish().await? == 0);
    ensure!(exec.io.out().to_end().await? == "0\n");
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn hooks_run_in_order(cx: Context) -> Result<()> {
    let hooks = cx.folder().join("hooks");
    let write = |word: &str| format!("cat > /dev/null; echo {word} >> {}", hooks.display());
    let mut container = cx.container(&["sh", "-c", "exit 3"]);
    for kind in ["createRuntime", "poststart", "poststop"] {
        container = container.spec(|spec| spec.hook(kind, "/bin/sh", &["sh", "-c", &write(kind)]));
    }
    ensure!(container.run().await? == 3);
    let text = fs::read_to_string(&hooks)?;
    ensure!(text == "createRuntime\npoststart\npoststop\n", "{text:?}");
    Ok(())
}

pub(crate) async fn hooks_follow_the_start_of_a_program_that_exits_at_once(cx: Context) -> Result<()> {
    // Those of runc 1.1 run before the program, at the end of create.
    let rounds = if cx.runtime() == Runtime::Native { 50 } else { 3 };
    for round in 0..repeated(rounds) {
        let file = cx.folder().join(format!("state{round}"));
        let write = format!("cat > {}", file.display());
        let container = cx.container(&["true"]).spec(|spec| spec.hook("poststart", "/bin/sh", &["sh", "-c", &write]));
        let container = container.start().await?;
        let state: Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
        ensure!(state["id"] == json!(container.id) && state["pid"] == json!(container.pid), "round {round}: {state}");
        let status = state["status"].as_str().unwrap_or_default();
        ensure!(["created", "running", "stopped"].contains(&status), "round {round}: {state}");
        ensure!(container.finish().await? == 0, "round {round}");
    }
    Ok(())
}

pub(crate) async fn a_failing_hook_fails_the_start_and_leaves_nothing(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]);
    let container = container.spec(|spec| spec.hook("createRuntime", "/bin/sh", &["sh", "-c", "exit 1"]));
    ensure!(container.create().await.is_err());
    cx.leaves_nothing().await
}

pub(crate) async fn a_shim_whose_binary_is_replaced_keeps_its_containers(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let name = cx.shim().binary_name();
    let original = cx.shim().binary.clone().unwrap_or_else(|| cx.suite().program(&name)).canonicalize()?;
    let path = cx.daemon().bin().join(&name);
    programs::copy(&original, &path)?;
    let container = cx.container(&["sh", "-c", "read go; exit 3"]).stdio(Stdio::ALL).start().await?;
    programs::copy(&original, &path)?;
    ensure!(container.exec("e", &["sh", "-c", "exit 4"]).run().await? == 4);
    cx.crash_daemon().await?;
    ensure!(container.exec("e2", &["sh", "-c", "exit 5"]).run().await? == 5);
    container.io.stdin().await?.write_all(b"go\n")?;
    ensure!(container.finish().await? == 3);
    cx.leaves_nothing().await
}
