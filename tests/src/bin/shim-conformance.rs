//! Tests a containerd shim, any shim, clause by clause. See `shim-conformance help`.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs};

use anyhow::{Context as _, Result, bail, ensure};
use shim_tests::cgroups::Version;
use shim_tests::conformance::child::{self, Subject};
use shim_tests::conformance::expect::Expectations;
use shim_tests::conformance::run::{self, Plan, Results};
use shim_tests::conformance::{Case, cases, clauses, faults, report};
use shim_tests::suite::Runtime;

const HELP: &str = "\
shim-conformance: starts a containerd shim as containerd does, drives it, and reports clause by clause what holds

  shim-conformance list [--filter PATTERN]
  shim-conformance run --shim PATH [--engine runc|crun|native|PATH] [--filter PATTERN]… [--expect FILE] [--jobs N]
                       [--cgroup 1|2] [--patience N] [--times N] [--json FILE] [--junit FILE] [--logs FOLDER]
  shim-conformance compare --shim A --shim B [--engine …] [--filter …] [--jobs N] [--cgroup …] [--patience N]
  shim-conformance table RESULTS.json…       several runs as one table in Markdown
  shim-conformance faults --shim PATH [--fault NAME]… [--engine …] [--filter …] [--jobs N]
                       which cases see which fault of a man in the middle, in Markdown; all of them take half an hour

  --engine   the OCI runtime that the shim has to use; by default crun, else runc; native: the shim's own engine, if it has one
  --filter   only cases whose name or clause contains PATTERN; one that begins with = is the whole name
  --expect   known deviations, each with a reason: they do not count as failures, and must fail
  --jobs     cases at a time; by default one per processor
  --cgroup   what the shim sees: on a host with v1, 2 is its unified hierarchy alone, with the controllers that v1 leaves there
  --patience multiplies every deadline: 10 on an emulated machine
  --times    multiplies the repetitions of cases that repeat, and their deadlines
  --logs     a folder with a folder for each failed case: the failure, the shim's log, a trace of calls and events

Needs root, an OCI runtime, and a static busybox (Debian: busybox-static). Every case has a process, pid and mount namespaces,
cgroups and a deadline of its own, and what the shim leaves behind ends with them.
Exit status: 0 when every MUST and SHOULD holds or is a known deviation, 1 when not, 2 when it cannot be tried.";

const HELP_WORDS: [&str; 3] = ["help", "--help", "-h"];

fn main() -> ExitCode {
    let arguments: Vec<String> = match env::args_os().skip(1).map(OsString::into_string).collect() {
        Ok(arguments) => arguments,
        Err(argument) => return cannot(&anyhow::anyhow!("an argument that is no UTF-8: {}", argument.display())),
    };
    let result = match arguments.split_first() {
        Some((word, rest)) if word == child::PERFORM => return child::main(rest),
        Some((word, rest)) if word == child::ASK => return child::answer(rest),
        Some((word, rest)) if HELP_WORDS.contains(&word.as_str()) || rest.iter().any(|word| HELP_WORDS[1..].contains(&word.as_str())) => {
            println!("{HELP}");
            Ok(true)
        }
        Some((word, rest)) if word == "list" => Options::read(rest).and_then(|options| list(&options)),
        Some((word, rest)) if word == "run" => Options::read(rest).and_then(|options| run_one(&options)),
        Some((word, rest)) if word == "compare" => Options::read(rest).and_then(|options| compare(&options)),
        Some((word, rest)) if word == "table" => table(rest),
        Some((word, rest)) if word == "faults" => Options::read(rest).and_then(|options| all_faults(&options)),
        Some((word, _)) => Err(anyhow::anyhow!("no command {word:?}; see shim-conformance help")),
        None => Err(anyhow::anyhow!("no command; see shim-conformance help")),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => cannot(&error),
    }
}

fn cannot(error: &anyhow::Error) -> ExitCode {
    eprintln!("shim-conformance: {error:#}");
    ExitCode::from(2)
}

fn number(flag: &str, value: &str) -> Result<usize> {
    value.parse().ok().filter(|number| *number > 0).with_context(|| format!("{flag} takes a number from 1 on, not {value:?}"))
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|about| about.is_file() && about.mode() & 0o111 != 0)
}

