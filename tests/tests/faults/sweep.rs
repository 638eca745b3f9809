//! A crash before, in the middle of and after every message, in both directions.

use std::cell::RefCell;
use std::env;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Result, ensure};
use shim_tests::context::Context;
use tokio::task::LocalSet;

use crate::campaign;
use crate::lane::{self, Lane, nothing};
use crate::scenarios::Scenario;

/// Runs of a scenario side by side: most of a run is waiting.
const LANES: usize = 4;

/// Runs for a place that is not reached: whether the daemon connects once more to a shim that is about to end is a matter of time.
const TRIES: usize = 5;
/// How many places may not be reached: those of the one call that the first run had more than others.
const OPTIONAL: usize = 6;

/// The plan of a worker that must not crash.
const SPARED: &str = "in:4000000000:before";

/// The messages between the keeper and its workers, in a trace.
pub(crate) struct Messages {
    pub(crate) all: Vec<Message>,
    /// How many workers there were.
    generations: usize,
    /// Of the last worker.
    counts: [usize; 2],
}

/// One of them: the line of the trace, the worker, and its number among those in its direction.
pub(crate) struct Message {
    at: usize,
    generation: usize,
    pub(crate) direction: &'static str,
    pub(crate) number: usize,
}

impl Messages {
    pub(crate) fn of(trace: &[String]) -> Self {
        let mut found = Self { all: Vec::new(), generations: 0, counts: [0; 2] };
        for (at, line) in trace.iter().enumerate() {
            let (direction, count) = match line.split(' ').next() {
                Some("life") => {
                    (found.generations, found.counts) = (found.generations + 1, [0; 2]);
                    continue;
                }
                Some("out") => ("out", &mut found.counts[0]),
                Some("in") => ("in", &mut found.counts[1]),
                _ => continue,
            };
            *count += 1;
            found.all.push(Message { at, generation: found.generations, direction, number: *count });
        }
        found
    }

    /// The places of the last worker's last messages.
    pub(crate) fn last(&self) -> [String; 2] {
        [format!("out:{}", self.counts[0]), format!("in:{}", self.counts[1])]
    }
}

/// Runs the scenario once without crashes, and then once for each place to crash.
pub(crate) async fn every_message(cx: Context, scenario: &'static Scenario) -> Result<()> {
    let begin = Instant::now();
    let first = Lane::new(&cx).await?;
    let model = LocalSet::new().run_until(lane::model(&first, scenario)).await?;
    drop(first);
    let mut plans = Vec::new();
    let messages = Messages::of(&model.trace.0);
    let others = |generation: usize| format!("{SPARED} ").repeat(generation - 1);
    for Message { at, generation, direction, number } in &messages.all {
        if *at >= model.begun_at {
            let line = &model.trace.0[*at];
            let plan = |when| (format!("{}{direction}:{number}:{when}", others(*generation)), line.clone());
            plans.extend(["before", "torn", "after"].map(plan));
        }
    }
    // After the last message of the last worker the keeper exits and kills the worker, so a crash after it is impossible.
    let last = messages.last().map(|place| format!("{}{place}:after", others(messages.generations)));
    plans.retain(|(plan, _)| !last.contains(plan));
    if let Ok(plan) = env::var("X_PLAN") {
        plans = vec![(plan, "of X_PLAN".to_owned()); campaign::runs()];
    }
    let (faults, [sent, received]) = (plans.len(), messages.counts);
    let record = Rc::new(model.record);
    let unreached = Rc::new(RefCell::new(Vec::new()));
    let failures = {
        let unreached = Rc::clone(&unreached);
        lane::work(&cx, LANES, plans, move |lane, (plan, message)| {
            let (record, unreached) = (Rc::clone(&record), Rc::clone(&unreached));
            Box::pin(async move {
                let planned = plan.split(' ').filter(|word| *word != SPARED).count();
                for _try in 0..TRIES {
                    let crashes = lane.run(scenario, &plan, Some(&record), nothing).await?.trace.crashes();
                    if crashes == planned || env::var_os("X_PLAN").is_some() {
                        return Ok(());
                    }
                }
                unreached.borrow_mut().push(format!("{message} [{plan}]"));
                Ok(())
            })
        })
        .await?
    };
    let (name, unreached) = (scenario.name, unreached.take());
    for place in &unreached {
        eprintln!("{} {} {name}: not reached in {TRIES} runs: {place}", cx.suite(), cx.runtime());
    }
    ensure!(unreached.len() <= OPTIONAL, "{name}: not reached in {TRIES} runs each: {unreached:#?}");
    eprintln!("{} {} {name}: {sent} out, {received} in, {faults} faults, {:.1} s", cx.suite(), cx.runtime(), begin.elapsed().as_secs_f64());
    lane::verdict(&failures)
}
