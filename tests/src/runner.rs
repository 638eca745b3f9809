//! The matrix: each case once per combination of containerd version and OCI runtime that it requests,
//! with a deadline, a reason when it is skipped, and an audit of leftovers.

use std::collections::BTreeMap;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Command, ExitCode};
use std::sync::{Arc, LazyLock, Mutex, RwLock};
use std::time::{Duration, Instant};
use std::{env, fmt};

use anyhow::{Context as _, Result, anyhow};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use tokio::runtime::Runtime as Executor;

use crate::audit::Audit;
use crate::context::Context;
use crate::daemon::Daemon;
use crate::suite::{self, Runtime, Shim, Suite};
use crate::times::times;
use crate::{cgroups, eventually, isolation};

/// The body of a case.
pub type Body = fn(Context) -> Pin<Box<dyn Future<Output = Result<()>>>>;

/// For which combinations a case runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Every containerd with every runtime.
    Full,
    /// Every containerd, where the runtime is not the test's to choose.
    Daemons,
    /// The oldest containerd with runc and the newest with the native engine: for slow cases.
    Ends,
    /// The oldest containerd with runc: for slow cases that depend little on either.
    Oldest,
    /// The containerd that Docker 26 came with.
    Docker,
    /// The newest containerd with every runtime.
    Newest,
    /// One combination: for behaviour of the shim alone.
    Once,
}

impl Scope {
    /// A shim without an engine of its own gets crun instead, once.
    fn combinations(self, has_native: bool) -> Vec<(Suite, Runtime)> {
        let all = Suite::ALL.into_iter().flat_map(|suite| Runtime::ALL.map(|runtime| (suite, runtime)));
        let chosen = all.filter(|combination| self.holds(*combination));
        let replace = |(suite, runtime)| (suite, if runtime == Runtime::Native && !has_native { Runtime::Crun } else { runtime });
        let mut combinations: Vec<_> = chosen.map(replace).collect();
        combinations.dedup();
        combinations
    }

    fn holds(self, (suite, runtime): (Suite, Runtime)) -> bool {
        match self {
            Self::Full => true,
            Self::Daemons => {
                let runtimes = [(Suite::Bookworm, Runtime::Runc), (Suite::Trixie, Runtime::Crun), (Suite::Forky, Runtime::Native)];
                runtimes.contains(&(suite, runtime))
            }
            Self::Ends => matches!((suite, runtime), (Suite::Bookworm, Runtime::Runc) | (Suite::Forky, Runtime::Native)),
            Self::Oldest => (suite, runtime) == (Suite::Bookworm, Runtime::Runc),
            Self::Docker => (suite, runtime) == (Suite::Trixie, Runtime::Runc),
            Self::Newest => suite == Suite::Forky,
            Self::Once => (suite, runtime) == (Suite::Forky, Runtime::Native),
        }
    }
}

/// One test function.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// `module::sentence`
    pub name: &'static str,
    /// Its combinations.
    pub scope: Scope,
    /// Its deadline.
    pub deadline: Duration,
    /// Whether nothing else may run at the same time.
    pub alone: bool,
    /// Its body.
    pub body: Body,
}

impl Case {
    /// A case with the usual deadline that others may run beside.
    pub const fn new(name: &'static str, scope: Scope, body: Body) -> Self {
        Self { name, scope, deadline: Duration::from_secs(60), alone: false, body }
    }

    /// Gives it another deadline.
    #[must_use]
    pub const fn within(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Lets nothing else run at the same time.
    #[must_use]
    pub const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }
}

/// Lists the cases of a module: `cases![lifecycle, Scope::Full: a, b; Scope::Once: c]`.
#[macro_export]
macro_rules! cases {
    ($module:ident, $($scope:expr => $($name:ident),+ $(,)?);+ $(;)?) => {
        vec![$($($crate::runner::Case::new(
            concat!(stringify!($module), "::", stringify!($name)),
            $scope,
            |cx| Box::pin($module::$name(cx)),
        )),+),+]
    };
}

/// The reason why a case can't run here; see [`skip`].
#[derive(Debug)]
pub struct Skip(String);

impl Skip {
    pub(crate) fn reason(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "skipped: {}", self.0)
    }
}

impl std::error::Error for Skip {}

