//! The terminal that xctl runs on: raw while a container's terminal is shown on it, and as before afterwards.

use std::io;
use std::os::fd::AsFd as _;

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use crate::error::{Error, IoContext as _, Result};

/// A raw terminal, until it is dropped.
#[derive(Debug)]
pub(crate) struct Raw(Termios);

impl Raw {
    /// Makes the terminal of standard input raw: keys are the container's, Ctrl-C too.
    ///
    /// Errors: if standard input is no terminal.
    pub(crate) fn enter() -> Result<Self> {
        if !is_there() {
            return Err(Error::refused(
                "standard input is not a terminal, so --tty cannot be used; leave it out, or run xctl on a terminal",
            ));
        }
        let before = tcgetattr(io::stdin().as_fd()).on("get the modes of", STDIN)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &raw).on("set the modes of", STDIN)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // a terminal that was closed has no modes
        let _ = tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &self.0);
    }
}

/// Whether standard input is a terminal.
pub(crate) fn is_there() -> bool {
    isatty(io::stdin().as_fd())
}

/// Columns and rows.
pub(crate) fn size() -> Option<(u32, u32)> {
    let size = tcgetwinsize(io::stdin().as_fd()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then(|| (u32::from(size.ws_col), u32::from(size.ws_row)))
}

const STDIN: &str = "standard input";
