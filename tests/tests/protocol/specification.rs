//! The numbers of `docs/specification.md` with the native engine: none may be exceeded, none may be missing, none may be without a test.
//!
//! With `X_SPECIFICATION=print` the tests print the tables with what they measure, plus a margin, instead of comparing.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use shim_tests::bundle::{Bundle, Container, leave};
use shim_tests::eventually::{SOON, eventually_true};
use shim_tests::kernel_trace::{Activity, KernelTrace};
use shim_tests::proc;
use shim_tests::runner::skip;
use shim_tests::stand::Stand;
use shim_tests::suite::Runtime;

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/specification.md");
const PRINT: &str = "X_SPECIFICATION";

const EXECUTIONS: &str = "Program executions";
const CALLS: &str = "System calls";
const PARTS: &str = "Processes, threads, descriptors";
const MEMORY: &str = "Memory";

/// How often a container and an exec are counted: interruptions add calls, so the fewest are compared.
const ROUNDS: usize = 5;
/// How many States are counted together: how often the keeper is woken for one of them varies.
const STATES: usize = 100;
/// How many further containers of a pod are measured together.
const FURTHER: u64 = 10;
/// How many shims share their executable while their memory is measured.
const SHIMS: u64 = 20;

/// What was measured, line by line.
#[derive(Debug, Default)]
struct Lines(Vec<(String, u64)>);

impl Lines {
    fn add(&mut self, name: impl Into<String>, value: u64) {
        self.0.push((name.into(), value));
    }

    /// The least of all measurements of that name.
    fn add_least(&mut self, name: &str, value: u64) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, least)) => *least = value.min(*least),
            None => self.add(name, value),
        }
    }

    /// Compares it with a table of the document, or prints it with `margin` percent more, rounded down: small numbers have none.
    fn compare(self, section: &str, margin: u64) -> Result<()> {
        if std::env::var_os(PRINT).is_some() {
            let mut text = format!("## {section}\n\n| | at most |\n| --- | ---: |\n");
            for (name, value) in self.0 {
                writeln!(text, "| {name} | {} |", value + value * margin / 100)?;
            }
            println!("{text}");
            return Ok(());
        }
        let promised = table(&fs::read_to_string(DOCUMENT)?, section)?;
        let names = |lines: &[(String, u64)]| lines.iter().map(|(name, _)| name.clone()).collect::<BTreeSet<_>>();
        let (measured, documented) = (names(&self.0), names(&promised));
        ensure!(measured == documented, "{section}: measured {measured:#?}, documented {documented:#?}");
        let most = |name: &str| promised.iter().find(|(promised, _)| promised == name).map_or(0, |(_, most)| *most);
        let exceeded = self.0.iter().filter(|(name, value)| *value > most(name));
        let exceeded: Vec<_> = exceeded.map(|(name, value)| format!("{name}: {value}, at most {} are promised", most(name))).collect();
        ensure!(exceeded.is_empty(), "{section}: {exceeded:#?}");
        Ok(())
    }
}

/// The rows of the table below a heading.
fn table(document: &str, section: &str) -> Result<Vec<(String, u64)>> {
    let (_, rest) = document.split_once(&format!("\n## {section}\n")).with_context(|| format!("{DOCUMENT} has no section {section}"))?;
    let rows = rest.split("\n## ").next().unwrap_or(rest).lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|row| {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [name, value] = cells[..] else { bail!("not two cells: {row}") };
        Ok((name.to_owned(), value.parse().with_context(|| row.to_owned())?))
    })
    .collect()
}

pub(crate) async fn every_section_with_numbers_has_a_test(_stand: Stand) -> Result<()> {
    let document = fs::read_to_string(DOCUMENT)?;
    let sections = document.split("\n## ").skip(1).filter(|section| section.contains("\n| ")).filter_map(|section| section.lines().next());
    let sections: Vec<_> = sections.collect();
    ensure!(sections == [EXECUTIONS, CALLS, PARTS, MEMORY], "{sections:?}");
    for section in sections {
        ensure!(!table(&document, section)?.is_empty(), "{section} is empty");
    }
    Ok(())
}

/// The same stand with the engine that the numbers are of.
fn native(stand: &Stand) -> Result<Stand> {
    Stand::with_engine(stand.shim(), &stand.program(""), Path::new(Runtime::Native.name()))
}

