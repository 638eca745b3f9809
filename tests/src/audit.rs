//! Leftovers: every process, file, mount and cgroup in the run's namespaces besides the test and its daemons.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::eventually::eventually;
use crate::{cgroups, isolation, proc};

/// The things that a container may leave behind, by kind and name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Audit(BTreeSet<String>);

impl Audit {
    /// Looks at everything.
    ///
    /// `but` lists pids that stay: daemons.
    pub fn take(but: &[u32]) -> Self {
        let mut found = BTreeSet::new();
        processes(but, &mut found);
        walk(Path::new("/run"), &mut found);
        for mount in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines() {
            found.insert(format!("mount {}", mount.split(' ').nth(4).unwrap_or_default()));
        }
        for folder in cgroups::folders(&isolation::cgroup()) {
            cgroups(&folder, &mut found);
        }
        Self(found)
    }

    /// What exists now and did not exist `before`.
    pub fn grown_since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }

    /// Waits until there is nothing more than `before`.
    ///
    /// Errors: the list of leftovers.
    pub async fn nothing_more_than(before: &Self, but: &[u32], deadline: Duration) -> Result<()> {
        eventually("nothing is left behind", deadline, async || {
            let grown = Self::take(but).grown_since(before);
            ensure!(grown.is_empty(), "{grown:#?}");
            Ok(())
        })
        .await
    }
}

fn processes(but: &[u32], found: &mut BTreeSet<String>) {
    for process in proc::all().into_values() {
        let known = process.pid == 1 || but.contains(&process.pid.cast_unsigned());
        // init waits for its own zombies in its own time; how many there were is in isolation::orphans()
        let buried = process.is_zombie() && process.parent == 1;
        if !known && !buried {
            let kind = if process.is_zombie() { "zombie" } else { "process" };
            let (pid, parent, comm) = (process.pid, process.parent, process.comm);
            found.insert(format!("{kind} {pid} {comm} (child of {parent}) {}", process.command));
        }
    }
}

/// The folders in which containerd keeps the bundles of each namespace: of containers, and of sandboxes.
pub const BUNDLES: [&str; 2] = ["io.containerd.runtime.v2.task", "io.containerd.sandbox.controller.v1.shim"];

/// Sockets and fifos, and the bundles of daemons.
fn walk(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, Ok(kind)) = (entry.path(), entry.file_type()) else { continue };
        let daemon = if folder.ends_with("state") { folder.parent().unwrap_or(folder) } else { folder };
        if kind.is_socket() && daemon.parent() == Some(Path::new(isolation::RUN)) {
            // a daemon's own, which it may leave when it is killed
        } else if kind.is_socket() {
            found.insert(format!("socket {}", path.display()));
        } else if kind.is_fifo() {
            found.insert(format!("fifo {}", path.display()));
        } else if kind.is_dir() && entry.file_name() != "rootfs" {
            if folder.parent().is_some_and(|parent| BUNDLES.iter().any(|name| parent.ends_with(name))) {
                found.insert(format!("bundle {}", path.display()));
            }
            walk(&path, found);
        }
    }
}

fn cgroups(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.insert(format!("cgroup {}", entry.path().display()));
            cgroups(&entry.path(), found);
        }
    }
}
