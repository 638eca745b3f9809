//! Measures x-manager beside containerd 2.1, one after the other in one run, with the same shim. Needs root.
//!
//! ```text
//! X_SHIM=… X_DAEMON=… manager-bench [--containers 100] [--rounds 30]
//! ```
//! It starts itself once for each daemon, as a run has namespaces and a daemon of its own.

use std::cell::{Cell, RefCell};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_client::types::v1::Status as Phase;
use prost_types::Any;
use serde_json::{Value, json};
use shim_tests::client::Client;
use shim_tests::context::Context;
use shim_tests::daemon::Daemon;
use shim_tests::eventually::eventually;
use shim_tests::suite::{self, Runtime, Shim, Suite};
use shim_tests::{beside, proc};
use tokio::task::JoinSet;

fn main() -> ExitCode {
    beside::end(PROGRAM, run())
}

const PROGRAM: &str = "manager-bench";

/// What to measure.
#[derive(Clone, Copy)]
struct Plan {
    containers: usize,
    rounds: usize,
}

fn run() -> Result<ExitCode> {
    let mut plan = Plan { containers: 100, rounds: 30 };
    let mut one = false;
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|value| value.parse().ok()).with_context(|| format!("{word} needs a number"));
        match word.as_str() {
            "--containers" => plan.containers = number()?,
            "--rounds" => plan.rounds = number()?,
            "--one" => one = true,
            _ => anyhow::bail!("unknown argument {word}"),
        }
    }
    if one {
        return beside::run(PROGRAM, measure(plan));
    }
    suite::fetch()?;
    suite::use_manager()?;
    let (theirs, ours) = (figures(plan, None)?, figures(plan, suite::manager())?);
    table(plan, &theirs, &ours);
    Ok(ExitCode::SUCCESS)
}

/// The figures of one daemon.
fn figures(plan: Plan, manager: Option<&Path>) -> Result<Value> {
    beside::figures(&["--one", "--containers", &plan.containers.to_string(), "--rounds", &plan.rounds.to_string()], manager)
}

