//! The conformance suite on our shim, without known deviations; checks of the suite itself (every clause has a case, faults are detected); its tool.
//! Needs root. `X_SHIM` names the shim's binary.

#[path = "conformance/links.rs"]
mod links;
#[path = "conformance/tool.rs"]
mod tool;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use shim_tests::cgroups::Version;
use shim_tests::conformance::child::{self, Subject, Verdict};
use shim_tests::conformance::clauses::Level;
use shim_tests::conformance::expect::Expectations;
use shim_tests::conformance::{Case, cases, clauses, faults};
use shim_tests::sandbox::NOT_SERVED;
use shim_tests::suite::{self, Runtime, Shim, Suite};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // more than processors: most of the time they wait
    arguments.test_threads.get_or_insert(4);
    let shim = match (arguments.list, suite::fetch().and_then(|()| Shim::under_test())) {
        (_, Ok(Shim { binary: Some(binary), .. })) => binary,
        (true, _) => PathBuf::new(),
        (false, Ok(_)) => return cannot("no shim: name its binary with X_SHIM"),
        (false, Err(error)) => return cannot(&format!("{error:#}")),
    };
    if let Err(error) = Version::chosen() {
        return cannot(&format!("{error:#}"));
    }
    let trials =
        [about_the_document(), tool::trials(&shim), with_each_engine(&shim), with_each_fault(&shim)].into_iter().flatten().collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !conclusion.has_failed() {
        let _nothing_was_written = std::fs::remove_dir_all(logs());
    }
    conclusion.exit_code()
}

fn cannot(why: &str) -> ExitCode {
    eprintln!("cannot run: {why}");
    ExitCode::from(2)
}

fn programs() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_shim-conformance")).parent().expect("a file is in a folder").to_owned()
}

fn subject(shim: PathBuf, runtime: Runtime) -> Subject {
    Subject::new(shim, Suite::Bookworm.runtime(runtime), programs()).expect("there are such cgroups: that was looked at first")
}

fn about_the_document() -> Vec<Trial> {
    type Test = (&'static str, fn() -> Result<()>);
    let tests: [Test; 10] = [
        ("document::every_case_names_a_clause_of_the_document", every_case_names_a_clause_of_the_document),
        ("document::every_clause_has_a_case_and_a_source", every_clause_has_a_case_and_a_source),
        ("document::the_documented_table_of_calls_is_the_tested_one", the_documented_table_of_calls_is_the_tested_one),
        ("document::known_deviations_have_reasons_and_cases", known_deviations_have_reasons_and_cases),
        ("document::every_must_has_a_fault", every_must_has_a_fault),
        ("document::the_table_of_faults_is_of_these_and_each_is_seen_by_few", the_table_of_faults_is_of_these_and_each_is_seen_by_few),
        (
            "document::what_goes_wrong_in_the_field_is_reproduced_by_cases_and_tests_that_there_are",
            what_goes_wrong_in_the_field_is_reproduced,
        ),
        ("document::what_goes_wrong_with_images_is_reproduced_by_tests_that_there_are", what_goes_wrong_with_images_is_reproduced),
        (
            "document::every_link_leads_to_a_file_and_a_heading_that_there_are",
            links::every_link_leads_to_a_file_and_a_heading_that_there_are,
        ),
        ("document::the_readme_leads_to_every_document", links::the_readme_leads_to_every_document),
    ];
    tests.into_iter().map(|(name, test)| Trial::test(name, move || test().map_err(failed))).collect()
}

fn failed(error: anyhow::Error) -> Failed {
    Failed::from(format!("{error:#}"))
}

fn every_case_names_a_clause_of_the_document() -> Result<()> {
    let mut names: Vec<_> = cases::all().iter().map(|case| case.name).collect();
    let total = names.len();
    names.sort_unstable();
    names.dedup();
    ensure!(names.len() == total, "two cases have the same name");
    for case in cases::all() {
        ensure!(clauses::find(case.clause).is_some(), "{}: there is no clause {}", case.name, case.clause);
    }
    for (fault, (case, words)) in faults::ALL.iter().flat_map(|fault| fault.seen.iter().map(move |seen| (fault, seen))) {
        ensure!(cases::find(case).is_some(), "{}: there is no case {case}", fault.name);
        ensure!(!words.is_empty(), "{}: no expected message for {case}", fault.name);
    }
    Ok(())
}

/// Without a fault, nothing shows that the clause's cases can fail.
fn every_must_has_a_fault() -> Result<()> {
    let proves = |clause: &str, case: &str| cases::find(case).is_some_and(|case| case.clause == clause);
    for clause in clauses::all().iter().filter(|clause| clause.level == Level::Must) {
        let seen = faults::ALL.iter().any(|fault| fault.seen.iter().any(|(case, _)| proves(clause.id, case)));
        ensure!(seen, "no fault is detected by a case of {} {}", clause.id, clause.text);
    }
    Ok(())
}

fn the_table_of_faults_is_of_these_and_each_is_seen_by_few() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/faults.md");
    faults::check_document(&std::fs::read_to_string(path)?)
}

