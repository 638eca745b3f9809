//! One run of a scenario, and its record: answers, events, runtime calls, and the keeper's descriptors and children.
//!
//! Ids and pids are written as names, so that two runs with the same behaviour have the same record.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use shim_tests::container::{Builder, Container, ExecBuilder, Process};
use shim_tests::context::Context;
use shim_tests::events::Event;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::gate::Gate;
use shim_tests::proc;

use crate::tally::Tally;

/// The record of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Record {
    lines: Vec<String>,
    /// The keeper's descriptors and children at each checkpoint of the scenario.
    held: BTreeMap<&'static str, String>,
}

impl Record {
    /// Checks that `other` is the same.
    ///
    /// Errors: the difference.
    pub(crate) fn agrees_with(&self, other: &Self) -> Result<()> {
        if self == other {
            return Ok(());
        }
        let same = self.lines.iter().zip(&other.lines).take_while(|(a, b)| a == b).count();
        bail!("after {same} lines:\n  without crashes {:#?}\n  now {:#?}", &self.lines[same..], &other.lines[same..])
    }

    /// The lines that begin with `word`, without it, with commas between them.
    pub(crate) fn of(&self, word: &str) -> String {
        self.lines.iter().filter_map(|line| line.strip_prefix(word)).map(str::trim).collect::<Vec<_>>().join(", ")
    }
}

/// A run in progress.
pub(crate) struct Run {
    pub(crate) cx: Context,
    pub(crate) gate: Rc<Gate>,
    /// The container, and the group where there is one.
    pub(crate) id: String,
    /// The messages at which workers crash.
    plan: String,
    /// The run without crashes, once there is one.
    model: Option<Rc<Record>>,
    /// The shim makes the containers without the gate.
    is_native: bool,
    seen: RefCell<Record>,
    pids: RefCell<BTreeMap<u32, String>>,
    sockets: RefCell<Vec<PathBuf>>,
    /// The length of the trace when the scenario's own part began.
    begun_at: Cell<usize>,
}

impl Run {
    pub(crate) fn new(cx: &Context, gate: &Rc<Gate>, id: String, plan: &str, model: Option<Rc<Record>>, is_native: bool) -> Self {
        let (cx, gate, plan) = (cx.clone(), Rc::clone(gate), plan.to_owned());
        Self {
            cx,
            gate,
            id,
            plan,
            model,
            is_native,
            seen: RefCell::default(),
            pids: RefCell::default(),
            sockets: RefCell::default(),
            begun_at: Cell::new(0),
        }
    }

    /// Records a line.
    pub(crate) fn note(&self, line: impl Display) {
        self.seen.borrow_mut().lines.push(line.to_string().replace(&self.id, "ID"));
    }

    /// Adds the record to the tally.
    pub(crate) fn count(&self) {
        let seen = self.seen.borrow();
        let of = |word: &str| seen.lines.iter().filter(|line| line.starts_with(word)).count() as u64;
        Tally::add(|tally| &tally.events, of("event "));
        Tally::add(|tally| &tally.exits, of("event exit"));
        Tally::add(|tally| &tally.answers, seen.lines.len() as u64 - of("event ") - of("call "));
    }

    /// The record so far.
    pub(crate) fn record(self) -> Record {
        self.seen.into_inner()
    }

    /// The path of the trace that the shim writes.
    pub(crate) fn trace_path(&self) -> PathBuf {
        self.plan_path().with_extension("trace")
    }

    /// Writes the plan to the file that workers read when they start.
    pub(crate) fn arm(&self) -> Result<()> {
        Ok(fs::write(self.plan_path(), &self.plan)?)
    }

    /// Removes the plan and the trace.
    pub(crate) fn disarm(&self) {
        for path in [self.plan_path(), self.trace_path()] {
            let _it_need_not_be_there = fs::remove_file(path);
        }
    }

    fn plan_path(&self) -> PathBuf {
        self.cx.daemon().faults().join(&self.id)
    }

    /// Attributes everything so far to another scenario.
    pub(crate) fn begin(&self) -> Result<()> {
        self.begun_at.set(fs::read_to_string(self.trace_path())?.lines().count());
        Ok(())
    }

    /// Waits until the worker has so many requests to wait for a process.
    pub(crate) async fn waits_arrive(&self, count: usize) -> Result<()> {
        eventually_true(format!("{count} Waits arrive"), SOON, || {
            let trace = fs::read_to_string(self.trace_path()).unwrap_or_default();
            trace.lines().filter(|line| line.starts_with("in request") && line.ends_with(" Wait")).count() >= count
        })
        .await
    }

