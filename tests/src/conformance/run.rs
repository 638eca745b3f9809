//! Performs many cases, a few at a time.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::child::{self, Subject, Verdict};
use super::clauses::{self, Level};
use super::expect::Expectations;
use super::{Case, report};
use crate::cgroups::Version;

/// The parameters of a run.
#[derive(Debug)]
pub struct Plan {
    /// The programs and settings.
    pub subject: Subject,
    /// Which cases.
    pub cases: Vec<Case>,
    /// The known deviations of the shim.
    pub expectations: Expectations,
    /// How many at a time.
    pub jobs: usize,
    /// A folder for each case that failed.
    pub logs: PathBuf,
}

/// The outcome of one case.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// The case.
    pub case: String,
    /// Its clause.
    pub clause: String,
    /// The verdict.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// The reason if the failure is expected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub known: Option<String>,
    /// How long it took.
    pub seconds: f64,
}

impl Outcome {
    /// The level of its clause.
    pub fn level(&self) -> Level {
        clauses::find(&self.clause).map_or(Level::Must, |clause| clause.level)
    }

    /// Whether it is as expected.
    pub fn is_fine(&self) -> bool {
        match &self.verdict {
            Verdict::Passed => self.known.is_none(),
            Verdict::Failed(_) => self.known.is_some() || self.level() == Level::May,
            Verdict::Skipped(_) => true,
        }
    }
}

/// The results of a run, and the programs it ran on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Results {
    /// The version that the shim prints.
    pub shim: String,
    /// The version that the OCI runtime prints.
    pub engine: String,
    /// Kernel and cgroup version.
    pub host: String,
    /// Seconds since 1970.
    pub at: u64,
    /// By case, in the order of the registry.
    pub outcomes: Vec<Outcome>,
}

impl Results {
    /// Whether it is as expected.
    pub fn is_fine(&self) -> bool {
        self.outcomes.iter().all(Outcome::is_fine)
    }
}

/// Performs them all; calls `on_outcome` with each outcome as it ends.
///
/// Errors: no case can run here.
pub fn run(plan: &Plan, on_outcome: impl Fn(&Outcome) + Sync) -> Result<Results> {
    ensure!(nix::unistd::geteuid().is_root(), "this needs root: it starts shims, containers and namespaces");
    fs::create_dir_all(&plan.logs).with_context(|| format!("make the folder for logs {}", plan.logs.display()))?;
    let (next, done) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let engine = plan.subject.engine.file_name().unwrap_or_default().to_string_lossy().into_owned();
    std::thread::scope(|scope| {
        for _ in 0..plan.jobs.clamp(1, plan.cases.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = plan.cases.get(index) else { return };
                    let outcome = perform(plan, case, &engine);
                    on_outcome(&outcome);
                    done.lock().expect("no panic under this lock").insert(index, outcome);
                }
            });
        }
    });
    let outcomes = done.into_inner().expect("no panic under this lock").into_values().collect();
    let subject = &plan.subject;
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    Ok(Results {
        shim: version(subject, &subject.shim, "-v"),
        engine: version(subject, &subject.engine, "--version"),
        host: host(subject.cgroups),
        at,
        outcomes,
    })
}

fn perform(plan: &Plan, case: &Case, engine: &str) -> Outcome {
    let folder = plan.logs.join(case.name);
    let _none_of_an_earlier_run = fs::remove_dir_all(&folder);
    let (verdict, took) = child::perform(case, &plan.subject, &folder);
    let known = plan.expectations.of(case.name, engine);
    let known = known.filter(|known| !(known.sometimes && verdict == Verdict::Passed)).filter(|_| !matches!(verdict, Verdict::Skipped(_)));
    match &verdict {
        Verdict::Failed(why) => {
            let _also_in_the_output = fs::write(folder.join("failure"), format!("{}\n", report::sentence(case, why)));
        }
        Verdict::Passed | Verdict::Skipped(_) => {
            let _best_effort = fs::remove_dir_all(&folder);
        }
    }
    let known = known.map(|known| known.reason.clone());
    Outcome { case: case.name.to_owned(), clause: case.clause.to_owned(), verdict, known, seconds: round(took) }
}

fn round(time: Duration) -> f64 {
    (time.as_secs_f64() * 100.0).round() / 100.0
}

/// The version that a program prints, on one line; its file name if it prints nothing.
fn version(subject: &Subject, program: &Path, flag: &str) -> String {
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let output = child::ask(subject, program, flag).unwrap_or_default();
    let words = output.lines().map(str::trim).filter(|line| line.to_lowercase().contains("version"));
    let version = words.map(|line| line.rsplit_once(char::is_whitespace).map_or(line, |(_, word)| word).trim_start_matches('v')).next();
    version.map_or_else(|| name.clone(), |version| format!("{name} {version}"))
}

fn host(cgroups: Version) -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let version = kernel.trim().split('-').next().unwrap_or_default();
    format!("Linux {version}, cgroup v{cgroups}")
}