#[derive(Debug, Default)]
struct Options {
    shims: Vec<PathBuf>,
    engine: Option<String>,
    filters: Vec<String>,
    faults: Vec<String>,
    expect: Option<PathBuf>,
    jobs: Option<usize>,
    json: Option<PathBuf>,
    junit: Option<PathBuf>,
    logs: Option<PathBuf>,
    cgroups: Option<Version>,
    patience: Option<u32>,
    times: Option<u32>,
}

impl Options {
    fn read(arguments: &[String]) -> Result<Self> {
        let mut options = Self::default();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let (flag, value) = match argument.split_once('=').filter(|(flag, _)| flag.starts_with("--")) {
                Some((flag, value)) => (flag, value.to_owned()),
                None => (argument.as_str(), rest.next().with_context(|| format!("{argument} needs a value"))?.clone()),
            };
            match flag {
                "--shim" => options.shims.push(value.into()),
                "--engine" => options.engine = Some(value),
                "--filter" => options.filters.push(value),
                "--fault" => options.faults.push(value),
                "--expect" => options.expect = Some(value.into()),
                "--jobs" => options.jobs = Some(number(flag, &value)?),
                "--json" => options.json = Some(value.into()),
                "--junit" => options.junit = Some(value.into()),
                "--cgroup" => options.cgroups = Some(Version::available(&value).with_context(|| format!("--cgroup {value}"))?),
                "--patience" => options.patience = Some(u32::try_from(number(flag, &value)?).context("--patience")?),
                "--times" => options.times = Some(u32::try_from(number(flag, &value)?).context("--times")?),
                "--logs" => options.logs = Some(value.into()),
                _ => bail!("no option {flag}; see shim-conformance help"),
            }
        }
        Ok(options)
    }

    fn cases(&self) -> Result<Vec<Case>> {
        let chosen = |case: &Case, filter: &String| match filter.strip_prefix('=') {
            Some(name) => case.name == name,
            None => case.name.contains(filter.as_str()) || case.clause == filter,
        };
        let mut cases = cases::all();
        cases.retain(|case| self.filters.is_empty() || self.filters.iter().any(|filter| chosen(case, filter)));
        ensure!(!cases.is_empty(), "no case is called anything like {:?}", self.filters);
        Ok(cases)
    }

    /// The OCI runtime: as it is named, found in PATH if it has no slash.
    fn engine(&self) -> Result<PathBuf> {
        if self.engine.as_deref() == Some(Runtime::Native.name()) {
            return Ok(Runtime::Native.name().into());
        }
        let names = self.engine.as_ref().map_or_else(|| vec!["crun", "runc"], |name| vec![name.as_str()]);
        let path = env::var_os("PATH").unwrap_or_default();
        let mut folders: Vec<_> = env::split_paths(&path).collect();
        folders.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
        let find = |name: &&str| match name.contains('/') {
            true => Some(PathBuf::from(name)).filter(|path| is_program(path)),
            false => folders.iter().map(|folder| folder.join(name)).find(|path| is_program(path)),
        };
        let found =
            names.iter().find_map(find).with_context(|| format!("no OCI runtime: {} is not there, or no program", names.join(" and ")))?;
        Ok(std::path::absolute(found)?)
    }

    fn plan(&self, shim: &Path) -> Result<Plan> {
        ensure!(nix::unistd::geteuid().is_root(), "this needs root: it starts shims, containers and namespaces");
        ensure!(shim.exists(), "no shim at {}", shim.display());
        ensure!(is_program(shim), "{} is not a program: no file that may be executed", shim.display());
        ensure!(
            ["/bin/busybox", "/usr/bin/busybox"].iter().any(|path| Path::new(path).exists()),
            "no /bin/busybox: containers are made of it"
        );
        let programs = env::current_exe()?.parent().context("a program is in a folder")?.to_owned();
        for name in [child::PROGRAM, "gated-runtime", "log-sink"] {
            ensure!(programs.join(name).is_file(), "no {name} beside this program: cargo install puts them there");
        }
        let cases = self.cases()?;
        let expectations = self.expect.as_deref().map(|path| Expectations::read(path, &cases::all())).transpose()?.unwrap_or_default();
        let logs = self.logs.clone().unwrap_or_else(|| env::temp_dir().join(format!("shim-conformance-{}", std::process::id())));
        ensure!(!logs.starts_with("/run") && !logs.starts_with("/proc"), "logs cannot be kept in {}: cases do not see it", logs.display());
        let mut subject = Subject::new(shim.canonicalize()?, self.engine()?, programs)?;
        subject.cgroups = self.cgroups.unwrap_or(subject.cgroups);
        subject.patience = self.patience.unwrap_or(subject.patience);
        subject.times = self.times.unwrap_or(subject.times);
        Ok(Plan {
            subject,
            cases,
            expectations,
            jobs: self.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)),
            logs: std::path::absolute(logs)?,
        })
    }

    fn shim(&self) -> Result<&Path> {
        match &self.shims[..] {
            [shim] => Ok(shim),
            shims => bail!("{} shims are named with --shim; one is needed", shims.len()),
        }
    }
}

