//! The program `shim-conformance`: its output for operators and for programs; no shim makes it hang or leave anything behind.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use shim_tests::conformance::child::{self, Verdict};
use shim_tests::conformance::{cases, faults};
use shim_tests::eventually::{SOON, eventually, within};
use shim_tests::runner::EXECUTOR;
use shim_tests::suite::Runtime;
use shim_tests::{bundle, cgroups, proc, programs};

/// A quick case of a MUST, the fault that it detects, and another case.
const CASE: &str = "lifecycle.create_start_and_connect_agree_on_pids";
const FAULT: &str = "wrong-task-pid";
const OTHER: &str = "bootstrap.the_version_is_printed";

pub(crate) fn trials(shim: &Path) -> Vec<Trial> {
    type Test = (&'static str, fn(&Place) -> Result<()>);
    let tests: [Test; 13] = [
        ("every_help_flag_prints_help", every_help_flag_prints_help),
        ("an_unusable_command_line_is_refused_in_one_line", an_unusable_command_line_is_refused_in_one_line),
        ("without_root_it_lists_and_runs_nothing", without_root_it_lists_and_runs_nothing),
        ("it_ends_with_0_when_all_holds_and_keeps_no_logs", it_ends_with_0_when_all_holds_and_keeps_no_logs),
        ("it_ends_with_1_when_a_must_fails", it_ends_with_1_when_a_must_fails),
        ("a_may_that_fails_is_no_failure", a_may_that_fails_is_no_failure),
        ("a_known_deviation_is_no_failure_and_has_to_fail", a_known_deviation_is_no_failure_and_has_to_fail),
        ("programs_receive_the_same_report", programs_receive_the_same_report),
        ("two_shims_are_compared", two_shims_are_compared),
        ("a_shim_command_that_never_returns_fails_the_case_in_time", a_shim_command_that_never_returns_fails_the_case_in_time),
        ("a_shim_that_exits_without_output_is_reported_as_such", a_shim_that_exits_without_output_is_reported_as_such),
        ("daemonized_processes_of_a_shim_end_with_its_case", daemonized_processes_of_a_shim_end_with_its_case),
        ("a_case_that_is_killed_leaves_its_logs_alone", a_case_that_is_killed_leaves_its_logs_alone),
    ];
    let shim = shim.to_owned();
    tests
        .into_iter()
        .map(|(name, test)| {
            let shim = shim.clone();
            Trial::test(format!("tool::{name}"), move || Place::new(shim).and_then(|place| test(&place)).map_err(super::failed))
        })
        .collect()
}

/// A folder of one test, removed with the value, and the shim under test.
struct Place {
    folder: PathBuf,
    shim: PathBuf,
}

impl Place {
    fn new(shim: PathBuf) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let name = format!("conformance-tool-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder)?;
        fs::set_permissions(&folder, Permissions::from_mode(0o755))?;
        Ok(Self { folder, shim })
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str) -> Result<String> {
        fs::write(self.folder.join(name), text)?;
        Ok(self.path(name))
    }

    /// A shim that is a shell script. Its processes are found by its name.
    fn script(&self, text: &str) -> Result<String> {
        let path = programs::script(&self.folder, "shim.sh", &format!("#!/bin/sh\nexport OF=$0\n{text}\n"))?;
        Ok(path.display().to_string())
    }

    /// The shim under test, with a fault.
    fn faulty(&self, fault: &str) -> Result<String> {
        let man = super::programs().join("man-in-the-middle");
        Ok(faults::install(&self.folder.join(fault), &man, &self.shim, fault)?.display().to_string())
    }

    fn good(&self) -> String {
        self.shim.display().to_string()
    }

    fn engine() -> PathBuf {
        shim_tests::suite::Suite::Bookworm.runtime(Runtime::Crun)
    }

    /// Runs the tool to its end.
    fn run(&self, arguments: &[&str]) -> Result<Ended> {
        self.run_command(Command::new(env!("CARGO_BIN_EXE_shim-conformance")).args(arguments))
    }

    fn run_command(&self, command: &mut Command) -> Result<Ended> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut command = tokio::process::Command::from(std::mem::replace(command, Command::new("")));
        command.kill_on_drop(true);
        let ended = EXECUTOR.block_on(async {
            let mut child = command.spawn()?;
            within("the tool", Duration::from_secs(100), bundle::output_of(&mut child)).await?
        });
        let ended = ended.with_context(|| format!("{command:?}"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Ended { code: ended.status.code(), out: text(&ended.stdout), err: text(&ended.stderr) })
    }

    /// The arguments of a run of some cases, with logs in the test's folder.
    fn run_cases(&self, shim: &str, cases: &[&str], more: &[&str]) -> Result<Ended> {
        let (engine, logs) = (Self::engine().display().to_string(), self.path("logs"));
        let filters: Vec<String> = cases.iter().map(|case| format!("--filter=={case}")).collect();
        let mut arguments = vec!["run", "--shim", shim, "--engine", &engine, "--logs", &logs];
        arguments.extend(filters.iter().map(String::as_str));
        arguments.extend(more);
        self.run(&arguments)
    }

    /// Runs `act` and collects the processes that mention the folder meanwhile; checks that none of them and no cgroup of their runs is left.
    fn leaves_nothing<T>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T>
    where
        T: Send,
    {
        let (mut seen, marker) = (BTreeSet::new(), self.path(""));
        let mentions = || who_mentions(&marker);
        let done = std::thread::scope(|scope| {
            let act = scope.spawn(act);
            while !act.is_finished() {
                seen.extend(mentions());
                std::thread::sleep(Duration::from_millis(10)); // the polling interval: processes start and exit without a notification
            }
            act.join().expect("it does not panic")
        })?;
        ensure!(!seen.is_empty(), "nothing was started");
        // at once, because a later run removes cgroups of dead runs
        let folders: Vec<_> = seen.iter().flat_map(|pid| cgroups::folders(&format!("x-tests-{pid}"))).collect();
        ensure!(folders.is_empty(), "{folders:?}");
        EXECUTOR.block_on(eventually("nothing is left behind", SOON, async || {
            let left = mentions();
            ensure!(left.is_empty(), "{:?}", left.iter().map(|pid| proc::Process::read(*pid)).collect::<Vec<_>>());
            let mounts = fs::read_to_string("/proc/self/mountinfo")?;
            ensure!(!mounts.contains(&marker), "{mounts}");
            Ok(())
        }))?;
        Ok(done)
    }
}

/// The processes of the whole host that mention it. Each is read once, because they start and exit all the time.
fn who_mentions(marker: &str) -> Vec<i32> {
    let has = |path: PathBuf| fs::read(path).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(marker));
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| ["cmdline", "environ"].iter().any(|file| has(Path::new("/proc").join(pid.to_string()).join(file)))).collect()
}

