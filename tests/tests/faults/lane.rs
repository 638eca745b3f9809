//! Runs, one after the other, in a namespace of their own; several lanes go side by side.

use std::cell::RefCell;
use std::fs;
use std::future::Future;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use shim_tests::context::Context;
use shim_tests::events::Events;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::gate::Gate;
use shim_tests::suite::Runtime;

use crate::run::{Record, Run};
use crate::scenarios::Scenario;

/// The longest that a run may take. Runs take half a second.
const RUN_WITHIN: Duration = Duration::from_secs(40);

/// A namespace with a runtime that counts its calls.
pub(crate) struct Lane {
    cx: Context,
    gate: Rc<Gate>,
    events: Events,
}

/// The result of a run.
pub(crate) struct Outcome {
    pub(crate) record: Record,
    pub(crate) trace: Trace,
    /// The number of lines at the start of the trace that belong to another scenario.
    pub(crate) begun_at: usize,
}

/// The trace that the workers of a run wrote: see `shim/src/worker/fault.rs`.
#[derive(Debug, Default)]
pub(crate) struct Trace(pub(crate) Vec<String>);

impl Trace {
    fn read(run: &Run) -> Result<Self> {
        let text = fs::read_to_string(run.trace_path()).context("the shim has written no trace: was it built with fault-injection?")?;
        Ok(Self(text.lines().map(str::to_owned).collect()))
    }

    /// How often the plan made a worker crash.
    pub(crate) fn crashes(&self) -> usize {
        self.0.iter().filter(|line| *line == "dies").count()
    }

    /// How many workers there were.
    pub(crate) fn generations(&self) -> usize {
        self.0.iter().filter(|line| *line == "life").count()
    }

    /// How often a worker was sent the state of the keeper.
    fn welcomes(&self) -> usize {
        self.0.iter().filter(|line| *line == "in welcome").count()
    }

    /// The last lines before a crash, and those after it.
    fn around_crash(&self) -> String {
        let at = self.0.iter().position(|line| line == "dies").unwrap_or(self.0.len());
        self.0[at.saturating_sub(12)..self.0.len().min(at + 30)].join("\n    ")
    }
}

impl Lane {
    /// A lane beside `cx`.
    pub(crate) async fn new(cx: &Context) -> Result<Self> {
        let cx = cx.with_own_namespace().await?;
        Ok(Self { gate: Rc::new(cx.gate()?), events: cx.events().await?, cx })
    }

    /// Runs a scenario with a plan of crashes, and `beside` it until it is over. With a model, any difference from it is an error.
    pub(crate) async fn run(
        &self,
        scenario: &Scenario,
        plan: &str,
        model: Option<&Rc<Record>>,
        beside: impl AsyncFnOnce(&Context),
    ) -> Result<Outcome> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let id = format!("f{:05}", NEXT.fetch_add(1, Ordering::Relaxed));
        let run = Run::new(&self.cx, &self.gate, id, plan, model.cloned(), self.is_native(scenario));
        if !scenario.late {
            run.arm()?;
        }
        let result = self.watched(scenario, &run, beside).await;
        let scene = if result.is_err() { run.scene() } else { String::new() };
        for verb in ["create", "start", "exec"] {
            let _it_need_not_be_there = self.gate.fail(verb, None);
            self.gate.release(verb)?;
        }
        let trace = Trace::read(&run);
        run.disarm();
        if let Err(error) = result {
            let around = trace.unwrap_or_default().around_crash();
            return Err(error.context(format!(
                "{} with crashes [{plan}] in {}, around the crash:\n    {around}\n  afterwards:\n    {scene}",
                scenario.name, run.id
            )));
        }
        let begun_at = run.begun_at();
        run.count();
        let outcome = Outcome { record: run.record(), trace: trace?, begun_at };
        if let Some(model) = model {
            model.agrees_with(&outcome.record).with_context(|| {
                format!("{} with crashes [{plan}], around the crash:\n    {}", scenario.name, outcome.trace.around_crash())
            })?;
        }
        Ok(outcome)
    }

    /// Whether the native engine makes the containers of a scenario.
    pub(crate) fn is_native(&self, scenario: &Scenario) -> bool {
        self.cx.runtime() == Runtime::Native && !scenario.needs_runtime()
    }

    async fn watched(&self, scenario: &Scenario, run: &Run, beside: impl AsyncFnOnce(&Context)) -> Result<()> {
        let body = async {
            tokio::select! {
                result = (scenario.body)(run) => result?,
                () = async { beside(&self.cx).await; std::future::pending().await } => {}
            }
            self.cx.leaves_nothing().await?;
            let sockets = run.sockets_left();
            ensure!(sockets.is_empty(), "sockets are left: {sockets:?}");
            self.events.catch_up(self.cx.client()).await
        };
        tokio::time::timeout(RUN_WITHIN, body).await.unwrap_or_else(|_elapsed| Err(anyhow!("not within {RUN_WITHIN:?}")))?;
        for event in self.events.all().iter().filter(|event| event.container.starts_with(&run.id)) {
            run.event(event);
        }
        for call in self.gate.calls().iter().filter(|call| call.contains(&run.id)) {
            run.note(format!("call {}", call.split(' ').next().unwrap_or_default()));
        }
        Ok(())
    }
}

