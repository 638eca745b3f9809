//! One case, in a process and namespaces of its own: so every process of the case ends with them.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::{Case, cases};
use crate::bundle;
use crate::cgroups::{self, Version};
use crate::eventually::{self, PATIENCE, SOON, eventually, within};
use crate::runner::{EXECUTOR, Skip, explain};
use crate::stand::Stand;
use crate::suite::Shim;
use crate::times::{TIMES, times};
use crate::{isolation, trace};

/// The result of a case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", content = "detail", rename_all = "lowercase")]
pub enum Verdict {
    /// The clause holds.
    Passed,
    /// It does not, and why.
    Failed(String),
    /// This machine cannot run the case, and why.
    Skipped(String),
}

/// The programs and settings of a case.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The shim's binary.
    pub shim: PathBuf,
    /// The OCI runtime's binary.
    pub engine: PathBuf,
    /// Where the helper programs of this package are.
    pub programs: PathBuf,
    /// The cgroup version that it sees.
    pub cgroups: Version,
    /// The factor by which all deadlines are longer.
    pub patience: u32,
    /// The factor by which cases that repeat something do so more often.
    pub times: u32,
}

impl Subject {
    /// A subject with the settings of [`cgroups::CHOICE`], [`PATIENCE`] and [`TIMES`].
    ///
    /// Errors: there are no such cgroups.
    pub fn new(shim: PathBuf, engine: PathBuf, programs: PathBuf) -> Result<Self> {
        Ok(Self { shim, engine, programs, cgroups: Version::chosen()?, patience: eventually::patience(), times: times() })
    }
}

/// The command with which this program performs one case.
pub const PERFORM: &str = "perform";
/// The program that performs it, beside the other helper programs.
pub const PROGRAM: &str = "shim-conformance";
const VERDICT: &str = "verdict.json";

/// Performs a case in another process, which writes into `folder`. It ends at the case's deadline at the latest, with all its processes.
pub fn perform(case: &Case, subject: &Subject, folder: &Path) -> (Verdict, Duration) {
    // it has a deadline of its own; this one is for a case that does not keep it
    perform_within((case.deadline * subject.times + Duration::from_secs(20)) * subject.patience, case, subject, folder)
}

/// Like [`perform`], with another deadline.
pub fn perform_within(deadline: Duration, case: &Case, subject: &Subject, folder: &Path) -> (Verdict, Duration) {
    let begin = Instant::now();
    let verdict = try_perform(begin + deadline, case, subject, folder).unwrap_or_else(|error| Verdict::Failed(format!("{error:#}")));
    (verdict, begin.elapsed())
}

fn try_perform(deadline: Instant, case: &Case, subject: &Subject, folder: &Path) -> Result<Verdict> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let output = fs::File::create(folder.join("output"))?;
    let mut child = Command::new(subject.programs.join(PROGRAM))
        .arg(PERFORM)
        .args([&subject.shim, &subject.engine, &subject.programs])
        .args([folder, Path::new(case.name)])
        .env(cgroups::CHOICE, subject.cgroups.to_string())
        .env(PATIENCE, subject.patience.to_string())
        .env(TIMES, subject.times.to_string())
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()?;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            // its namespaces end with it, but these have to be removed
            isolation::remove_cgroups_of(child.id());
            return Ok(Verdict::Failed(
                "the case did not end by itself, and was killed together with every process that it had started".to_owned(),
            ));
        }
        std::thread::sleep(Duration::from_millis(5)); // the kernel has no wait with a deadline for a child
    }
    match fs::read(folder.join(VERDICT)) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
        Err(_) => {
            let message = fs::read_to_string(folder.join("output")).unwrap_or_default();
            Ok(Verdict::Failed(format!("the case's own process ended without a verdict: {}", message.trim())))
        }
    }
}

/// The command that runs a program with a flag for its output.
pub const ASK: &str = "ask";

/// The output of `program` with `flag`, run in namespaces of its own, so that all its processes end.
///
/// Errors: it prints nothing in time, or too much.
pub fn ask(subject: &Subject, program: &Path, flag: &str) -> Result<String> {
    EXECUTOR.block_on(async {
        let mut command = tokio::process::Command::new(subject.programs.join(PROGRAM));
        command.arg(ASK).arg(program).arg(flag).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let output = within("the program's output", SOON, bundle::output_of(&mut command.spawn()?)).await??;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    })
}

/// The body of the process that [`ask`] starts.
pub fn answer(arguments: &[String]) -> ExitCode {
    let [program, flag] = arguments else { return ExitCode::from(2) };
    run_tied(|| match Command::new(program).arg(flag).stdin(Stdio::null()).status() {
        Ok(_verdict) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}

/// Runs `inside` in namespaces of its own, which end with the parent of this process.
fn run_tied(inside: impl FnOnce() -> ExitCode) -> ExitCode {
    // the parent may be killed
    let tied = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("die with the parent");
    match tied.and_then(|()| isolation::run(inside)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::from(2)
        }
    }
}

/// The body of that process. `arguments` are those after [`PERFORM`].
pub fn main(arguments: &[String]) -> ExitCode {
    run_tied(|| inside(arguments))
}

fn inside(arguments: &[String]) -> ExitCode {
    let [shim, engine, programs, folder, name] = arguments else { return ExitCode::from(2) };
    let folder = Path::new(folder);
    let subject = Subject::new(shim.into(), engine.into(), programs.into());
    let verdict = match (cases::find(name), subject) {
        (Some(case), Ok(subject)) => judge(&case, &subject, folder),
        (None, _) => Verdict::Failed(format!("there is no case {name}")),
        (_, Err(error)) => Verdict::Failed(format!("{error:#}")),
    };
    let bytes = serde_json::to_vec(&verdict).expect("strings alone");
    match fs::write(folder.join(VERDICT), bytes) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("write the verdict: {error}");
            ExitCode::from(2)
        }
    }
}

fn judge(case: &Case, subject: &Subject, folder: &Path) -> Verdict {
    let verdict = catch_unwind(AssertUnwindSafe(|| EXECUTOR.block_on(try_judge(case, subject, folder))));
    match verdict {
        Ok(Ok(())) => Verdict::Passed,
        Ok(Err(error)) => match error.downcast_ref::<Skip>() {
            Some(skip) => Verdict::Skipped(skip.reason().to_owned()),
            None => Verdict::Failed(explain(&error)),
        },
        Err(panic) => {
            let message = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Verdict::Failed(format!("the case panicked: {}", message.unwrap_or_default()))
        }
    }
}

async fn try_judge(case: &Case, subject: &Subject, folder: &Path) -> Result<()> {
    trace::open(folder)?;
    let shim = Shim { runtime_type: String::new(), binary: Some(subject.shim.clone()) };
    let stand = Stand::with_engine(&shim, &subject.programs, &subject.engine)?;
    for need in case.needs {
        need.check(&stand.path())?;
    }
    let deadline = case.deadline * times();
    let body = eventually::timeout(deadline, (case.body)(stand.clone())).await;
    body.unwrap_or_else(|_elapsed| Err(anyhow!("the whole case: not within {:?}", deadline * eventually::patience())))?;
    leaves_nothing(&stand).await
}

/// Sockets are left to clauses of their own.
async fn leaves_nothing(stand: &Stand) -> Result<()> {
    eventually("nothing of the case is left behind", SOON, async || {
        let mut left = stand.leftovers();
        left.retain(|what| !what.starts_with("socket "));
        ensure!(left.is_empty(), "{left:#?}");
        Ok(())
    })
    .await
}