impl Drop for Place {
    fn drop(&mut self) {
        let _left_to_the_system = fs::remove_dir_all(&self.folder);
    }
}

/// The exit code and output of the tool.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ended {
    fn ended_with(self, code: i32) -> Result<Self> {
        ensure!(self.code == Some(code), "{self:?}, not {code}");
        Ok(self)
    }

    fn prints(&self, text: &str) -> Result<()> {
        ensure!(self.out.contains(text), "no {text:?}: {self:?}");
        Ok(())
    }
}

fn every_help_flag_prints_help(place: &Place) -> Result<()> {
    for arguments in [&["help"][..], &["--help"], &["-h"], &["run", "--help"], &["run", "--shim", "x", "-h"]] {
        let ended = place.run(arguments)?.ended_with(0)?;
        ended.prints("shim-conformance run --shim PATH")?;
        ensure!(ended.err.is_empty(), "{ended:?}");
    }
    Ok(())
}

fn an_unusable_command_line_is_refused_in_one_line(place: &Place) -> Result<()> {
    let good = place.good();
    let plain = place.write("plain", "#!/bin/sh\n")?;
    let typo = place.write("typo.toml", &format!("[[deviation]]\ncase = \"{CASE}\"\nreasn = \"it is so\"\n"))?;
    let unknown = place.write("unknown.toml", "[[deviation]]\ncase = \"stdio.unknown\"\nreason = \"it is so\"\n")?;
    let silent = place.write("silent.toml", &format!("[[deviation]]\ncase = \"{CASE}\"\nreason = \"\"\n"))?;
    let rows: &[(&[&str], &str)] = &[
        (&[], "no command"),
        (&["judge"], "no command \"judge\""),
        (&["run"], "0 shims are named"),
        (&["run", "--shim", &good, "--shim", &good], "2 shims are named"),
        (&["run", "--shim"], "--shim needs a value"),
        (&["run", "--colour", "red"], "no option --colour"),
        (&["run", "--shim", "/no/such/shim"], "no shim at /no/such/shim"),
        (&["run", "--shim", "/etc"], "/etc is not a program"),
        (&["run", "--shim", &plain], "plain is not a program"),
        (&["run", "--shim", &good, "--engine", "/no/such/runtime"], "no OCI runtime: /no/such/runtime is not there"),
        (&["run", "--shim", &good, "--engine", "no-such-runtime"], "no OCI runtime: no-such-runtime is not there"),
        (&["run", "--shim", &good, "--engine", &plain], "plain is not there, or no program"),
        (&["run", "--shim", &good, "--filter", "like.nothing"], "no case is called anything like [\"like.nothing\"]"),
        (&["list", "--filter", "like.nothing"], "no case is called anything like"),
        (&["run", "--shim", &good, "--jobs", "many"], "--jobs takes a number from 1 on, not \"many\""),
        (&["run", "--shim", &good, "--jobs", "0"], "--jobs takes a number from 1 on"),
        (&["run", "--shim", &good, "--patience", "-1"], "--patience takes a number from 1 on"),
        (&["run", "--shim", &good, "--cgroup", "3"], "--cgroup 3"),
        (&["run", "--shim", &good, "--logs", "/run/logs"], "logs cannot be kept in /run/logs"),
        (&["run", "--shim", &good, "--expect", "/no/such/file"], "read /no/such/file"),
        (&["run", "--shim", &good, "--expect", &typo], "typo.toml: line 3: unknown field `reasn`"),
        (&["run", "--shim", &good, "--expect", &unknown], "there is no case stdio.unknown"),
        (&["run", "--shim", &good, "--expect", &silent], "has no reason"),
        (&["compare", "--shim", &good], "1 shims are named with --shim; two are needed"),
        (&["compare", "--shim", &good, "--shim", &good, "--json", "x"], "compare writes no results"),
        (&["faults", "--shim", &good, "--fault", "unknown-fault"], "no fault is called unknown-fault"),
        (&["table"], "no results are named"),
        (&["table", "/no/such/results"], "read /no/such/results"),
    ];
    for (arguments, words) in rows {
        let ended = place.run(arguments)?.ended_with(2).with_context(|| format!("{arguments:?}"))?;
        let is_one_line = ended.err.starts_with("shim-conformance: ") && ended.err.trim_end().lines().count() == 1;
        ensure!(is_one_line && ended.err.contains(words) && ended.out.is_empty(), "{arguments:?}: {ended:?}, not {words:?}");
    }
    Ok(())
}