    pub(crate) fn begun_at(&self) -> usize {
        self.begun_at.get()
    }

    /// A container of this run.
    pub(crate) fn container(&self, args: &[&str]) -> Builder {
        self.build(args, &self.id)
    }

    /// Another container of this run.
    pub(crate) fn member(&self, name: &str, args: &[&str]) -> Builder {
        self.build(args, &format!("{}-{name}", self.id))
    }

    fn build(&self, args: &[&str], id: &str) -> Builder {
        let builder = self.cx.container(args).id(id);
        if self.is_native { builder } else { builder.runtime_binary(&self.gate.binary()) }
    }

    /// Creates.
    pub(crate) async fn create(&self, builder: Builder, name: &str) -> Result<Container> {
        let container = builder.create().await?;
        self.name(container.pid, name);
        self.note(format!("create {name}"));
        Ok(container)
    }

    /// Adds.
    pub(crate) async fn add(&self, builder: ExecBuilder) -> Result<Process> {
        let process = builder.add().await?;
        self.note(format!("add {}", process.exec));
        Ok(process)
    }

    /// Starts.
    pub(crate) async fn start(&self, process: &Process, name: &str) -> Result<()> {
        let pid = process.start().await?;
        self.name(pid, name);
        self.note(format!("start {name}: pid of {}", self.named(pid)));
        Ok(())
    }

    /// Records a call with an empty answer.
    pub(crate) fn done(&self, call: &str, answer: Result<(), impl Into<anyhow::Error>>) -> Result<()> {
        answer.map_err(|error| error.into().context(call.to_owned()))?;
        self.note(call);
        Ok(())
    }

    /// Records an error.
    pub(crate) fn refused<T>(&self, call: &str, answer: Result<T, impl Into<anyhow::Error>>) -> Result<()> {
        match answer {
            Ok(_) => bail!("{call} was accepted"),
            Err(error) => {
                self.note(format!("{call}: {:#}", error.into()));
                Ok(())
            }
        }
    }

    /// Records the answer of State.
    pub(crate) async fn state(&self, process: &Process) -> Result<()> {
        let state = process.state().await?;
        self.note(format!("state {}: {:?} pid of {} status {}", process.exec, state.status(), self.named(state.pid), state.exit_status));
        Ok(())
    }

    /// Records the answer of Pids about known processes; their children start and exit at any time.
    pub(crate) async fn pids(&self, container: &Container) -> Result<()> {
        let known = self.pids.borrow().clone();
        let listed = self.cx.client().pids(&container.id).await?;
        let mut pids: Vec<_> = listed.iter().filter_map(|process| known.get(&process.pid)).collect();
        pids.sort();
        self.note(format!("pids {pids:?}"));
        Ok(())
    }

    /// Calls Wait, State and Delete, and records the three answers.
    pub(crate) async fn finish(&self, process: &Process, name: &str) -> Result<()> {
        let waited = self.cx.client().wait(&process.id, &process.exec).await?;
        self.note(format!("wait {name}: {}", waited.exit_status));
        let state = process.state().await?;
        self.note(format!("state {name}: {:?} pid of {} status {}", state.status(), self.named(state.pid), state.exit_status));
        let deleted = process.delete().await?;
        self.note(format!("delete {name}: pid of {} status {}", self.named(deleted.pid), deleted.exit_status));
        ensure!(
            waited.exited_at == state.exited_at && waited.exited_at == deleted.exited_at,
            "{name} exited at {:?}, {:?}, {:?}",
            waited.exited_at,
            state.exited_at,
            deleted.exited_at
        );
        Ok(())
    }

    /// Records an event.
    pub(crate) fn event(&self, event: &Event) {
        let Event { topic, container, exec, pid, status, .. } = event;
        let who = if exec.is_empty() { container } else { exec };
        let status = if *status == 0 { String::new() } else { format!(" {status}") };
        self.note(format!("event {topic} {who}/{}{status}", self.named(*pid)));
    }

