//! The output of a run: progress, the result, the formats for other programs and for documents.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::child::Verdict;
use super::clauses::{self, Level};
use super::run::{Outcome, Results};
use super::{Case, cases};

/// The clause, the case and the failure.
pub(super) fn sentence(case: &Case, why: &str) -> String {
    let clause = clauses::find(case.clause).map_or(String::new(), |clause| format!("{} {}: {}\n", clause.id, clause.level, clause.text));
    format!("{clause}{}: {why}", case.name)
}

/// A line for a case that has ended.
pub fn progress(outcome: &Outcome) -> String {
    let (word, rest) = match (&outcome.verdict, &outcome.known) {
        (Verdict::Passed, None) => ("ok", String::new()),
        (Verdict::Passed, Some(reason)) => ("PASSED?", format!(": expected was: {reason}")),
        (Verdict::Failed(_), Some(reason)) => ("known", format!(": {reason}")),
        (Verdict::Failed(_), None) if outcome.level() == Level::May => ("not", String::new()),
        (Verdict::Failed(why), None) => ("FAILED", format!(": {}", first_line(why))),
        (Verdict::Skipped(why), _) => ("skipped", format!(": {why}")),
    };
    format!("{word:8} {:6.2} s  {:3} {:6} {}{rest}", outcome.seconds, outcome.clause, outcome.level().to_string(), outcome.case)
}

fn first_line(text: &str) -> String {
    let line: String = text.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    if line.chars().count() > 200 { line.chars().take(200).chain("…".chars()).collect() } else { line }
}

/// The counts of one level.
#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    passed: usize,
    failed: usize,
    known: usize,
    skipped: usize,
}

fn counts(outcomes: &[Outcome], level: Level) -> Counts {
    let mut counts = Counts::default();
    for outcome in outcomes.iter().filter(|outcome| outcome.level() == level) {
        match (&outcome.verdict, &outcome.known) {
            (Verdict::Passed, _) => counts.passed += 1,
            (Verdict::Failed(_), None) => counts.failed += 1,
            (Verdict::Failed(_), Some(_)) => counts.known += 1,
            (Verdict::Skipped(_), _) => counts.skipped += 1,
        }
    }
    counts
}

/// How many names of a kind the summary repeats.
const MAX_NAMES: usize = 8;

/// The end of a run, on one screen.
pub fn summary(results: &Results) -> String {
    let mut text = format!("\n{} with {}, {}\n", results.shim, results.engine, results.host);
    for level in Level::ALL {
        let Counts { passed, failed, known, skipped } = counts(&results.outcomes, level);
        let _cannot_fail = writeln!(
            text,
            "{level:6} {passed:4} hold {failed:4} {} {known:4} known deviations {skipped:4} skipped",
            if level == Level::May { "absent" } else { "broken" }
        );
    }
    let list = |text: &mut String, title: &str, wanted: &dyn Fn(&Outcome) -> bool| {
        let found: Vec<_> = results.outcomes.iter().filter(|outcome| wanted(outcome)).collect();
        if !found.is_empty() {
            let names: Vec<_> = found.iter().take(MAX_NAMES).map(|outcome| outcome.case.as_str()).collect();
            let more = if found.len() > names.len() { format!("\n  and {} more", found.len() - names.len()) } else { String::new() };
            let _cannot_fail = writeln!(text, "{title}:\n  {}{more}", names.join("\n  "));
        }
    };
    list(&mut text, "broken", &|outcome| matches!(outcome.verdict, Verdict::Failed(_)) && !outcome.is_fine());
    list(&mut text, "known to fail, and passed: the list is out of date", &|outcome| {
        outcome.verdict == Verdict::Passed && !outcome.is_fine()
    });
    text
}

/// The results as JUnit has them.
pub fn junit(results: &Results) -> String {
    let failed = results.outcomes.iter().filter(|outcome| !outcome.is_fine()).count();
    let mut text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"{}\" tests=\"{}\" failures=\"{failed}\">\n",
        escape(&format!("{} {}", results.shim, results.engine)),
        results.outcomes.len()
    );
    for outcome in &results.outcomes {
        let area = outcome.case.split('.').next().unwrap_or_default();
        let inner = match (&outcome.verdict, outcome.is_fine()) {
            (Verdict::Skipped(why), _) => format!("<skipped message=\"{}\"/>", escape(why)),
            (Verdict::Failed(why), true) => {
                format!("<skipped message=\"{}\"/>", escape(outcome.known.as_deref().unwrap_or(why)))
            }
            (Verdict::Failed(why), false) => format!("<failure message=\"{}\">{}</failure>", escape(&first_line(why)), escape(why)),
            (Verdict::Passed, false) => "<failure message=\"known to fail, and passed\"/>".to_owned(),
            (Verdict::Passed, true) => String::new(),
        };
        let _cannot_fail = writeln!(
            text,
            "  <testcase classname=\"{area}\" name=\"{} {}\" time=\"{}\">{inner}</testcase>",
            outcome.clause,
            escape(&outcome.case),
            outcome.seconds
        );
    }
    text.push_str("</testsuite>\n");
    text
}

