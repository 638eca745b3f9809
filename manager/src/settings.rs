//! Settings: paths, addresses, and limits on what clients can make this process hold.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use containerd_client::types::Platform;
use log::LevelFilter;

use crate::layers::LayerLimits;
use crate::store::{Files, Kind};

/// What the daemon is started with.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    /// Persistent data: the metadata store and the work folders of tasks and sandboxes.
    pub(crate) root: PathBuf,
    /// Data that is lost with a reboot: bundles.
    pub(crate) state: PathBuf,
    /// The socket of the gRPC API.
    pub(crate) address: PathBuf,
    /// The group that may use it, beside root.
    pub(crate) gid: u32,
    /// What is logged.
    pub(crate) log_level: LevelFilter,
    /// Where metrics are served, if anywhere.
    pub(crate) metrics: Option<MetricsAddress>,
    /// How often the restart monitor checks containers without an event; none turns it off.
    pub(crate) restart_interval: Option<Duration>,
    /// Whether namespaces share content.
    pub(crate) sharing: Sharing,
    /// Whether layers are unpacked before clients ask for it.
    pub(crate) unpacks_ahead: bool,
    /// When garbage is collected.
    pub(crate) collection: Collection,
    /// How images are pulled and pushed.
    pub(crate) transfer: TransferSettings,
    /// Snapshotters that other processes serve.
    pub(crate) proxies: Vec<ProxyPlugin>,
    /// The content store that another process serves, if one does.
    pub(crate) content_proxy: Option<ContentProxy>,
    /// What clients may make this process hold.
    pub(crate) limits: Limits,
}

/// How images are pulled and pushed; containerd's settings and defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TransferSettings {
    /// Blobs that arrive at the same time.
    pub(crate) max_concurrent_downloads: usize,
    /// Blobs that are sent at the same time.
    pub(crate) max_concurrent_uploaded_layers: usize,
    /// Folders with a hosts.toml for each registry, joined by `:`, for clients that name none; empty for none.
    pub(crate) config_path: String,
}

impl Default for TransferSettings {
    fn default() -> Self {
        Self { max_concurrent_downloads: 3, max_concurrent_uploaded_layers: 3, config_path: String::new() }
    }
}

/// Where metrics are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MetricsAddress {
    /// An address and port.
    Tcp(std::net::SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

/// Whether content that one namespace has is given to others without its bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// To all who know its digest.
    #[default]
    Shared,
    /// Only from namespaces with the label `containerd.io/namespace.shareable=true`.
    Isolated,
}

/// When garbage is collected; containerd's settings and defaults.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Collection {
    /// The most of the time that collections may take, as a fraction of it.
    pub(crate) pause_threshold: f64,
    /// Removals after which it is collected at once; 0 leaves that to the schedule.
    pub(crate) deletion_threshold: u64,
    /// Changes after which the next scheduled collection takes place; 0 if only removals count.
    pub(crate) mutation_threshold: u64,
    /// Before one that a threshold or a client asks for.
    pub(crate) schedule_delay: Duration,
    /// Before the first.
    pub(crate) startup_delay: Duration,
}

impl Default for Collection {
    fn default() -> Self {
        Self {
            pause_threshold: 0.02,
            deletion_threshold: 0,
            mutation_threshold: 100,
            schedule_delay: Duration::ZERO,
            startup_delay: Duration::from_millis(100),
        }
    }
}

/// A snapshotter that another process serves, as containerd's `[proxy_plugins]` has them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ProxyPlugin {
    pub(crate) name: String,
    /// What it calls itself, where several are behind one socket.
    pub(crate) snapshotter: String,
    /// Its unix socket.
    pub(crate) address: PathBuf,
    /// Of its snapshots; none for that of this machine.
    pub(crate) platform: Option<Platform>,
    /// What clients see of it.
    pub(crate) exports: BTreeMap<String, String>,
    pub(crate) capabilities: Vec<String>,
}

/// A content store that another process serves, likewise.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ContentProxy {
    pub(crate) name: String,
    /// In which it has everything, whatever namespace has it here.
    pub(crate) namespace: String,
    /// Its unix socket.
    pub(crate) address: PathBuf,
    /// What clients see of it.
    pub(crate) platform: Option<Platform>,
    pub(crate) exports: BTreeMap<String, String>,
    pub(crate) capabilities: Vec<String>,
}

/// What clients may make this process hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Connections of clients.
    pub(crate) connections: usize,
    /// Clients subscribed to events.
    pub(crate) subscribers: usize,
    /// Bytes of events queued for each subscriber.
    pub(crate) event_queue_bytes: usize,
    /// Bytes of the metadata store.
    pub(crate) store_bytes: u64,
    /// What a layer may have.
    pub(crate) layers: LayerLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 1024, subscribers: 256, event_queue_bytes: 4 << 20, store_bytes: 1 << 30, layers: LayerLimits::default() }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            root: "/var/lib/x-manager".into(),
            state: "/run/x-manager".into(),
            address: "/run/x-manager/x-manager.sock".into(),
            gid: 0,
            log_level: LevelFilter::Info,
            metrics: None,
            restart_interval: Some(Duration::from_secs(10)),
            sharing: Sharing::default(),
            unpacks_ahead: true,
            collection: Collection::default(),
            transfer: TransferSettings::default(),
            proxies: Vec::new(),
            content_proxy: None,
            limits: Limits::default(),
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

    /// The socket for `x-manager upgrade`, root's alone.
    pub(crate) fn control_address(&self) -> PathBuf {
        self.state.join("control.sock")
    }

    /// The file of the metadata store that outlives a reboot.
    pub(crate) fn store(&self) -> PathBuf {
        self.root.join("meta.db")
    }

    /// All files of the metadata store.
    pub(crate) fn store_files(&self) -> Files {
        Files { meta: self.store(), notes: self.state.join("notes.db") }
    }

    /// The files of content, as containerd lays them out.
    pub(crate) fn content(&self) -> PathBuf {
        self.root.join("io.containerd.content.v1.content")
    }

    /// The bundles of a kind, as containerd lays them out: a folder for each namespace, in it one for each task or sandbox.
    pub(crate) fn bundles(&self, kind: Kind) -> PathBuf {
        self.state.join(folder(kind))
    }

    /// The same for what a bundle's `work` leads to.
    pub(crate) fn works(&self, kind: Kind) -> PathBuf {
        self.root.join(folder(kind))
    }
}

/// Named after the part of containerd that owns it.
fn folder(kind: Kind) -> &'static str {
    match kind {
        Kind::Task => "io.containerd.runtime.v2.task",
        Kind::Sandbox => "io.containerd.sandbox.controller.v1.shim",
    }
}