    /// Records the keeper's open files by kind, and its children, once they do not change any more.
    pub(crate) async fn held(&self, place: &'static str) -> Result<()> {
        let keeper = self.cx.shim_pid(&self.id)?;
        self.remember_sockets(keeper);
        let held = match self.model.as_ref().and_then(|model| model.held.get(place)) {
            Some(wanted) => {
                eventually(format!("the keeper has the same descriptors and children as without crashes, {place}"), SOON, async || {
                    let now = holdings(keeper)?;
                    ensure!(now == *wanted, "\n  without crashes: {wanted}\n  now:            {now}");
                    Ok(now)
                })
                .await?
            }
            None => at_rest(keeper).await?,
        };
        self.seen.borrow_mut().held.insert(place, held);
        Ok(())
    }

    /// For diagnosing a failure: processes, and the shim's log.
    pub(crate) fn scene(&self) -> String {
        let mut lines = Vec::new();
        let all = proc::all();
        for shim in self.cx.shims() {
            lines.push(format!("keeper {}: {}", shim.pid, holdings(shim.pid).unwrap_or_default()));
            let below = |process: &&proc::Process| {
                process.parent == shim.pid || all.get(&process.parent).is_some_and(|parent| parent.parent == shim.pid)
            };
            for process in all.values().filter(below) {
                let wait = fs::read_to_string(format!("/proc/{}/wchan", process.pid)).unwrap_or_default();
                lines.push(format!("{} {} of {}, {} in {wait}", process.pid, process.comm, process.parent, process.state));
            }
        }
        let log = self.cx.daemon().log();
        let about: Vec<_> = log.lines().filter(|line| line.contains(&self.id)).collect();
        lines.extend(about[about.len().saturating_sub(20)..].iter().map(|line| (*line).to_owned()));
        lines.join("\n    ")
    }

    /// The keeper's sockets that are still there.
    pub(crate) fn sockets_left(&self) -> Vec<String> {
        self.sockets.borrow().iter().filter(|path| path.exists()).map(|path| path.display().to_string()).collect()
    }

    fn remember_sockets(&self, keeper: i32) {
        let Ok(process) = proc::Process::read(keeper) else { return };
        let words: Vec<_> = process.command.split(' ').collect();
        let after = |flag: &str| words.iter().skip_while(|word| **word != flag).nth(1);
        let paths = ["-socket", "-control"].into_iter().filter_map(after).map(|path| path.trim_start_matches("unix://").into());
        *self.sockets.borrow_mut() = paths.collect();
    }

    /// Gives a pid a name.
    pub(crate) fn name(&self, pid: u32, name: &str) {
        if pid == 0 {
            return;
        }
        self.pids.borrow_mut().entry(pid).or_insert_with(|| name.to_owned());
    }

    /// The name of a pid.
    pub(crate) fn named(&self, pid: u32) -> String {
        match pid {
            0 => "none".to_owned(),
            pid => self.pids.borrow().get(&pid).cloned().unwrap_or_else(|| "unknown".to_owned()),
        }
    }
}

/// The descriptors and children of a keeper once they have not changed for a while.
async fn at_rest(keeper: i32) -> Result<String> {
    let (mut last, mut since) = (String::new(), Instant::now());
    eventually("the keeper's descriptors and children do not change", SOON, async || {
        let now = holdings(keeper)?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
        ensure!(since.elapsed() > Duration::from_millis(200), "{last}");
        Ok(last.clone())
    })
    .await
}

fn holdings(keeper: i32) -> Result<String> {
    let mut counts = BTreeMap::<String, usize>::new();
    for target in proc::open_files(keeper)?.into_values() {
        let target = target.display().to_string();
        // files by name, because each run has its own folders; others by kind, without the number
        let kind = match target.split_once(':') {
            Some(("anon_inode", kind)) => kind.to_owned(),
            Some((kind, _)) => kind.to_owned(),
            None => target.rsplit('/').next().unwrap_or_default().to_owned(),
        };
        // Programs: one, or two after an upgrade; the mount of the first one, `/`, until then. A log whose bundle is gone is closed at the next line, which
        // is written only after a crash.
        if kind.starts_with("containerd-shim-") || kind.is_empty() || kind == "log (deleted)" {
            continue;
        }
        *counts.entry(kind).or_default() += 1;
    }
    let children = proc::all().into_values().filter(|process| process.parent == keeper);
    for child in children {
        let kind = if child.is_zombie() { "zombie" } else { "child" };
        *counts.entry(format!("{kind} {}", child.comm)).or_default() += 1;
    }
    Ok(counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect::<Vec<_>>().join(", "))
}
