//! Runs one engine command to its end, for commands without a keeper.
//!
//! **Invariant:** it ends at its deadline, even if the engine hangs; the engine's output is kept up to a limit.
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::wait;
use crate::handover::{Exited, Spawn};
use crate::{helper, sys};

/// How long a killed command may take to exit: one in an uninterruptible sleep is left to init.
const ENDS_WITHIN: Duration = Duration::from_millis(200);

/// Runs an engine's command and returns its exit.
///
/// Errors: it could not be executed; TimedOut after the kill.
pub(crate) fn run(order: &Spawn, deadline: Instant) -> io::Result<Exited> {
    let cwd = if Path::new(&order.cwd).is_dir() { order.cwd.clone() } else { "/".into() };
    let (started, mut pipes) = helper::start(&Spawn { cwd, ..order.clone() }, Vec::new(), |_| Ok(None))?;
    let process = sys::process::open(started.pid)?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let _ = sys::process::signal(process.as_fd(), libc::SIGKILL);
            wait::for_end(process.as_fd(), Instant::now() + ENDS_WITHIN);
            let _ = sys::process::reap(started.pid);
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
        let mut fds = vec![PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        // poll(2) would report one at end of file for ever.
        let open = pipes.captures().filter(|capture| !capture.is_closed());
        fds.extend(open.map(|capture| PollFd::new(capture.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        // A full pipe would block it.
        pipes.read();
        if let Some(ended) = sys::process::reap(started.pid)? {
            if let Some(error) = started.failure.error() {
                return Err(error);
            }
            let (log, output) = pipes.finish();
            return Ok(Exited { status: ended.status, log, output, terminal: false });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::{Fd, LOG_ARGUMENT, MAX_OUTPUT_BYTES};

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
        run(&shell("sleep 30 & exit 0"), soon()).expect("runs");
        assert!(begun.elapsed() < Duration::from_secs(25));
    }
}
