//! Faults that are injected into a working shim, one at a time, and the cases that must detect each.
//!
//! The program `man-in-the-middle` takes the place of the shim. It runs the real one and forwards everything, except for its fault. It is
//! configured by the files beside it: `real`, the path of the shim, and `fault`, one of the names here.

mod list;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

pub use list::ALL;

use super::child::Verdict;
use super::clauses::Level;
use super::run::Results;
use crate::programs;

/// One fault: its name, its behaviour, and the cases that must detect it.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// The name in the file `fault`.
    pub name: &'static str,
    /// A description for readers.
    pub text: &'static str,
    /// The cases that have to fail, each with the text that its failure has to contain.
    pub seen: &'static [(&'static str, &'static str)],
    /// Why nearly every case detects it.
    pub broad: Option<&'static str>,
}

const fn fault(name: &'static str, text: &'static str, seen: &'static [(&'static str, &'static str)]) -> Fault {
    Fault { name, text, seen, broad: None }
}

impl Fault {
    const fn broad(mut self, why: &'static str) -> Self {
        self.broad = Some(why);
        self
    }

    /// Whether a case must detect it.
    pub fn is_claimed_by(&self, case: &str) -> bool {
        self.seen.iter().any(|(name, _)| *name == case)
    }

    /// The cases that must detect it, in Markdown.
    fn seen_by(&self) -> String {
        names(self.seen.iter().map(|(case, _)| *case))
    }

    /// Checks that a case that must detect the fault failed with the expected message.
    ///
    /// Errors: the result that it had instead.
    pub fn check(&self, case: &str, verdict: &Verdict) -> Result<()> {
        let (_, words) = self.seen.iter().find(|(name, _)| *name == case).context("the case is not among those that must detect it")?;
        match verdict {
            Verdict::Failed(why) if why.contains(words) => Ok(()),
            Verdict::Failed(why) => bail!("{case} fails, but not with {words:?}: {why}"),
            other => bail!("{case} results in {other:?}, though {}", self.text),
        }
    }
}

/// At most this many other cases may detect a fault unless it is [`Fault::broad`]: a fault that breaks everything proves nothing about one case.
pub const MOST_OTHERS: usize = 8;

/// Installs `man-in-the-middle` with this fault for the shim `real` in `folder`, and returns its path.
pub fn install(folder: &Path, program: &Path, real: &Path, fault: &str) -> Result<PathBuf> {
    fs::create_dir_all(folder)?;
    let place = folder.join("man-in-the-middle");
    programs::copy(program, &place)?;
    fs::write(folder.join("real"), real.to_str().context("a path in UTF-8")?)?;
    fs::write(folder.join("fault"), fault)?;
    Ok(place)
}

/// Cases that cannot run through `man-in-the-middle`, because it needs the files beside it.
pub const NOT_THROUGH_PROXY: &[&str] = &["lifetime.a_removed_binary_affects_no_running_container"];

/// Which cases detected which fault.
#[derive(Debug, Default)]
pub struct Table(Vec<Row>);

#[derive(Debug)]
struct Row {
    fault: Fault,
    /// Why cases that must detect it did not.
    missed: Vec<String>,
    others: Vec<String>,
}

impl Table {
    /// Adds a run with a fault, and returns a line about it.
    pub fn add(&mut self, fault: &Fault, results: &Results) -> String {
        let (mut missed, mut others) = (Vec::new(), Vec::new());
        for outcome in results.outcomes.iter().filter(|outcome| !NOT_THROUGH_PROXY.contains(&outcome.case.as_str())) {
            if fault.is_claimed_by(&outcome.case) {
                missed.extend(fault.check(&outcome.case, &outcome.verdict).err().map(|error| format!("{error:#}")));
            } else if matches!(outcome.verdict, Verdict::Failed(_)) && outcome.level() != Level::May {
                others.push(outcome.case.clone());
            }
        }
        let row = Row { fault: *fault, missed, others };
        let line =
            format!("{}: {}, also by {} other cases", fault.name, row.wrong().unwrap_or_else(|| "detected".to_owned()), row.others.len());
        self.0.push(row);
        line
    }

    /// Whether each fault was detected by the cases that must, and by few others.
    pub fn is_complete(&self) -> bool {
        self.0.iter().all(|row| row.wrong().is_none())
    }

    /// A row for each fault.
    pub fn markdown(&self) -> String {
        let mut text = "| fault | behaviour | detected by | also by |\n| --- | --- | --- | --- |\n".to_owned();
        for row in &self.0 {
            let seen = if row.missed.is_empty() { row.fault.seen_by() } else { "**not detected by every case that must**".to_owned() };
            let others = match row.fault.broad {
                Some(why) if row.others.len() > MOST_OTHERS => format!("{} others: {why}", row.others.len()),
                _ => names(row.others.iter().map(String::as_str)),
            };
            let _cannot_fail = writeln!(text, "| {} | {} | {seen} | {others} |", row.fault.name, row.fault.text);
        }
        text
    }
}

impl Row {
    fn wrong(&self) -> Option<String> {
        let too_many = self.others.len() > MOST_OTHERS && self.fault.broad.is_none();
        match (self.missed.first(), too_many) {
            (Some(missed), _) => Some(format!("NOT DETECTED: {missed}")),
            (None, true) => Some(format!("detected by TOO MANY cases: {}", self.others.join(", "))),
            (None, false) => None,
        }
    }
}

fn names<'a>(cases: impl Iterator<Item = &'a str>) -> String {
    cases.map(|case| format!("`{case}`")).collect::<Vec<_>>().join(", ")
}

/// Checks that the table in a document lists [`ALL`] faults, none of them detected by too many cases.
pub fn check_document(document: &str) -> Result<()> {
    let rows: Vec<Vec<&str>> = document
        .lines()
        .filter(|line| line.starts_with("| "))
        .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .collect();
    for fault in ALL {
        let row = rows.iter().find(|row| row[0] == fault.name).with_context(|| format!("{} is not in the document", fault.name))?;
        ensure!(row[1..3] == [fault.text, &fault.seen_by()], "{} differs in the document: {row:?}", fault.name);
        let others = row.get(3).map_or(0, |others| others.matches('`').count() / 2);
        ensure!(others <= MOST_OTHERS, "{} is detected by {others} other cases", fault.name);
    }
    // two lines are the table's head
    ensure!(rows.len() == ALL.len() + 2, "the document has {} faults, there are {}", rows.len() - 2, ALL.len());
    Ok(())
}
