//! A crash before, in the middle of and after every message, in both directions.

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
    let failures = lane::work(&cx, LANES, plans, move |lane, (plan, message)| {
        let record = Rc::clone(&record);
        Box::pin(async move {
            let outcome = lane.run(scenario, &plan, Some(&record), nothing).await?;
            let crashes = outcome.trace.crashes();
            let planned = plan.split(' ').filter(|word| *word != SPARED).count();
            ensure!(
                crashes == planned || env::var_os("X_PLAN").is_some(),
                "{} at [{plan}] ({message}): {crashes} crashes: {:#?}",
                scenario.name,
                outcome.trace
            );
            Ok(())
        })
    })
    .await?;
    let name = scenario.name;
    eprintln!("{} {} {name}: {sent} out, {received} in, {faults} faults, {:.1} s", cx.suite(), cx.runtime(), begin.elapsed().as_secs_f64());
    lane::verdict(&failures)
}
