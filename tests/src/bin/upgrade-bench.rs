//! Measures how long a client waits while a shim is upgraded under it. Needs root.
//!
//! ```text
//! upgrade-bench [--rounds 1000] [--shims 0] [--rest 0] [--json]
//! ```
//! `X_SHIM` names the shim. In each round a client makes calls without a pause, which only a worker can answer, while the shim is upgraded to a copy
//! of its program; the longest call is the round's pause. One half of the rounds replaces the worker, the other the keeper too; as many
//! again ask the shim for nothing but `ps`, which shows how long a call takes on this machine anyway.
//! `--shims` upgrades that many containers' shims in one go instead. `--rest` measures the gain and the cost of hibernating workers, with so
//! many shims; `X_SHIM_IDLE_SECONDS` is best set to 5.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use shim_tests::bundle::Container;
use shim_tests::eventually::eventually;
use shim_tests::stand::Stand;
use shim_tests::suite::Shim;
use shim_tests::ttrpc::Code;
use shim_tests::{programs, runner};

fn main() -> ExitCode {
    runner::benchmark("upgrade-bench", Plan::read(), measure)
}

struct Plan {
    rounds: usize,
    shims: usize,
    rest: usize,
    json: bool,
}

impl Plan {
    fn read() -> Result<Self> {
        let mut plan = Self { rounds: 1000, shims: 0, rest: 0, json: false };
        let mut rest = std::env::args().skip(1);
        while let Some(flag) = rest.next() {
            let mut value = || rest.next().with_context(|| format!("{flag} needs a value"))?.parse().with_context(|| flag.clone());
            match flag.as_str() {
                "--rounds" => plan.rounds = value()?,
                "--shims" => plan.shims = value()?,
                "--rest" => plan.rest = value()?,
                "--json" => plan.json = true,
                _ => bail!("unknown flag {flag}"),
            }
        }
        Ok(plan)
    }
}

async fn measure(plan: &Plan) -> Result<()> {
    let shim = Shim::under_test()?;
    let own = std::env::current_exe()?;
    let stand = Stand::new(&shim, own.parent().context("a file is in a folder")?)?;
    let copies = [copy(&stand, "first")?, copy(&stand, "second")?];
    let result = match plan {
        Plan { rest: 1.., .. } => rest(&stand, plan.rest).await?,
        Plan { shims: 1.., .. } => many(&stand, &copies[0], plan.shims).await?,
        _ => rounds(&stand, &copies, plan.rounds).await?,
    };
    if plan.json {
        println!("{result:#}")
    } else {
        print(&result)
    }
    stand.leaves_nothing().await
}

/// Another file with the same content is another program.
fn copy(stand: &Stand, name: &str) -> Result<PathBuf> {
    let path = stand.folder().join(name);
    programs::copy(stand.binary(), &path)?;
    Ok(path)
}

async fn rounds(stand: &Stand, copies: &[PathBuf; 2], rounds: usize) -> Result<Value> {
    let container = stand.instant("c1", &["sleep", "100000"]).run().await?;
    let mut result = json!({});
    let mut idle = Vec::new();
    for _ in 0..rounds / 2 {
        idle.push(beside_calls(&container, ps(stand)).await?.0);
    }
    result["nothing"] = json!({ "rounds": idle.len(), "seen by a client": figures(idle)? });
    for (kind, words) in [("worker", &["--worker-only"][..]), ("worker and keeper", &[])] {
        let mut pauses = Vec::new();
        let mut reported = Vec::new();
        for round in 0..rounds / 2 {
            let (pause, report) = beside_calls(&container, upgrade(stand, &copies[round % 2], words)).await?;
            pauses.push(pause);
            reported.push(Duration::from_secs_f64(report["summary"]["longest_pause_ms"].as_f64().context("no pause")? / 1e3));
        }
        result[kind] =
            json!({ "rounds": pauses.len(), "seen by a client": figures(pauses)?, "reported by the keeper": figures(reported)? });
    }
    container.shut_down().await?;
    Ok(result)
}

/// Has a client call while `doing` runs. Returns the longest call, and the result.
async fn beside_calls(container: &Container, something: impl Future<Output = Result<Value>>) -> Result<(Duration, Value)> {
    let stop = Arc::new(AtomicBool::new(false));
    let calls = tokio::spawn(call_until(container.task.clone(), Arc::clone(&stop)));
    let report = something.await;
    stop.store(true, Ordering::Relaxed);
    Ok((calls.await??, report?))
}

async fn call_until(task: shim_tests::task::Task, stop: Arc<AtomicBool>) -> Result<Duration> {
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        let begin = Instant::now();
        let answer = task.state("c1", "missing").await;
        longest = longest.max(begin.elapsed());
        ensure!(answer.is_err_and(|error| error.code() == Some(Code::NotFound)), "a process exists that was never created");
    }
    Ok(longest)
}

