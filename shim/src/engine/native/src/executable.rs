//! Protects the executable of the processes that enter containers.
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::fcntl::AT_FDCWD;

use crate::plan;
use crate::sys::{self, Attributes, Tree};

/// A handle of an executable, or of its folder, through which it cannot be written, whatever the permissions: on a read-only mount of its own that no path leads to.
///
/// A performer is a fork, so `/proc/self/exe` of a process that enters a container is the keeper's executable, and a container can have it executed. A
/// keeper that was executed through such a handle (execveat(2), or `/proc/self/fd`) gives it nothing to write to, also when no keeper runs any more.
pub fn readonly_executable(path: &Path) -> io::Result<OwnedFd> {
    let mount = sys::open_tree(AT_FDCWD, path, Tree::Top)?;
    // Private: as a peer of the mount that it was cloned from, it would take part in each mount that is made there.
    let attributes = Attributes { set: plan::RDONLY, propagation: libc::MS_PRIVATE, ..Attributes::default() };
    sys::set_attributes(mount.as_fd(), &attributes, Tree::Top)?;
    Ok(mount)
}
