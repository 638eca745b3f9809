//! Runs a verb of a container's engine.
use std::fs::{File, Metadata};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::Record;
use crate::engine::{CommandEngine, EngineError, Verb};
use crate::handover::{Exited, Spawn, Step};
use crate::worker::cause::Cause;
use crate::worker::error::Error;

/// Runs a verb to its end.
///
/// Errors: the engine's message; that its program is missing, if that is why it could not be started.
pub(super) async fn run_verb(cause: &Cause, at: Step, engine: &CommandEngine, verb: Verb, spawn: Spawn) -> Result<Exited, Error> {
    let exited = match cause.run(at, spawn).await {
        Ok(exited) => exited,
        Err(error @ Error::Keeper { .. }) => return Err(engine.blocking_explain(verb).map_or(error, Error::from)),
        Err(error) => return Err(error),
    };
    engine.interpret(verb, &exited)?;
    Ok(exited)
}

/// The folder where criu writes its own files.
pub(super) struct CriuWork {
    pub(super) path: PathBuf,
    /// Absent from the request, so the shim removes it.
    is_ours: bool,
}

impl CriuWork {
    pub(super) fn new(record: &Record, named: Option<&Path>) -> Self {
        let named = named.or(record.options.criu_work_path.as_deref());
        Self { path: named.map_or_else(|| record.bundle.join("criu-work"), Path::to_owned), is_ours: named.is_none() }
    }

    /// Removes the files after a success.
    pub(super) fn blocking_remove(&self) {
        if self.is_ours
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            log::debug!(path:% = self.path.display(), error:%; "cannot remove criu's files");
        }
    }
}

/// Appends the errors in criu's log to the failure of a checkpoint or a restore: the engine only names the log.
pub(super) fn blocking_add_criu_errors(error: Error, work_path: &Path) -> Error {
    let Error::Engine(EngineError::Failed { verb, message }) = error else { return error };
    let log = work_path.join(if verb == Verb::Restore { "restore.log" } else { "dump.log" });
    let message = match criu_errors(&log) {
        Some(errors) => format!("{message}; {}: {errors}", log.display()),
        None => message,
    };
    EngineError::Failed { verb, message }.into()
}

/// The last error lines of a criu log.
fn criu_errors(log: &Path) -> Option<String> {
    // A pipe of this name without a writer would be waited for.
    let mut file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(log).ok()?;
    let length = file.metadata().ok().filter(Metadata::is_file)?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(MAX_LOG_BYTES))).ok()?;
    let mut bytes = Vec::new();
    file.take(MAX_LOG_BYTES).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let errors: Vec<String> =
        text.lines().filter(|line| line.contains("Error (")).map(|line| line.chars().take(MAX_LINE_CHARS).collect()).collect();
    (!errors.is_empty()).then(|| errors[errors.len().saturating_sub(MAX_LINES)..].join("; "))
}

/// How much of criu's log is read, and how much is quoted.
const MAX_LOG_BYTES: u64 = 256 << 10;
const MAX_LINES: usize = 8;
const MAX_LINE_CHARS: usize = 300;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_restore_says_what_criu_said_and_no_more_than_that() {
        let folder = scratch::Folder::new("criu");
        let failed = || Error::Engine(EngineError::Failed { verb: Verb::Restore, message: "criu failed".into() });
        assert_eq!(blocking_add_criu_errors(failed(), &folder).chain(), failed().chain());
        let log = folder.join("restore.log");
        nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        assert_eq!(blocking_add_criu_errors(failed(), &folder).chain(), failed().chain());
        std::fs::remove_file(&log).expect("removed");
        let noise = "(00.1) pie: 1: fine\n".repeat(50_000);
        let long = "x".repeat(10_000);
        let errors: String = (0..20).map(|number| format!("(00.2) Error (criu/tty.c:{number}): {long}\n")).collect();
        std::fs::write(folder.join("restore.log"), noise + &errors).expect("a file");
        let text = blocking_add_criu_errors(failed(), &folder).chain();
        assert!(text.contains("criu failed; ") && text.contains("restore.log: (00.2) Error (criu/tty.c:12): xxx"), "{text}");
        assert!(text.contains("tty.c:19") && !text.contains("tty.c:11") && text.len() < 4000, "{text}");
    }
}
