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

/// Runs the scenario once without crashes, and then once for each place to crash.
pub(crate) async fn every_message(cx: Context, scenario: &'static Scenario) -> Result<()> {
    let begin = Instant::now();
    let first = Lane::new(&cx).await?;
    let model = LocalSet::new().run_until(lane::model(&first, scenario)).await?;
    drop(first);
    let mut plans = Vec::new();
    let (mut generations, mut sent, mut received) = (0, 0, 0);
    for (at, line) in model.trace.0.iter().enumerate() {
        let (direction, number) = match line.split(' ').next() {
            Some("life") => {
                (generations, sent, received) = (generations + 1, 0, 0);
                continue;
            }
            Some("out") => {
                sent += 1;
                ("out", sent)
            }
            Some("in") => {
                received += 1;
                ("in", received)
            }
            _ => continue,
        };
        if at >= model.begun_at {
            let others = format!("{SPARED} ").repeat(generations - 1);
            plans.extend(["before", "torn", "after"].map(|when| (format!("{others}{direction}:{number}:{when}"), line.clone())));
        }
    }
    // After the last message of the last worker the keeper exits and kills the worker, so a crash after it is impossible.
    let others = format!("{SPARED} ").repeat(generations - 1);
    let last = [format!("{others}out:{sent}:after"), format!("{others}in:{received}:after")];
    plans.retain(|(plan, _)| !last.contains(plan));
    if let Ok(plan) = env::var("X_PLAN") {
        plans = vec![(plan, "of X_PLAN".to_owned()); campaign::runs()];
    }
    let faults = plans.len();
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
