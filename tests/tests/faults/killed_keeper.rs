//! The keeper is killed at every message of the sandbox calls: the one crash that a pod does not survive. The client runs `delete` when the connection ends;
//! after that nothing is left, and exits that were known are still reported.
//!
//! ```text
//!  create ─ start ─ container b exits ─ container c runs ─ b deleted ─ stop ─ shutdown
//!     └────────┴───────── keeper killed at one of the messages ─────────┴───────┘
//!                                       └─▶ delete of all bundles, or of the pod's alone ─▶ nothing is left, the id is free
//! ```

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use shim_tests::bundle::Bundle;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually_true};
use shim_tests::proc;
use shim_tests::sandbox::Sandbox;
use shim_tests::stand::Stand;
use shim_tests::ttrpc::CallError;
use tokio::task::JoinSet;

use crate::sweep::{Message, Messages};

/// The bundles for which a client runs `delete`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deletes {
    /// The pod's and each container's, as with version 2 of the shim protocol.
    Each,
    /// The pod's alone, as with version 3, where the bundles of its containers are removed meanwhile.
    PodAlone,
}

/// Runs the pod once without a crash, then once for each place to kill the keeper: `of` of them, or all with `X_FAULTS_ALL`. `pids`: whose pid namespace its
/// containers are in.
pub(crate) async fn every_message(cx: Context, deletes: Deletes, pids: i32, of: usize) -> Result<()> {
    let begin = Instant::now();
    let model = Lane::new(&cx, deletes, pids)?.run("").await.context("without a crash")?;
    let mut plans = plans(&model);
    let places = plans.len();
    if let Ok(plan) = env::var("X_PLAN") {
        plans = vec![plan];
    } else if env::var_os("X_FAULTS_ALL").is_none() {
        let step = places.div_ceil(of).max(1);
        plans = plans.into_iter().skip(step / 2).step_by(step).collect();
    }
    let (runs, struck) = (plans.len(), Cell::new(0));
    let jobs = RefCell::new(plans.into_iter());
    let lane = async || -> Result<()> {
        let lane = Lane::new(&cx, deletes, pids)?;
        while let Some(plan) = { jobs.borrow_mut().next() } {
            let trace = lane.run(&plan).await.with_context(|| format!("the keeper killed at [{plan}] in {}", lane.stand.namespace()))?;
            struck.update(|count| count + usize::from(is_struck(&trace)));
        }
        Ok(())
    };
    tokio::try_join!(lane(), lane(), lane(), lane())?;
    let (struck, seconds) = (struck.get(), begin.elapsed().as_secs_f64());
    eprintln!("killed keeper, {deletes:?}, pids {pids}: {places} places, {runs} runs, {struck} keepers killed, {seconds:.1} s");
    // Which message is the last one depends on when the connections close.
    ensure!(struck > 0 && struck + 4 >= runs, "only {struck} of {runs} keepers were killed");
    Ok(())
}

/// Before and after each message of the only worker.
pub(crate) fn plans(trace: &[String]) -> Vec<String> {
    let messages = Messages::of(trace);
    let plans = |Message { direction, number, .. }: &Message| ["before", "after"].map(|when| format!("{direction}:{number}:{when}:keeper"));
    let mut plans: Vec<_> = messages.all.iter().flat_map(plans).collect();
    // After the last ones the keeper exits.
    let last = messages.last().map(|place| format!("{place}:after:keeper"));
    plans.retain(|plan| !last.contains(plan));
    plans
}

/// Whether the plan was carried out.
pub(crate) fn is_struck(trace: &[String]) -> bool {
    trace.iter().any(|line| line == "dies")
}

/// Runs one after the other on a stand of their own, each with the same ids.
struct Lane {
    stand: Stand,
    deletes: Deletes,
    pids: i32,
}

/// What a client has made and learnt of a pod.
#[derive(Default)]
struct Client {
    members: RefCell<Vec<Bundle>>,
    exits: RefCell<BTreeMap<String, u32>>,
}

const POD_ID: &str = "s1";

impl Lane {
    fn new(cx: &Context, deletes: Deletes, pids: i32) -> Result<Self> {
        let programs = cx.program("gated-runtime").parent().context("a file is in a folder")?.to_owned();
        Ok(Self { stand: Stand::with_engine(cx.shim(), &programs, &cx.runtime_binary())?, deletes, pids })
    }

    fn plans(&self) -> PathBuf {
        self.stand.folder().join("faults")
    }

