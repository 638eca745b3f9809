//! Where everything is kept and served.

use std::path::PathBuf;

use log::LevelFilter;

/// What the daemon is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// What outlives a reboot: the metadata store, the tasks' work folders.
    pub(crate) root: PathBuf,
    /// What does not: bundles.
    pub(crate) state: PathBuf,
    /// The socket of the gRPC API.
    pub(crate) address: PathBuf,
    /// The group that may use it, beside root.
    pub(crate) gid: u32,
    /// What is logged.
    pub(crate) log_level: LevelFilter,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            root: "/var/lib/x-manager".into(),
            state: "/run/x-manager".into(),
            address: "/run/x-manager/x-manager.sock".into(),
            gid: 0,
            log_level: LevelFilter::Info,
        }
    }
}

impl Settings {
    /// The socket to which shims send their events.
    pub(crate) fn ttrpc_address(&self) -> PathBuf {
        let mut address = self.address.clone().into_os_string();
        address.push(".ttrpc");
        address.into()
    }

    /// The file of the metadata store.
    pub(crate) fn store(&self) -> PathBuf {
        self.root.join("meta.db")
    }

    /// The bundles, as containerd lays them out: a folder for each namespace, in it one for each task.
    pub(crate) fn bundles(&self) -> PathBuf {
        self.state.join(TASKS)
    }

    /// The same for what a bundle's `work` leads to.
    pub(crate) fn works(&self) -> PathBuf {
        self.root.join(TASKS)
    }
}

const TASKS: &str = "io.containerd.runtime.v2.task";