/// The run of a scenario without crashes, which must match the scenario.
pub(crate) async fn model(lane: &Lane, scenario: &Scenario) -> Result<Outcome> {
    let outcome = lane.run(scenario, "", None, nothing).await.context("without crashes")?;
    ensure!(outcome.record.of("event ") == scenario.events, "events without crashes: {}", outcome.record.of("event "));
    let calls = if lane.is_native(scenario) { "" } else { scenario.calls };
    ensure!(outcome.record.of("call ") == calls, "calls without crashes: {}", outcome.record.of("call "));
    ensure!(outcome.trace.generations() == scenario.generations && outcome.trace.crashes() == 0, "without crashes: {:#?}", outcome.trace);
    ensure!(outcome.trace.welcomes() == scenario.generations, "each worker is welcomed once: {:#?}", outcome.trace);
    Ok(outcome)
}

/// Does nothing during a run.
pub(crate) async fn nothing(_cx: &Context) {}

/// Works through `jobs` in several lanes. A lane with a failure is replaced by a new one, so that one failure does not
/// become many. Returns at most a few failures.
pub(crate) async fn work<J: 'static>(
    cx: &Context,
    lanes: usize,
    jobs: Vec<J>,
    perform: impl for<'a> Fn(&'a Lane, J) -> std::pin::Pin<Box<dyn Future<Output = Result<()>> + 'a>> + 'static,
) -> Result<Vec<anyhow::Error>> {
    const ENOUGH: usize = 5;
    let jobs = Rc::new(RefCell::new(jobs.into_iter()));
    let failures = Rc::new(RefCell::new(Vec::new()));
    let perform = Rc::new(perform);
    let mut running = tokio::task::JoinSet::<Result<()>>::new();
    let local = tokio::task::LocalSet::new();
    for _lane in 0..lanes {
        let (cx, jobs, failures, perform) = (cx.clone(), Rc::clone(&jobs), Rc::clone(&failures), Rc::clone(&perform));
        running.spawn_local_on(
            async move {
                let mut lane = Lane::new(&cx).await?;
                loop {
                    let job = jobs.borrow_mut().next();
                    let Some(job) = job.filter(|_| failures.borrow().len() < ENOUGH) else { return Ok(()) };
                    if let Err(error) = perform(&lane, job).await {
                        failures.borrow_mut().push(error);
                        lane = Lane::new(&cx).await?;
                    }
                }
            },
            &local,
        );
    }
    local
        .run_until(async {
            while let Some(done) = running.join_next().await {
                done??;
            }
            anyhow::Ok(())
        })
        .await?;
    Ok(failures.take())
}

/// One error of all that failed.
pub(crate) fn verdict(failures: &[anyhow::Error]) -> Result<()> {
    let text: Vec<_> =
        failures.iter().map(|error| error.chain().map(ToString::to_string).collect::<Vec<_>>().join("\n  because: ")).collect();
    ensure!(failures.is_empty(), "{} runs failed (no more were tried after 5):\n{}", failures.len(), text.join("\n"));
    Ok(())
}

/// Waits until a shim of this namespace has a worker, and returns it.
pub(crate) async fn some_worker(cx: &Context) -> Result<i32> {
    eventually("a worker", SOON, async || {
        let is_worker = |child: &shim_tests::proc::Process| child.command.split(' ').any(|word| word == "worker");
        let shims = cx.shims();
        let worker = shims.iter().flat_map(|shim| shim_tests::proc::children(shim.pid)).find(is_worker);
        worker.map(|worker| worker.pid).context("no worker")
    })
    .await
}
