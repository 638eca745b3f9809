//! Builds that do not work: the upgrade is refused or rolled back, and reports the reason.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use shim_tests::builds::{self, Upgraded};
use shim_tests::cgroups::Own;
use shim_tests::container::{Container, Stdio};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::proc::{self, Process};
use shim_tests::programs;

use crate::{build, on_build};

/// A container that the upgrades must not affect.
struct Witness {
    cx: Context,
    container: Container,
    keeper: i32,
    execs: u32,
}

impl Witness {
    async fn new(cx: &Context) -> Result<Self> {
        let container = cx.container(&["sh", "-c", "read go; exit 3"]).stdio(Stdio::ALL).start().await?;
        let keeper = cx.shim_pid(&container.id)?;
        Ok(Self { cx: cx.clone(), container, keeper, execs: 0 })
    }

    /// Checks that it is unaffected, and that its shim is that build.
    async fn holds(&mut self, keeper: &str, worker: &str) -> Result<Value> {
        ensure!(self.cx.shim_pid(&self.container.id)? == self.keeper, "another keeper");
        ensure!(self.container.state().await?.pid == self.container.pid);
        self.execs += 1;
        ensure!(self.container.exec(&format!("e{}", self.execs), &["sh", "-c", "exit 4"]).run().await? == 4);
        let shims = builds::ps(&self.cx, self.cx.shim().binary.as_ref().context("ours")?).await?;
        let shim = shims.into_iter().find(|shim| shim["group"] == *self.container.id).context("ps does not show the shim")?;
        ensure!(shim["keeper"]["build"] == keeper && shim["worker"]["build"] == worker, "{shim:#}");
        Ok(shim)
    }

    async fn ends(self) -> Result<()> {
        self.container.io.stdin().await?.write_all(b"go\n")?;
        ensure!(self.container.finish().await? == 3);
        self.cx.leaves_nothing().await
    }
}

fn is_rolled_back(upgraded: &Upgraded, why: &str) -> Result<()> {
    let shim = upgraded.only()?;
    let reason = shim["why"].as_str().unwrap_or_default();
    ensure!(upgraded.status == 1 && shim["result"] == "rolled-back" && reason.contains(why), "{why:?} is not in {shim:#}");
    Ok(())
}

pub(crate) async fn a_worker_that_does_not_work_never_takes_over(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let mut witness = Witness::new(&cx).await?;
    for (words, why) in [
        ("at=hello do=crash", "signal 6"),
        ("at=hello do=exit", "exit status 7"),
        ("at=hello do=hang", "it sent no message within 10s"),
        ("at=fit do=crash", "signal 6"),
        ("at=fit do=hang", "did not respond"),
        // on a busy machine the keeper waits longer
        ("at=fit do=spin", "within"),
        ("records=0", "the record of container"),
        ("oldest=7 newest=9", "it speaks message version 7 to 9, this keeper version 1"),
    ] {
        let program = build(&cx, "new", &format!("build=bad {words}"))?;
        let shim = cx.shim().binary.clone().context("ours")?;
        let upgraded = builds::upgrade(&cx, &shim, &["--all", "--to", &program.display().to_string()]).await?;
        is_rolled_back(&upgraded, why).with_context(|| words.to_owned())?;
        let shown = witness.holds("old", "old").await?;
        ensure!(shown["remark"].as_str().is_some_and(|remark| remark.contains(why)), "{shown:#}");
        ensure!(shown["worker_generation"] == 1, "the previous worker was replaced: {shown:#}");
    }
    witness.ends().await
}

pub(crate) async fn a_new_worker_that_fails_is_rolled_back_to_the_previous_build(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let mut witness = Witness::new(&cx).await?;
    for (words, is_late) in
        [("at=welcome do=crash", false), ("at=later do=crash", true), ("at=later do=exit", true), ("at=later do=kill", true)]
    {
        let program = build(&cx, "new", &format!("build=bad {words}"))?;
        let upgraded = builds::upgrade(&cx, &program, &["--all", "--worker-only"]).await?;
        if is_late {
            upgraded.is_done()?;
            eventually("the previous worker is back", SOON, async || {
                let shown = builds::ps(&cx, &program).await?.remove(0);
                ensure!(shown["worker"]["build"] == "old" && shown["upgrade"]["worker"]["result"] == "rolled-back", "{shown:#}");
                Ok(())
            })
            .await?;
        } else {
            is_rolled_back(&upgraded, "the worker was rolled back: signal 6")?;
        }
        witness.holds("old", "old").await.with_context(|| words.to_owned())?;
    }
    // the keeper is not rolled back any more: only its worker is
    let program = build(&cx, "new", "build=bad at=later do=crash")?;
    builds::upgrade(&cx, &program, &["--all"]).await?.is_done()?;
    eventually("the previous worker is back", SOON, async || witness.holds("bad", "old").await).await?;
    witness.ends().await
}