fn list(options: &Options) -> Result<bool> {
    let mut last = "";
    for case in options.cases()? {
        if let Some(clause) = clauses::find(case.clause).filter(|clause| clause.id != last) {
            println!("{} {} {} [{}]", clause.id, clause.level, clause.text, clause.source);
            last = clause.id;
        }
        println!("    {}", case.name);
    }
    Ok(true)
}

/// `part`: of the folder for logs.
fn perform(options: &Options, shim: &Path, part: &str) -> Result<Results> {
    let mut plan = options.plan(shim)?;
    let logs = plan.logs.clone();
    plan.logs.push(part);
    let subject = &plan.subject;
    println!("{} cases on {} with {}, cgroup v{}", plan.cases.len(), shim.display(), subject.engine.display(), subject.cgroups);
    let results = run::run(&plan, |outcome| println!("{}", report::progress(outcome)))?;
    // a folder without a failure is removed
    if fs::remove_dir(&plan.logs).is_err() {
        println!("logs of what failed: {}", plan.logs.display());
    }
    let _another_run_has_failures = fs::remove_dir(logs);
    Ok(results)
}

fn run_one(options: &Options) -> Result<bool> {
    let results = perform(options, options.shim()?, "")?;
    print!("{}", report::summary(&results));
    for (path, text) in [(&options.json, serde_json::to_string_pretty(&results)?), (&options.junit, report::junit(&results))] {
        if let Some(path) = path {
            fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
        }
    }
    Ok(results.is_fine())
}

fn compare(options: &Options) -> Result<bool> {
    let [one, other] = &options.shims[..] else { bail!("{} shims are named with --shim; two are needed", options.shims.len()) };
    ensure!(
        options.json.is_none() && options.junit.is_none(),
        "compare writes no results: have `run` do it for each shim, and make a `table` of them"
    );
    let (one, other) = (perform(options, one, "first")?, perform(options, other, "second")?);
    print!("{}", report::comparison(&one, &other));
    Ok(true)
}

/// A run for each fault, of the cases that must detect one unless others are chosen.
fn all_faults(options: &Options) -> Result<bool> {
    let mut plan = options.plan(options.shim()?)?;
    plan.cases.retain(|case| !options.filters.is_empty() || faults::ALL.iter().any(|fault| fault.is_claimed_by(case.name)));
    let real = plan.subject.shim.clone();
    let place = env::temp_dir().join(format!("man-in-the-middle-{}", std::process::id()));
    let mut table = faults::Table::default();
    for name in &options.faults {
        ensure!(faults::ALL.iter().any(|fault| fault.name == name), "no fault is called {name}");
    }
    for fault in faults::ALL.iter().filter(|fault| options.faults.is_empty() || options.faults.iter().any(|name| name == fault.name)) {
        plan.subject.shim = faults::install(&place, &plan.subject.programs.join("man-in-the-middle"), &real, fault.name)?;
        let results = run::run(&plan, |_| ())?;
        eprintln!("{}", table.add(fault, &results));
    }
    fs::remove_dir_all(&place)?;
    let _some_cases_have_failed = fs::remove_dir_all(&plan.logs);
    print!("{}", table.markdown());
    Ok(table.is_complete())
}

fn table(paths: &[String]) -> Result<bool> {
    let mut runs: Vec<Results> = Vec::new();
    for path in paths {
        let text = fs::read(path).with_context(|| format!("read {path}"))?;
        runs.push(serde_json::from_slice(&text).with_context(|| format!("read {path}"))?);
    }
    let first = runs.first().context("no results are named")?;
    let date = Command::new("date").args(["-u", "+%Y-%m-%d", "-d", &format!("@{}", first.at)]).output()?.stdout;
    println!("{}, {}.\n", String::from_utf8_lossy(&date).trim(), first.host);
    print!("{}", report::markdown(&runs));
    Ok(true)
}