/// A whole life, from `start` to `delete`, as a daemon has it.
async fn life(bundle: Bundle) -> Result<()> {
    let container = bundle.create().await?;
    container.start().await?;
    ensure!(container.finish().await? == 0);
    leave(&container.task, container.shim_pid()?, &container.id).await?;
    container.bundle.delete_command().await?;
    fs::remove_dir_all(&container.bundle.folder)?;
    Ok(())
}

/// The same of a further container in the shim of another.
async fn further_life(bundle: Bundle) -> Result<()> {
    let container = bundle.create().await?;
    container.start().await?;
    ensure!(container.finish().await? == 0);
    container.bundle.delete_command().await?;
    fs::remove_dir_all(&container.bundle.folder)?;
    Ok(())
}

/// What a container, an exec and a further container of a pod do, several times each.
struct Lives {
    container: Vec<Activity>,
    exec: Vec<Activity>,
    further: Vec<Activity>,
}

async fn lives(stand: &Stand) -> Result<Lives> {
    let mut trace = KernelTrace::follow()?;
    let mut lives = Lives { container: Vec::new(), exec: Vec::new(), further: Vec::new() };
    for round in 0..=ROUNDS {
        life(stand.bundle(&format!("c{round}"), &["/bin/true"])).await?;
        lives.container.push(trace.take()?);
    }
    let first = stand.bundle("first", &["sleep", "1000"]).group("pod").run().await?;
    trace.take()?;
    for round in 0..=ROUNDS {
        ensure!(first.run(&format!("e{round}"), &["/bin/true"]).await? == 0);
        lives.exec.push(trace.take()?);
        further_life(stand.bundle(&format!("f{round}"), &["/bin/true"]).group("pod")).await?;
        lives.further.push(trace.take()?);
    }
    ensure!(first.shut_down().await? == 137);
    // the first of each also makes what the others find
    for all in [&mut lives.container, &mut lives.exec, &mut lives.further] {
        all.remove(0);
    }
    Ok(lives)
}

/// A container whose shim's worker hibernates as soon as it may.
fn sleeper(stand: &Stand, id: &str) -> Bundle {
    stand.bundle(id, &["sleep", "1000"]).env("X_SHIM_IDLE_SECONDS", "1")
}

async fn hibernates(container: &Container) -> Result<()> {
    let shim = container.shim_pid()?;
    eventually_true("the worker hibernates", Duration::from_secs(30), || worker_of(shim).is_none()).await
}

/// The same, once it does.
async fn asleep(stand: &Stand) -> Result<Container> {
    let container = sleeper(stand, "asleep").run().await?;
    hibernates(&container).await?;
    Ok(container)
}

fn worker_of(shim: i32) -> Option<i32> {
    let is_worker = |child: &proc::Process| child.command.split(' ').any(|word| word == "worker");
    proc::children(shim).into_iter().find(is_worker).map(|worker| worker.pid)
}

pub(crate) async fn program_executions_are_those_of_the_specification(stand: Stand) -> Result<()> {
    let stand = native(&stand)?;
    let lives = lives(&stand).await?;
    let mut lines = Lines::default();
    let kinds = [
        ("a container: `start`, keeper, worker, the container's program, `delete`", &lives.container),
        ("an exec: its program", &lives.exec),
        ("a further container of a pod: `start`, the container's program, `delete`", &lives.further),
    ];
    for (name, all) in kinds {
        for activity in all {
            lines.add_least(name, activity.executions().len() as u64);
        }
    }
    let mut trace = KernelTrace::follow()?;
    let container = asleep(&stand).await?;
    trace.take()?;
    container.task.state(&container.id, "").await?;
    lines.add("State while the worker is asleep", trace.take()?.executions().len() as u64);
    ensure!(container.run("e", &["/bin/true"]).await? == 0);
    lines.add("an exec while the worker is asleep: a worker, the exec's program", trace.take()?.executions().len() as u64);
    ensure!(container.shut_down().await? == 137);
    lines.compare(EXECUTIONS, 0)?;
    stand.leaves_nothing().await
}

/// The system calls of the parts of a shim; those of the containers' programs are left out.
#[derive(Debug, Default)]
struct Calls {
    start: u64,
    keeper: u64,
    /// The worker and performers.
    forks: u64,
    init: u64,
    delete: u64,
}

