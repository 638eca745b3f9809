//! Pods through containerd's CRI plugin: how long each step takes, what it costs, and what idle pods hold.
//!
//! ```text
//!  network plugin that makes nothing:  the steps of an empty pod, and of one with a container; costs; idle pods
//!  Debian's bridge plugin:             RunPodSandbox as a cluster has it
//! ```

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use shim_tests::cri::{Cri, Namespace, Plugin, Pod, PodSpec, Sandboxer, Setup};
use shim_tests::eventually::eventually;
use shim_tests::{isolation, proc};
use tokio::task::{JoinSet, LocalSet};

use super::cost::Meter;
use super::latency::milliseconds;
use super::memory::{Footprint, HIBERNATES_WITHIN, accounted, make_cgroups};
use super::{Plan, Subject};

/// Pods that are made or removed at the same time.
const CLIENTS: usize = 8;
/// How long collectors and timers of shims have after the last request, and keepers after their workers have gone.
const SETTLES: Duration = Duration::from_secs(5);

/// The daemon of one shim.
struct Bench {
    cri: Cri,
    /// The folder below which its pods' cgroups are, in every hierarchy.
    cgroup: String,
    shims_cgroup: String,
    next: usize,
}

impl Bench {
    async fn new(subject: &Subject, plugin: Plugin) -> Result<Self> {
        let namespace = subject.bed.cx.client().namespace().to_owned();
        let cgroup = format!("{}/{namespace}", isolation::cgroup());
        let shims_cgroup = format!("/{}/pods-{namespace}", isolation::cgroup());
        let setup = Setup { sandboxer: subject.sandboxer, plugin, shim_cgroup: Some(&shims_cgroup), ..Setup::default() };
        make_cgroups(&shims_cgroup)?;
        let cri = Cri::start_with(&subject.bed.cx, &setup).await?;
        Ok(Self { cri, cgroup, shims_cgroup, next: 0 })
    }

    fn spec(&mut self) -> PodSpec {
        self.next += 1;
        PodSpec::new(&format!("pod{}", self.next)).network(Namespace::Pod)
    }

    /// Runs a pod: how long that took, and the pod.
    async fn run(&mut self) -> Result<(f64, Pod)> {
        let spec = self.spec();
        let begin = Instant::now();
        let pod = self.cri.run_pod_of(&spec).await?;
        Ok((milliseconds(begin.elapsed()), pod))
    }

    /// Stops and removes a pod: how long each took.
    async fn end(&self, pod: &Pod) -> Result<[f64; 2]> {
        let begin = Instant::now();
        self.cri.stop_pod(pod).await?;
        let stopped = begin.elapsed();
        self.cri.remove_pod(pod).await?;
        Ok([milliseconds(stopped), milliseconds(begin.elapsed() - stopped)])
    }

    /// Waits until no shim of a removed pod is left.
    async fn settled(&self) -> Result<()> {
        eventually("the shims of removed pods have exited", Duration::from_secs(20), async || {
            let left = self.cri.shims();
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        })
        .await
    }
}

pub(super) async fn measure(subjects: &mut [Subject], plan: &Plan) -> Result<()> {
    let mut benches = Vec::new();
    for subject in subjects.iter() {
        benches.push([Bench::new(subject, Plugin::Nothing).await?, Bench::new(subject, Plugin::Bridge).await?]);
    }
    let mut all = vec![Samples::default(); subjects.len()];
    // the first is slower and not measured
    for round in 0..=plan.rounds {
        for (bench, samples) in benches.iter_mut().zip(&mut all) {
            let taken = one_round(bench).await?;
            if round > 0 {
                samples.push(taken);
            }
        }
    }
    for (subject, samples) in subjects.iter_mut().zip(all) {
        samples.note(subject);
    }
    for (subject, [bench, _]) in subjects.iter_mut().zip(&mut benches) {
        costs(subject, bench, plan.rounds).await?;
        LocalSet::new().run_until(idle(subject, bench, plan)).await?;
    }
    Ok(())
}

/// The times of one round, in milliseconds.
struct Round {
    run: f64,
    first_container: f64,
    stop: f64,
    remove: f64,
    stop_empty: f64,
    remove_empty: f64,
    run_with_network: f64,
}

async fn one_round([bench, bridged]: &mut [Bench; 2]) -> Result<Round> {
    let (run, pod) = bench.run().await?;
    let begin = Instant::now();
    bench.cri.run(&pod, "app", &["sleep", "100000"]).await?;
    let first_container = milliseconds(begin.elapsed());
    let [stop, remove] = bench.end(&pod).await?;
    let (_like_the_first, pod) = bench.run().await?;
    let [stop_empty, remove_empty] = bench.end(&pod).await?;
    let (run_with_network, pod) = bridged.run().await?;
    bridged.end(&pod).await?;
    Ok(Round { run, first_container, stop, remove, stop_empty, remove_empty, run_with_network })
}

