//! Containers that run detached, and what is done with them.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::operator::output_text;
use tokio::io::AsyncWriteExt as _;

use crate::harness::{Child, Xctl};

fn started(xctl: &Xctl<'_>, flags: &[&str], program: &[&str]) -> Result<()> {
    let output = xctl.run(&[&["--detach"], flags].concat(), program)?;
    ensure!(output.status.success(), "{}", output_text(&output));
    Ok(())
}

/// What the list says of a container.
fn listed(xctl: &Xctl<'_>, name: &str) -> Result<Value> {
    let list: Value = serde_json::from_str(&xctl.prints(&["--format", "json", "ps", "--all"])?)?;
    let found = list.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == name)).cloned();
    found.with_context(|| format!("{name} is in {list}"))
}

async fn exited(xctl: &Xctl<'_>, name: &str, status: u32) -> Result<()> {
    eventually(format!("{name} has exited with {status}"), SOON, async || {
        let row = listed(xctl, name)?;
        ensure!(row["status"] == "exited" && row["exit_status"] == status, "{row}");
        Ok(())
    })
    .await
}

pub(crate) async fn a_detached_container_writes_its_log_without_a_daemon(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let xctl = Xctl::new(&cx)?;
    let script = "echo first; echo problem >&2; while ! test -e /mnt/go; do sleep 0.05; done; seq 1 20000; exit 3";
    let volume = format!("{}:/mnt", cx.folder().display());
    started(&xctl, &["--name", "talks", "-v", &volume], &["sh", "-c", script])?;
    eventually("both outputs are in the log", SOON, async || {
        let logs = xctl.prints(&["logs", "talks"])?;
        ensure!(logs.contains("first\n") && logs.contains("problem\n"), "{logs:?}");
        Ok(())
    })
    .await?;
    let mut follower = Child::piped(&xctl.command(&["logs", "--follow", "--tail", "1", "talks"]))?;
    ensure!(["first", "problem"].contains(&follower.line().await?.as_str()));
    cx.daemon().kill()?;
    fs::write(cx.folder().join("go"), "")?;
    let log = xctl.logs().join(cx.client().namespace()).join("talks.log");
    eventually("the output is in the file while the daemon is down", SOON, async || {
        ensure!(fs::read_to_string(&log)?.ends_with("\n20000\n"));
        Ok(())
    })
    .await?;
    while follower.line().await? != "20000" {}
    cx.revive_daemon().await?;
    exited(&xctl, "talks", 3).await?;
    ensure!(follower.status().await? == 0);
    ensure!(xctl.prints(&["logs", "--tail", "2", "talks"])? == "19999\n20000\n");
    ensure!(xctl.prints(&["logs", "--follow", "talks"])?.lines().count() == 20_002);
    xctl.prints(&["rm", "talks"])?;
    xctl.leaves_nothing().await
}

/// As logrotate's `copytruncate` does it.
pub(crate) async fn a_log_that_is_cut_goes_on_at_its_start(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let script = "i=0; while ! test -e /mnt/stop; do echo line $i; i=$((i + 1)); sleep 0.05; done";
    let volume = format!("{}:/mnt", cx.folder().display());
    started(&xctl, &["--name", "talks", "-v", &volume], &["sh", "-c", script])?;
    let log = xctl.logs().join(cx.client().namespace()).join("talks.log");
    let mut follower = Child::piped(&xctl.command(&["logs", "--follow", "talks"]))?;
    while follower.line().await? != "line 5" {}
    fs::File::options().write(true).open(&log)?.set_len(0)?;
    let first = async || -> Result<u32> {
        let text = fs::read_to_string(&log)?;
        let line = text.lines().next().context("no line yet")?;
        line.strip_prefix("line ").with_context(|| format!("{line:?}"))?.parse().with_context(|| format!("{line:?}"))
    };
    eventually("the file begins with a later line", SOON, async || {
        let first = first().await?;
        ensure!(first > 5, "{first}");
        Ok(())
    })
    .await?;
    let later = first().await? + 5;
    // one that has not looked meanwhile begins in the middle of a line
    while follower.line().await?.strip_prefix("line ").and_then(|number| number.parse().ok()).is_none_or(|number: u32| number < later) {}
    fs::write(cx.folder().join("stop"), "")?;
    exited(&xctl, "talks", 0).await?;
    ensure!(follower.status().await? == 0);
    xctl.prints(&["rm", "talks"])?;
    xctl.leaves_nothing().await
}

