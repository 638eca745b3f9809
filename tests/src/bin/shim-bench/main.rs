//! Measures shims side by side, interleaved in one run, through a real containerd. Needs root.
//!
//! ```text
//! shim-bench --shim ours=target/…/containerd-shim-x-v2 --shim go=stock [--containerd 1.6|1.7|2.1] [--runtime runc|crun]
//!            [--containers 100] [--rounds 30] [--execs 5000] [--skip memory,latency,load,stdout,execs] [--upgrade] [--rest] [--json]
//! ```
//! `stock` is the shim that comes with that containerd. A shim's runtime type follows from its file name.
//! For a shim with keepers, `--upgrade` upgrades all shims whose memory was measured, in one go, and `--rest` measures them again when all
//! their workers hibernate.

mod execs;
mod memory;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Map, Value, json};
use shim_tests::container::{Container, Stdio};
use shim_tests::context::Context;
use shim_tests::daemon::Daemon;
use shim_tests::runner::EXECUTOR;
use shim_tests::stdio::Pace;
use shim_tests::suite::{self, Runtime, Shim, Suite};
use shim_tests::{isolation, proc};
use tokio::task::{JoinSet, LocalSet};

const GIB: u64 = 1 << 30;

fn main() -> ExitCode {
    let result = arguments().and_then(|plan| {
        if std::env::var_os("X_TESTS_INNER").is_none() {
            suite::fetch()?;
        }
        isolation::run(|| match EXECUTOR.block_on(measure(&plan)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("shim-bench: {error:#}");
                ExitCode::FAILURE
            }
        })
    });
    result.unwrap_or_else(|error| {
        eprintln!("shim-bench: {error:#}");
        ExitCode::from(2)
    })
}

/// What to measure.
struct Plan {
    shims: Vec<(String, Shim)>,
    suite: Suite,
    runtime: Runtime,
    containers: usize,
    rounds: usize,
    execs: usize,
    skip: String,
    upgrade: bool,
    rest: bool,
    json: bool,
}

fn arguments() -> Result<Plan> {
    let mut plan = Plan {
        shims: Vec::new(),
        suite: Suite::Bookworm,
        runtime: Runtime::Runc,
        containers: 100,
        rounds: 30,
        execs: 5000,
        skip: String::new(),
        upgrade: false,
        rest: false,
        json: false,
    };
    let mut rest = std::env::args().skip(1);
    while let Some(flag) = rest.next() {
        let mut value = || rest.next().with_context(|| format!("{flag} needs a value"));
        match flag.as_str() {
            "--shim" => {
                let value = value()?;
                let (name, path) = value.split_once('=').context("--shim is NAME=PATH")?;
                plan.shims.push((name.to_owned(), shim(path)?));
            }
            "--containerd" => {
                let value = value()?;
                plan.suite = Suite::ALL.into_iter().find(|suite| suite.version() == value).context("1.6, 1.7 or 2.1")?;
            }
            "--runtime" => {
                let value = value()?;
                plan.runtime = Runtime::ALL.into_iter().find(|runtime| runtime.name() == value).context("runc or crun")?;
            }
            "--containers" => plan.containers = value()?.parse()?,
            "--rounds" => plan.rounds = value()?.parse()?,
            "--execs" => plan.execs = value()?.parse()?,
            "--skip" => plan.skip = value()?,
            "--upgrade" => plan.upgrade = true,
            "--rest" => plan.rest = true,
            "--json" => plan.json = true,
            other => bail!("unknown argument {other}; see the head of tests/src/bin/shim-bench.rs"),
        }
    }
    ensure!(!plan.shims.is_empty(), "name at least one --shim NAME=PATH");
    ensure!(plan.containers > 0 && plan.rounds > 0 && plan.execs > 0, "nothing to measure");
    Ok(plan)
}

fn shim(path: &str) -> Result<Shim> {
    if path == "stock" {
        return Ok(Shim::stock());
    }
    let binary = PathBuf::from(path).canonicalize().with_context(|| path.to_owned())?;
    let name = Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = name.strip_prefix("containerd-shim-").context("a shim is called containerd-shim-NAME-vN")?;
    let (name, version) = name.rsplit_once('-').context("a shim is called containerd-shim-NAME-vN")?;
    Ok(Shim { runtime_type: format!("io.containerd.{name}.{version}"), binary: Some(binary) })
}

/// One shim under measurement.
struct Subject {
    name: String,
    cx: Context,
    figures: Map<String, Value>,
}

