//! Runs one engine command to its end, for commands without a keeper.
//!
//! **Invariant:** it ends at its deadline, even if the engine hangs; the engine's output is kept up to a limit.
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;

use crate::handover::{Exited, Fd, LOG_ARGUMENT, MAX_OUTPUT_BYTES, Spawn};
use crate::sys;

/// Runs an engine's command and returns its exit.
///
/// Errors: it could not be executed; TimedOut after the kill.
pub(crate) fn run(order: &Spawn, deadline: Instant) -> io::Result<Exited> {
    let (log, log_writer) = pipe()?;
    let (output, output_writer) = pipe()?;
    // The engine opens its log by a path; this one leads to the pipe while this process runs.
    let log_path = format!("/proc/{}/fd/{}", std::process::id(), log_writer.as_raw_fd());
    let mut arguments = order
        .argv
        .iter()
        .map(|argument| OsString::from_vec(if argument == LOG_ARGUMENT { log_path.clone().into_bytes() } else { argument.clone() }));
    let program = arguments.next().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear();
    for entry in &order.env {
        let split = entry.iter().position(|byte| *byte == b'=').ok_or(io::ErrorKind::InvalidInput)?;
        let (name, value) = (entry[..split].to_vec(), entry[split + 1..].to_vec());
        command.env(OsString::from_vec(name), OsString::from_vec(value));
    }
    let cwd = Path::new(&order.cwd);
    command.current_dir(if cwd.is_dir() { cwd } else { Path::new("/") });
    let target = |index: usize| -> io::Result<Stdio> {
        Ok(match order.fds.get(index) {
            Some(Fd::Output) => output_writer.try_clone()?.into(),
            _ => Stdio::null(),
        })
    };
    command.stdin(Stdio::null()).stdout(target(1)?).stderr(target(2)?);
    let mut child = command.spawn()?;
    drop((command, output_writer));

    let mut collected = [Collected::new(log), Collected::new(output)];
    let status = wait(&mut child, &mut collected, deadline);
    drop(log_writer);
    if status.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let [log, output] = collected.map(|mut pipe| {
        pipe.read();
        pipe.bytes
    });
    let status = status?;
    let status = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(255);
    Ok(Exited { status: u32::try_from(status).unwrap_or(255), log, output, terminal: false })
}

/// Waits for the exit of `child`, and reads its output meanwhile: a full pipe would block it.
fn wait(child: &mut Child, collected: &mut [Collected; 2], deadline: Instant) -> io::Result<ExitStatus> {
    let process = sys::process::open(child.id())?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
        let mut fds = vec![PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        // poll(2) would report one at end of file for ever.
        fds.extend(collected.iter().filter(|pipe| !pipe.ended).map(|pipe| PollFd::new(pipe.file.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        for pipe in &mut *collected {
            pipe.read();
        }
    }
}

/// The output from a pipe; the end of it where it is too long.
struct Collected {
    file: File,
    bytes: Vec<u8>,
    ended: bool,
}

impl Collected {
    fn new(pipe: OwnedFd) -> Self {
        Self { file: pipe.into(), bytes: Vec::new(), ended: false }
    }

    /// Reads the available bytes.
    fn read(&mut self) {
        let mut chunk = [0; 4096];
        while !self.ended {
            match self.file.read(&mut chunk) {
                Ok(0) => self.ended = true,
                Ok(count) => self.bytes.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.ended = error.kind() != io::ErrorKind::WouldBlock;
                    break;
                }
            }
            if self.bytes.len() > 2 * MAX_OUTPUT_BYTES {
                self.bytes.drain(..self.bytes.len() - MAX_OUTPUT_BYTES);
            }
        }
        let surplus = self.bytes.len().saturating_sub(MAX_OUTPUT_BYTES);
        self.bytes.drain(..surplus);
    }
}

/// A pipe whose read end does not block.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    nix::fcntl::fcntl(&read, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((read, write))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn shell(script: &str) -> Spawn {
        let argv = ["/bin/sh", "-c", script, "sh"].map(|argument| argument.as_bytes().to_vec());
        Spawn {
            argv: argv.into_iter().chain([LOG_ARGUMENT.to_vec()]).collect(),
            env: vec![b"A=b=c".to_vec()],
            cwd: "/proc".into(),
            fds: vec![Fd::Null, Fd::Output, Fd::Output],
            ..Spawn::default()
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn a_commands_stdout_and_stderr_are_kept_apart() {
        let exited = run(&shell("echo log > $1; echo out; echo err >&2; echo $A; pwd; exit 7"), soon()).expect("runs");
        assert_eq!(exited.status, 7);
        assert_eq!(String::from_utf8_lossy(&exited.log), "log\n");
        assert_eq!(String::from_utf8_lossy(&exited.output), "out\nerr\nb=c\n/proc\n");
        assert_eq!(run(&shell("kill -9 $$"), soon()).expect("runs").status, 137);
    }

    #[test]
    fn a_command_with_much_output_does_not_stall_and_the_end_of_its_output_is_kept() {
        let exited = run(&shell("head -c 3000000 /dev/zero; echo end"), soon()).expect("runs");
        assert_eq!(exited.output.len(), MAX_OUTPUT_BYTES);
        assert!(exited.output.ends_with(b"end\n"));
    }

    #[test]
    fn a_hanging_command_is_killed_and_its_remaining_children_are_not_waited_for() {
        let begun = Instant::now();
        let error = run(&shell("sleep 60"), Instant::now() + Duration::from_millis(50)).expect_err("hangs");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        run(&shell("sleep 5 & exit 0"), soon()).expect("runs");
        assert!(begun.elapsed() < Duration::from_secs(4));
    }
}