fn without_root_it_lists_and_runs_nothing(place: &Place) -> Result<()> {
    use std::os::unix::process::CommandExt as _;
    let program = place.path("shim-conformance");
    programs::copy(Path::new(env!("CARGO_BIN_EXE_shim-conformance")), Path::new(&program))?;
    let unprivileged =
        |arguments: &[&str]| place.run_command(Command::new(&program).args(arguments).uid(65534).gid(65534).current_dir("/"));
    unprivileged(&["list"])?.ended_with(0)?.prints(CASE)?;
    let ended = unprivileged(&["run", "--shim", &place.good()])?.ended_with(2)?;
    ensure!(ended.err.trim_end() == "shim-conformance: this needs root: it starts shims, containers and namespaces", "{ended:?}");
    Ok(())
}

fn it_ends_with_0_when_all_holds_and_keeps_no_logs(place: &Place) -> Result<()> {
    let ended = place.leaves_nothing(|| place.run_cases(&place.good(), &[CASE, OTHER], &["--jobs", "1"]))?.ended_with(0)?;
    ended.prints("2 cases on")?;
    ended.prints("MUST      1 hold    0 broken    0 known deviations    0 skipped")?;
    ended.prints("SHOULD    1 hold    0 broken")?;
    ensure!(!Path::new(&place.path("logs")).exists(), "a folder for logs is left");
    Ok(())
}