pub(crate) async fn a_worker_that_fails_during_the_rehearsal_rolls_the_whole_upgrade_back(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let mut witness = Witness::new(&cx).await?;
    let program = build(&cx, "new", "build=bad at=later do=crash rehearsal=hang")?;
    let upgraded = builds::upgrade(&cx, &program, &["--all"]).await?;
    is_rolled_back(&upgraded, "the worker was rolled back: signal 6")?;
    is_rolled_back(&upgraded, "the keeper was kept: its worker was rolled back")?;
    witness.holds("old", "old").await?;
    witness.ends().await
}

pub(crate) async fn a_new_worker_that_gets_no_cpu_does_not_replace_the_keeper(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let mut witness = Witness::new(&cx).await?;
    let starved = Own::with(&format!("{}-starved", cx.client().namespace()), "cpu.cfs_quota_us", "5000")?;
    let program = build(&cx, "new", "build=bad at=welcome do=spin")?;
    let (keeper, old) = (witness.keeper, witness.holds("old", "old").await?["worker"]["pid"].as_i64().context("a pid")?);
    let starve = eventually("the new worker runs", SOON, async || {
        let is_it = |process: &Process| {
            process.parent == keeper && i64::from(process.pid) != old && process.command.split(' ').any(|word| word == "worker")
        };
        starved.take(proc::all().into_values().find(is_it).context("not yet")?.pid)
    });
    let (upgraded, starved_in_time) = tokio::join!(builds::upgrade(&cx, &program, &["--all"]), starve);
    starved_in_time?;
    is_rolled_back(&upgraded?, "the keeper was kept: the new worker did not respond within 20s")?;
    starved.set("cpu.cfs_quota_us", "-1")?;
    // with a request, the keeper detects that it hangs
    eventually("the previous worker is back", SOON, async || witness.holds("old", "old").await).await?;
    starved.emptied().await?;
    witness.ends().await
}

pub(crate) async fn a_rehearsal_that_cannot_be_killed_does_not_stop_the_keeper(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let mut witness = Witness::new(&cx).await?;
    let frozen = Own::with(&format!("{}-frozen", cx.client().namespace()), "freezer.state", "FROZEN")?;
    let program = build(&cx, "new", "build=bad at=rehearsal do=hang")?;
    let keeper = witness.keeper;
    let freeze = eventually("the new keeper rehearses", SOON, async || {
        let is_it = |process: &Process| process.parent == keeper && process.command.split(' ').any(|word| word == "rehearse");
        frozen.take(proc::all().into_values().find(is_it).context("not yet")?.pid)
    });
    let (upgraded, frozen_in_time) = tokio::join!(builds::upgrade(&cx, &program, &["--all"]), freeze);
    frozen_in_time?;
    is_rolled_back(&upgraded?, "its rehearsal failed: it sent no message within 10s")?;
    witness.holds("old", "bad").await?;
    let good = build(&cx, "good", "build=good")?;
    builds::upgrade(&cx, &good, &["--all"]).await?.is_done()?;
    witness.holds("good", "good").await?;
    frozen.set("freezer.state", "THAWED")?;
    frozen.emptied().await?;
    witness.ends().await
}

pub(crate) async fn a_keeper_that_does_not_work_never_takes_over(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let mut witness = Witness::new(&cx).await?;
    for (words, why) in [
        ("at=rehearsal do=crash", "its rehearsal failed: signal 6"),
        ("at=rehearsal do=exit", "its rehearsal failed: exit status 7"),
        ("at=rehearsal do=hang", "its rehearsal failed: it sent no message within 10s"),
        ("state=0", "the keeper's state has version 2, which needs a reader of version 1 or later"),
    ] {
        let program = build(&cx, "new", &format!("build=bad {words}"))?;
        let upgraded = builds::upgrade(&cx, &program, &["--all"]).await?;
        is_rolled_back(&upgraded, why).with_context(|| words.to_owned())?;
        ensure!(upgraded.only()?["report"]["worker"]["result"] == "upgraded", "{upgraded:#?}");
        witness.holds("old", "bad").await.with_context(|| words.to_owned())?;
        let old = cx.shim().binary.clone().context("ours")?;
        builds::upgrade(&cx, &old, &["--all"]).await?.is_done()?;
        witness.holds("old", "old").await?;
    }
    witness.ends().await
}

pub(crate) async fn an_executable_that_cannot_resume_executes_the_previous_one(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let mut witness = Witness::new(&cx).await?;
    let program = build(&cx, "new", "build=bad at=resume do=refuse")?;
    let (client, id) = (cx.client().clone(), witness.container.id.clone());
    let waiting = tokio::spawn(async move { client.wait_for_ever(&id, "").await });
    let upgraded = builds::upgrade(&cx, &program, &["--all"]).await?;
    is_rolled_back(&upgraded, "it could not resume from the state")?;
    witness.holds("old", "bad").await?;
    let old = cx.shim().binary.clone().context("ours")?;
    builds::upgrade(&cx, &old, &["--all"]).await?.is_done()?;
    witness.holds("old", "old").await?;
    ensure!(!waiting.is_finished());
    witness.ends().await?;
    ensure!(waiting.await??.into_inner().exit_status == 3);
    Ok(())
}

