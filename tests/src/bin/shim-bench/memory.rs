//! Memory of the shims of idle containers; for shims with keepers also the time of an upgrade, and the memory while their workers hibernate.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio as Standard;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use shim_tests::container::{Container, Stdio};
use shim_tests::eventually::{eventually, within};
use shim_tests::messages::{Options, any};
use shim_tests::{isolation, proc, programs};
use tokio::task::{JoinSet, LocalSet};

use super::{Plan, Subject};

/// Containers that are created or deleted concurrently.
const CLIENTS: usize = 8;
/// The time limit per container, from creation to deletion: enough for the slowest shim on a busy machine.
const WITHIN_EACH: Duration = Duration::from_secs(1);
/// The time limit for everything else.
const WITHIN: Duration = Duration::from_secs(300);
/// How long the context switches of keepers alone are counted.
const WATCHED: Duration = Duration::from_secs(20);
/// A worker hibernates after a minute.
pub(super) const HIBERNATES_WITHIN: Duration = Duration::from_secs(150);

/// One shim after the other, so that none shares the machine with the containers of another.
pub(super) async fn measure(subjects: &mut [Subject], plan: &Plan) -> Result<()> {
    for subject in subjects {
        let limit = WITHIN + WITHIN_EACH * u32::try_from(plan.containers)?;
        let name = subject.name.clone();
        within(&format!("memory of {name}"), limit, LocalSet::new().run_until(one(subject, plan))).await?.context(name)?;
    }
    Ok(())
}

async fn one(subject: &mut Subject, plan: &Plan) -> Result<()> {
    let cgroup = format!("/{}/shims-{}", isolation::cgroup(), subject.bed.cx.client().namespace());
    let folders = make_cgroups(&cgroup)?;
    let before = accounted(&folders);
    let containers = start(subject, plan.containers, &cgroup).await?;
    // collectors and idle timers do their work in the first seconds after the last request
    tokio::time::sleep(Duration::from_secs(5)).await;
    let processes = Processes::find(subject, plan.containers)?;
    let has_keepers = !processes.workers.is_empty();
    note(subject, "", &processes)?;
    let grown = accounted(&folders).saturating_sub(before) as f64 / 1024.0;
    subject.note("charged to the shims' cgroup without page cache, KiB per container", grown / plan.containers as f64);
    subject.note("charged to the shims' cgroup without page cache, MiB in all", grown / 1024.0);
    if plan.rest && has_keepers {
        rest(subject, plan.containers).await?;
    }
    if plan.upgrade && has_keepers {
        upgrade(subject, &containers).await?;
        note(subject, "after the upgrade, ", &Processes::find(subject, plan.containers)?)?;
    }
    end(subject, containers).await
}

async fn start(subject: &Subject, count: usize, cgroup: &str) -> Result<Vec<Container>> {
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let (bed, cgroup, name) = (subject.bed.clone(), cgroup.to_owned(), subject.name.clone());
        clients.spawn_local(async move {
            let mut started = Vec::new();
            for number in (client..count).step_by(CLIENTS) {
                let binary_name = bed.cx.runtime_binary().display().to_string();
                let options = Options { binary_name, shim_cgroup: cgroup.clone(), ..Options::default() };
                let container = bed.container(&["sleep", "100000"]).stdio(Stdio::None).options(Some(any(&options)));
                started.push(container.start().await.with_context(|| format!("container {number}"))?);
                if number % 100 == 99 {
                    eprintln!("{name}: {} of {count} containers run", number + 1);
                }
            }
            anyhow::Ok(started)
        });
    }
    let mut started = Vec::new();
    while let Some(done) = clients.join_next().await {
        started.extend(done??);
    }
    Ok(started)
}