pub(crate) async fn a_container_is_listed_inspected_started_again_and_removed(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let created = xctl.container("create", &["--name", "job", "--label", "a=b"], &["sh", "-c", "echo run; sleep 1000"])?.output()?;
    ensure!(created.stdout == b"job\n", "{}", output_text(&created));
    ensure!(listed(&xctl, "job")?["status"] == "not started");
    ensure!(!xctl.prints(&["ps"])?.contains("job"));
    let taken = xctl.container("create", &["--name", "job"], &["true"])?.output()?;
    ensure!(taken.status.code() == Some(1) && output_text(&taken).contains("`xctl rm job` removes it"), "{taken:?}");
    xctl.prints(&["start", "job"])?;
    let table = xctl.prints(&["ps"])?;
    ensure!(table.starts_with("NAME ") && table.contains("job ") && table.contains(" running "), "{table}");
    let all: Value = serde_json::from_str(&xctl.prints(&["inspect", "job"])?)?;
    ensure!(all[0]["labels"]["a"] == "b" && all[0]["state"]["status"] == "running", "{all}");
    ensure!(all[0]["spec"]["process"]["args"][2] == "echo run; sleep 1000", "{all}");
    let (status, text) = xctl.fails(&["rm", "job"])?;
    ensure!(status == 1 && text.contains("container job runs; `xctl stop job` stops it"), "{text}");
    let (_, text) = xctl.fails(&["start", "job"])?;
    ensure!(text.contains("runs already"), "{text}");
    xctl.prints(&["kill", "job"])?;
    exited(&xctl, "job", 137).await?;
    let (_, text) = xctl.fails(&["kill", "job"])?;
    ensure!(text.contains("job"), "{text}");
    xctl.prints(&["start", "job"])?;
    eventually("both runs are in the log", SOON, async || {
        let logs = xctl.prints(&["logs", "job"])?;
        ensure!(logs == "run\nrun\n", "{logs:?}");
        Ok(())
    })
    .await?;
    xctl.prints(&["rm", "--force", "job"])?;
    xctl.leaves_nothing().await
}

pub(crate) async fn stop_is_a_signal_and_then_a_kill(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let script = |signal: &str| format!("trap 'exit 7' {signal}; echo ready; sleep 1000 & wait");
    for (name, flags, signal) in [("polite", &[][..], "TERM"), ("other", &["--stop-signal", "USR1"], "USR1")] {
        started(&xctl, &[&["--name", name], flags].concat(), &["sh", "-c", &script(signal)])?;
        eventually("it is ready", SOON, async || {
            ensure!(xctl.prints(&["logs", name])? == "ready\n");
            Ok(())
        })
        .await?;
    }
    started(&xctl, &["--name", "stubborn"], &["sleep", "1000"])?;
    xctl.prints(&["stop", "polite", "other"])?;
    xctl.prints(&["stop", "--time", "0", "stubborn"])?;
    for (name, status) in [("polite", 7), ("other", 7), ("stubborn", 137)] {
        ensure!(listed(&xctl, name)?["exit_status"] == status, "{name}");
    }
    xctl.prints(&["stop", "polite"])?;
    xctl.prints(&["rm", "polite", "other", "stubborn"])?;
    xctl.leaves_nothing().await
}

