//! A pod's life as the kubelet sees it: with a pause container, and with the shim in its place.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use shim_tests::context::Context;
use shim_tests::cri::{Cri, RUNNING, Sandboxer, Setup};
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::proc;
use shim_tests::runner::{needs_controller, skip};
use shim_tests::suite::{Shim, Suite};

/// The pid of the shell with the argument `path`, in a container.
async fn program_with(path: &str) -> Result<i32> {
    eventually("its program runs", SOON, async || {
        let mut all = proc::all().into_values();
        let init = all.find(|process| process.comm == "sh" && process.command.contains(path));
        init.map(|process| process.pid).context("not yet")
    })
    .await
}

pub(crate) async fn a_container_of_a_pod_runs_and_reports_exec_stats_and_logs(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    needs_controller("memory")?;
    let cri = Cri::start_as(&cx, sandboxer).await?;
    let pod = cri.run_pod("pod").await?;
    let id = cri.run(&pod, "app", &["sh", "-c", "echo hello; echo oops >&2; exec sleep 1000"]).await?;
    ensure!(cri.status(&id).await?.state == RUNNING);
    let (code, out) = cri.exec(&id, &["sh", "-c", "echo inside; exit 4"]).await?;
    ensure!(code == 4 && out == "inside\n", "{code} {out:?}");
    for _probe in 0..5 {
        ensure!(cri.exec(&id, &["true"]).await?.0 == 0);
    }
    eventually("it has used something", SOON, async || {
        let (cpu, memory) = cri.stats(&id).await?;
        ensure!(cpu > 0 && memory > 0, "{cpu} ns, {memory} bytes");
        Ok(())
    })
    .await?;
    eventually("both lines are logged", SOON, async || {
        let log = cri.log(&pod, "app");
        ensure!(log.contains("hello\n") && log.contains("oops\n"), "{log:?}");
        Ok(())
    })
    .await?;
    cri.stop(&id, 1).await?;
    let status = cri.ended(&id).await?;
    // a pid namespace's first process ignores what it does not handle
    ensure!([137, 143].contains(&status.exit_code), "{status:?}");
    cri.remove(&id).await?;
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

pub(crate) async fn exit_codes_and_reasons_reach_the_kubelet(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    needs_controller("memory")?;
    let cri = Cri::start_as(&cx, sandboxer).await?;
    let pod = cri.run_pod("pod").await?;
    for (name, code, reason) in [("fine", 0, "Completed"), ("failed", 3, "Error")] {
        let id = cri.run(&pod, name, &["sh", "-c", &format!("exit {code}")]).await?;
        let status = cri.ended(&id).await?;
        ensure!(status.exit_code == code && status.reason == reason, "{status:?}");
        ensure!(status.finished_at > 0 && status.started_at > 0, "{status:?}");
    }
    let id = cri.create(&pod, "greedy", &["tail", "/dev/zero"], 16 << 20).await?;
    cri.start_container(&id).await?;
    let status = cri.ended(&id).await?;
    ensure!(status.exit_code == 137 && status.reason == "OOMKilled", "{status:?}");
    let id = cri.run(&pod, "polite", &["sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.1; done"]).await?;
    // once it listens
    cri.exec(&id, &["sh", "-c", "until grep -q 'SigCgt:.*4...$' /proc/1/status; do :; done"]).await?;
    cri.stop(&id, 10).await?;
    ensure!(cri.ended(&id).await?.exit_code == 7);
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

pub(crate) async fn all_containers_of_a_pod_share_one_shim(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    let cri = Cri::start_as(&cx, sandboxer).await?;
    let (pod, other) = (cri.run_pod("pod").await?, cri.run_pod("other").await?);
    for name in ["one", "two", "three"] {
        cri.run(&pod, name, &["sleep", "1000"]).await?;
    }
    eventually("there is one for each of two pods", SOON, async || {
        let shims = cri.shims();
        ensure!(shims.len() == 2, "{shims:?}");
        Ok(())
    })
    .await?;
    cri.end_pod(&pod).await?;
    eventually("the other pod's shim is left", SOON, async || {
        let shims = cri.shims();
        ensure!(shims.len() == 1, "{shims:?}");
        Ok(())
    })
    .await?;
    let id = cri.run(&other, "late", &["sh", "-c", "exit 5"]).await?;
    ensure!(cri.ended(&id).await?.exit_code == 5);
    cri.end_pod(&other).await?;
    cri.leaves_nothing().await
}

pub(crate) async fn a_pod_outlives_containerd(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    let cri = Cri::start_as(&cx, sandboxer).await?;
    let pod = cri.run_pod("pod").await?;
    // it prints what the test sends it: a killed daemon loses output that it has read but not yet written to the log
    let feed = format!("/tmp/feed-{}", cx.client().namespace());
    let script = format!("mkfifo {feed}; exec 0<>{feed}; rm {feed}; cat; :");
    let id = cri.run(&pod, "app", &["sh", "-c", &script]).await?;
    let init = program_with(&feed).await?;
    let stdin = PathBuf::from(format!("/proc/{init}/fd/0"));
    let is_fed = || fs::read_link(&stdin).is_ok_and(|target| target.ends_with(format!("{} (deleted)", feed.trim_start_matches('/'))));
    eventually_true("it reads its input", SOON, is_fed).await?;
    let mut fed = String::new();
    let mut say = |times: usize| -> Result<String> {
        let from = fed.lines().count();
        let lines: String = (from..from + times).map(|number| format!("line {number}\n")).collect();
        // both ways: nothing waits for a reader
        fs::File::options().read(true).write(true).open(&stdin)?.write_all(lines.as_bytes())?;
        fed += &lines;
        Ok(fed.clone())
    };
    let logged = async |fed: String| {
        eventually("all is logged, once", SOON, async || {
            let log = cri.log(&pod, "app");
            ensure!(log == fed, "{log:?} of {fed:?}");
            Ok(())
        })
        .await
    };
    let before = cri.status(&id).await?;
    for _restart in 0..2 {
        logged(say(5)?).await?;
        let mut fed = String::new();
        cri.crash(async {
            fed = say(500)?;
            Ok(())
        })
        .await?;
        let after = eventually("the plugin is there again", SOON, async || cri.status(&id).await).await?;
        ensure!(after.state == RUNNING && after.started_at == before.started_at, "{before:?}, then {after:?}");
        ensure!(cri.exec(&id, &["sh", "-c", "exit 6"]).await?.0 == 6);
        logged(fed).await?;
    }
    logged(say(5)?).await?;
    let second = cri.run(&pod, "second", &["sh", "-c", "exit 5"]).await?;
    ensure!(cri.ended(&second).await?.exit_code == 5);
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

pub(crate) async fn an_exit_while_containerd_is_down_is_known_afterwards(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    let cri = Cri::start_as(&cx, sandboxer).await?;
    let pod = cri.run_pod("pod").await?;
    // a name of its own: the same test runs beside this one on other daemons
    let gate = format!("/tmp/go-{}", cx.client().namespace());
    let id = cri.run(&pod, "app", &["sh", "-c", &format!("until [ -e {gate} ]; do sleep 0.02; done; exit 3")]).await?;
    let init = program_with(&gate).await?;
    cri.crash(async {
        fs::write(format!("/proc/{init}/root{gate}"), "")?;
        eventually_true("it has exited", SOON, || !proc::is_alive(init)).await
    })
    .await?;
    let status = eventually("the plugin reports the exit", SOON * 2, async || {
        let status = cri.status(&id).await?;
        ensure!(status.state != RUNNING, "{status:?}");
        Ok(status)
    })
    .await?;
    ensure!(status.exit_code == 3 && status.reason == "Error", "{status:?}");
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

/// Waits until these are the commands of the processes of a container that sleep. A process that was forked executes its command later, and a killed one
/// exits later, than the client is answered.
async fn sleep_in(cri: &Cri, id: &str, expected: &[&str]) -> Result<()> {
    let list = r"for process in /proc/[0-9]*; do tr '\0' ' ' <$process/cmdline; echo; done 2>/dev/null | grep ^sleep | sort";
    eventually("those that are to sleep do", SOON, async || {
        let (_, output) = cri.exec(id, &["sh", "-c", list]).await?;
        let found: Vec<_> = output.lines().map(str::trim).collect();
        ensure!(found == expected, "{found:?}");
        Ok(())
    })
    .await
}

/// The plugin's default is to wait for the end of the output without a limit.
pub(crate) async fn a_probe_that_takes_too_long_is_answered_and_leaves_no_descendant(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    if !cx.shim().is_ours() {
        return skip("with the stock shim the answer never comes");
    }
    let cri = Cri::start_as(&cx, sandboxer).await?;
    let pod = cri.run_pod("pod").await?;
    let id = cri.run(&pod, "app", &["sh", "-c", "sleep 1001 & exec sleep 1002"]).await?;
    for script in ["(setsid sh -c 'trap \"\" HUP INT TERM; sleep 1003 & exit' &) ; sleep 1004", "trap '' TERM; sleep 1003 & sleep 1004"] {
        let begin = Instant::now();
        let error = cri.exec_within(&id, &["sh", "-c", script], 1).await.err().context("an answer after its time")?;
        ensure!(format!("{error:#}").contains("timeout 1s exceeded"), "{error:#}");
        ensure!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
        sleep_in(&cri, &id, &["sleep 1001", "sleep 1002"]).await?;
    }
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

/// Hooks start programs so. The plugin kills every exec before it deletes it, also one that has exited.
pub(crate) async fn what_a_probe_has_left_behind_outlives_it(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    let cri = Cri::start_as(&cx, sandboxer).await?;
    let pod = cri.run_pod("pod").await?;
    let id = cri.run(&pod, "app", &["sleep", "1001"]).await?;
    let (code, _) = cri.exec(&id, &["sh", "-c", "(setsid sleep 1005 <&- >&- 2>&- &)"]).await?;
    ensure!(code == 0);
    sleep_in(&cri, &id, &["sleep 1001", "sleep 1005"]).await?;
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

/// With the stock shim the same happens.
pub(crate) async fn a_probe_whose_output_a_child_holds_ends_with_the_drain_time_out(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    if cx.suite() == Suite::Bookworm {
        return skip("containerd 1.6 waits without a limit");
    }
    let stock = (sandboxer == Sandboxer::Pause).then(Shim::stock);
    for shim in [Some(cx.shim().clone()), stock].into_iter().flatten() {
        let setup = Setup { sandboxer, shim: Some(&shim), setting: "drain_exec_sync_io_timeout = \"2s\"", ..Setup::default() };
        let cri = Cri::start_with(&cx, &setup).await?;
        let pod = cri.run_pod("pod").await?;
        let id = cri.run(&pod, "app", &["sleep", "1000"]).await?;
        let keeper = cri.shims().first().context("it has a shim")?.pid;
        cri.exec(&id, &["true"]).await?;
        let before = proc::fewest_open_files(keeper).await?;
        // an output that ends in time is whole
        let (code, output) = cri.exec(&id, &["sh", "-c", "(sleep 0.2; echo late) & echo now; exit 4"]).await?;
        ensure!(code == 4 && output == "now\nlate\n", "{code} {output:?}");
        let held = cri.exec(&id, &["sh", "-c", "sleep 1000 & echo now"]).await;
        let error = held.err().map(|error| format!("{error:#}")).context("an answer without the output's end")?;
        ensure!(error.contains("io is still held by other processes"), "{error}");
        // and nothing of it is in the way of the next ones
        let (code, output) = cri.exec(&id, &["sh", "-c", "echo next"]).await?;
        ensure!(code == 0 && output == "next\n", "{code} {output:?}");
        if shim.is_ours() {
            eventually("the descriptors of the probe are closed", SOON, async || {
                let open = proc::fewest_open_files(keeper).await?;
                ensure!(open == before, "{open}, {before} before");
                Ok(())
            })
            .await?;
        }
        cri.end_pod(&pod).await?;
        cri.leaves_nothing().await?;
    }
    Ok(())
}

/// Whether it then works is for a host that systemd runs: tests/tools/systemd-check.
pub(crate) async fn the_cgroup_driver_of_the_readme_is_asked_for(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    if Path::new("/run/systemd/system").exists() {
        return skip("systemd runs here, and would do it");
    }
    let cri = Cri::start_with(&cx, &Setup { sandboxer, option: "SystemdCgroup = true", ..Setup::default() }).await?;
    // the messages of runc, of crun, and of an engine that leaves it to them
    let reasons = ["systemd", "sd-bus", "SystemdCgroup"];
    match sandboxer {
        Sandboxer::Pause => cri.no_pod_runs("pod", &reasons).await?,
        // nothing runs in it yet
        Sandboxer::Shim => {
            let pod = cri.run_pod("pod").await?;
            let error = cri.run(&pod, "app", &["true"]).await.err().context("a container runs")?;
            ensure!(reasons.iter().any(|reason| format!("{error:#}").contains(reason)), "{error:#}");
            cri.end_pod(&pod).await?;
        }
    }
    cri.leaves_nothing().await
}
