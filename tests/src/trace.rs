//! What happened in a case, line by line with the time: calls, answers, events, commands. For whoever has to find out why it failed.

use std::fmt::Display;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::Result;

static TRACE: Mutex<Option<(Instant, File)>> = Mutex::new(None);
/// Longer lines are cut.
const MAX_LINE_BYTES: usize = 2000;

/// Writes a trace to `path` from now on.
pub fn open(path: &Path) -> Result<()> {
    *TRACE.lock().expect("no panic under this lock") = Some((Instant::now(), File::create(path)?));
    Ok(())
}

/// Adds a line, if a trace is open.
pub fn note(kind: &str, what: impl Display) {
    let mut trace = TRACE.lock().expect("no panic under this lock");
    let Some((begin, file)) = trace.as_mut() else { return };
    let mut line = format!("{:9.4} {kind:8} {what}", begin.elapsed().as_secs_f64()).replace('\n', " ");
    if line.len() > MAX_LINE_BYTES {
        let end = (0..=MAX_LINE_BYTES).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
        line.truncate(end);
        line.push('…');
    }
    let _the_case_matters_more = writeln!(file, "{line}");
}
