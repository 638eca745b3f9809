//! Runs hooks.
//!
//! **Invariant:** a hook gets the environment that it asks for, or none: neither the shim's nor, on the host, the container's, whose variables could make
//! it load the image's code.
//! **Invariant:** a hook ends with the process that runs it, which ends with its keeper.
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Doing, Failure, Step};
use crate::plan::Hook;
use crate::sys;

/// Runs hooks in order, to the first that fails. `kind` names them in the failure; `inherited` is the environment of those that ask for none.
pub(super) fn run(hooks: &[Hook], kind: &str, state: &str, cwd: Option<&Path>, inherited: &[String]) -> Result<(), Failure> {
    hooks.iter().enumerate().try_for_each(|(index, hook)| {
        run_one(hook, state, cwd, inherited)
            .map_err(|failure| Failure { what: format!("run {kind} hook #{index}: {}", failure.what), ..failure })
    })
}

fn run_one(hook: &Hook, state: &str, cwd: Option<&Path>, inherited: &[String]) -> Result<(), Failure> {
    let doing = || hook.path.clone();
    // Not pipes: a hook that reads nothing would end this process by SIGPIPE, one that writes much would wait for a reader.
    let file = || memfd_create("hook", MFdFlags::MFD_CLOEXEC).map(File::from);
    let (mut input, output) = (file().doing(Step::Hooks, doing)?, file().doing(Step::Hooks, doing)?);
    input.write_all(state.as_bytes()).and_then(|()| input.rewind()).doing(Step::Hooks, doing)?;
    let copy = || output.try_clone().doing(Step::Hooks, doing);
    let mut command = Command::new(&hook.path);
    command.arg0(&hook.args[0]).args(&hook.args[1..]).env_clear().stdin(input).stdout(copy()?).stderr(copy()?);
    let env = if hook.env.is_empty() { inherited } else { &hook.env };
    command.envs(env.iter().filter_map(|entry| entry.split_once('=')));
    if let Some(cwd) = cwd {
        command.current_dir(cwd);
    }
    sys::end_with_this_process(&mut command);
    let mut child = command.spawn().doing(Step::Hooks, doing)?;
    let why = match wait(&mut child, hook.timeout()).doing(Step::Hooks, doing)? {
        Some(status) if status.success() => return Ok(()),
        Some(status) => status.to_string(),
        None => format!("killed after {} s", hook.timeout().unwrap_or_default().as_secs()),
    };
    let written = tail(output);
    Err(Failure { step: Step::Hooks, what: format!("{}: {why}, output: {written}", hook.path), errno: 0 })
}

/// The status, or `None` if it had to be killed.
fn wait(child: &mut Child, timeout: Option<Duration>) -> std::io::Result<Option<ExitStatus>> {
    let (Some(timeout), Ok(handle)) = (timeout, sys::open_pidfd(child.id())) else { return child.wait().map(Some) };
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        if sys::wait_for_exit(handle.as_fd(), u16::try_from(left).unwrap_or(u16::MAX))? {
            return child.wait().map(Some);
        }
        if left == 0 {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
    }
}

/// The end of what it has written.
fn tail(mut output: File) -> String {
    let mut text = Vec::new();
    let length = output.metadata().map(|about| about.len()).unwrap_or(0);
    let read = output
        .seek(SeekFrom::Start(length.saturating_sub(MAX_OUTPUT_BYTES)))
        .and_then(|_| output.take(MAX_OUTPUT_BYTES).read_to_end(&mut text));
    if read.is_err() {
        return String::new();
    }
    String::from_utf8_lossy(&text).trim().to_owned()
}

const MAX_OUTPUT_BYTES: u64 = 2 << 10;
