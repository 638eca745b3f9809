//! `upgrade`: replaces the program of running shims.
//!
//! **Invariant:** a bounded number of shims is upgraded at a time, and the result of each is reported.
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::survey::{Found, survey};
use super::{Error, print_json, table};
use crate::chain::chain;
use crate::control;
use crate::handover::{ControlRequest, PartResult, Snapshot, UpgradeReport};
use crate::invocation::UpgradeOrder;

/// How long a keeper may take: longer than its own timeouts of all steps.
const PATIENCE: Duration = Duration::from_secs(90);
/// The default for the most shims that are upgraded at once.
const MOST_AT_ONCE: usize = 8;

/// A shim, and the result of its upgrade.
struct Target {
    control: PathBuf,
    snapshot: Snapshot,
    result: Result<UpgradeReport, control::Error>,
    took: Duration,
}

/// The result that is shown for a shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Upgraded,
    Unchanged,
    /// A part of it runs the old program.
    RolledBack,
    /// It exited with its last container meanwhile.
    Gone,
    /// Unknown.
    Failed,
}

/// Upgrades shims. Returns whether all of them run the program now.
pub(crate) fn upgrade(order: &UpgradeOrder) -> Result<bool, Error> {
    let path = order.to.clone().unwrap_or_else(own_path);
    let program = open(&path)?;
    let (chosen, silent) = choose(order)?;
    let path = path.canonicalize().unwrap_or(path);
    let request = ControlRequest::Upgrade { path: path.to_string_lossy().into_owned(), keeper_too: !order.worker_only };
    let total = chosen.len();
    let queue = Mutex::new(chosen.into_iter());
    let (done, targets) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let next = queue.lock().map(|mut queue| queue.next()).ok().flatten();
            let Some((control, snapshot)) = next else { return };
            let begun = Instant::now();
            let result = control::upgrade(&control, &request, program.as_fd(), begun + PATIENCE);
            let target = Target { control, snapshot, result, took: begun.elapsed() };
            let count = done.fetch_add(1, Ordering::Relaxed) + 1;
            if !order.query.json {
                eprintln!("{count}/{total} {}", target.line());
            }
            if let Ok(mut targets) = targets.lock() {
                targets.push(target);
            }
        }
    };
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..order.at_once.unwrap_or_else(at_once).min(total) {
            scope.spawn(work);
        }
    });
    let mut targets = targets.into_inner().unwrap_or_default();
    targets.sort_by_key(Target::name);
    let summary = Summary::of(&targets, silent, begun.elapsed());
    if order.query.json {
        print_json(&json!({ "shims": targets.iter().map(Target::to_json).collect::<Vec<_>>(), "summary": summary.to_json() }))?;
    } else {
        io::stdout().lock().write_all(summary.to_text(&targets).as_bytes())?;
    }
    Ok(summary.is_success())
}

/// The number of processors: more would only wait for each other, and clients with them.
fn at_once() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(MOST_AT_ONCE)
}

fn own_path() -> PathBuf {
    std::fs::read_link("/proc/self/exe").unwrap_or_else(|_| "/proc/self/exe".into())
}

/// Opens the program, so that all shims get the same one even if its file is replaced.
fn open(path: &Path) -> Result<File, Error> {
    let failed = |source| Error::Program { path: path.to_owned(), source };
    let program = File::open(path).map_err(failed)?;
    let meta = program.metadata().map_err(failed)?;
    let refuse = |why| Err(Error::NoProgram { path: path.to_owned(), why });
    if !meta.is_file() {
        return refuse("it is not a file");
    }
    if meta.permissions().mode() & 0o111 == 0 {
        return refuse("it is not executable");
    }
    Ok(program)
}