/// The logs folder has what is needed to find the cause.
fn it_ends_with_1_when_a_must_fails(place: &Place) -> Result<()> {
    let ended = place.leaves_nothing(|| place.run_cases(&place.faulty(FAULT)?, &[CASE, OTHER], &[]))?.ended_with(1)?;
    ended.prints("FAILED")?;
    ended.prints("MUST      0 hold    1 broken")?;
    ended.prints(&format!("broken:\n  {CASE}\n"))?;
    ended.prints(&format!("logs of what failed: {}", place.path("logs")))?;
    let kept: Vec<_> = fs::read_dir(place.path("logs"))?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(kept == [CASE], "{kept:?}");
    let read = |name: &str| fs::read_to_string(place.folder.join("logs").join(CASE).join(name)).with_context(|| name.to_owned());
    let (failure, log, trace) = (read("failure")?, read("shim.log")?, read("trace")?);
    ensure!(failure.starts_with("L5 MUST: ") && failure.contains(CASE) && failure.contains("task_pid"), "{failure}");
    ensure!(log.starts_with("== of c1\n") && log.lines().count() > 1, "{log}");
    for kind in ["command", "call     Create", "answer   Connect", "event    start c1"] {
        ensure!(trace.contains(&format!(" {kind}")), "no {kind:?}: {trace}");
    }
    Ok(())
}

fn a_may_that_fails_is_no_failure(place: &Place) -> Result<()> {
    let case = "lifecycle.a_signal_for_all_reaches_every_process";
    let ended = place.run_cases(&place.faulty("no-kill-for-all")?, &[case], &[])?.ended_with(0)?;
    ended.prints("not")?;
    ended.prints("MAY       0 hold    1 absent")
}

fn a_known_deviation_is_no_failure_and_has_to_fail(place: &Place) -> Result<()> {
    let deviation = format!("[[deviation]]\ncase = \"{CASE}\"\nreason = \"it counts from one\"\n");
    let (always, sometimes) = (place.write("always", &deviation)?, place.write("sometimes", &format!("{deviation}sometimes = true\n"))?);
    let elsewhere = place.write("elsewhere", &format!("{deviation}engine = \"youki\"\n"))?;
    let (good, faulty) = (place.good(), place.faulty(FAULT)?);
    let known = place.run_cases(&faulty, &[CASE], &["--expect", &always])?.ended_with(0)?;
    known.prints(": it counts from one")?;
    known.prints("MUST      0 hold    0 broken    1 known deviations")?;
    place.run_cases(&faulty, &[CASE], &["--expect", &elsewhere])?.ended_with(1)?.prints("0 known deviations")?;
    let held = place.run_cases(&good, &[CASE], &["--expect", &always])?.ended_with(1)?;
    held.prints("PASSED?")?;
    held.prints(&format!("the list is out of date:\n  {CASE}\n"))?;
    place.run_cases(&good, &[CASE], &["--expect", &sometimes])?.ended_with(0)?.prints("1 hold")
}

fn programs_receive_the_same_report(place: &Place) -> Result<()> {
    let (json, junit) = (place.path("results.json"), place.path("results.xml"));
    place.run_cases(&place.faulty(FAULT)?, &[CASE, OTHER], &["--json", &json, "--junit", &junit])?.ended_with(1)?;
    let results: serde_json::Value = serde_json::from_slice(&fs::read(&json)?)?;
    let outcomes = results["outcomes"].as_array().context("no outcomes")?;
    let verdicts: Vec<_> = outcomes.iter().map(|outcome| (outcome["case"].as_str(), outcome["verdict"].as_str())).collect();
    ensure!(verdicts == [(Some(OTHER), Some("passed")), (Some(CASE), Some("failed"))], "{results}");
    let elements = elements(&fs::read_to_string(&junit)?)?;
    let count = |name: &str| elements.iter().filter(|element| element.split_whitespace().next() == Some(name)).count();
    ensure!(count("testsuite") == 1 && count("testcase") == 2 && count("failure") == 1 && count("skipped") == 0, "{elements:#?}");
    ensure!(elements[0].contains("tests=\"2\" failures=\"1\""), "{}", elements[0]);
    place.run(&["table", &json])?.ended_with(0)?.prints(&format!("| L5 | MUST | `{CASE}` | **no** |"))
}

