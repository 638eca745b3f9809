//! Measures what a shim itself costs in a container's life: a test double takes the OCI runtime's place. Needs root.
//!
//! ```text
//! lifecycle-bench --shim NAME=PATH [--shim NAME=PATH …] [--rounds 200]
//! ```
//! Every shim has its turn in every round: `start`, Create, Start, exit, Delete, Shutdown, `delete`. Prints medians of each step in ms, of the sum, and
//! the processor time of all processes of a life, the test double's included.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use shim_tests::eventually::SOON;
use shim_tests::stand::Stand;
use shim_tests::suite::Shim;
use shim_tests::{bundle, isolation, runner};

fn main() -> ExitCode {
    runner::benchmark("lifecycle-bench", Plan::read(), measure)
}

struct Plan {
    shims: Vec<(String, PathBuf)>,
    rounds: usize,
}

impl Plan {
    fn read() -> Result<Self> {
        let mut plan = Self { shims: Vec::new(), rounds: 200 };
        let mut rest = std::env::args().skip(1);
        while let Some(flag) = rest.next() {
            let value = rest.next().with_context(|| format!("{flag} needs a value"))?;
            match flag.as_str() {
                "--shim" => {
                    let (name, path) = value.split_once('=').context("--shim is NAME=PATH")?;
                    plan.shims.push((name.to_owned(), Path::new(path).canonicalize().with_context(|| path.to_owned())?));
                }
                "--rounds" => plan.rounds = value.parse()?,
                _ => bail!("unknown flag {flag}"),
            }
        }
        ensure!(!plan.shims.is_empty() && plan.rounds > 0, "name at least one --shim NAME=PATH, and a round or more");
        Ok(plan)
    }
}

const STEPS: [&str; 7] = ["start command", "Create", "Start", "exit", "Delete", "Shutdown", "delete command"];

/// The times of one shim's lives.
struct Subject {
    name: String,
    stand: Stand,
    steps: [Vec<Duration>; STEPS.len()],
    sums: Vec<Duration>,
    processor: Vec<Duration>,
}

async fn measure(plan: &Plan) -> Result<()> {
    let own = std::env::current_exe()?;
    let programs = own.parent().context("a file is in a folder")?;
    let mut subjects = Vec::new();
    for (name, binary) in &plan.shims {
        let shim = Shim { runtime_type: "io.containerd.x.v2".into(), binary: Some(binary.clone()) };
        let stand = Stand::new(&shim, programs)?;
        subjects.push(Subject { name: name.clone(), stand, steps: Default::default(), sums: Vec::new(), processor: Vec::new() });
    }
    for round in 0..plan.rounds {
        for subject in &mut subjects {
            subject.live(round).await.with_context(|| format!("{} in round {round}", subject.name))?;
        }
    }
    println!("| median of {} | {} |", plan.rounds, subjects.iter().map(|subject| subject.name.as_str()).collect::<Vec<_>>().join(" | "));
    println!("| --- |{}", " ---: |".repeat(subjects.len()));
    let row = |name: &str, times: &dyn Fn(&Subject) -> Vec<Duration>| {
        let cells: Vec<_> = subjects.iter().map(|subject| format!("{:.2}", median(times(subject)))).collect();
        println!("| {name}, ms | {} |", cells.join(" | "));
    };
    for (index, step) in STEPS.iter().enumerate() {
        row(step, &|subject| subject.steps[index].clone());
    }
    row("sum", &|subject| subject.sums.clone());
    row("processor time", &|subject| subject.processor.clone());
    for subject in subjects {
        subject.stand.leaves_nothing().await?;
    }
    Ok(())
}

impl Subject {
    /// One life of a container whose process exits at once.
    async fn live(&mut self, round: usize) -> Result<()> {
        let id = format!("c{round}");
        let bundle = self.stand.instant(&id, &["true"]);
        let used = used()?;
        let mut last = Instant::now();
        let mut step = |index: usize| {
            let now = Instant::now();
            self.steps[index].push(now - std::mem::replace(&mut last, now));
            now
        };
        let begun = Instant::now();
        let task = bundle.shim().await?;
        step(0);
        let container = bundle.create_in(&task).await?;
        let shim = container.shim_pid()?;
        isolation::keep(shim.unsigned_abs());
        step(1);
        let wait = task.begin_wait(&id, "").await?;
        container.start().await?;
        step(2);
        wait.status(SOON).await?;
        step(3);
        task.delete(&id, "").await?;
        step(4);
        bundle::leave(&task, shim, &id).await?;
        step(5);
        container.bundle.delete_command().await?;
        self.sums.push(step(6) - begun);
        // Orphans are children of init, which this is: the processor time counts from here on.
        waitpid(Pid::from_raw(shim), None).context("reap the keeper")?;
        isolation::forget(shim.unsigned_abs());
        self.processor.push(used_since(used)?);
        Ok(())
    }
}

/// The processor time of all processes that were waited for.
fn used() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let time = |value: nix::sys::time::TimeVal| Duration::from_micros((value.tv_sec() * 1_000_000 + value.tv_usec()).unsigned_abs());
    Ok(time(usage.user_time()) + time(usage.system_time()))
}

fn used_since(before: Duration) -> Result<Duration> {
    Ok(used()?.saturating_sub(before))
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}
