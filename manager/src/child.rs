//! Programs that run for a while, and whose output is wanted.
//!
//! **Invariant:** a program neither runs longer than it may nor fills memory, and none outlives this process. When it is late, or its caller leaves, it is
//! killed with all that it has started.

use std::io;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use crate::error::{Error, IoContext as _, Result};
use crate::sys::children::{self, Group};

/// What a program may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) time: Duration,
    /// What is kept of each of its outputs. The rest is read too: a program that prints much is no error.
    pub(crate) bytes: u64,
}

/// Feeds a program, and waits until it has ended and its outputs are closed. To be called on the main thread.
///
/// Errors: [`Error::ProgramUnusable`]; [`Error::ProgramLate`].
pub(crate) async fn run(program: &Path, mut command: Command, input: Vec<u8>, limits: Limits) -> Result<Output> {
    let stdin = if input.is_empty() { Stdio::null() } else { Stdio::piped() };
    command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).kill_on_drop(true);
    // service managers' variables are for this process alone
    for name in ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"] {
        command.env_remove(name);
    }
    // a program that outlives this process would interfere with what the next process does for the same task
    children::die_with_us(command.as_std_mut());
    children::restores_open_files(command.as_std_mut());
    let mut child = command.spawn().map_err(|source| not_run(program, source))?;
    // dropped before the child is
    let group = child.id().map(Group::of);
    let stdin = child.stdin.take();
    let fed = async {
        if let Some(mut stdin) = stdin {
            // a program that does not read its input may have reported why
            let _ = stdin.write_all(&input).await;
        }
    };
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let ended = async {
        let ((), stdout, stderr) = tokio::join!(fed, beginning(stdout, limits.bytes), beginning(stderr, limits.bytes));
        io::Result::Ok(Output { status: child.wait().await?, stdout: stdout?, stderr: stderr? })
    };
    let late = |_elapsed| Error::ProgramLate { program: program.to_owned(), limit: limits.time };
    let output = tokio::time::timeout(limits.time, ended).await.map_err(late)?;
    // a program that has exited by itself meant its descendants to stay, like a shim
    if let Some(group) = group {
        group.release();
    }
    output.on("run", program)
}

fn not_run(program: &Path, source: io::Error) -> Error {
    use io::ErrorKind::{NotFound, PermissionDenied};
    let program = program.to_owned();
    if matches!(source.kind(), NotFound | PermissionDenied) || source.raw_os_error() == Some(nix::libc::ENOEXEC) {
        Error::ProgramUnusable { program, source }
    } else {
        Error::Io { op: "run", path: program, source }
    }
}

async fn beginning(pipe: Option<impl AsyncRead + Unpin>, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        (&mut pipe).take(most).read_to_end(&mut bytes).await?;
        tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    async fn sh(script: &str, input: &[u8], time: Duration) -> Result<Output> {
        let program = Path::new("/bin/sh");
        let mut command = Command::new(program);
        command.args(["-c", script]);
        run(program, command, input.to_vec(), Limits { time, bytes: 8 }).await
    }

    #[tokio::test]
    async fn the_beginning_of_what_a_program_prints_is_kept_and_the_rest_is_no_error() {
        let output = sh("cat; yes | head -c 1000000 >&2; exit 3", b"more than eight", Duration::from_secs(30)).await.expect("it ends");
        assert_eq!((output.status.code(), &*output.stdout, &*output.stderr), (Some(3), &b"more tha"[..], &b"y\ny\ny\ny\n"[..]));
    }

    #[tokio::test]
    async fn a_program_that_is_late_and_one_whose_caller_leaves_are_killed_with_what_they_have_started() {
        let late = sh("sleep 1000 & sleep 1000", b"", Duration::from_millis(100)).await.expect_err("it is late");
        assert!(matches!(late, Error::ProgramLate { .. }), "{late:?}");
        let file = std::env::temp_dir().join(format!("x-child-{}", std::process::id()));
        let script = format!("sh -c 'echo $$ > {0}.new; mv {0}.new {0}; exec sleep 1000' & sleep 1000", file.display());
        let begin = Instant::now();
        let pid = tokio::select! {
            ended = sh(&script, b"", Duration::from_secs(1000)) => panic!("{ended:?}"),
            pid = async {
                while !file.exists() && begin.elapsed() < SOON {
                    tokio::task::yield_now().await;
                }
                std::fs::read_to_string(&file)
            } => pid.expect("it has started"),
        };
        std::fs::remove_file(&file).expect("it is there");
        let stat = format!("/proc/{}/stat", pid.trim());
        // its new parent may not have reaped it yet
        let is_over = || std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z ") || stat.contains(") X "));
        while !is_over() && begin.elapsed() < SOON {
            std::thread::yield_now();
        }
        assert!(is_over(), "{stat}");
    }

    const SOON: Duration = Duration::from_secs(100);
}