/// The elements of an XML document, each with its attributes.
///
/// Errors: it is not well formed.
fn elements(text: &str) -> Result<Vec<String>> {
    let (mut found, mut open) = (Vec::new(), Vec::new());
    let mut parts = text.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>").context("no declaration")?.split('<');
    ensure!(parts.next().is_some_and(|before| before.trim().is_empty()), "text before the first element");
    for part in parts {
        let (tag, rest) = part.split_once('>').with_context(|| format!("an element without an end: {part}"))?;
        ensure!(!rest.contains('>') && tag.matches('"').count() % 2 == 0, "not escaped: {part}");
        let is_entity = |text: &str| ["amp;", "lt;", "gt;", "quot;"].iter().any(|entity| text.starts_with(entity));
        ensure!(part.split('&').skip(1).all(is_entity), "not escaped: {part}");
        let name = |tag: &str| tag.split_whitespace().next().unwrap_or_default().to_owned();
        if let Some(end) = tag.strip_prefix('/') {
            ensure!(open.pop().as_deref() == Some(end), "{end} closes an element that is not open");
            continue;
        }
        found.push(tag.trim_end_matches('/').to_owned());
        if !tag.ends_with('/') {
            open.push(name(tag));
        }
    }
    ensure!(open.is_empty(), "{open:?} are not closed");
    Ok(found)
}

fn two_shims_are_compared(place: &Place) -> Result<()> {
    let (engine, logs, good, faulty) = (Place::engine().display().to_string(), place.path("logs"), place.good(), place.faulty(FAULT)?);
    let filters = [CASE, OTHER].map(|case| format!("--filter=={case}"));
    let arguments = ["compare", "--shim", &good, "--shim", &faulty, "--engine", &engine, "--logs", &logs, &filters[0], &filters[1]];
    let ended = place.run(&arguments)?.ended_with(0)?;
    ended.prints(&format!("L5  MUST   A holds    B broken   {CASE}\n"))?;
    ended.prints("A: 1 MUST, 1 SHOULD, 0 MAY hold")?;
    ended.prints("B: 0 MUST, 1 SHOULD, 0 MAY hold; 1 cases are the same for both")?;
    ensure!(!Path::new(&logs).join("first").exists() && Path::new(&logs).join("second").join(CASE).join("shim.log").exists(), "{ended:?}");
    Ok(())
}

const START: &str = "bootstrap.start_answers_an_address_that_can_be_dialled";

fn a_shim_command_that_never_returns_fails_the_case_in_time(place: &Place) -> Result<()> {
    let shim = place.script("trap '' TERM; while :; do sleep 1000; done")?;
    let ended = place.leaves_nothing(|| place.run_cases(&shim, &[START], &[]))?.ended_with(1)?;
    ended.prints("not within 30s: a command of the shim")
}

fn a_shim_that_exits_without_output_is_reported_as_such(place: &Place) -> Result<()> {
    let shim = place.script("exit 0")?;
    let ended = place.leaves_nothing(|| place.run_cases(&shim, &[START], &[]))?.ended_with(1)?;
    ended.prints("not an address: \"\"")
}

/// In a session of its own, with nothing of the test open, as a child of the namespace's init.
fn daemonized_processes_of_a_shim_end_with_its_case(place: &Place) -> Result<()> {
    let shim = place.script("(setsid sleep 1000 </dev/null >/dev/null 2>&1 &); echo unix:///run/no-such-socket")?;
    let ended = place.leaves_nothing(|| place.run_cases(&shim, &[START], &[]))?.ended_with(1)?;
    ended.prints("connect /run/no-such-socket")
}

/// The case opens the file `shim.pid` of the bundle, which is a fifo: even its own deadline cannot stop it.
fn a_case_that_is_killed_leaves_its_logs_alone(place: &Place) -> Result<()> {
    let real = place.good();
    let shim = place.script(&format!(
        "case \"$*\" in *start) ;; *) exec {real} \"$@\" ;; esac\nanswer=$({real} \"$@\") || exit 1\nrm shim.pid; mkfifo shim.pid; echo \"$answer\""
    ))?;
    let case = cases::find(CASE).context("a case")?;
    let (subject, logs) = (super::subject(shim.into(), Runtime::Crun), place.folder.join("logs"));
    let verdict = place.leaves_nothing(|| Ok(child::perform_within(Duration::from_secs(3), &case, &subject, &logs).0))?;
    ensure!(matches!(&verdict, Verdict::Failed(why) if why.contains("did not end by itself")), "{verdict:?}");
    let read = |name: &str| fs::read_to_string(logs.join(name)).with_context(|| name.to_owned());
    let (log, trace) = (read("shim.log")?, read("trace")?);
    ensure!(log.starts_with("== of c1\n") && log.lines().count() > 1, "{log:?}");
    ensure!(trace.contains(" call     Start"), "{trace:?}");
    Ok(())
}