impl Calls {
    /// Of each process, the generation says what it is: the test starts commands, `start` the keeper, the keeper workers and performers,
    /// a performer the process that becomes the container's.
    fn of(activity: &Activity) -> Self {
        let mut calls = Self::default();
        let start = activity.0.iter().find(|span| span.generation == 1 && span.program.is_some()).map(|span| span.process);
        for span in &activity.0 {
            let part = match (span.generation, &span.program) {
                (1, Some(_)) if Some(span.process) == start => &mut calls.start,
                (1, Some(_)) => &mut calls.delete,
                (2, _) => &mut calls.keeper,
                (3, _) => &mut calls.forks,
                (4, None) => &mut calls.init,
                // forks of the test, and programs of containers
                _ => continue,
            };
            *part += span.count();
        }
        calls
    }

    fn all(&self) -> u64 {
        self.start + self.keeper + self.forks + self.init + self.delete
    }
}

pub(crate) async fn system_calls_are_those_of_the_specification(stand: Stand) -> Result<()> {
    let stand = native(&stand)?;
    let lives = lives(&stand).await?;
    let mut lines = Lines::default();
    for (what, all) in [("a container", &lives.container), ("an exec", &lives.exec), ("a further container of a pod", &lives.further)] {
        for calls in all.iter().map(Calls::of) {
            let commands = [("`start`", calls.start), ("`delete`", calls.delete)];
            let parts = [("keeper", calls.keeper), ("its forks, worker and performer", calls.forks)];
            for (part, count) in commands.into_iter().filter(|_| what != "an exec").chain(parts) {
                lines.add_least(&format!("{what}: {part}"), count);
            }
            lines.add_least(&format!("{what}: the process that becomes its own, until execve"), calls.init);
            lines.add_least(&format!("{what}: all of these"), calls.all());
        }
    }
    let mut trace = KernelTrace::follow()?;
    let container = stand.bundle("awake", &["sleep", "1000"]).run().await?;
    lines.add("a hundred States, answered by a worker", of_states(&mut trace, &container).await?);
    ensure!(container.shut_down().await? == 137);
    let container = asleep(&stand).await?;
    lines.add("a hundred States, answered by the keeper alone", of_states(&mut trace, &container).await?);
    ensure!(container.shut_down().await? == 137);
    lines.compare(CALLS, 25)?;
    stand.leaves_nothing().await
}

/// The calls of a hundred States, the fewest of several measurements.
async fn of_states(trace: &mut KernelTrace, container: &Container) -> Result<u64> {
    let mut least = u64::MAX;
    for _round in 0..ROUNDS {
        trace.take()?;
        for _state in 0..STATES {
            container.task.state(&container.id, "").await?;
        }
        least = least.min(Calls::of(&trace.take()?).all());
    }
    Ok(least)
}

/// What shims consist of.
#[derive(Debug, Default)]
struct Parts {
    processes: u64,
    threads: u64,
    descriptors: u64,
    pss_kib: u64,
    anonymous_kib: u64,
    tables_kib: u64,
}

impl Parts {
    /// The sum of several shims.
    async fn of(shims: &[&Container]) -> Result<Self> {
        let mut parts = Self::default();
        for container in shims {
            let shim = container.shim_pid()?;
            for pid in [shim].into_iter().chain(worker_of(shim)) {
                let is_single = || proc::status_field(pid, "Threads").is_ok_and(|count| count == "1");
                eventually_true("the threads that a call has needed have exited", SOON * 2, is_single).await?;
                parts.processes += 1;
                parts.threads += 1;
                parts.descriptors += proc::fewest_open_files(pid).await? as u64;
                parts.pss_kib += rollup(pid, "Pss:")?;
                parts.anonymous_kib += rollup(pid, "Anonymous:")?;
                parts.tables_kib += proc::status_field(pid, "VmPTE")?.trim_end_matches(" kB").trim().parse::<u64>()?;
            }
        }
        Ok(parts)
    }

