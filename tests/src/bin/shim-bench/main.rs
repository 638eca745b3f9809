//! Measures shims side by side, interleaved in one run, through a real containerd. Needs root.
//!
//! ```text
//! shim-bench --shim go=stock@crun --shim ours=target/…/containerd-shim-x-v2@native [--containerd 1.6|1.7|2.1] [--runtime runc|crun|native]
//!            [--rounds 30] [--containers 100] [--probed 20] [--execs 5000] [--no-seccomp] [--upgrade] [--rest]
//!            [--only PART,…] [--skip PART,…] [--json] [--plot FILE.svg]
//! ```
//! `--shim NAME=PATH[@RUNTIME[+keeper]]`: with `+keeper`, its pods have no pause container, but the shim holds their namespaces. `stock` is the shim that comes with that containerd; its runtime is `--runtime` unless it is named. A shim's
//! runtime type follows from its file name. Ratios are to the first shim. Containers have the seccomp profile of `ctr run --seccomp`.
//! `--probed` is how many containers have an exec each second. For a shim with keepers, `--upgrade` upgrades all shims whose memory was
//! measured, in one go, and `--rest` measures them again when all their workers hibernate.
//!
//! | part | module | measures |
//! | --- | --- | --- |
//! | latency | `latency` | the time of one container, and of one exec |
//! | load | `latency` | containers per second of 1, 2 and 8 clients |
//! | cost | `cost` | processor time of one container, and of one exec |
//! | counts | `cost` | program executions and system calls of the same |
//! | probes | `probes` | processor time of containers with an exec each second |
//! | stdout | `output` | the throughput of stdout, and its processor time |
//! | execs | `execs` | hundreds of execs of one container, without a daemon |
//! | memory | `memory` | memory of idle containers' shims |
//! | pods | `pods` | pods through CRI: the time of their steps, processor time, memory of idle ones. Only where `--only` names it |

mod cost;
mod execs;
mod latency;
mod memory;
mod output;
mod plot;
mod pods;
mod probes;
mod report;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::{env, fs};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use shim_tests::container::Builder;
use shim_tests::context::Context;
use shim_tests::cri::Sandboxer;
use shim_tests::daemon::Daemon;
use shim_tests::runner::{self, Skip};
use shim_tests::suite::{Runtime, Shim, Suite};

use report::{Column, Figure, Figures};

fn main() -> ExitCode {
    runner::benchmark("shim-bench", arguments(), measure)
}

/// What to measure.
struct Plan {
    shims: Vec<Choice>,
    suite: Suite,
    containers: usize,
    probed: usize,
    rounds: usize,
    execs: usize,
    only: Option<String>,
    skip: String,
    seccomp: bool,
    upgrade: bool,
    rest: bool,
    json: bool,
    plot: Option<PathBuf>,
}

/// A shim with the runtime that it uses.
struct Choice {
    name: String,
    shim: Shim,
    runtime: Runtime,
    sandboxer: Sandboxer,
}

fn arguments() -> Result<Plan> {
    let mut plan = Plan {
        shims: Vec::new(),
        suite: Suite::Bookworm,
        containers: 100,
        probed: 20,
        rounds: 30,
        execs: 5000,
        only: None,
        skip: String::new(),
        seccomp: true,
        upgrade: false,
        rest: false,
        json: false,
        plot: None,
    };
    let mut usual = Runtime::Runc;
    let mut named = Vec::new();
    let mut rest = env::args().skip(1);
    while let Some(flag) = rest.next() {
        let mut value = || rest.next().with_context(|| format!("{flag} needs a value"));
        match flag.as_str() {
            "--shim" => named.push(value()?),
            "--containerd" => {
                let value = value()?;
                plan.suite = Suite::ALL.into_iter().find(|suite| suite.version() == value).context("1.6, 1.7 or 2.1")?;
            }
            "--runtime" => usual = runtime(&value()?)?,
            "--containers" => plan.containers = value()?.parse()?,
            "--probed" => plan.probed = value()?.parse()?,
            "--rounds" => plan.rounds = value()?.parse()?,
            "--execs" => plan.execs = value()?.parse()?,
            "--only" => plan.only = Some(parts(value()?)?),
            "--skip" => plan.skip = parts(value()?)?,
            "--no-seccomp" => plan.seccomp = false,
            "--upgrade" => plan.upgrade = true,
            "--rest" => plan.rest = true,
            "--json" => plan.json = true,
            // of the folder in which it was started: the run has mounts of its own, but no folder
            "--plot" => plan.plot = Some(env::current_dir()?.join(value()?)),
            other => bail!("unknown argument {other}; see the head of tests/src/bin/shim-bench/main.rs"),
        }
    }
    for value in named {
        let (name, program) = value.split_once('=').context("--shim is NAME=PATH[@RUNTIME]")?;
        let (sandboxer, program) = pods::sandboxer(program);
        let (path, runtime) = match program.rsplit_once('@') {
            Some((path, word)) => (path, runtime(word)?),
            None => (program, usual),
        };
        let shim = shim(path)?;
        ensure!(shim.is_ours() || runtime != Runtime::Native, "{name}: a shim without an engine of its own needs runc or crun");
        ensure!(sandboxer == Sandboxer::Pause || plan.suite == Suite::Forky, "{name}: no shim holds pods before containerd 2");
        plan.shims.push(Choice { name: name.to_owned(), shim, runtime, sandboxer });
    }
    ensure!(!plan.shims.is_empty(), "name at least one --shim NAME=PATH[@RUNTIME]");
    ensure!(plan.containers > 0 && plan.probed > 0 && plan.rounds > 0 && plan.execs > 0, "nothing to measure");
    Ok(plan)
}

