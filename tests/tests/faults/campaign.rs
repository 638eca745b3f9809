//! Deaths at random: from outside at any moment, and several in a row at messages.

use std::env;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use shim_tests::context::Context;
use shim_tests::proc;
use tokio::task::LocalSet;

use crate::lane::{self, Lane};
use crate::run::Record;
use crate::scenarios::{self, Scenario};

/// `X_CAMPAIGN` runs for each combination, 30 without it.
pub(crate) fn runs() -> usize {
    env::var("X_CAMPAIGN").ok().and_then(|text| text.parse().ok()).unwrap_or(30)
}

/// Small and seeded; what it says depends on nothing but the seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// How the workers of one run die.
struct Job {
    scenario: &'static Scenario,
    model: Rc<Record>,
    /// At messages, one word per life.
    plan: String,
    /// From outside, each so long after the last.
    kills: Vec<Duration>,
}

/// Runs scenarios in turn, each with deaths of its own.
pub(crate) async fn random_deaths(cx: Context) -> Result<()> {
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
    for number in 0..runs() {
        let (scenario, messages, model) = &models[number % models.len()];
        let kills = (0..1 + random.below(4)).map(|_| Duration::from_millis(random.below(150))).collect();
        let words: Vec<_> = (0..1 + random.below(3)).map(|_| word(&mut random, messages / 2)).collect();
        let (plan, kills) = if random.below(2) == 0 { (words.join(" "), Vec::new()) } else { (String::new(), kills) };
        jobs.push(Job { scenario, model: Rc::clone(model), plan, kills });
    }
    static DEATHS: AtomicU32 = AtomicU32::new(0);
    let before = DEATHS.load(Ordering::Relaxed);
    let count = jobs.len();
    let failures = lane::work(&cx, 3, jobs, |lane, job| {
        Box::pin(async move {
            let outcome = lane.run(job.scenario, &job.plan, Some(&job.model), async |cx| kill_workers(cx, &job.kills).await).await?;
            DEATHS.fetch_add(u32::try_from(outcome.trace.lives())? - 1, Ordering::Relaxed);
            Ok(())
        })
    })
    .await?;
    let deaths = DEATHS.load(Ordering::Relaxed) - before;
    eprintln!(
        "{} {} campaign: seed {seed}, {count} runs, {deaths} deaths survived, {:.1} s",
        cx.suite(),
        cx.runtime(),
        begin.elapsed().as_secs_f64()
    );
    lane::verdict(&failures)
}

fn word(random: &mut Random, messages: u64) -> String {
    let direction = ["in", "out"][usize::from(random.below(2) == 0)];
    let when = ["before", "torn", "after"][usize::try_from(random.below(3)).unwrap_or(0)];
    format!("{direction}:{}:{when}", 1 + random.below(messages.max(1)))
}

async fn kill_workers(cx: &Context, after: &[Duration]) {
    for pause in after {
        tokio::time::sleep(*pause).await; // the moment is what is random
        if let Ok(worker) = lane::some_worker(cx).await {
            proc::kill_hard(worker);
        }
    }
}