    /// Returns the trace of the worker.
    async fn run(&self, plan: &str) -> Result<Vec<String>> {
        let (plans, plan_path) = (self.plans(), self.plans().join(POD_ID));
        fs::create_dir_all(&plans)?;
        fs::write(&plan_path, plan)?;
        let pod = self.stand.bundle(POD_ID, &[]).without_spec().env("X_FAULT", &plans.display().to_string());
        let client = Client::default();
        let lived = self.live(&pod, &client).await;
        let trace_path = plan_path.with_extension("trace");
        let trace: Vec<_> = fs::read_to_string(&trace_path).unwrap_or_default().lines().map(str::to_owned).collect();
        match lived {
            Err(_) if is_struck(&trace) => {}
            other => other?,
        }
        if let Ok(keeper) = pod.shim_pid() {
            eventually_true("the keeper is dead", SOON, || !proc::is_alive(keeper)).await?;
        }
        let last = || trace[trace.len().saturating_sub(6)..].join("; ");
        self.delete(&pod, &client).await.with_context(|| format!("after {}", last()))?;
        ensure!(
            !pod.folder.join("pod").exists(),
            "after {}: {:?} is left",
            last(),
            fs::read_dir(pod.folder.join("pod"))?.collect::<Vec<_>>()
        );
        self.stand.leaves_nothing().await.with_context(|| format!("after {}", last()))?;
        // As the client does: the next run has the same ids.
        for entry in fs::read_dir(self.stand.folder().join("b"))? {
            fs::remove_dir_all(entry?.path())?;
        }
        fs::remove_file(&plan_path)?;
        fs::remove_file(&trace_path)?;
        Ok(trace)
    }

    /// The calls of a client, until one fails.
    async fn live(&self, pod: &Bundle, client: &Client) -> Result<()> {
        let mut sandbox = Sandbox::shim_of(pod.clone()).await?;
        sandbox.config.namespaces().pid = self.pids;
        sandbox.create().await?;
        let holder = sandbox.start().await?;
        let exited = self.member(&sandbox, client, ("b", holder), &["sh", "-c", "exit 3"]).await?;
        client.learns(&exited.id, sandbox.task.wait(&exited.id, "").await?, 3)?;
        let running = self.member(&sandbox, client, ("c", holder), &["sleep", "1000"]).await?;
        sandbox.task.delete(&exited.id, "").await?;
        sandbox.stop().await?;
        client.learns(&running.id, sandbox.task.wait(&running.id, "").await?, 137)?;
        let shim = pod.shim_pid()?;
        match sandbox.service.shutdown(POD_ID).await {
            Ok(()) | Err(CallError::Closed) => {}
            Err(error) => return Err(error.into()),
        }
        drop(sandbox);
        eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await
    }

    /// Creates and starts a container.
    async fn member(&self, sandbox: &Sandbox, client: &Client, (id, holder): (&str, u32), args: &[&str]) -> Result<Bundle> {
        let mut bundle = sandbox.member(id, holder, args);
        if self.pids == shim_tests::sandbox::POD {
            bundle = bundle.spec(|spec| spec.join_pids(holder));
        }
        bundle.write()?;
        client.members.borrow_mut().push(bundle.clone());
        if self.deletes == Deletes::Each {
            bundle.start_shim().await?;
        }
        bundle.clone().run_in(&sandbox.task).await?;
        Ok(bundle)
    }

    /// Runs `delete` for all at once, as the client does when the connection has ended, and checks the answers.
    async fn delete(&self, pod: &Bundle, client: &Client) -> Result<()> {
        let members = client.members.borrow().clone();
        if self.deletes == Deletes::PodAlone {
            for member in &members {
                // With the rest of their bundles; their root file systems are the test's.
                for name in ["x-journal", "config.json"] {
                    let _not_written_yet = fs::remove_file(member.folder.join(name));
                }
            }
            pod.delete_command().await.context("of the pod alone")?;
            return Ok(());
        }
        let mut deleting = JoinSet::new();
        for bundle in members.into_iter().chain([pod.clone()]) {
            deleting.spawn(async move { (bundle.id.clone(), bundle.delete_command().await) });
        }
        while let Some(deleted) = deleting.join_next().await {
            let (id, answer) = deleted?;
            let status = answer.with_context(|| format!("of {id}"))?.exit_status;
            let known = client.exits.borrow().get(&id).copied();
            // b may have exited by itself before the keeper was killed, unknown to the client.
            let is_true = known.map_or(status == 137 || (id, status) == ("b".to_owned(), 3), |known| status == known);
            ensure!(is_true, "delete reports {status}, known to the client was {known:?}");
        }
        Ok(())
    }
}

impl Client {
    fn learns(&self, id: &str, status: u32, expected: u32) -> Result<()> {
        ensure!(status == expected, "{id} exited with {status}, not {expected}");
        self.exits.borrow_mut().insert(id.to_owned(), status);
        Ok(())
    }
}
