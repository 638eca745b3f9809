//! The descriptors of a performer.
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::Descriptors;
use crate::sys;

/// What is left beside 0 to 2.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) report: OwnedFd,
    pub(super) gate: Option<OwnedFd>,
    pub(super) console: Option<OwnedFd>,
}

impl Kept {
    /// Closes the child's copy of the report: its end tells the keeper that the performer is done. The owner is not dropped in the child.
    pub(super) fn close_report(&self) -> io::Result<()> {
        let number = self.report.as_raw_fd() as u32;
        sys::close_range(number, number)
    }
}

/// Makes the streams 0 to 2, keeps the others close-on-exec, and closes everything else.
///
/// `init` is kept too: a handle of a container's init.
pub(super) fn settle(given: Descriptors, init: Option<OwnedFd>) -> io::Result<(Kept, Option<OwnedFd>)> {
    let others = [Some(&given.report), given.gate.as_ref(), given.console.as_ref(), init.as_ref()].into_iter().flatten();
    let highest = given.stdio.iter().chain(others).map(AsRawFd::as_raw_fd).max().unwrap_or(2).max(2);
    // Away from every number that is in use, so that none is overwritten or closed below.
    let first = highest + 1;
    let away = |fd: OwnedFd| sys::duplicate(&fd, first);
    let stdio = given.stdio.map(away);
    let kept = Kept { report: away(given.report)?, gate: given.gate.map(away).transpose()?, console: given.console.map(away).transpose()? };
    let init = init.map(away).transpose()?;
    let [stdin, stdout, stderr] = stdio;
    dup2_stdin(stdin?)?;
    dup2_stdout(stdout?)?;
    dup2_stderr(stderr?)?;
    let others = [Some(&kept.report), kept.gate.as_ref(), kept.console.as_ref(), init.as_ref()];
    let mut numbers: Vec<u32> = others.into_iter().flatten().map(|fd| fd.as_raw_fd() as u32).collect();
    numbers.sort_unstable();
    // A descriptor of the caller's, not close-on-exec, may have any number, also one between two that are kept.
    let mut next = 3;
    for number in numbers {
        if next < number {
            sys::close_range(next, number - 1)?;
        }
        next = number + 1;
    }
    sys::close_range(next, u32::MAX)?;
    Ok((kept, init))
}
