//! The trace of a case, line by line with the time: calls, answers, events, commands; and the logs of its shims. For finding the cause of a failure.

use std::fmt::Display;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::Result;

static TRACE: Mutex<Option<Trace>> = Mutex::new(None);
/// Longer lines are cut.
const MAX_LINE_BYTES: usize = 2000;

struct Trace {
    begin: Instant,
    lines: File,
    log: File,
    /// The container whose shim has logged last.
    last: String,
}

/// Writes into the files `trace` and `shim.log` of `folder` from now on, without buffering, because a case may be killed.
pub fn open(folder: &Path) -> Result<()> {
    let (lines, log) = (File::create(folder.join("trace"))?, File::create(folder.join("shim.log"))?);
    *TRACE.lock().expect("no panic under this lock") = Some(Trace { begin: Instant::now(), lines, log, last: String::new() });
    Ok(())
}

/// Adds the log of the shim that was started for a container, if a trace is open.
pub fn copy_log(container: &str, bytes: &[u8]) {
    let mut trace = TRACE.lock().expect("no panic under this lock");
    let Some(trace) = trace.as_mut() else { return };
    if trace.last != container {
        container.clone_into(&mut trace.last);
        let _the_case_matters_more = writeln!(trace.log, "== of {container}");
    }
    let _the_case_matters_more = trace.log.write_all(bytes);
}

/// Adds a line, if a trace is open.
pub fn note(kind: &str, what: impl Display) {
    let mut trace = TRACE.lock().expect("no panic under this lock");
    let Some(trace) = trace.as_mut() else { return };
    let mut line = format!("{:9.4} {kind:8} {what}", trace.begin.elapsed().as_secs_f64()).replace('\n', " ");
    if line.len() > MAX_LINE_BYTES {
        let end = (0..=MAX_LINE_BYTES).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
        line.truncate(end);
        line.push('…');
    }
    let _the_case_matters_more = writeln!(trace.lines, "{line}");
}