/// The selected shims, and how many did not answer.
fn choose(order: &UpgradeOrder) -> Result<(Vec<(PathBuf, Snapshot)>, usize), Error> {
    let (mut alive, mut silent) = (Vec::new(), 0);
    for shim in survey(&order.query)? {
        match shim.found {
            Found::Alive(snapshot) => alive.push((shim.control, *snapshot)),
            Found::Silent(_) => silent += 1,
            Found::Dead => {}
        }
    }
    if order.all {
        return Ok((alive, silent));
    }
    let knows = |snapshot: &Snapshot, id: &str| snapshot.group == id || snapshot.state.iter().any(|(key, _)| key == id);
    let missing: Vec<&str> =
        order.ids.iter().map(String::as_str).filter(|id| !alive.iter().any(|(_, snapshot)| knows(snapshot, id))).collect();
    if !missing.is_empty() {
        return Err(Error::NotAll { ids: missing.join(", "), namespace: order.query.namespace.clone(), silent });
    }
    alive.retain(|(_, snapshot)| order.ids.iter().any(|id| knows(snapshot, id)));
    Ok((alive, 0))
}

impl Target {
    fn name(&self) -> String {
        format!("{}/{}", self.snapshot.namespace, self.snapshot.group)
    }

    fn verdict(&self) -> Verdict {
        match &self.result {
            // One that shuts down removes its socket; one that crashes does not.
            Err(error) if error.is_gone() && !self.control.exists() => Verdict::Gone,
            Err(_) => Verdict::Failed,
            Ok(report) => verdict(report),
        }
    }

    /// Why the upgrade did not succeed.
    fn why(&self) -> Option<String> {
        match &self.result {
            Err(_) if self.verdict() == Verdict::Gone => None,
            Err(error) => Some(chain(error)),
            Ok(report) => why(report),
        }
    }

    fn line(&self) -> String {
        let (name, why) = (table::printable(&self.name()), self.why().map(|why| format!(": {}", table::printable(&why))));
        let versions = match &self.result {
            Ok(report) if self.verdict() == Verdict::Upgraded => format!(" from {} to {}", report.from, report.to),
            _ => String::new(),
        };
        format!("{name} {}{}{}", self.verdict().name(), table::printable(&versions), why.unwrap_or_default())
    }

    fn to_json(&self) -> Value {
        json!({
            "namespace": self.snapshot.namespace,
            "group": self.snapshot.group,
            "control": self.control.to_string_lossy(),
            "keeper_pid": self.snapshot.keeper_pid,
            "result": self.verdict().name(),
            "why": self.why(),
            "report": self.result.as_ref().ok().map(report_json),
            "took_ms": self.took.as_secs_f64() * 1e3,
        })
    }
}

fn verdict(report: &UpgradeReport) -> Verdict {
    use PartResult as R;
    match (&report.worker, &report.keeper) {
        (R::Kept(_) | R::RolledBack(_), _) | (_, R::Kept(_) | R::RolledBack(_)) => Verdict::RolledBack,
        (R::Upgraded, _) | (_, R::Upgraded) => Verdict::Upgraded,
        (R::Unasked | R::Unchanged, R::Unasked | R::Unchanged) => Verdict::Unchanged,
    }
}

/// Why a part of a shim runs the previous program.
pub(super) fn why(report: &UpgradeReport) -> Option<String> {
    let part = |name: &str, result: &PartResult| match result {
        PartResult::Kept(why) => Some(format!("the {name} was kept: {why}")),
        PartResult::RolledBack(why) => Some(format!("the {name} was rolled back: {why}")),
        PartResult::Unasked | PartResult::Unchanged | PartResult::Upgraded => None,
    };
    let parts: Vec<String> = [part("worker", &report.worker), part("keeper", &report.keeper)].into_iter().flatten().collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// A report as JSON.
pub(super) fn report_json(report: &UpgradeReport) -> Value {
    let part = |result: &PartResult| {
        let (result, why) = match result {
            PartResult::Unasked => ("unasked", None),
            PartResult::Unchanged => ("unchanged", None),
            PartResult::Upgraded => ("upgraded", None),
            PartResult::Kept(why) => ("kept", Some(why)),
            PartResult::RolledBack(why) => ("rolled-back", Some(why)),
        };
        json!({ "result": result, "why": why })
    };
    json!({
        "from": report.from,
        "to": report.to,
        "path": report.path,
        "at_seconds": report.at_seconds,
        "worker": part(&report.worker),
        "keeper": part(&report.keeper),
        "pause_ms": report.pause_nanos as f64 / 1e6,
    })
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Upgraded => "upgraded",
            Self::Unchanged => "unchanged",
            Self::RolledBack => "rolled-back",
            Self::Gone => "gone",
            Self::Failed => "failed",
        }
    }
}