async fn ps(stand: &Stand) -> Result<Value> {
    let mut command = tokio::process::Command::new(stand.binary());
    let output = command.args(["ps", "--json", "--namespace", stand.namespace()]).kill_on_drop(true).output().await?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

async fn upgrade(stand: &Stand, program: &Path, words: &[&str]) -> Result<Value> {
    let mut command = tokio::process::Command::new(program);
    command.args(["upgrade", "--all", "--json", "--namespace", stand.namespace()]).args(words).kill_on_drop(true);
    let output = command.output().await?;
    let report: Value = serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    ensure!(output.status.success(), "{report:#}");
    Ok(report)
}

/// Many shims in one go.
async fn many(stand: &Stand, program: &Path, count: usize) -> Result<Value> {
    let mut containers = Vec::new();
    for number in 0..count {
        containers.push(stand.instant(&format!("c{number}"), &["sleep", "100000"]).run().await?);
    }
    let begin = Instant::now();
    let report = upgrade(stand, program, &[]).await?;
    let took = begin.elapsed();
    let mut pauses = Vec::new();
    for shim in report["shims"].as_array().context("no shims")? {
        pauses.push(Duration::from_secs_f64(shim["report"]["pause_ms"].as_f64().context("no pause")? / 1e3));
    }
    ensure!(report["summary"]["upgraded"] == count, "{}", report["summary"]);
    for container in &containers {
        ensure!(container.task.state(&container.id, "").await?.pid == container.pid);
        container.shut_down().await?;
    }
    Ok(json!({ "all": { "shims": count, "took_ms": took.as_secs_f64() * 1e3, "reported by the keeper": figures(pauses)? } }))
}

/// Memory of shims with and without a worker, and how long the first call takes that needs one.
async fn rest(stand: &Stand, count: usize) -> Result<Value> {
    let mut containers = Vec::new();
    for number in 0..count {
        containers.push(stand.instant(&format!("c{number}"), &["sleep", "100000"]).run().await?);
    }
    let (mut awake, mut asleep, mut warm, mut cold) = (0.0, 0.0, Vec::new(), Vec::new());
    for _ in 0..4 {
        for container in &containers {
            cold.push(call(container).await?);
            warm.push(call(container).await?);
        }
        awake = memory_kib(&ps(stand).await?)?;
        eventually("all workers hibernate", Duration::from_secs(60), async || {
            let report = ps(stand).await?;
            let left = report["shims"].as_array().context("no shims")?.iter().filter(|shim| shim["worker_asleep"] != true).count();
            asleep = memory_kib(&report)?;
            ensure!(left == 0, "{left} workers still run");
            Ok(())
        })
        .await?;
    }
    // before the first round no worker had hibernated
    cold.drain(..count);
    for container in &containers {
        container.shut_down().await?;
    }
    let share = |kib: f64| kib / count as f64;
    Ok(json!({ "rest": {
        "shims": count, "KiB of PSS a shim, awake": share(awake), "KiB of PSS a shim, asleep": share(asleep),
        "a call": figures(warm)?, "a call that wakes": figures(cold)?,
    } }))
}

async fn call(container: &Container) -> Result<Duration> {
    let begin = Instant::now();
    let answer = container.task.state(&container.id, "missing").await;
    ensure!(answer.is_err_and(|error| error.code() == Some(Code::NotFound)), "a process exists that was never created");
    Ok(begin.elapsed())
}

fn memory_kib(report: &Value) -> Result<f64> {
    let shims = report["shims"].as_array().context("no shims")?;
    Ok(shims.iter().flat_map(|shim| [&shim["keeper"], &shim["worker"]]).filter_map(|process| process["pss_kib"].as_f64()).sum())
}

fn figures(mut times: Vec<Duration>) -> Result<Value> {
    times.sort();
    ensure!(!times.is_empty(), "nothing was measured");
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e3;
    Ok(json!({ "median_ms": at(0.5), "p99_ms": at(0.99), "worst_ms": at(1.0) }))
}

fn print(result: &Value) {
    for (kind, figures) in result.as_object().into_iter().flatten() {
        for (whose, times) in figures.as_object().into_iter().flatten() {
            match times.as_object() {
                Some(times) => {
                    let times: Vec<_> = times.iter().map(|(name, time)| format!("{name} {:.2}", time.as_f64().unwrap_or(0.0))).collect();
                    println!("{kind}, {whose}: {}", times.join(", "));
                }
                None => println!("{kind}, {whose}: {times}"),
            }
        }
    }
}
