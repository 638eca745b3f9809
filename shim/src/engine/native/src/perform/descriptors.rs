//! The descriptors of a performer.
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

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
    /// Closes everything in the child but its gate and `others`. Of the host's folders that are still open, one would be enough: a path of the
    /// container can lead through it to the host's root (`/proc/self/fd/3/../../..`), until the program is executed. The owners are not dropped in the child.
    pub(super) fn close_others(&self, others: &[RawFd]) -> io::Result<()> {
        close_all_but(self.gate.iter().map(AsRawFd::as_raw_fd).chain(others.iter().copied()).collect())
    }

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
    close_all_but(others.into_iter().flatten().map(AsRawFd::as_raw_fd).collect())?;
    Ok((kept, init))
}

/// Closes everything above 2 but these. A descriptor of the caller's, not close-on-exec, may have any number, also one between two that are kept.
fn close_all_but(mut numbers: Vec<RawFd>) -> io::Result<()> {
    numbers.sort_unstable();
    let mut next = 3;
    for number in numbers.into_iter().filter_map(|number| u32::try_from(number).ok()) {
        if next < number {
            sys::close_range(next, number - 1)?;
        }
        next = number + 1;
    }
    sys::close_range(next, u32::MAX)
}