/// Text for XML, which has no place for most control characters.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '\n' | '\t' => escaped.push(character),
            control if control.is_control() => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

/// Several runs beside each other, as Markdown: counts, then each clause, then why.
pub fn markdown(runs: &[Results]) -> String {
    let mut text = String::new();
    let names: Vec<String> = runs.iter().map(|run| format!("{}, {}", run.shim, run.engine)).collect();
    let _cannot_fail = writeln!(text, "| | {} |\n| --- |{}", names.join(" | "), " --- |".repeat(runs.len()));
    for level in Level::ALL {
        let cells = runs.iter().map(|run| {
            let Counts { passed, failed, known, skipped } = counts(&run.outcomes, level);
            let total = passed + failed + known;
            format!("{passed} of {total}{}", if skipped > 0 { format!(", {skipped} skipped") } else { String::new() })
        });
        let _cannot_fail = writeln!(text, "| {level} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    let _cannot_fail = writeln!(text, "\n| clause | | case | {} |", names.join(" | "));
    let _cannot_fail = writeln!(text, "| --- | --- | --- |{}", " --- |".repeat(runs.len()));
    let mut reasons: Vec<(usize, &str)> = Vec::new();
    for case in cases::all() {
        let mut cells = Vec::new();
        for run in runs {
            let outcome = run.outcomes.iter().find(|outcome| outcome.case == case.name);
            cells.push(match outcome.map(|outcome| (&outcome.verdict, &outcome.known)) {
                None => "not run".to_owned(),
                Some((Verdict::Passed, _)) => "yes".to_owned(),
                Some((Verdict::Skipped(_), _)) => "skipped".to_owned(),
                Some((Verdict::Failed(_), None)) => "**no**".to_owned(),
                Some((Verdict::Failed(_), Some(reason))) => format!("no [{}]", number(&mut reasons, reason)),
            });
        }
        let level = clauses::find(case.clause).map_or(Level::Must, |clause| clause.level);
        let _cannot_fail = writeln!(text, "| {} | {level} | `{}` | {} |", case.clause, case.name, cells.join(" | "));
    }
    for (number, reason) in reasons {
        let _cannot_fail = write!(text, "\n{number}. {reason}");
    }
    text.push('\n');
    text
}

fn number<'a>(reasons: &mut Vec<(usize, &'a str)>, reason: &'a str) -> usize {
    if let Some((number, _)) = reasons.iter().find(|(_, known)| *known == reason) {
        return *number;
    }
    reasons.push((reasons.len() + 1, reason));
    reasons.len()
}

/// Two runs beside each other, on a terminal: their differences.
pub fn comparison(one: &Results, other: &Results) -> String {
    let word = |outcome: Option<&Outcome>| match outcome.map(|outcome| &outcome.verdict) {
        Some(Verdict::Passed) => "holds",
        Some(Verdict::Failed(_)) => "broken",
        Some(Verdict::Skipped(_)) => "skipped",
        None => "not run",
    };
    let theirs: BTreeMap<&str, &Outcome> = other.outcomes.iter().map(|outcome| (outcome.case.as_str(), outcome)).collect();
    let mut text = format!("\nA: {} with {}\nB: {} with {}\n\n", one.shim, one.engine, other.shim, other.engine);
    let mut same = 0;
    for outcome in &one.outcomes {
        let (a, b) = (word(Some(outcome)), word(theirs.get(outcome.case.as_str()).copied()));
        if a == b {
            same += 1;
        } else {
            let level = outcome.level().to_string();
            let _cannot_fail = writeln!(text, "{:3} {level:6} A {a:8} B {b:8} {}", outcome.clause, outcome.case);
        }
    }
    for (name, run) in [("A", one), ("B", other)] {
        let held = |level| counts(&run.outcomes, level).passed;
        let _cannot_fail =
            write!(text, "\n{name}: {} MUST, {} SHOULD, {} MAY hold", held(Level::Must), held(Level::Should), held(Level::May));
    }
    let _cannot_fail = writeln!(text, "; {same} cases are the same for both");
    text
}