async fn end(subject: &Subject, mut containers: Vec<Container>) -> Result<()> {
    eprintln!("{}: deleting {} containers", subject.name, containers.len());
    let mut clients = JoinSet::new();
    while !containers.is_empty() {
        let part = containers.split_off(containers.len().saturating_sub(containers.len().div_ceil(CLIENTS).max(1)));
        clients.spawn_local(async move {
            for container in part {
                let status = container.destroy().await?;
                ensure!(status == 137, "{} ended with {status}", container.id);
                container.remove().await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = clients.join_next().await {
        done??;
    }
    Ok(())
}

/// The processes that shims consist of.
struct Processes {
    /// Keepers, or whole shims.
    keepers: Vec<i32>,
    workers: Vec<i32>,
    containers: usize,
}

impl Processes {
    fn find(subject: &Subject, containers: usize) -> Result<Self> {
        let keepers: Vec<i32> = subject.bed.cx.shims().iter().map(|shim| shim.pid).collect();
        ensure!(keepers.len() == containers, "{} shims for {containers} containers", keepers.len());
        let is_worker = |process: &proc::Process| {
            keepers.binary_search(&process.parent).is_ok() && process.command.split(' ').any(|word| word == "worker")
        };
        let workers = proc::all().into_values().filter(is_worker).map(|process| process.pid).collect();
        Ok(Self { keepers, workers, containers })
    }
}

/// Notes figures per container, and of all of them.
fn note(subject: &mut Subject, prefix: &str, processes: &Processes) -> Result<()> {
    let keepers = Footprint::of(&processes.keepers)?;
    let workers = Footprint::of(&processes.workers)?;
    let all = keepers.and(&workers);
    let mut kinds = vec![("shim", &all)];
    if !processes.workers.is_empty() {
        kinds.extend([("keeper", &keepers), ("worker", &workers)]);
    }
    for (whose, footprint) in kinds {
        for (what, sum) in footprint.sizes() {
            subject.note(&format!("{prefix}{whose}: {what}, KiB per container"), sum as f64 / processes.containers as f64);
        }
        subject.note(&format!("{prefix}{whose}: threads per container"), footprint.threads as f64 / processes.containers as f64);
    }
    for (what, sum) in all.sizes() {
        subject.note(&format!("{prefix}shim: {what}, MiB in all"), sum as f64 / 1024.0);
    }
    Ok(())
}

/// Waits until all workers hibernate: only keepers are left, and nothing wakes them.
async fn rest(subject: &mut Subject, containers: usize) -> Result<()> {
    eprintln!("{}: waiting until all workers hibernate …", subject.name);
    let processes = eventually("all workers hibernate", HIBERNATES_WITHIN, async || {
        let processes = Processes::find(subject, containers)?;
        ensure!(processes.workers.is_empty(), "{} workers still run", processes.workers.len());
        Ok(processes)
    })
    .await?;
    let switches = |pids: &[i32]| pids.iter().map(|pid| context_switches(*pid)).sum::<Result<u64>>();
    // the last of them tidy up
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = switches(&processes.keepers)?;
    tokio::time::sleep(WATCHED).await;
    let after = switches(&processes.keepers)?;
    note(subject, "asleep, ", &processes)?;
    let what = format!("asleep, context switches of all keepers in {} s", WATCHED.as_secs());
    subject.note(&what, (after - before) as f64);
    Ok(())
}

fn context_switches(pid: i32) -> Result<u64> {
    let count = |name| anyhow::Ok(proc::status_field(pid, name)?.parse::<u64>()?);
    Ok(count("voluntary_ctxt_switches")? + count("nonvoluntary_ctxt_switches")?)
}

/// Upgrades all shims to a copy of their executable.
async fn upgrade(subject: &mut Subject, containers: &[Container]) -> Result<()> {
    let shim = subject.bed.cx.shim().binary.clone().context("a shim with keepers is a file")?;
    let program = subject.bed.cx.folder().join("copy");
    // another file with the same content is another program
    programs::copy(&shim, &program)?;
    eprintln!("{}: upgrading {} shims …", subject.name, containers.len());
    let mut command = tokio::process::Command::new(&program);
    command.args(["upgrade", "--all", "--json", "--namespace", subject.bed.cx.client().namespace()]);
    let begin = Instant::now();
    let output = command.stdin(Standard::null()).kill_on_drop(true).output().await?;
    let took = begin.elapsed();
    let report: Value = serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let mut pauses = Vec::new();
    for shim in report["shims"].as_array().context("no shims")? {
        pauses.push(shim["report"]["pause_ms"].as_f64().with_context(|| format!("{shim:#}"))?);
    }
    eprintln!("{}: {}", subject.name, report["summary"]);
    ensure!(output.status.success() && report["summary"]["upgraded"] == containers.len(), "{}", report["summary"]);
    for container in containers {
        let state = container.state().await?;
        ensure!(state.pid == container.pid, "{} has pid {}, not {}", container.id, state.pid, container.pid);
    }
    pauses.sort_by(f64::total_cmp);
    let at = |part: f64| pauses[((pauses.len() - 1) as f64 * part) as usize];
    subject.note("one upgrade of all, s", took.as_secs_f64());
    for (what, part) in [("median", 0.5), ("99 %", 0.99), ("longest", 1.0)] {
        subject.note(&format!("time for which no worker answered, {what}, ms"), at(part));
    }
    Ok(())
}

/// Sums over processes of one kind.
#[derive(Debug, Default)]
pub(super) struct Footprint {
    pss: u64,
    anonymous: u64,
    tables: u64,
    threads: u64,
}

impl Footprint {
    pub(super) fn of(pids: &[i32]) -> Result<Self> {
        let mut sum = Self::default();
        for pid in pids {
            let path = format!("/proc/{pid}/smaps_rollup");
            let text = fs::read_to_string(&path).with_context(|| path)?;
            let lines: BTreeMap<&str, &str> = text.lines().filter_map(|line| line.split_once(':')).collect();
            let field = |name| lines.get(name).and_then(|value| value.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0);
            sum.pss += field("Pss");
            sum.anonymous += field("Anonymous");
            sum.tables += proc::status_field(*pid, "VmPTE")?.trim_end_matches(" kB").trim().parse::<u64>()?;
            sum.threads += proc::status_field(*pid, "Threads")?.parse::<u64>()?;
        }
        Ok(sum)
    }

    fn and(&self, other: &Self) -> Self {
        Self {
            pss: self.pss + other.pss,
            anonymous: self.anonymous + other.anonymous,
            tables: self.tables + other.tables,
            threads: self.threads + other.threads,
        }
    }

    pub(super) fn threads(&self) -> u64 {
        self.threads
    }

    /// In KiB.
    pub(super) fn sizes(&self) -> [(&'static str, u64); 3] {
        [("PSS", self.pss), ("anonymous", self.anonymous), ("page tables", self.tables)]
    }
}

/// Makes a cgroup of that path in every v1 hierarchy, ready to be joined, and returns the folders of the memory controller.
pub(super) fn make_cgroups(path: &str) -> Result<Vec<PathBuf>> {
    let mut memory = Vec::new();
    for entry in fs::read_dir("/sys/fs/cgroup")?.flatten().filter(|entry| entry.path().join("cgroup.procs").exists()) {
        let mut folder = entry.path();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            let parent = folder.clone();
            folder.push(part);
            match fs::create_dir(&folder) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error.into()),
                _ => {}
            }
            // nothing can join a cpuset without processors and memory nodes
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(value) = fs::read_to_string(parent.join(file)) {
                    fs::write(folder.join(file), value.trim())?;
                }
            }
        }
        if folder.join("memory.usage_in_bytes").exists() {
            memory.push(folder);
        }
    }
    Ok(memory)
}

/// Bytes accounted to those cgroups, without page cache.
pub(super) fn accounted(folders: &[PathBuf]) -> u64 {
    folders.iter().map(|folder| usage_without_cache(folder).unwrap_or(0)).sum()
}

fn usage_without_cache(folder: &Path) -> Result<u64> {
    let usage: u64 = fs::read_to_string(folder.join("memory.usage_in_bytes"))?.trim().parse()?;
    let stat = fs::read_to_string(folder.join("memory.stat"))?;
    let cache = stat.lines().find_map(|line| line.strip_prefix("total_cache ")).and_then(|value| value.parse::<u64>().ok());
    Ok(usage.saturating_sub(cache.unwrap_or(0)))
}
