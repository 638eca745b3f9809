//! The keeper of a pod is killed at every message while containerd calls it: containerd runs `delete` by itself. Whatever the last call was, the pod is then shut
//! down, and nothing is left.

use std::cell::{Cell, RefCell};
use std::env;
use std::fs;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use shim_tests::context::Context;
use shim_tests::controller::Sandbox;
use shim_tests::cri::PodSpec;
use shim_tests::eventually::{SOON, eventually};
use tonic::Code;

use crate::killed_keeper::{is_struck, plans};

/// Runs the pod once without a crash, then once for each place to kill the keeper: `of` of them, or all with `X_FAULTS_ALL`.
pub(crate) async fn every_message(cx: Context, of: usize) -> Result<()> {
    let begin = Instant::now();
    let cx = cx.with_own_sandboxes().await?;
    let mut plans = plans(&run(&cx, "").await.context("without a crash")?);
    let places = plans.len();
    if env::var_os("X_FAULTS_ALL").is_none() {
        let step = places.div_ceil(of).max(1);
        plans = plans.into_iter().skip(step / 2).step_by(step).collect();
    }
    let (runs, struck) = (plans.len(), Cell::new(0));
    let jobs = RefCell::new(plans.into_iter());
    let lane = async || -> Result<()> {
        let cx = cx.with_own_namespace().await?;
        while let Some(plan) = { jobs.borrow_mut().next() } {
            let trace = run(&cx, &plan).await.with_context(|| format!("the keeper killed at [{plan}]"))?;
            struck.update(|count| count + usize::from(is_struck(&trace)));
        }
        Ok(())
    };
    tokio::try_join!(lane(), lane(), lane())?;
    let (struck, seconds) = (struck.get(), begin.elapsed().as_secs_f64());
    eprintln!("killed keeper under containerd: {places} places, {runs} runs, {struck} keepers killed, {seconds:.1} s");
    ensure!(struck > 0 && struck + 4 >= runs, "only {struck} of {runs} keepers were killed");
    Ok(())
}

/// Returns the trace of the worker.
async fn run(cx: &Context, plan: &str) -> Result<Vec<String>> {
    // one id for all: it is free again after each run
    let pod = format!("{}-pod", cx.client().namespace());
    let member = format!("{pod}-b");
    let plan_path = cx.daemon().faults().join(&pod);
    fs::write(&plan_path, plan)?;
    let lived = live(cx, &pod, &member).await;
    let trace_path = plan_path.with_extension("trace");
    let trace: Vec<_> = fs::read_to_string(&trace_path).unwrap_or_default().lines().map(str::to_owned).collect();
    match lived {
        Err(_) if is_struck(&trace) => {}
        other => other?,
    }
    // What a client does with what it knows of: its task, its container, the pod.
    eventually("task and container are deleted", SOON, async || {
        for gone in [cx.client().delete(&member).await.map(drop), cx.client().delete_container(&member).await] {
            ensure!(gone.as_ref().map_or_else(|status| status.code() == Code::NotFound, |()| true), "{gone:?}");
        }
        Ok(())
    })
    .await?;
    let shut_down = Sandbox::known(cx, &pod).shutdown().await;
    cx.leaves_nothing().await.with_context(|| format!("Shutdown: {shut_down:?}; after {:?}", trace.last()))?;
    fs::remove_file(&plan_path)?;
    fs::remove_file(&trace_path)?;
    Ok(trace)
}

/// The calls of a client, until one fails.
async fn live(cx: &Context, pod: &str, member: &str) -> Result<()> {
    let sandbox = Sandbox::create(cx, pod, &PodSpec::new(pod)).await?;
    let holder = sandbox.start().await?;
    let container = sandbox.member(cx.container(&["sleep", "1000"]).id(member), holder).create().await?;
    container.start().await?;
    container.kill(9).await?;
    ensure!(container.wait().await? == 137);
    container.delete().await?;
    sandbox.stop().await?;
    Ok(sandbox.shutdown().await?)
}