async fn measure(plan: Plan) -> Result<Value> {
    let shim = Shim::under_test()?;
    let daemon = Arc::new(Daemon::start(Suite::Forky, &shim).await?);
    let programs = std::env::current_exe()?.parent().context("a file is in a folder")?.to_owned();
    let cx = Context::new(Arc::clone(&daemon), Runtime::Crun, shim, &programs).await?;
    let mut starts = Vec::new();
    for _start in 0..9 {
        daemon.stop()?;
        starts.push(first_answer(&daemon).await?.as_secs_f64() * 1000.0);
    }
    cx.client().reconnected().await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let idle = memory(&daemon)?;

    eprintln!("{}: lifecycles, events", cx.suite());
    let mut lifecycles = Vec::new();
    for _round in 0..plan.rounds {
        let begin = Instant::now();
        ensure!(cx.container(&["true"]).run().await? == 0);
        lifecycles.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
    eprintln!("events");
    let events = events_per_second(&cx).await?;

    eprintln!("{} containers", plan.containers);
    // a runtime that starts plain processes, so that the daemon's share is measured
    let runtime = programs.join("gated-runtime");
    let create = async |_number: usize| {
        cx.container(&["sleep", "100000"])
            .rootfs(Vec::new())
            .runtime_binary(&runtime)
            .start()
            .await
            .with_context(|| last_lines(&daemon.log()))
    };
    let containers = several("created", plan.containers, create).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let full = memory(&daemon)?;
    eprintln!("restart");
    daemon.kill()?;
    let begin = Instant::now();
    let answered = first_answer(&daemon).await?;
    cx.client().reconnected().await?;
    eventually("all are known to run", Duration::from_secs(120), async || {
        let tasks = cx.client().list().await?;
        let running = tasks.iter().filter(|task| task.status() == Phase::Running).count();
        ensure!(running == plan.containers, "{running}");
        Ok(())
    })
    .await?;
    let all = begin.elapsed();
    eprintln!("end");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let again = memory(&daemon)?;
    several("destroyed", containers.len(), async |number: usize| containers[number].destroy().await).await?;
    Ok(json!({
        "first": median(&mut starts), "idle": idle, "life": median(&mut lifecycles), "events": events, "full": full, "again": again,
        "answered": answered.as_secs_f64() * 1000.0, "all": all.as_secs_f64() * 1000.0,
    }))
}

/// Runs `act` `count` times, some concurrently, and prints its progress.
///
/// Errors: the first, also when it takes longer than a second each.
async fn several<T>(what: &str, count: usize, each: impl AsyncFn(usize) -> Result<T>) -> Result<Vec<T>> {
    let (begun, done) = (Cell::new(0), RefCell::new(Vec::new()));
    let worker = async || {
        while begun.get() < count {
            let number = begun.replace(begun.get() + 1);
            let made = each(number).await.with_context(|| format!("number {number}"))?;
            done.borrow_mut().push(made);
            if done.borrow().len() % 100 == 0 {
                eprintln!("{what}: {}", done.borrow().len());
            }
        }
        Ok(())
    };
    let workers = async { tokio::try_join!(worker(), worker(), worker(), worker()) };
    let limit = Duration::from_secs(60) + Duration::from_secs(1) * u32::try_from(count)?;
    let all: Result<_> = tokio::time::timeout(limit, workers).await.with_context(|| format!("not {count} {what} within {limit:?}"))?;
    all.map(|_workers| done.into_inner())
}

/// Starts a daemon and measures how long it takes until a call is answered.
async fn first_answer(daemon: &Daemon) -> Result<Duration> {
    let begin = Instant::now();
    daemon.spawn()?;
    loop {
        if UnixStream::connect(daemon.address()).is_ok()
            && let Ok(client) = Client::connect(&daemon.address(), "default").await
            && client.version().await.is_ok()
        {
            return Ok(begin.elapsed());
        }
        ensure!(begin.elapsed() < Duration::from_secs(30), "it does not answer: {}", daemon.log());
        tokio::time::sleep(Duration::from_micros(300)).await;
    }
}

/// Proportional set size and private memory, KiB.
fn memory(daemon: &Daemon) -> Result<Value> {
    let pid = daemon.pid().context("a daemon")?.cast_signed();
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let pss = text.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(json!({ "pss": pss.context("no PSS")?, "private": proc::private_kib(pid)? }))
}

/// Events that one subscriber receives from 16 publishing clients.
async fn events_per_second(cx: &Context) -> Result<f64> {
    const EVENTS: u32 = 8000;
    // containerd answers a subscription with its first event
    let kicks = async {
        loop {
            cx.client().publish("/bench/kick", Any::default()).await?;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let mut stream = tokio::select! {
        stream = cx.client().subscribe() => stream?,
        never = kicks => return never,
    };
    let mut clients = Vec::new();
    for _publisher in 0..16 {
        clients.push(cx.daemon().client(cx.client().namespace()).await?);
    }
    let mut publishers = JoinSet::new();
    let begin = Instant::now();
    for client in clients {
        publishers.spawn(async move {
            for _event in 0..EVENTS / 16 {
                client.publish("/bench/event", Any::default()).await?;
            }
            Ok::<_, anyhow::Error>(())
        });
    }
    let mut received = 0;
    while received < EVENTS && begin.elapsed() < Duration::from_secs(20) {
        let envelope = tokio::time::timeout(Duration::from_secs(10), stream.message()).await??.context("the stream ended")?;
        received += u32::from(envelope.topic == "/bench/event");
    }
    let rate = f64::from(received) / begin.elapsed().as_secs_f64();
    Ok(rate)
}

fn last_lines(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn table(plan: Plan, theirs: &Value, ours: &Value) {
    println!("| | containerd 2.1 | x-manager | ratio |\n| --- | ---: | ---: | ---: |");
    let row = |name: String, pointer: &str, digits: usize| {
        let value = |figures: &Value| figures.pointer(pointer).and_then(Value::as_f64).unwrap_or(f64::NAN);
        let (theirs, ours) = (value(theirs), value(ours));
        println!("| {name} | {theirs:.digits$} | {ours:.digits$} | {:.2} |", ours / theirs);
    };
    let count = plan.containers;
    row("memory idle, PSS KiB".to_owned(), "/idle/pss", 0);
    row("memory idle, private KiB".to_owned(), "/idle/private", 0);
    row(format!("memory with {count} containers, PSS KiB"), "/full/pss", 0);
    row("the same after a restart, PSS KiB".to_owned(), "/again/pss", 0);
    row("exec to first answered call, ms".to_owned(), "/first", 1);
    row(format!("restart with {count} shims to first answered call, ms"), "/answered", 1);
    row("restart until all are known to run, ms".to_owned(), "/all", 1);
    row("create to deleted of `true`, ms".to_owned(), "/life", 1);
    row("events per second, 16 publishers, 1 subscriber".to_owned(), "/events", 0);
}