/// What can be measured.
const PARTS: [&str; 9] = ["latency", "load", "cost", "counts", "probes", "stdout", "execs", "memory", "pods"];

/// A list of parts, separated by commas.
fn parts(list: String) -> Result<String> {
    match list.split(',').find(|part| !PARTS.contains(part)) {
        Some(unknown) => bail!("unknown part {unknown}; there are {}", PARTS.join(", ")),
        None => Ok(list),
    }
}

fn runtime(word: &str) -> Result<Runtime> {
    Runtime::ALL.into_iter().find(|runtime| runtime.name() == word).with_context(|| format!("{word} is not runc, crun or native"))
}

fn shim(path: &str) -> Result<Shim> {
    if path == "stock" {
        return Ok(Shim::stock());
    }
    let binary = PathBuf::from(path).canonicalize().with_context(|| path.to_owned())?;
    let name = Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = name.strip_prefix("containerd-shim-").context("a shim is called containerd-shim-NAME-vN")?;
    let (name, version) = name.rsplit_once('-').context("a shim is called containerd-shim-NAME-vN")?;
    Ok(Shim { runtime_type: format!("io.containerd.{name}.{version}"), binary: Some(binary) })
}

/// One shim under measurement.
struct Subject {
    name: String,
    shim: Shim,
    runtime: Runtime,
    sandboxer: Sandboxer,
    bed: Bed,
    figures: Figures,
}

impl Subject {
    fn note(&mut self, name: &str, value: f64) {
        self.figures.note(name, Figure::single(value));
    }

    /// Notes the median and the quartiles of samples.
    fn note_all(&mut self, name: &str, samples: Vec<f64>) {
        if let Some(figure) = Figure::of(samples) {
            self.figures.note(name, figure);
        }
    }
}

/// Where its containers run; cheap to clone.
#[derive(Clone)]
struct Bed {
    cx: Context,
    /// The seccomp profile of every container, or null.
    seccomp: Arc<Value>,
}

impl Bed {
    async fn new(plan: &Plan, choice: &Choice, programs: &Path) -> Result<Self> {
        let daemon = Arc::new(Daemon::start(plan.suite, &choice.shim).await?);
        let cx = Context::new(daemon, choice.runtime, choice.shim.clone(), programs).await?;
        let seccomp = if plan.seccomp { default_profile(&cx)? } else { Value::Null };
        Ok(Self { cx, seccomp: Arc::new(seccomp) })
    }

    /// A container that runs `args`.
    fn container(&self, args: &[&str]) -> Builder {
        let seccomp = &self.seccomp;
        let builder = self.cx.container(args);
        if seccomp.is_null() { builder } else { builder.spec(|spec| spec.with(|spec| spec["linux"]["seccomp"] = Value::clone(seccomp))) }
    }
}