impl Subject {
    fn note(&mut self, name: &str, value: f64) {
        self.figures.insert(name.to_owned(), json!(value));
    }
}

async fn measure(plan: &Plan) -> Result<()> {
    let programs = std::env::current_exe()?.parent().context("a file is in a folder")?.to_owned();
    let mut subjects = Vec::new();
    for (name, shim) in &plan.shims {
        let daemon = Arc::new(Daemon::start(plan.suite, shim).await?);
        let cx = Context::new(daemon, plan.runtime, shim.clone(), &programs).await?;
        subjects.push(Subject { name: name.clone(), cx, figures: Map::new() });
    }
    let wanted = |what: &str| !plan.skip.split(',').any(|skipped| skipped == what);
    if wanted("latency") {
        eprintln!("latency …");
        latency(&mut subjects, plan.rounds).await?;
    }
    if wanted("load") {
        eprintln!("eight clients …");
        load(&mut subjects).await?;
    }
    if wanted("stdout") {
        eprintln!("a GiB of stdout …");
        stdout(&mut subjects).await?;
    }
    if wanted("execs") {
        eprintln!("hundreds of execs …");
        execs::measure(&mut subjects, plan, &programs).await?;
    }
    if wanted("memory") {
        eprintln!("{} idle containers each …", plan.containers);
        memory::measure(&mut subjects, plan).await?;
    }
    if plan.json {
        let all: Map<_, _> = subjects.into_iter().map(|subject| (subject.name, Value::Object(subject.figures))).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        print_table(plan, &subjects);
    }
    Ok(())
}

