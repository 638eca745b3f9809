//! What `start` tells the keeper, and the keeper its workers: the flags of their command lines.
use std::path::PathBuf;

/// The flags of a keeper and of its workers.
///
/// They are containerd's own where containerd has one, so that `ps` shows a line that its tools recognise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// containerd's namespace: `-namespace`.
    pub(crate) namespace: String,
    /// The container, or the group, that this shim was started for: `-id`.
    pub(crate) id: String,
    /// containerd's gRPC socket: `-address`.
    pub(crate) containerd_address: String,
    /// containerd's ttrpc socket, where events go: `-ttrpc-address`. Without one, there are no events.
    pub(crate) ttrpc_address: Option<String>,
    /// Where the shim listens, `unix://…`: `-socket`.
    pub(crate) shim_address: String,
    /// Path of the keeper's control socket: `-control`.
    pub(crate) control_path: PathBuf,
    /// The bundle that `start` ran in: `-bundle`. Its `log` fifo is containerd's.
    pub(crate) bundle: PathBuf,
    /// How much to log: `-log-level`.
    pub(crate) log_level: log::LevelFilter,
}

impl Settings {
    /// Encodes the settings as arguments.
    pub(crate) fn to_arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut flag = |name: &str, value: String| arguments.extend([format!("-{name}"), value]);
        flag("namespace", self.namespace.clone());
        flag("id", self.id.clone());
        flag("address", self.containerd_address.clone());
        if let Some(address) = &self.ttrpc_address {
            flag("ttrpc-address", address.clone());
        }
        flag("socket", self.shim_address.clone());
        flag("control", self.control_path.display().to_string());
        flag("bundle", self.bundle.display().to_string());
        flag("log-level", self.log_level.to_string().to_lowercase());
        arguments
    }
}