/// How many of which.
struct Summary {
    counts: [(Verdict, usize); 5],
    /// Keepers that did not answer.
    silent: usize,
    pause: Duration,
    took: Duration,
}

impl Summary {
    fn of(targets: &[Target], silent: usize, took: Duration) -> Self {
        let count = |verdict| (verdict, targets.iter().filter(|target| target.verdict() == verdict).count());
        let pauses = targets.iter().filter_map(|target| target.result.as_ref().ok()).map(|report| report.pause_nanos);
        Self {
            counts: [Verdict::Upgraded, Verdict::Unchanged, Verdict::RolledBack, Verdict::Gone, Verdict::Failed].map(count),
            silent,
            pause: Duration::from_nanos(pauses.max().unwrap_or(0)),
            took,
        }
    }

    fn is_success(&self) -> bool {
        self.silent == 0
            && self
                .counts
                .iter()
                .all(|(verdict, count)| matches!(verdict, Verdict::Upgraded | Verdict::Unchanged | Verdict::Gone) || *count == 0)
    }

    fn to_json(&self) -> Value {
        let mut value =
            json!({ "silent": self.silent, "longest_pause_ms": self.pause.as_secs_f64() * 1e3, "took_ms": self.took.as_secs_f64() * 1e3 });
        for (verdict, count) in self.counts {
            value[verdict.name()] = json!(count);
        }
        value
    }

    /// Counts, then the shims that an operator has to look at, each reason once.
    fn to_text(&self, targets: &[Target]) -> String {
        let counts: Vec<String> = self.counts.iter().map(|(verdict, count)| format!("{} {count}", verdict.name())).collect();
        let mut text = format!("{}, silent {}, longest pause {:.1} ms\n", counts.join(", "), self.silent, self.pause.as_secs_f64() * 1e3);
        let mut reasons: Vec<(String, Vec<String>)> = Vec::new();
        for target in targets {
            let Some(why) = target.why() else { continue };
            match reasons.iter_mut().find(|(known, _)| *known == why) {
                Some((_, names)) => names.push(target.name()),
                None => reasons.push((why, vec![target.name()])),
            }
        }
        for (why, names) in reasons {
            text.push_str(&format!("{}\n    {}\n", table::printable(&why), table::printable(&names.join(" "))));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(name: &str, worker: PartResult, keeper: PartResult) -> Target {
        let report = UpgradeReport { worker, keeper, pause_nanos: 2_500_000, ..UpgradeReport::default() };
        let snapshot = Snapshot { namespace: "n1".into(), group: name.into(), ..Snapshot::default() };
        Target { control: "/c".into(), snapshot, result: Ok(report), took: Duration::ZERO }
    }

    #[test]
    fn a_summary_counts_each_result_and_gives_every_reason_once() {
        use PartResult as R;
        let mut targets = vec![
            target("a", R::Upgraded, R::Upgraded),
            target("b", R::Unasked, R::Unchanged),
            target("c", R::RolledBack("signal 11".into()), R::Unasked),
            target("d", R::RolledBack("signal 11".into()), R::Unasked),
            target("e", R::Upgraded, R::Kept("no".into())),
        ];
        let summary = Summary::of(&targets, 0, Duration::ZERO);
        assert!(!summary.is_success());
        let text = summary.to_text(&targets);
        assert!(text.starts_with("upgraded 1, unchanged 1, rolled-back 3, gone 0, failed 0, silent 0, longest pause 2.5 ms\n"), "{text}");
        assert_eq!(text.matches("signal 11").count(), 1, "{text}");
        assert!(text.contains("n1/c n1/d") && text.contains("the keeper was kept: no"), "{text}");
        targets.truncate(2);
        assert!(Summary::of(&targets, 0, Duration::ZERO).is_success());
        assert!(!Summary::of(&targets, 1, Duration::ZERO).is_success());
    }
}