fn print_table(plan: &Plan, subjects: &[Subject]) {
    println!("{}, {}, {} idle containers, median of {} rounds\n", plan.suite, plan.runtime, plan.containers, plan.rounds);
    println!("| | {} |", subjects.iter().map(|subject| subject.name.as_str()).collect::<Vec<_>>().join(" | "));
    println!("| --- |{}", " ---: |".repeat(subjects.len()));
    let mut names: Vec<&String> = Vec::new();
    for name in subjects.iter().flat_map(|subject| subject.figures.keys()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.sort();
    for name in names {
        let cell = |subject: &Subject| match subject.figures.get(name).and_then(Value::as_f64) {
            Some(value) if value >= 100.0 => format!("{value:.0}"),
            Some(value) if value >= 10.0 => format!("{value:.1}"),
            Some(value) => format!("{value:.2}"),
            None => String::new(),
        };
        println!("| {name} | {} |", subjects.iter().map(cell).collect::<Vec<_>>().join(" | "));
    }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}

async fn latency(subjects: &mut [Subject], rounds: usize) -> Result<()> {
    let mut runs = vec![Vec::new(); subjects.len()];
    let mut execs = vec![Vec::new(); subjects.len()];
    let mut hosts = Vec::new();
    for subject in subjects.iter() {
        run_true(&subject.cx).await?; // the first run is slower and not measured
        hosts.push(subject.cx.container(&["sleep", "100000"]).start().await?);
    }
    for round in 0..rounds {
        for (index, subject) in subjects.iter().enumerate() {
            runs[index].push(run_true(&subject.cx).await?.to_vec());
            execs[index].push(run_exec(&hosts[index], &format!("e{round}")).await?.to_vec());
        }
    }
    for host in &hosts {
        host.destroy().await?;
    }
    for ((subject, runs), execs) in subjects.iter_mut().zip(runs).zip(execs) {
        for (number, what, steps, runs) in [("1", "create to deleted", STEPS, runs), ("2", "exec, added to deleted", EXEC_STEPS, execs)] {
            subject.note(
                &format!("{number} /bin/true, {what}, ms"),
                median(runs.iter().map(|run: &Vec<Duration>| run.iter().sum()).collect()),
            );
            for (index, name) in steps.iter().enumerate() {
                subject.note(&format!("{number}.{} of it {name}, ms", index + 1), median(runs.iter().map(|run| run[index]).collect()));
            }
        }
    }
    Ok(())
}

/// The steps of a container's life that [`run_true`] times.
const STEPS: [&str; 4] = ["create", "start", "until its exit is published", "delete"];

/// The times of the steps from create to deleted; metadata is made before and removed after.
async fn run_true(cx: &Context) -> Result<[Duration; 4]> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let id = format!("true{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let container = cx.container(&["/bin/true"]).id(&id).metadata().await?;
    let begin = Instant::now();
    let container = container.create_task().await?;
    let created = begin.elapsed();
    container.start().await?;
    let started = begin.elapsed();
    ensure!(container.wait().await? == 0);
    let ended = begin.elapsed();
    container.delete().await?;
    let deleted = begin.elapsed();
    container.remove().await?;
    Ok([created, started - created, ended - started, deleted - ended])
}

/// The steps of an added process's life that [`run_exec`] times.
const EXEC_STEPS: [&str; 4] = ["add", "start", "until its exit is published", "delete"];

/// The times of the steps from added to deleted.
async fn run_exec(host: &Container, exec: &str) -> Result<[Duration; 4]> {
    let begin = Instant::now();
    let process = host.exec(exec, &["/bin/true"]).add().await?;
    let added = begin.elapsed();
    process.start().await?;
    let started = begin.elapsed();
    ensure!(process.wait().await? == 0);
    let ended = begin.elapsed();
    process.delete().await?;
    let deleted = begin.elapsed();
    Ok([added, started - added, ended - started, deleted - ended])
}

async fn load(subjects: &mut [Subject]) -> Result<()> {
    let each = 10;
    let mut rates = vec![Vec::new(); subjects.len()];
    for _round in 0..3 {
        for (index, subject) in subjects.iter().enumerate() {
            let begin = Instant::now();
            let clients = async {
                let mut clients = JoinSet::new();
                for _client in 0..8 {
                    let cx = subject.cx.clone();
                    clients.spawn_local(async move {
                        for _container in 0..each {
                            run_true(&cx).await?;
                        }
                        anyhow::Ok(())
                    });
                }
                while let Some(done) = clients.join_next().await {
                    done??;
                }
                anyhow::Ok(())
            };
            LocalSet::new().run_until(clients).await?;
            rates[index].push(f64::from(8 * each) / begin.elapsed().as_secs_f64());
        }
    }
    for (subject, mut rates) in subjects.iter_mut().zip(rates) {
        rates.sort_by(f64::total_cmp);
        subject.note("3 eight clients at once, containers/s", rates[rates.len() / 2]);
    }
    Ok(())
}

async fn stdout(subjects: &mut [Subject]) -> Result<()> {
    let mut speeds = vec![Vec::new(); subjects.len()];
    let mut costs = vec![Vec::new(); subjects.len()];
    for _round in 0..3 {
        for (index, subject) in subjects.iter().enumerate() {
            let stdio = Stdio::Fifos { stdin: false, pace: Some(Pace::Count) };
            let script = format!("dd if=/dev/zero bs=64k count={} 2>/dev/null", GIB / (64 << 10));
            let container = subject.cx.container(&["sh", "-c", &script]).stdio(stdio).create().await?;
            let shim = subject.cx.shim_pid(&container.id)?;
            let before = processor_time(shim)?;
            let begin = Instant::now();
            container.start().await?;
            shim_tests::eventually::eventually_true("a GiB", Duration::from_secs(60), || container.io.out().count() == GIB).await?;
            speeds[index].push(1024.0 / begin.elapsed().as_secs_f64());
            costs[index].push(processor_time(shim)? - before);
            ensure!(container.finish().await? == 0);
        }
    }
    for ((subject, mut speeds), mut costs) in subjects.iter_mut().zip(speeds).zip(costs) {
        speeds.sort_by(f64::total_cmp);
        costs.sort_by(f64::total_cmp);
        subject.note("4 1 GiB of stdout through a fifo, MiB/s", speeds[speeds.len() / 2]);
        subject.note("5 1 GiB of stdout, processor time of the shim, s", costs[costs.len() / 2]);
    }
    Ok(())
}

/// Processor seconds of a shim and the processes that belong to it: not those of containers.
fn processor_time(shim: i32) -> Result<f64> {
    let mut ticks = 0;
    for pid in own_processes(shim) {
        let stat = proc::stat(pid)?;
        ticks += stat.field(14).parse::<u64>()? + stat.field(15).parse::<u64>()?;
    }
    Ok(ticks as f64 / 100.0)
}

/// The shim's process, and its worker if it has one.
fn own_processes(shim: i32) -> Vec<i32> {
    let is_worker = |child: &proc::Process| child.command.split(' ').any(|word| word == "worker");
    let workers = proc::children(shim).into_iter().filter(is_worker).map(|child| child.pid);
    std::iter::once(shim).chain(workers).collect()
}