/// A known deviation of the stock shim. A run on it skips the test, unless `X_STOCK_ALL` is set.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// The containerd versions whose shim does so.
    pub versions: &'static [&'static str],
    /// The test, `module::sentence`.
    pub test: &'static str,
    /// What it does instead.
    pub instead: &'static str,
}

/// Skips a case.
pub fn skip<T>(reason: impl Into<String>) -> Result<T> {
    Err(anyhow::Error::new(Skip(reason.into())))
}

/// Skips a case on a daemon that keeps no checkpoints as images.
pub fn needs_checkpoint_images() -> Result<()> {
    if suite::manager().is_some() { skip("x-manager writes checkpoints to a folder that the client names") } else { Ok(()) }
}

/// Skips a case where cgroups lack a controller.
pub fn needs_controller(name: &str) -> Result<()> {
    cgroups::lacks(name).map_or(Ok(()), skip)
}

/// Skips a case where criu does not work.
pub fn needs_criu(criu: &Path) -> Result<()> {
    match Command::new(criu).arg("check").output() {
        Err(error) => skip(format!("{} does not start: {error}", criu.display())),
        Ok(output) if !output.status.success() => {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            skip(format!("criu check: {}", text.lines().last().unwrap_or_default()))
        }
        Ok(_runs) => Ok(()),
    }
}