fn every_clause_has_a_case_and_a_source() -> Result<()> {
    let musts = clauses::all().iter().filter(|clause| clause.level == Level::Must).count();
    ensure!(musts > 50, "{musts} clauses with MUST: the document was not read");
    for (index, clause) in clauses::all().iter().enumerate() {
        ensure!(cases::all().iter().any(|case| case.clause == clause.id), "no case proves {} {}", clause.id, clause.text);
        ensure!(!clause.source.is_empty(), "{} has no source", clause.id);
        ensure!(clauses::all()[..index].iter().all(|other| other.id != clause.id), "{} is listed twice", clause.id);
    }
    Ok(())
}

fn the_documented_table_of_calls_is_the_tested_one() -> Result<()> {
    let between = |begin, end| clauses::DOCUMENT.split_once(begin)?.1.split_once(end).map(|(text, _)| text);
    let written = between("<!-- calls: begin -->", "<!-- calls: end -->").context("no table of calls in the document")?;
    let tested = cases::table_of_calls();
    ensure!(written.trim() == tested.trim(), "the document has\n{written}\nand this is tested:\n{tested}");
    Ok(())
}

fn known_deviations_have_reasons_and_cases() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("expect");
    for entry in std::fs::read_dir(&folder)? {
        let path = entry?.path();
        let expectations = Expectations::read(&path, &cases::all())?;
        ensure!(expectations.is_empty() || !path.ends_with("x.toml"), "our own shim may have no known deviations");
    }
    ensure!(folder.join("x.toml").exists(), "no {}", folder.join("x.toml").display());
    Ok(())
}

/// `docs/field.md` names cases of this suite as `area.sentence`, other tests as `target::module::sentence`.
fn what_goes_wrong_in_the_field_is_reproduced() -> Result<()> {
    let rows = include_str!("../../docs/field.md").lines().filter(|line| line.starts_with("| ") && !line.starts_with("| ---"));
    let (mut failures, mut names) = (0, 0);
    for row in rows.filter(|row| !row.starts_with("| symptom")) {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [_, reported, reproduced, factor] = cells[..] else { anyhow::bail!("not four cells: {row}") };
        ensure!(!reported.is_empty(), "no report, and no dash: {row}");
        ensure!(factor.is_empty() || factor.parse::<u32>().is_ok(), "{factor:?} is no factor: {row}");
        failures += 1;
        let quoted: Vec<_> = reproduced.split('`').skip(1).step_by(2).collect();
        ensure!(!quoted.is_empty(), "nothing reproduces it: {row}");
        for name in quoted {
            names += 1;
            match name.split("::").collect::<Vec<_>>()[..] {
                [case] => ensure!(cases::find(case).is_some(), "there is no case {case}"),
                _ => is_a_test(name)?,
            }
        }
    }
    ensure!(failures >= 50 && names > failures, "{failures} failures, {names} names: the document was not read");
    Ok(())
}

/// `docs/field-images.md` has a row for each number, with tests or with the reason why there is none.
fn what_goes_wrong_with_images_is_reproduced() -> Result<()> {
    let rows = include_str!("../../docs/field-images.md").lines().filter(|line| line.starts_with("| ") && !line.starts_with("| ---"));
    let (mut numbers, mut names) = (0, 0);
    for row in rows.filter(|row| !row.starts_with("| #")) {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [number, _, reported, reproduced] = cells[..] else { anyhow::bail!("not four cells: {row}") };
        numbers += 1;
        ensure!(number == numbers.to_string() && !reported.is_empty(), "row {numbers}, and its report: {row}");
        if reproduced.starts_with("no test: ") {
            continue;
        }
        let quoted: Vec<_> = reproduced.split('`').skip(1).step_by(2).collect();
        ensure!(!quoted.is_empty(), "nothing reproduces it: {row}");
        names += quoted.len();
        quoted.into_iter().try_for_each(is_a_test)?;
    }
    ensure!(numbers == 110 && names > 150, "{numbers} rows, {names} names: the document was not read");
    Ok(())
}

