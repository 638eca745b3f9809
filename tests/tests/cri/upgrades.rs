//! Shims of pods that run are upgraded, downgraded and rolled back, and their workers hibernate.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use shim_tests::builds;
use shim_tests::context::Context;
use shim_tests::cri::{Cri, Namespace, Pod, PodSpec, READY, RUNNING, Sandboxer, Setup};
use shim_tests::eventually::{SOON, eventually};
use shim_tests::proc;
use shim_tests::runner::skip;
use shim_tests::suite::Shim;

use crate::namespaces::namespace;
use crate::places::keeper_is_in_its_pod;

/// A build with the test identity `words`, in the test's folder; skips without a shim that is built for that.
pub(crate) fn build(cx: &Context, name: &str, words: &str) -> Result<Shim> {
    let Ok(faulty) = Shim::faulty() else { return skip("there is no shim with fault-injection: name one with X_SHIM_FAULTY") };
    let folder = cx.folder().join(name);
    fs::create_dir_all(&folder)?;
    let program = folder.join(faulty.binary_name());
    builds::make(faulty.binary.as_ref().context("our own shim is a file")?, &program, words)?;
    Ok(Shim { binary: Some(program), ..faulty })
}

/// Waits until a pod's shim has a worker.
pub(crate) async fn worker(cri: &Cri, pod: &Pod) -> Result<i32> {
    let keeper = cri.keeper(pod)?.pid;
    eventually("the worker is there", SOON, async || {
        let is_worker = |child: &proc::Process| child.command.split(' ').any(|word| word == "worker");
        proc::children(keeper).into_iter().find(is_worker).map(|child| child.pid).context("no worker")
    })
    .await
}

/// A pod, and what must not change.
struct Subject {
    pod: Pod,
    keeper: i32,
    app: String,
    init: i32,
    ip: String,
    made: u32,
}

impl Subject {
    async fn new(cri: &Cri, spec: &PodSpec) -> Result<Self> {
        let pod = cri.run_pod_of(spec).await?;
        let app = cri.run(&pod, "app", &["sh", "-c", "trap 'exit 7' TERM; sleep 100000 & wait"]).await?;
        let (keeper, init) = (cri.keeper(&pod)?.pid, cri.init_of(&app).await?);
        let ip = cri.pod_status(&pod).await?.ip;
        Ok(Self { pod, keeper, app, init, ip, made: 0 })
    }

    /// Checks that the pod is as before, that its shim is that build, and that it takes another container.
    async fn holds(&mut self, cri: &Cri, name: &str) -> Result<()> {
        let shim = cri.ps(&self.pod).await?;
        ensure!(shim["keeper"]["build"] == name && shim["worker"]["build"] == name, "{shim:#}");
        ensure!(cri.keeper(&self.pod)?.pid == self.keeper, "another keeper");
        keeper_is_in_its_pod(cri, &self.pod).await?;
        let status = cri.pod_status(&self.pod).await?;
        ensure!(status.state == READY && status.ip == self.ip, "{status:?}");
        ensure!(cri.status(&self.app).await?.state == RUNNING && cri.init_of(&self.app).await? == self.init);
        let addresses = cri.sh(&self.app, "ip -4 -o addr").await?;
        ensure!(addresses.contains(&self.ip), "{addresses}");
        self.made += 1;
        let id = cri.run(&self.pod, &format!("after{}", self.made), &["sh", "-c", "cat >/dev/null; sleep 100000 & wait"]).await?;
        let init = cri.init_of(&id).await?;
        for shared in ["net", "ipc", "uts"] {
            ensure!(namespace(init, shared)? == namespace(self.init, shared)?, "{shared} is not the pod's");
        }
        cri.stop(&id, 0).await?;
        ensure!(cri.ended(&id).await?.exit_code == 137);
        cri.remove(&id).await
    }
}

pub(crate) async fn pods_are_upgraded_downgraded_and_rolled_back(cx: Context) -> Result<()> {
    let first = build(&cx, "old", "build=old")?;
    let cri = Cri::start_with(&cx, &Setup { sandboxer: Sandboxer::Shim, shim: Some(&first), ..Setup::default() }).await?;
    let mut subjects = vec![
        Subject::new(&cri, &PodSpec::new("plain")).await?,
        Subject::new(&cri, &PodSpec::new("shared-pids").pid(Namespace::Pod)).await?,
    ];
    let steps = [("new", "build=new", true), ("broken", "build=broken at=fit do=crash", false), ("old", "build=old", true)];
    let mut name = "old";
    for (step, words, works) in [("old", "", true)].into_iter().chain(steps) {
        if !words.is_empty() {
            let program = build(&cx, step, words)?.binary.context("a build is a file")?;
            let pods: Vec<_> = subjects.iter().map(|subject| &subject.pod).collect();
            let upgraded = cri.upgrade(&program, &pods, &[]).await?;
            let wanted = if works { "upgraded" } else { "rolled-back" };
            ensure!(upgraded.report["summary"][wanted] == subjects.len(), "{upgraded:#?}");
        }
        if works {
            name = step;
        }
        for subject in &mut subjects {
            subject.holds(&cri, name).await.with_context(|| format!("{step}: {}", subject.pod.id))?;
        }
    }
    // a restarted containerd finds both, with the keeper that is there now; containerd issue 13360: it had lost the addresses
    cri.crash(async { Ok(()) }).await?;
    for subject in &mut subjects {
        eventually("the plugin is there again", SOON, async || cri.pod_status(&subject.pod).await).await?;
        subject.holds(&cri, name).await?;
        cri.stop(&subject.app, 10).await?;
        ensure!(cri.ended(&subject.app).await?.exit_code == 7);
        cri.end_pod(&subject.pod).await?;
    }
    cri.leaves_nothing().await
}

/// containerd asks for the status of each pod whenever the kubelet does.
pub(crate) async fn a_hibernating_worker_is_not_woken_by_the_status_of_its_pod(cx: Context) -> Result<()> {
    let setup = Setup { sandboxer: Sandboxer::Shim, environment: &[("X_SHIM_IDLE_SECONDS", "5")], ..Setup::default() };
    let cri = Cri::start_with(&cx, &setup).await?;
    let pod = cri.run_pod("pod").await?;
    let id = cri.run(&pod, "app", &["sleep", "100000"]).await?;
    let sleeps = async || {
        let shim = cri.ps(&pod).await?;
        ensure!(shim["worker_asleep"] == true && shim["worker"].is_null(), "{shim:#}");
        anyhow::Ok(shim["worker_generation"].clone())
    };
    let generation = eventually("the worker hibernates", SOON * 3, sleeps).await?;
    for _ in 0..3 {
        ensure!(cri.pod_status(&pod).await?.state == READY && cri.pods().await?[&pod.id] == READY);
    }
    ensure!(sleeps().await? == generation, "the worker was woken");
    cri.crash(async { Ok(()) }).await?;
    eventually("the plugin is there again", SOON, async || cri.pod_status(&pod).await).await?;
    ensure!(cri.pod_status(&pod).await?.state == READY);
    // it asks more when it starts
    eventually("the worker hibernates again", SOON * 3, sleeps).await?;
    ensure!(cri.exec(&id, &["sh", "-c", "exit 6"]).await?.0 == 6);
    eventually("the worker hibernates", SOON * 3, sleeps).await?;
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}
