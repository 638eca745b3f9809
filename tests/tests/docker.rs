//! Docker 26, and 20.10 and 28 where messages count, with the shim under test as its runtime; `X_DOCKER=28` tests all with 28. Needs root.
//!
//! `X_SHIM` names the shim's binary, `X_RUNTIME_TYPE` its runtime type; see `shim_tests::suite`.

#[path = "docker/images.rs"]
mod images;

use std::io::Write as _;
use std::path::Path;
use std::process::{ExitCode, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use shim_tests::cases;
use shim_tests::context::Context;
use shim_tests::docker::{Docker, Version};
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::proc;
use shim_tests::runner::{self, Scope};

fn main() -> ExitCode {
    let programs = Path::new(env!("CARGO_BIN_EXE_gated-runtime")).parent().expect("a file is in a folder");
    let cases = cases![cases,
        Scope::Docker =>
            run_prints_and_exits_like_the_program,
            a_program_that_is_missing_ends_with_127_and_one_that_cannot_be_executed_with_126,
            exec_runs_beside_init,
            logs_hold_every_line,
            stop_is_a_signal_and_then_a_kill,
            a_terminal_works,
            an_out_of_memory_kill_is_known_as_one,
            a_failing_container_is_restarted_as_often_as_asked,
            a_container_outlives_dockerd,
            an_exit_while_dockerd_is_down_is_known_afterwards,
            a_container_outlives_containerd,
    ];
    let images =
        cases![images, Scope::Once => what_docker_does_with_images_it_does_on_x_manager, a_pull_that_is_pruned_meanwhile_ends_well];
    let images = images.into_iter().map(|case| case.within(Duration::from_secs(400)));
    let cases: Vec<_> = cases.into_iter().map(|case| case.within(Duration::from_secs(120))).chain(images).collect();
    runner::main(&cases, &[], programs)
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn started(output: &Output) -> Result<()> {
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

mod cases {
    use super::*;

    pub(crate) async fn run_prints_and_exits_like_the_program(cx: Context) -> Result<()> {
        let docker = Docker::start(&cx).await?;
        let output = docker.container(&["--rm"], &["echo", "hello"])?;
        ensure!(output.status.success() && text(&output) == "hello\n", "{output:?}");
        let output = docker.container(&["--rm"], &["sh", "-c", "echo oops >&2; exit 3"])?;
        ensure!(output.status.code() == Some(3) && output.stderr == b"oops\n", "{output:?}");
        docker.leaves_nothing().await
    }

    /// dockerd and its client look for words in the runtime's message.
    pub(crate) async fn a_program_that_is_missing_ends_with_127_and_one_that_cannot_be_executed_with_126(cx: Context) -> Result<()> {
        for version in [Version::V20, Version::V26, Version::V28] {
            missing_programs_and_others(&cx, version).await.with_context(|| format!("{version:?}"))?;
        }
        Ok(())
    }

    async fn missing_programs_and_others(cx: &Context, version: Version) -> Result<()> {
        let docker = Docker::start_version(cx, version).await?;
        let native = version.has_native(cx).then_some("with-native");
        for runtime in ["with-crun", "with-runc"].into_iter().chain(native) {
            started(&docker.container_of(runtime, &["--detach", "--name", runtime], &["sleep", "1000"])?)?;
            for (program, status) in [("no-such-program", 127), ("/no/such/program", 127), ("/etc/passwd", 126), ("/etc", 126)] {
                // runc 1.1.15 says "is a directory", which Docker 20.10 does not know yet
                let status = if (version, runtime, program) == (Version::V20, "with-runc", "/etc") { 125 } else { status };
                let output = docker.container_of(runtime, &["--rm"], &[program])?;
                ensure!(output.status.code() == Some(status), "{runtime}: run {program}: {output:?}");
                // up to Docker 26, for every error of the program
                let status = if version == Version::V28 { status } else { 126 };
                let output = docker.output(&["exec", runtime, program])?;
                ensure!(output.status.code() == Some(status), "{runtime}: exec {program}: {output:?}");
            }
        }
        docker.leaves_nothing().await
    }

    pub(crate) async fn exec_runs_beside_init(cx: Context) -> Result<()> {
        let docker = Docker::start(&cx).await?;
        started(&docker.container(&["--detach", "--name", "long"], &["sleep", "1000"])?)?;
        ensure!(docker.run(&["exec", "long", "cat", "/proc/1/comm"])? == "sleep");
        ensure!(docker.output(&["exec", "long", "sh", "-c", "exit 5"])?.status.code() == Some(5));
        let mut cat = docker.command(&["exec", "--interactive", "long", "wc", "-c"]);
        let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        cat.stdin.take().context("piped")?.write_all(&vec![b'x'; 1_000_001])?;
        let output = cat.wait_with_output()?;
        ensure!(text(&output).trim() == "1000001", "{output:?}");
        docker.leaves_nothing().await
    }

    pub(crate) async fn logs_hold_every_line(cx: Context) -> Result<()> {
        let docker = Docker::start(&cx).await?;
        started(&docker.container(&["--name", "talks"], &["seq", "1", "20000"])?)?;
        let logs = docker.run(&["logs", "talks"])?;
        let expected = (1..=20000).map(|number| number.to_string()).collect::<Vec<_>>().join("\n");
        ensure!(logs == expected, "{} bytes instead of {}", logs.len(), expected.len());
        docker.leaves_nothing().await
    }

    pub(crate) async fn stop_is_a_signal_and_then_a_kill(cx: Context) -> Result<()> {
        let docker = Docker::start(&cx).await?;
        let polite = "trap 'exit 7' TERM; echo ready; sleep 1000 & wait";
        started(&docker.container(&["--detach", "--name", "polite"], &["sh", "-c", polite])?)?;
        eventually("it is ready", SOON, async || {
            ensure!(docker.run(&["logs", "polite"])? == "ready");
            Ok(())
        })
        .await?;
        docker.run(&["stop", "--time", "20", "polite"])?;
        ensure!(docker.inspect("polite", ".State.ExitCode")? == "7");
        started(&docker.container(&["--detach", "--name", "stubborn"], &["sleep", "1000"])?)?;
        docker.run(&["stop", "--time", "1", "stubborn"])?;
        ensure!(docker.inspect("stubborn", ".State.ExitCode")? == "137");
        docker.run(&["start", "stubborn"])?;
        docker.run(&["pause", "stubborn"])?;
        docker.run(&["unpause", "stubborn"])?;
        docker.run(&["kill", "stubborn"])?;
        ensure!(docker.run(&["wait", "stubborn"])? == "137");
        docker.leaves_nothing().await
    }

    pub(crate) async fn a_terminal_works(cx: Context) -> Result<()> {
        let docker = Docker::start(&cx).await?;
        let output = docker.container(&["--rm", "--tty"], &["sh", "-c", "test -t 1 && tty; exit 4"])?;
        ensure!(output.status.code() == Some(4) && text(&output).starts_with("/dev/"), "{output:?}");
        docker.leaves_nothing().await
    }

    pub(crate) async fn an_out_of_memory_kill_is_known_as_one(cx: Context) -> Result<()> {
        let docker = Docker::start(&cx).await?;
        let output = docker.container(&["--name", "greedy", "--memory", "16m"], &["tail", "/dev/zero"])?;
        ensure!(output.status.code() == Some(137), "{output:?}");
        ensure!(docker.inspect("greedy", ".State.OOMKilled")? == "true");
        docker.leaves_nothing().await
    }

    pub(crate) async fn a_failing_container_is_restarted_as_often_as_asked(cx: Context) -> Result<()> {
        let docker = Docker::start(&cx).await?;
        let options = ["--detach", "--name", "fails", "--restart", "on-failure:3"];
        started(&docker.container(&options, &["sh", "-c", "echo tried; exit 9"])?)?;
        eventually("dockerd stops restarting it", Duration::from_secs(30), async || {
            let state = docker.inspect("fails", ".State.Status")?;
            ensure!(state == "exited" && docker.inspect("fails", ".RestartCount")? == "3", "{state}");
            Ok(())
        })
        .await?;
        ensure!(docker.run(&["logs", "fails"])? == "tried\ntried\ntried\ntried");
        ensure!(docker.inspect("fails", ".State.ExitCode")? == "9");
        docker.leaves_nothing().await
    }

    pub(crate) async fn a_container_outlives_dockerd(cx: Context) -> Result<()> {
        let docker = Docker::start(&cx).await?;
        let script = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.02; done";
        started(&docker.container(&["--detach", "--name", "stays"], &["sh", "-c", script])?)?;
        let pid: i32 = docker.inspect("stays", ".State.Pid")?.parse()?;
        docker.kill()?;
        ensure!(proc::is_alive(pid));
        docker.revive().await?;
        ensure!(docker.inspect("stays", ".State.Pid")? == pid.to_string());
        ensure!(docker.inspect("stays", ".RestartCount")? == "0");
        ensure!(docker.run(&["exec", "stays", "echo", "hello"])? == "hello");
        let lines = docker.run(&["logs", "stays"])?.lines().count();
        eventually("its log grows", SOON, async || {
            let now = docker.run(&["logs", "stays"])?.lines().count();
            ensure!(now > lines + 10, "{lines} lines, then {now}");
            Ok(())
        })
        .await?;
        docker.run(&["stop", "--time", "0", "stays"])?;
        let logs = docker.run(&["logs", "stays"])?;
        let gap = logs.lines().enumerate().find(|(number, line)| *line != format!("line {number}"));
        ensure!(gap.is_none(), "{gap:?}");
        docker.leaves_nothing().await
    }

    pub(crate) async fn an_exit_while_dockerd_is_down_is_known_afterwards(cx: Context) -> Result<()> {
        let docker = Docker::start(&cx).await?;
        let script = "while ! test -e /go; do sleep 0.05; done; exit 3";
        started(&docker.container(&["--detach", "--name", "ends"], &["sh", "-c", script])?)?;
        let pid: i32 = docker.inspect("ends", ".State.Pid")?.parse()?;
        docker.kill()?;
        std::fs::write(format!("/proc/{pid}/root/go"), "")?;
        eventually_true("it has exited", SOON, || !proc::is_alive(pid)).await?;
        docker.revive().await?;
        eventually("dockerd knows", SOON, async || {
            let state = docker.inspect("ends", ".State.Status")?;
            ensure!(state == "exited", "{state}");
            Ok(())
        })
        .await?;
        ensure!(docker.inspect("ends", ".State.ExitCode")? == "3");
        docker.leaves_nothing().await
    }

    pub(crate) async fn a_container_outlives_containerd(cx: Context) -> Result<()> {
        let docker = Docker::start(&cx).await?;
        started(&docker.container(&["--detach", "--name", "stays"], &["sleep", "1000"])?)?;
        let pid: i32 = docker.inspect("stays", ".State.Pid")?.parse()?;
        docker.context().crash_daemon().await?;
        ensure!(proc::is_alive(pid));
        eventually("exec works again", Duration::from_secs(30), async || {
            ensure!(docker.run(&["exec", "stays", "echo", "hello"])? == "hello");
            Ok(())
        })
        .await?;
        ensure!(docker.inspect("stays", ".State.Pid")? == pid.to_string());
        docker.leaves_nothing().await
    }
}