/// Whether there is a test `target::module::sentence`: of this package, of x-manager, of the engine or of the shim.
fn is_a_test(name: &str) -> Result<()> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let engine = package.join("../shim/src/engine/native");
    let parts: Vec<_> = name.split("::").collect();
    let [target, ref modules @ .., sentence] = parts[..] else { anyhow::bail!("no name of a test: {name}") };
    let (folder, is_listed) = match (target, modules) {
        ("engine", [_only]) => (engine.join("tests/engine"), false),
        ("engine", _) => (engine.join("src"), false),
        ("shim", _) => (package.join("../shim/src"), false),
        ("x-manager", _) => (package.join("../manager/src"), false),
        _ => (package.join("tests").join(target), true),
    };
    let module = std::fs::read_to_string(folder.join(modules.join("/")).with_extension("rs")).unwrap_or_default();
    let main = match is_listed {
        true => std::fs::read_to_string(folder.with_extension("rs")).with_context(|| format!("there is no test {name}"))?,
        false => module.clone(),
    };
    let defined = format!("fn {sentence}(");
    ensure!((main.contains(&defined) || module.contains(&defined)) && main.contains(sentence), "there is no test {name}");
    Ok(())
}

fn logs() -> PathBuf {
    std::env::temp_dir().join(format!("conformance-{}", std::process::id()))
}

fn perform(case: &Case, subject: &Subject, run: &str) -> Verdict {
    let folder = logs().join(run).join(case.name);
    let (verdict, _) = child::perform(case, subject, &folder);
    if !matches!(verdict, Verdict::Failed(_)) {
        let _best_effort = std::fs::remove_dir_all(&folder);
    }
    verdict
}

fn with_each_engine(shim: &Path) -> Vec<Trial> {
    let mut trials = Vec::new();
    for runtime in Runtime::ALL {
        let subject = subject(shim.to_owned(), runtime);
        // the cases of sandboxes make no container: one engine is enough
        let depends = |case: &Case| runtime == Runtime::Native || case.area() != "sandboxes";
        for case in cases::all().into_iter().filter(depends) {
            let subject = subject.clone();
            trials.push(Trial::ignorable_test(format!("{runtime}::{}", case.name), move || {
                match perform(&case, &subject, runtime.name()) {
                    Verdict::Passed => Ok(Completion::Completed),
                    // other shims need not serve it
                    Verdict::Skipped(why) if why.starts_with(NOT_SERVED) => Err(Failed::from(why)),
                    Verdict::Skipped(why) => Ok(Completion::ignored_with(why)),
                    Verdict::Failed(_) if clauses::find(case.clause).is_some_and(|clause| clause.level == Level::May) => {
                        Ok(Completion::ignored_with("no client depends on it"))
                    }
                    Verdict::Failed(why) => Err(Failed::from(format!("{why}\nlogs: {}", logs().display()))),
                }
            }));
        }
    }
    trials
}

/// The results of cases on a working shim behind `man-in-the-middle`.
fn with_each_fault(shim: &Path) -> Vec<Trial> {
    let shim = shim.to_owned();
    let through = move |fault: &str, case: &str| -> Result<Verdict> {
        let case = cases::find(case).context("a case")?;
        let place = logs().join("fault").join(fault).join(case.name);
        let shim = faults::install(&place, &programs().join("man-in-the-middle"), &shim, fault)?;
        // the engine that takes the least time; the faults of task calls were written for a shim that runs another program
        let runtime = if ["sandboxes", "pods"].contains(&case.area()) { Runtime::Native } else { Runtime::Crun };
        let subject = subject(shim, runtime);
        let verdict = perform(&case, &subject, &format!("logs/{fault}"));
        std::fs::remove_dir_all(place)?;
        let _of_a_failure_that_was_wanted = std::fs::remove_dir_all(logs().join("logs").join(fault).join(case.name));
        Ok(verdict)
    };
    let mut trials = Vec::new();
    let mut claimants = BTreeSet::new();
    for (fault, (case, _)) in faults::ALL.iter().flat_map(|fault| fault.seen.iter().map(move |seen| (fault, seen))) {
        claimants.insert(*case);
        let through = through.clone();
        trials.push(Trial::test(format!("fault::{}_is_seen_by_{case}", fault.name), move || {
            through(fault.name, case).and_then(|verdict| fault.check(case, &verdict)).map_err(failed)
        }));
    }
    for case in claimants {
        let through = through.clone();
        trials.push(Trial::test(format!("fault::none_is_seen_by_{case}"), move || match through("none", case).map_err(failed)? {
            Verdict::Passed => Ok(()),
            verdict => Err(Failed::from(format!("through a man who does nothing: {verdict:?}"))),
        }));
    }
    trials
}