#[derive(Clone, Default)]
struct Samples(Vec<(&'static str, Vec<f64>)>);

impl Samples {
    fn push(&mut self, round: Round) {
        let Round { run, first_container, stop, remove, stop_empty, remove_empty, run_with_network } = round;
        let rows = [
            ("RunPodSandbox, ms", run),
            ("… with the bridge plugin, ms", run_with_network),
            ("CreateContainer and StartContainer of the first, ms", first_container),
            ("RunPodSandbox until the first container runs, ms", run + first_container),
            ("StopPodSandbox without a container, ms", stop_empty),
            ("RemovePodSandbox without a container, ms", remove_empty),
            ("StopPodSandbox and RemovePodSandbox with a container, ms", stop + remove),
        ];
        for (name, value) in rows {
            match self.0.iter_mut().find(|(its, _)| *its == name) {
                Some((_, values)) => values.push(value),
                None => self.0.push((name, vec![value])),
            }
        }
    }

    fn note(self, subject: &mut Subject) {
        for (name, values) in self.0 {
            subject.note_all(name, values);
        }
    }
}

/// Processor time of a pod without containers, from RunPodSandbox to the exit of its shim.
async fn costs(subject: &mut Subject, bench: &mut Bench, rounds: usize) -> Result<()> {
    let pid = bench.cri.daemon().pid().context("the daemon runs")?;
    let meter = Meter::of(&format!("daemon-{}", bench.next), &bench.cgroup, pid)?;
    let (mut others, mut daemons) = (Vec::new(), Vec::new());
    for _round in 0..rounds {
        bench.settled().await?;
        let (before, own_before) = (meter.read()?, meter.daemon()?);
        let (_time, pod) = bench.run().await?;
        bench.end(&pod).await?;
        bench.settled().await?;
        others.push(meter.read()? - before);
        daemons.push(meter.daemon()? - own_before);
    }
    subject.note_all("processor time of a pod's life without containerd's, ms", others);
    subject.note_all("processor time of containerd for it, ms", daemons);
    Ok(())
}

/// What pods without containers hold.
async fn idle(subject: &mut Subject, bench: &mut Bench, plan: &Plan) -> Result<()> {
    let count = plan.containers;
    let folders = [make_cgroups(&bench.shims_cgroup)?, make_cgroups(&bench.cgroup)?].concat();
    let before = accounted(&folders);
    let specs: Vec<_> = (0..count).map(|_| bench.spec()).collect();
    let pods = at_once(bench, &specs).await?;
    tokio::time::sleep(SETTLES).await; // collectors and idle timers do their work
    note(subject, bench, "", count, &folders, before)?;
    let has_keepers = bench.cri.shims().iter().any(|shim| !workers_of(shim.pid).is_empty());
    if plan.rest && has_keepers {
        eprintln!("{}: waiting until all workers hibernate …", subject.name);
        eventually("all workers hibernate", HIBERNATES_WITHIN, async || {
            let left: usize = bench.cri.shims().iter().map(|shim| workers_of(shim.pid).len()).sum();
            ensure!(left == 0, "{left} workers still run");
            Ok(())
        })
        .await?;
        // the last of them tidy up
        tokio::time::sleep(SETTLES).await;
        note(subject, bench, "asleep, ", count, &folders, before)?;
    }
    for pod in &pods {
        bench.end(pod).await?;
    }
    bench.settled().await
}

async fn at_once(bench: &Bench, specs: &[PodSpec]) -> Result<Vec<Pod>> {
    let mut pods = Vec::new();
    for some in specs.chunks(CLIENTS) {
        let mut runs = JoinSet::new();
        for spec in some {
            let (cri, spec) = (bench.cri.clone(), spec.clone());
            runs.spawn_local(async move { cri.run_pod_of(&spec).await });
        }
        while let Some(pod) = runs.join_next().await {
            pods.push(pod??);
        }
    }
    Ok(pods)
}

fn note(subject: &mut Subject, bench: &Bench, prefix: &str, count: usize, folders: &[PathBuf], before: u64) -> Result<()> {
    let shims = bench.cri.shims();
    ensure!(shims.len() == count, "{} shims of {count} pods", shims.len());
    let pids: Vec<i32> = shims.iter().flat_map(|shim| std::iter::once(shim.pid).chain(descendants(shim.pid))).collect();
    let footprint = Footprint::of(&pids)?;
    let each = |sum: u64| sum as f64 / count as f64;
    subject.note(&format!("{prefix}processes per pod"), each(pids.len() as u64));
    for (what, sum) in footprint.sizes() {
        subject.note(&format!("{prefix}{what}, KiB per pod"), each(sum));
    }
    subject.note(&format!("{prefix}threads per pod"), each(footprint.threads()));
    let grown = accounted(folders).saturating_sub(before) as f64 / 1024.0;
    subject.note(&format!("{prefix}charged to cgroups of pods and shims without page cache, KiB per pod"), grown / count as f64);
    Ok(())
}

fn descendants(pid: i32) -> Vec<i32> {
    proc::children(pid).into_iter().flat_map(|child| std::iter::once(child.pid).chain(descendants(child.pid))).collect()
}

fn workers_of(shim: i32) -> Vec<i32> {
    let is_worker = |child: &proc::Process| child.command.split(' ').any(|word| word == "worker");
    proc::children(shim).into_iter().filter(is_worker).map(|child| child.pid).collect()
}

/// Whether a column's pods have a pause container, as its name on the command line ends.
pub(super) fn sandboxer(word: &str) -> (Sandboxer, &str) {
    match word.strip_suffix("+keeper") {
        Some(rest) => (Sandboxer::Shim, rest),
        None => (Sandboxer::Pause, word),
    }
}