/// Drives async code for the threads of the test harness.
pub static EXECUTOR: LazyLock<Executor> =
    LazyLock::new(|| tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads can be started"));

static DAEMONS: Mutex<BTreeMap<Suite, Arc<Daemon>>> = Mutex::new(BTreeMap::new());
static ALONE: RwLock<()> = RwLock::new(());
static TIMES: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

/// The main function of a benchmark, in namespaces of its own as the tests are. `plan` is what its arguments ask for.
pub fn benchmark<P>(name: &str, plan: Result<P>, measure: impl AsyncFnOnce(&P) -> Result<()>) -> ExitCode {
    let result = plan.and_then(|plan| {
        if env::var_os("X_TESTS_INNER").is_none() {
            suite::fetch()?;
        }
        isolation::run(|| match EXECUTOR.block_on(measure(&plan)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{name}: {error:#}");
                ExitCode::FAILURE
            }
        })
    });
    result.unwrap_or_else(|error| {
        eprintln!("{name}: {error:#}");
        ExitCode::from(2)
    })
}

/// Runs `cases` the way `cargo test` and nextest expect it; `programs` is the folder with this package's helper programs.
pub fn main(cases: &[Case], known: &'static [Known], programs: &Path) -> ExitCode {
    main_on(Shim::under_test, cases, known, programs)
}

/// Like [`main`], with the shim that `find` finds.
pub fn main_on(find: fn() -> Result<Shim>, cases: &[Case], known: &'static [Known], programs: &Path) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // two threads keep two processors busy; more only make deadlines meaningless
    arguments.test_threads.get_or_insert(2);
    if arguments.list {
        let nothing = Shim { runtime_type: String::new(), binary: None };
        return libtest_mimic::run(&arguments, trials(cases, known, &nothing, programs)).exit_code();
    }
    match prepare(find).and_then(|shim| isolation::run(|| run(&arguments, cases, known, &shim, programs))) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cannot run: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn prepare(find: fn() -> Result<Shim>) -> Result<Shim> {
    if !is_inside() && nix::unistd::geteuid().is_root() {
        suite::fetch()?;
    }
    find()
}

fn run(arguments: &Arguments, cases: &[Case], known: &'static [Known], shim: &Shim, programs: &Path) -> ExitCode {
    let before = Audit::take(&[]);
    let conclusion = libtest_mimic::run(arguments, trials(cases, known, shim, programs));
    report_times();
    let mut code = conclusion.exit_code();
    let daemons = std::mem::take(&mut *DAEMONS.lock().expect("no panic under this lock"));
    for daemon in daemons.values() {
        let _not_under_test = daemon.stop();
    }
    if !conclusion.has_failed() {
        let settled = Audit::nothing_more_than(&before, &[], Duration::from_secs(10));
        if let Err(error) = EXECUTOR.block_on(settled) {
            eprintln!("clean up after the last test: {error:#}");
            code = ExitCode::from(101);
        }
    }
    code
}

/// Whether this process is the one in the run's namespaces.
pub(crate) fn is_inside() -> bool {
    env::var_os("X_TESTS_INNER").is_some()
}

/// Remembers how long a test took, for `X_TESTS_TIMES`.
pub(crate) fn note_time(time: Duration, name: &str) {
    TIMES.lock().expect("no panic under this lock").push((time, name.to_owned()));
}

pub(crate) fn report_times() {
    if env::var_os("X_TESTS_TIMES").is_some() {
        let mut times = std::mem::take(&mut *TIMES.lock().expect("no panic under this lock"));
        times.sort();
        let total: Duration = times.iter().map(|(time, _)| *time).sum();
        for (time, name) in times.iter().rev().take(30) {
            eprintln!("{:7.2} s  {name}", time.as_secs_f64());
        }
        eprintln!("{:7.2} s  all of them", total.as_secs_f64());
    }
}

fn trials(cases: &[Case], known: &'static [Known], shim: &Shim, programs: &Path) -> Vec<Trial> {
    let mut trials = Vec::new();
    for case in cases {
        for (suite, runtime) in case.scope.combinations(shim.is_ours()) {
            let name = format!("{suite}::{runtime}::{}", case.name);
            let trial = One { name: name.clone(), case: *case, suite, runtime, shim: shim.clone(), programs: programs.into(), known };
            trials.push(Trial::ignorable_test(name, move || trial.run()));
        }
    }
    trials
}

/// One case in one combination.
struct One {
    name: String,
    case: Case,
    suite: Suite,
    runtime: Runtime,
    shim: Shim,
    programs: PathBuf,
    known: &'static [Known],
}

impl One {
    fn run(self) -> std::result::Result<Completion, Failed> {
        if self.shim == Shim::stock() && env::var_os("X_STOCK_ALL").is_none() {
            let known = |known: &&Known| known.test == self.case.name && known.versions.contains(&self.suite.version());
            if let Some(known) = self.known.iter().find(known) {
                return Ok(Completion::ignored_with(format!("the stock shim: {}", known.instead)));
            }
        }
        let (_shared, _alone);
        if self.case.alone {
            _alone = ALONE.write();
        } else {
            _shared = ALONE.read();
        }
        let begin = Instant::now();
        let verdict = catch_unwind(AssertUnwindSafe(|| EXECUTOR.block_on(self.verdict())));
        note_time(begin.elapsed(), &self.name);
        match verdict {
            Ok(Ok(())) => Ok(Completion::Completed),
            Ok(Err(error)) => match error.downcast_ref::<Skip>() {
                Some(Skip(reason)) => Ok(Completion::ignored_with(reason)),
                None => Err(Failed::from(explain(&error))),
            },
            Err(panic) => resume_unwind(panic),
        }
    }

    async fn verdict(&self) -> Result<()> {
        if !self.runtime.works() {
            return skip(format!("{} does not work with v1 cgroups beside controllers on v2", self.runtime));
        }
        let daemon = shared_daemon(self.suite, &self.shim).await?;
        let cx = Context::new(daemon, self.runtime, self.shim.clone(), &self.programs).await?;
        let deadline = self.case.deadline * times();
        let body = eventually::timeout(deadline, (self.case.body)(cx.clone())).await;
        body.unwrap_or_else(|_elapsed| Err(anyhow!("the whole test: not within {deadline:?}")))
            .with_context(|| format!("the daemon's log:\n{}", cx.logs()))?;
        cx.leaves_nothing().await
    }
}

/// The error with its sources, and the test's lines in its backtrace.
pub(crate) fn explain(error: &anyhow::Error) -> String {
    let mut text = error.chain().map(ToString::to_string).collect::<Vec<_>>().join("\n  because: ");
    let backtrace = error.backtrace().to_string();
    let is_of_a_test = |line: &&str| line.contains("conformance/cases/") || (line.contains("/tests/") && !line.contains("/tests/src/"));
    for place in backtrace.lines().filter(is_of_a_test) {
        text.push_str("\n  ");
        text.push_str(place.trim());
    }
    text
}

async fn shared_daemon(suite: Suite, shim: &Shim) -> Result<Arc<Daemon>> {
    static STARTING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _one_at_a_time = STARTING.lock().await;
    if let Some(daemon) = DAEMONS.lock().expect("no panic under this lock").get(&suite) {
        return Ok(Arc::clone(daemon));
    }
    let daemon = Arc::new(Daemon::start(suite, shim).await?);
    DAEMONS.lock().expect("no panic under this lock").insert(suite, Arc::clone(&daemon));
    Ok(daemon)
}
