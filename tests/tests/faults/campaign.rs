//! Random disturbances: workers killed and stopped from outside at any moment, shims upgraded and downgraded, and several crashes in a row
//! at messages.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use shim_tests::builds;
use shim_tests::context::Context;
use shim_tests::proc;
use tokio::task::LocalSet;

use crate::lane::{self, Lane};
use crate::run::Record;
use crate::scenarios::{self, Scenario};
use crate::tally::{Tally, tally};

/// `X_CAMPAIGN` runs for each combination, 30 without it.
pub(crate) fn runs() -> usize {
    env::var("X_CAMPAIGN").ok().and_then(|text| text.parse().ok()).unwrap_or(30)
}

/// Small and seeded; its numbers depend on nothing but the seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// The crashes and disturbances of one run.
struct Job {
    scenario: &'static Scenario,
    model: Rc<Record>,
    /// Crashes at messages, one word per worker generation.
    plan: String,
    /// Disturbances from outside, each that long after the previous one.
    disturbances: Vec<(Duration, Disturbance)>,
}

/// A disturbance of a shim from outside.
#[derive(Clone)]
enum Disturbance {
    /// Its worker is killed.
    Kill,
    /// Its worker is stopped for that long.
    Stop(Duration),
    /// It is upgraded to another build.
    Upgrade { to: PathBuf, worker_only: bool },
}

/// Runs scenarios in turn, each with crashes of its own.
pub(crate) async fn random_crashes(cx: Context) -> Result<()> {
    let begin = Instant::now();
    let seed = env::var("X_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0x9e37_79b9_7f4a_7c15);
    let mut random = Random(seed);
    let mut models = Vec::new();
    let first = Lane::new(&cx).await?;
    for scenario in scenarios::ALL {
        models.push((scenario, LocalSet::new().run_until(lane::model(&first, scenario)).await?));
    }
    drop(first);
    let models: Vec<_> =
        models.into_iter().map(|(scenario, model)| (scenario, model.trace.0.len() as u64, Rc::new(model.record))).collect();
    let mut jobs = Vec::new();
    let builds = other_builds(&cx)?;
    for number in 0..runs() {
        let (scenario, messages, model) = &models[number % models.len()];
        let disturbances =
            (0..1 + random.below(4)).map(|_| (Duration::from_millis(random.below(150)), disturbance(&mut random, &builds))).collect();
        let words: Vec<_> = (0..1 + random.below(3)).map(|_| word(&mut random, messages / 2)).collect();
        let (plan, disturbances) = if random.below(2) == 0 { (words.join(" "), Vec::new()) } else { (String::new(), disturbances) };
        jobs.push(Job { scenario, model: Rc::clone(model), plan, disturbances });
    }
    static CRASHES: AtomicU32 = AtomicU32::new(0);
    let before = CRASHES.load(Ordering::Relaxed);
    let tallied = tally();
    let count = jobs.len();
    let failures = lane::work(&cx, 3, jobs, |lane, job| {
        Box::pin(async move {
            let outcome = lane.run(job.scenario, &job.plan, Some(&job.model), async |cx| disturb(cx, &job.disturbances).await).await?;
            CRASHES.fetch_add(u32::try_from(outcome.trace.generations())? - 1, Ordering::Relaxed);
            Ok(())
        })
    })
    .await?;
    let crashes = CRASHES.load(Ordering::Relaxed) - before;
    eprintln!(
        "{} {} campaign: seed {seed}, {count} runs, {crashes} crashes survived, {} and nothing else: none lost, none doubled; {:.1} s",
        cx.suite(),
        cx.runtime(),
        tally() - tallied,
        begin.elapsed().as_secs_f64()
    );
    lane::verdict(&failures)
}

fn word(random: &mut Random, messages: u64) -> String {
    let direction = ["in", "out"][usize::from(random.below(2) == 0)];
    let when = ["before", "torn", "after"][usize::try_from(random.below(3)).unwrap_or(0)];
    format!("{direction}:{}:{when}", 1 + random.below(messages.max(1)))
}

/// Copies of the shim under other names, as upgrades and downgrades to each other.
fn other_builds(cx: &Context) -> Result<[PathBuf; 2]> {
    let shim = cx.shim().binary.clone().context("X_SHIM must name our own shim")?;
    let make = |name: &str| {
        let folder = cx.folder().join(name);
        fs::create_dir_all(&folder)?;
        builds::make(&shim, &folder.join(cx.shim().binary_name()), &format!("build={name}"))
    };
    Ok([make("a")?, make("b")?])
}

fn disturbance(random: &mut Random, builds: &[PathBuf; 2]) -> Disturbance {
    match random.below(5) {
        0 | 1 => Disturbance::Kill,
        2 => Disturbance::Stop(Duration::from_millis(random.below(300))),
        which => Disturbance::Upgrade { to: builds[usize::try_from(random.below(2)).unwrap_or(0)].clone(), worker_only: which == 3 },
    }
}

async fn disturb(cx: &Context, disturbances: &[(Duration, Disturbance)]) {
    for (pause, disturbance) in disturbances {
        tokio::time::sleep(*pause).await; // the random moment
        match disturbance {
            Disturbance::Upgrade { to, worker_only } => {
                let words: &[&str] = if *worker_only { &["--all", "--worker-only"] } else { &["--all"] };
                // the shim may be gone by then
                if builds::upgrade(cx, to, words).await.is_ok() {
                    Tally::add(|tally| &tally.upgrades, 1);
                }
            }
            Disturbance::Kill => {
                if let Ok(worker) = lane::some_worker(cx).await {
                    proc::kill_hard(worker);
                    Tally::add(|tally| &tally.kills, 1);
                }
            }
            Disturbance::Stop(time) => {
                if let Ok(worker) = lane::some_worker(cx).await
                    && proc::signal(worker, Signal::SIGSTOP).is_ok()
                {
                    tokio::time::sleep(*time).await; // the duration of the stop
                    // it may be gone by then
                    let _gone = proc::signal(worker, Signal::SIGCONT);
                    Tally::add(|tally| &tally.stops, 1);
                }
            }
        }
    }
}