    /// What each of `count` has that others have not, rounded up.
    fn each(&self, others: &Self, count: u64) -> Self {
        let each = |all: fn(&Self) -> u64| all(self).saturating_sub(all(others)).div_ceil(count);
        Self {
            processes: each(|parts| parts.processes),
            threads: each(|parts| parts.threads),
            descriptors: each(|parts| parts.descriptors),
            pss_kib: each(|parts| parts.pss_kib),
            anonymous_kib: each(|parts| parts.anonymous_kib),
            tables_kib: each(|parts| parts.tables_kib),
        }
    }
}

/// A size of all mappings of a process, in KiB.
fn rollup(pid: i32, name: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("smaps_rollup has no {name}"))?;
    Ok(value.trim().trim_end_matches(" kB").parse()?)
}

/// Each of `shims` shims awake, each asleep, and each further container of a pod.
async fn parts(stand: &Stand, shims: u64) -> Result<[(&'static str, Parts); 3]> {
    let mut containers = Vec::new();
    for number in 0..shims {
        containers.push(stand.bundle(&format!("awake{number}"), &["sleep", "1000"]).run().await?);
    }
    let awake = Parts::of(&containers.iter().collect::<Vec<_>>()).await?.each(&Parts::default(), shims);
    all_shut_down(containers).await?;

    let mut containers = Vec::new();
    for number in 0..shims {
        containers.push(sleeper(stand, &format!("asleep{number}")).run().await?);
    }
    for container in &containers {
        hibernates(container).await?;
    }
    let asleep = Parts::of(&containers.iter().collect::<Vec<_>>()).await?.each(&Parts::default(), shims);
    all_shut_down(containers).await?;

    let first = stand.bundle("first", &["sleep", "1000"]).group("pod").run().await?;
    let alone = Parts::of(&[&first]).await?;
    let mut others = Vec::new();
    for number in 0..FURTHER {
        others.push(stand.bundle(&format!("further{number}"), &["sleep", "1000"]).group("pod").run().await?);
    }
    let further = Parts::of(&[&first]).await?.each(&alone, FURTHER);
    for other in others {
        ensure!(other.destroy().await? == 137);
    }
    ensure!(first.shut_down().await? == 137);
    Ok([("a shim awake", awake), ("a shim asleep", asleep), ("each further container of a pod", further)])
}

async fn all_shut_down(containers: Vec<Container>) -> Result<()> {
    for container in containers {
        ensure!(container.shut_down().await? == 137);
    }
    Ok(())
}

pub(crate) async fn processes_threads_and_descriptors_are_those_of_the_specification(stand: Stand) -> Result<()> {
    let stand = native(&stand)?;
    let mut lines = Lines::default();
    for (what, parts) in parts(&stand, 1).await? {
        lines.add(format!("{what}: processes"), parts.processes);
        lines.add(format!("{what}: threads"), parts.threads);
        lines.add(format!("{what}: descriptors"), parts.descriptors);
    }
    lines.compare(PARTS, 0)?;
    stand.leaves_nothing().await
}

pub(crate) async fn memory_is_that_of_the_specification(stand: Stand) -> Result<()> {
    let stand = native(&stand)?;
    if has_symbols(stand.binary())? {
        return skip(format!("the specification is that of a release build, and {} is none", stand.binary().display()));
    }
    let mut lines = Lines::default();
    for (what, parts) in parts(&stand, SHIMS).await? {
        lines.add(format!("{what}: PSS, KiB"), parts.pss_kib);
        lines.add(format!("{what}: anonymous, KiB"), parts.anonymous_kib);
        lines.add(format!("{what}: page tables, KiB"), parts.tables_kib);
    }
    lines.compare(MEMORY, 20)?;
    stand.leaves_nothing().await
}

/// Whether a program has a symbol table, which a release build has not. Fields are those of elf(5), 64 bits.
fn has_symbols(program: &Path) -> Result<bool> {
    const SHT_SYMTAB: u64 = 2;
    let bytes = fs::read(program)?;
    let number = |at: usize, size: usize| {
        let field = bytes.get(at..at + size).context("no whole ELF file")?;
        anyhow::Ok(field.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    };
    let (sections, size, count) = (number(0x28, 8)?, number(0x3a, 2)?, number(0x3c, 2)?);
    for index in 0..count {
        if number(usize::try_from(sections + index * size + 4)?, 4)? == SHT_SYMTAB {
            return Ok(true);
        }
    }
    Ok(false)
}