/// The profile that containerd's client puts into a container's specification.
fn default_profile(cx: &Context) -> Result<Value> {
    const ID: &str = "profile";
    let ctr = |arguments: &[&str]| {
        let mut command = Command::new(cx.suite().program("ctr"));
        command.arg("--address").arg(cx.daemon().address()).args(["--namespace", "profiles", "containers"]).args(arguments);
        let output = command.output().context("run ctr")?;
        ensure!(output.status.success(), "ctr {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(output.stdout)
    };
    let root = shim_tests::rootfs::shared()?.display().to_string();
    ctr(&["create", "--rootfs", "--seccomp", &root, ID, "/bin/true"])?;
    let spec = ctr(&["info", "--spec", ID])?;
    ctr(&["delete", ID])?;
    let mut spec: Value = serde_json::from_slice(&spec).context("the specification from ctr")?;
    let profile = spec["linux"]["seccomp"].take();
    ensure!(profile["syscalls"].as_array().is_some_and(|rules| !rules.is_empty()), "ctr made no seccomp profile");
    Ok(profile)
}

async fn measure(plan: &Plan) -> Result<()> {
    let programs = env::current_exe()?.parent().context("a file is in a folder")?.to_owned();
    let load = fs::read_to_string("/proc/loadavg")?;
    let mut subjects = Vec::new();
    for choice in &plan.shims {
        let bed = Bed::new(plan, choice, &programs).await.with_context(|| choice.name.clone())?;
        let (name, shim, runtime, sandboxer) = (choice.name.clone(), choice.shim.clone(), choice.runtime, choice.sandboxer);
        subjects.push(Subject { name, shim, runtime, sandboxer, bed, figures: Figures::default() });
    }
    let lists = |list: &str, part: &str| list.split(',').any(|listed| listed == part);
    let wanted = |part: &str| plan.only.as_deref().is_none_or(|only| lists(only, part)) && !lists(&plan.skip, part);
    if wanted("latency") {
        begin(&mut subjects, latency::SECTION);
        latency::measure(&mut subjects, plan.rounds).await?;
    }
    if wanted("load") {
        begin(&mut subjects, "Several clients at once");
        latency::of_several_clients(&mut subjects).await?;
    }
    if wanted("cost") {
        begin(&mut subjects, "Processor time");
        or_skipped(cost::processor_time(&mut subjects, plan.rounds).await)?;
    }
    if wanted("counts") {
        begin(&mut subjects, "Counts");
        or_skipped(cost::counts(&mut subjects, plan, &programs).await)?;
    }
    if wanted("probes") {
        begin(&mut subjects, &format!("{} containers with an exec each second", plan.probed));
        or_skipped(probes::measure(&mut subjects, plan.probed).await)?;
    }
    if wanted("stdout") {
        begin(&mut subjects, "Output");
        output::measure(&mut subjects).await?;
    }
    if wanted("execs") {
        begin(&mut subjects, "Many execs, without a daemon");
        execs::measure(&mut subjects, plan, &programs).await?;
    }
    if wanted("memory") {
        begin(&mut subjects, &format!("Memory of {} idle containers' shims", plan.containers));
        memory::measure(&mut subjects, plan).await?;
    }
    if plan.only.as_deref().is_some_and(|only| lists(only, "pods")) {
        begin(&mut subjects, &format!("Pods, and {} idle ones without containers", plan.containers));
        pods::measure(&mut subjects, plan).await?;
    }
    let columns: Vec<Column<'_>> = subjects.iter().map(|subject| (subject.name.as_str(), &subject.figures)).collect();
    if let Some(path) = &plan.plot {
        fs::write(path, plot::svg(&latency::PANELS, &columns)).with_context(|| path.display().to_string())?;
    }
    if plan.json {
        println!("{}", serde_json::to_string_pretty(&report::json(&columns))?);
    } else {
        print!("{}{}", introduction(plan, &load)?, report::markdown(&columns));
    }
    Ok(())
}

fn begin(subjects: &mut [Subject], section: &str) {
    eprintln!("{section} …");
    subjects.iter_mut().for_each(|subject| subject.figures.begin(section));
}

/// Leaves out figures that cannot be measured here, with the reason.
fn or_skipped(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.downcast_ref::<Skip>().is_some() => {
            eprintln!("{error:#}");
            Ok(())
        }
        other => other,
    }
}

/// What the figures are of, and how to repeat them.
fn introduction(plan: &Plan, load: &str) -> Result<String> {
    let mut text = String::from("# Benchmark\n\n");
    let target = if plan.only.as_deref() == Some("pods") { "bench-pods" } else { "bench" };
    text.push_str("Shims side by side in one run, taking turns, through the same version of containerd. Repeat it with ");
    text.push_str(&format!("`make {target}` (root; the quieter the\n"));
    text.push_str("machine, the better). Cells are medians, with quartiles in brackets, and the ratio to the first column.\n\n");
    let plotted = plan.plot.as_ref().and_then(|path| path.file_name()).map(|name| name.to_string_lossy());
    if let Some(name) = plotted {
        text.push_str(&format!("![Latencies]({name})\n\n"));
    }
    let mut programs = vec![plan.suite.to_string()];
    for runtime in Runtime::programs() {
        if plan.shims.iter().any(|choice| choice.runtime == runtime) {
            let output = Command::new(plan.suite.runtime(runtime)).arg("--version").output()?;
            programs.push(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().replace(" version", ""));
        }
    }
    let seccomp = if plan.seccomp { "with the seccomp profile of `ctr run --seccomp`" } else { "without seccomp" };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let processors = std::thread::available_parallelism()?;
    text.push_str(&format!("{}; containers {seccomp}; {} rounds; Linux {}, ", programs.join(", "), plan.rounds, kernel.trim()));
    let load = load.split(' ').next().unwrap_or_default();
    text.push_str(&format!("{processors} processors, load average {load} before it began.\n\n"));
    Ok(text)
}
