//! Runs the cases that drive a shim directly: each on a [`Stand`] of its own, with a deadline, a reason when it is skipped, and an audit
//! of leftovers.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::RwLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::audit::Audit;
use crate::runner::{EXECUTOR, Skip, explain, note_time, report_times};
use crate::stand::Stand;
use crate::suite::{self, Shim};
use crate::times::times;
use crate::{eventually, isolation, runner};

/// The body of a case.
pub type Body = fn(Stand) -> Pin<Box<dyn Future<Output = Result<()>>>>;

/// One test function.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// `module::sentence`
    pub name: &'static str,
    /// Its body.
    pub body: Body,
    /// Its deadline.
    pub deadline: Duration,
    /// Whether nothing else may run at the same time: it measures.
    pub alone: bool,
}

impl Case {
    /// A case with the usual deadline.
    pub const fn new(name: &'static str, body: Body) -> Self {
        Self { name, body, deadline: Duration::from_secs(60), alone: false }
    }

    /// Lets nothing else run at the same time.
    #[must_use]
    pub const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Gives it another deadline.
    #[must_use]
    pub const fn within(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }
}

/// Lists the cases of a module: `direct_cases![events: a, b]`.
#[macro_export]
macro_rules! direct_cases {
    ($module:ident: $($name:ident),+ $(,)?) => {
        [$($crate::direct::Case::new(
            concat!(stringify!($module), "::", stringify!($name)),
            |stand| Box::pin($module::$name(stand)),
        )),+]
    };
}

static ALONE: RwLock<()> = RwLock::new(());

/// Runs `cases` the way `cargo test` and nextest expect it; `programs` is the folder with this package's helper programs.
pub fn main(cases: &[Case], programs: &Path) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // more than processors: most of the time they wait
    arguments.test_threads.get_or_insert(4);
    if arguments.list {
        let nothing = Shim { runtime_type: String::new(), binary: None };
        return libtest_mimic::run(&arguments, trials(cases, &nothing, programs)).exit_code();
    }
    let prepared = if runner::is_inside() { Ok(()) } else { suite::fetch() };
    let result = prepared.and_then(|()| Shim::under_test()).and_then(|shim| isolation::run(|| run(&arguments, cases, &shim, programs)));
    result.unwrap_or_else(|error| {
        eprintln!("cannot run: {error:#}");
        ExitCode::from(2)
    })
}

fn run(arguments: &Arguments, cases: &[Case], shim: &Shim, programs: &Path) -> ExitCode {
    let before = Audit::take(&[]);
    let conclusion = libtest_mimic::run(arguments, trials(cases, shim, programs));
    report_times();
    // A systemd starts what it likes meanwhile.
    if !conclusion.has_failed() && !isolation::under_systemd() {
        let settled = Audit::nothing_more_than(&before, &[], Duration::from_secs(10));
        if let Err(error) = EXECUTOR.block_on(settled) {
            eprintln!("clean up after the last test: {error:#}");
            return ExitCode::from(101);
        }
    }
    conclusion.exit_code()
}

fn trials(cases: &[Case], shim: &Shim, programs: &Path) -> Vec<Trial> {
    cases
        .iter()
        .map(|case| {
            let (case, shim, programs) = (*case, shim.clone(), programs.to_owned());
            Trial::ignorable_test(case.name, move || perform(&case, &shim, &programs))
        })
        .collect()
}

fn perform(case: &Case, shim: &Shim, programs: &Path) -> std::result::Result<Completion, Failed> {
    let (_shared, _alone);
    if case.alone {
        _alone = ALONE.write();
    } else {
        _shared = ALONE.read();
    }
    let begin = Instant::now();
    let verdict = catch_unwind(AssertUnwindSafe(|| EXECUTOR.block_on(verdict(case, shim, programs))));
    note_time(begin.elapsed(), case.name);
    match verdict {
        Ok(Ok(())) => Ok(Completion::Completed),
        Ok(Err(error)) => match error.downcast_ref::<Skip>() {
            Some(skip) => Ok(Completion::ignored_with(skip.reason())),
            None => Err(Failed::from(explain(&error))),
        },
        Err(panic) => resume_unwind(panic),
    }
}

async fn verdict(case: &Case, shim: &Shim, programs: &Path) -> Result<()> {
    let stand = Stand::new(shim, programs)?;
    let deadline = case.deadline * times();
    let body = eventually::timeout(deadline, (case.body)(stand.clone())).await;
    body.unwrap_or_else(|_elapsed| Err(anyhow!("the whole test: not within {deadline:?}")))
        .with_context(|| format!("on the stand {}; the last lines of the shims' logs:\n{}", stand.namespace(), stand.last_log_lines()))?;
    stand.leaves_nothing().await
}