/// The rehearsal of the new executable receives the state with all descriptors, in addition to the inherited ones: twice as many.
pub(crate) async fn a_keeper_short_of_descriptors_survives_an_upgrade_attempt(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let mut witness = Witness::new(&cx).await?;
    let mut execs = Vec::new();
    for number in 0..12 {
        let exec = witness.container.exec(&format!("many{number}"), &["cat"]).stdio(Stdio::ALL).add().await?;
        exec.start().await?;
        execs.push(exec);
    }
    let few = proc::open_files(witness.keeper)?.len() + 30;
    limit_descriptors(witness.keeper, &format!("{few}:")).await?;
    let program = build(&cx, "new", "build=new")?;
    builds::upgrade(&cx, &program, &["--all"]).await?.is_done()?;
    let limits = fs::read_to_string(format!("/proc/{}/limits", witness.keeper))?;
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
    ensure!(soft == Some(few.to_string().as_str()), "the limit is not restored: {limits}");
    witness.holds("new", "new").await?;
    limit_descriptors(witness.keeper, &format!("{few}:{few}")).await?;
    let old = cx.shim().binary.clone().context("ours")?;
    let upgraded = builds::upgrade(&cx, &old, &["--all"]).await?;
    is_rolled_back(&upgraded, "Too many open files")?;
    witness.holds("new", "old").await?;
    for exec in execs {
        exec.io.stdin().await?.write_all(b"still there\n")?;
        exec.io.out().until("still there\n").await?;
        exec.kill(9).await?;
        ensure!(exec.finish().await? == 137);
    }
    witness.ends().await
}

async fn limit_descriptors(pid: i32, limits: &str) -> Result<()> {
    let mut command = tokio::process::Command::new("prlimit");
    let status = command.arg(format!("--pid={pid}")).arg(format!("--nofile={limits}")).status().await?;
    ensure!(status.success(), "prlimit: {status}");
    Ok(())
}

pub(crate) async fn a_program_that_is_no_shim_is_refused(cx: Context) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let cx = on_build(&cx, "build=old").await?;
    let mut witness = Witness::new(&cx).await?;
    let shim = cx.shim().binary.clone().context("ours")?;
    let path = programs::script(cx.folder(), "program", "neither an executable nor a script")?;
    let upgraded = builds::upgrade(&cx, &shim, &["--all", "--to", &path.display().to_string()]).await?;
    is_rolled_back(&upgraded, "cannot be executed: Exec format error")?;
    let upgraded = builds::upgrade(&cx, &shim, &["--all", "--to", "/bin/true"]).await?;
    is_rolled_back(&upgraded, "the worker was kept")?;
    for (path, mode) in [(path.as_path(), 0o644), (std::path::Path::new("/"), 0), (std::path::Path::new("/not-there"), 0)] {
        if mode != 0 {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        }
        ensure!(builds::upgrade(&cx, &shim, &["--all", "--to", &path.display().to_string()]).await.is_err(), "{}", path.display());
    }
    witness.holds("old", "old").await?;
    witness.ends().await
}

pub(crate) async fn an_upgrade_to_the_same_executable_changes_nothing(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let mut witness = Witness::new(&cx).await?;
    let shim = cx.shim().binary.clone().context("ours")?;
    let upgraded = builds::upgrade(&cx, &shim, &["--all"]).await?;
    ensure!(upgraded.status == 0 && upgraded.only()?["result"] == "unchanged", "{upgraded:#?}");
    ensure!(witness.holds("old", "old").await?["worker_generation"] == 1);
    witness.ends().await
}

pub(crate) async fn only_the_shims_that_are_named_are_upgraded(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let (mut a, mut b) = (Witness::new(&cx).await?, Witness::new(&cx).await?);
    let program = build(&cx, "new", "build=new")?;
    let upgraded = builds::upgrade(&cx, &program, &[&a.container.id]).await?;
    upgraded.is_done()?;
    ensure!(upgraded.only()?["group"] == *a.container.id, "{upgraded:#?}");
    a.holds("new", "new").await?;
    b.holds("old", "old").await?;
    ensure!(builds::upgrade(&cx, &program, &[&a.container.id, "missing"]).await.is_err(), "an unknown id is accepted");
    for witness in [a, b] {
        witness.container.io.stdin().await?.write_all(b"go\n")?;
        ensure!(witness.container.finish().await? == 3);
    }
    cx.leaves_nothing().await
}

pub(crate) async fn many_shims_are_upgraded_a_few_at_a_time(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let mut containers = Vec::new();
    for _ in 0..20 {
        containers.push(cx.container(&["sleep", "1000"]).start().await?);
    }
    let program = build(&cx, "new", "build=new")?;
    let upgraded = builds::upgrade(&cx, &program, &["--all", "--at-once", "3"]).await?;
    upgraded.is_done()?;
    ensure!(upgraded.report["summary"]["upgraded"] == 20, "{upgraded:#?}");
    let pause = upgraded.report["summary"]["longest_pause_ms"].as_f64().context("no pause")?;
    ensure!(pause > 0.0, "a pause of {pause} ms");
    for container in containers {
        ensure!(container.state().await?.pid == container.pid);
        ensure!(container.destroy().await? == 137);
    }
    cx.leaves_nothing().await
}