pub(crate) async fn exec_runs_beside_the_program(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    started(&xctl, &["--name", "long", "-e", "A=1"], &["sleep", "1000"])?;
    let exec = |words: &[&str]| xctl.command(&[&["exec"], words].concat()).output();
    let output = exec(&["-e", "B=2", "-w", "/tmp", "-u", "user", "long", "sh", "-c", "echo $A $B; pwd; id -u; echo oops >&2; exit 5"])?;
    ensure!(output.stdout == b"1 2\n/tmp\n1000\n" && output.stderr == b"oops\n" && output.status.code() == Some(5), "{output:?}");
    let output = exec(&["long", "/no/such/program"])?;
    ensure!(output.status.code() == Some(127) && output_text(&output).contains("/no/such/program"), "{output:?}");
    let output = exec(&["long", "/etc"])?;
    ensure!(output.status.code() == Some(126) && output_text(&output).contains("/etc"), "{output:?}");
    let mut child = Child::piped(&xctl.command(&["exec", "-i", "long", "wc", "-c"]))?;
    child.stdin.take().context("piped")?.write_all(&vec![b'x'; 1_000_001]).await?;
    ensure!(child.line().await?.trim() == "1000001" && child.status().await? == 0);
    ensure!(exec(&["--detach", "long", "sleep", "2000"])?.status.success());
    let top = xctl.prints(&["top", "long"])?;
    ensure!(top.contains("sleep 2000"), "{top}");
    xctl.prints(&["rm", "--force", "long"])?;
    xctl.leaves_nothing().await
}

pub(crate) async fn processes_and_usage_are_shown(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    started(&xctl, &["--name", "busy", "--memory", "64m"], &["sh", "-c", "sleep 1000 & while :; do :; done"])?;
    let processes: Value = serde_json::from_str(&xctl.prints(&["--format", "json", "top", "busy"])?)?;
    let commands: Vec<_> = processes.as_array().context("a list")?.iter().map(|row| row["command"].as_str().unwrap_or_default()).collect();
    ensure!(commands.len() == 2 && commands.contains(&"sleep 1000"), "{processes}");
    let usage: Value = serde_json::from_str(&xctl.prints(&["--format", "json", "stats", "busy"])?)?;
    let row = &usage[0];
    ensure!(row["name"] == "busy" && row["memory_limit_bytes"] == 64 << 20, "{usage}");
    ensure!(row["cpu_percent"].as_f64().is_some_and(|percent| percent > 1.0), "{usage}");
    ensure!(row["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 0) && row["processes"] == 2, "{usage}");
    ensure!(xctl.prints(&["stats"])?.contains("busy"));
    xctl.prints(&["rm", "--force", "busy"])?;
    xctl.leaves_nothing().await
}

pub(crate) async fn events_are_printed_as_they_happen(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let mut child = Child::piped(&xctl.command(&["--format", "json", "events"]))?;
    // what happens before it has subscribed is not printed: so it happens until one is
    let exit = {
        let exit = async {
            loop {
                let event: Value = serde_json::from_str(&child.line().await?)?;
                if event["topic"] == "/tasks/exit" {
                    return anyhow::Ok(event);
                }
            }
        };
        tokio::pin!(exit);
        let printed = eventually("an exit is printed", SOON, async || {
            ensure!(xctl.run(&["--rm"], &["sh", "-c", "exit 3"])?.status.code() == Some(3));
            tokio::time::timeout(Duration::from_millis(100), &mut exit).await.context("nothing yet")?
        });
        printed.await?
    };
    ensure!(exit["event"]["exit_status"] == 3 && exit["namespace"] == cx.client().namespace(), "{exit}");
    drop(child);
    xctl.leaves_nothing().await
}

pub(crate) async fn the_daemon_restarts_a_container_until_it_is_stopped(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    started(&xctl, &["--name", "again", "--restart", "always"], &["sh", "-c", "echo tried; exit 9"])?;
    eventually("it was started three times", Duration::from_secs(30), async || {
        let logs = xctl.prints(&["logs", "again"])?;
        ensure!(logs.lines().count() >= 3, "{logs:?}");
        Ok(())
    })
    .await?;
    xctl.prints(&["stop", "again"])?;
    let labels = listed(&xctl, "again")?["labels"].clone();
    ensure!(labels.get("containerd.io/restart.status").is_none() && labels["containerd.io/restart.policy"] == "always", "{labels}");
    // what the monitor had begun before may still end
    eventually("it is removed, and stays so", SOON, async || {
        xctl.prints(&["rm", "--force", "again"])?;
        Ok(())
    })
    .await?;
    xctl.leaves_nothing().await
}
