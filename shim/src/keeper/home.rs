//! The keeper's own namespaces, while it is in those of a pod.
//!
//! Owns the way back. What the keeper starts is to run in its own: a worker, a runtime, a hook, a logger. So each child goes home before it does anything
//! else, and the descriptors are handed over when the keeper is replaced.
//!
//! ```text
//!  Home(none) ──enter──▶ Home(network, ipc, uts of the host) ──leave──▶ Home(none)
//!                          └─ child: setns to each, then executes
//! ```
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns};
use x_engine::perform;

use crate::saved::{Reader, Saved, Writer};

/// The namespaces to return to; none while the keeper is in them.
#[derive(Debug, Default)]
pub(crate) struct Home(Vec<OwnedFd>);

/// The namespaces that the keeper of a pod leaves.
const KINDS: [&str; 3] = ["net", "ipc", "uts"];

impl Home {
    /// Enters the namespaces of a pod. After a failure the keeper is in its own.
    ///
    /// Errors: what failed.
    pub(crate) fn enter(&mut self, plan: &[u8]) -> Result<(), (String, io::Error)> {
        // An earlier attempt of a request that no commit has ended.
        self.leave().map_err(|error| ("return from the namespaces of another pod".to_owned(), error))?;
        let own = KINDS.iter().map(|kind| Ok(File::open(format!("/proc/self/ns/{kind}"))?.into())).collect::<io::Result<_>>();
        self.0 = own.map_err(|error| ("open the keeper's own namespaces".to_owned(), error))?;
        perform::enter_pod(plan).map_err(|failure| {
            if let Err(error) = self.leave() {
                log::error!(error:%; "the keeper cannot return to its own namespaces; what it starts does");
            }
            (failure.what, io::Error::from_raw_os_error(if failure.errno == 0 { nix::libc::EINVAL } else { failure.errno }))
        })
    }

    /// Returns to the keeper's own namespaces.
    pub(crate) fn leave(&mut self) -> io::Result<()> {
        self.go()?;
        self.0.clear();
        Ok(())
    }

    /// Whether the keeper is in the namespaces of a pod.
    pub(crate) fn is_left(&self) -> bool {
        !self.0.is_empty()
    }

    /// Moves the calling process to the keeper's own namespaces: a child of the keeper.
    pub(crate) fn go(&self) -> io::Result<()> {
        Ok(self.0.iter().try_for_each(|namespace| setns(namespace, CloneFlags::empty()))?)
    }

    /// Those that a new process has to join.
    pub(crate) fn namespaces(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd).collect()
    }
}

/// A keeper of an earlier version has saved none.
impl Saved for Home {
    fn save(&self, writer: &mut Writer) {
        self.0.save(writer);
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, minicbor::decode::Error> {
        Option::load(reader).map(Option::unwrap_or_default).map(Self)
    }
}
