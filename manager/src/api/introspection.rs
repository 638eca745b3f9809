//! `containerd.services.introspection.v1.Introspection`

use std::borrow::Cow;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_client::google::rpc::Status as RpcStatus;
use containerd_client::services::v1::{Plugin, PluginInfoRequest, PluginInfoResponse, PluginsRequest, PluginsResponse, ServerResponse};
use containerd_client::types::Platform;
use prost::Message as _;
use prost_types::Any;

use super::call::Call;
use super::sandbox_controller::SANDBOX_CONTROLLER;
use super::search::Filters;
use crate::error::{Error, IoContext as _, Object, Result};
use crate::filter::{Fields, Filter, text};
use crate::settings::{Settings, Sharing};
use crate::snapshots::{Snapshots, Snapshotter};
use crate::tasks::Tasks;
use crate::wire;

impl Fields for Plugin {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        match path {
            ["type"] => text(&self.r#type),
            ["id"] => text(&self.id),
            _ => None,
        }
    }
}

/// What containerd would call the parts of this daemon.
fn all(settings: &Settings, snapshots: &Snapshots) -> Vec<Plugin> {
    let plugin = |kind: &str, id: &str| Plugin { r#type: kind.to_owned(), id: id.to_owned(), ..Plugin::default() };
    let with = |mut plugin: Plugin, platforms: &[Platform], capabilities: &[&str], exports: &[(&str, String)]| {
        plugin.platforms = platforms.to_vec();
        plugin.capabilities = capabilities.iter().map(|capability| (*capability).to_owned()).collect();
        plugin.exports = exports.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        plugin
    };
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let platforms = [Platform { os: "linux".to_owned(), architecture: architecture.to_owned(), ..Platform::default() }];
    let sharing = match settings.sharing {
        Sharing::Shared => "shared",
        Sharing::Isolated => "isolated",
    };
    let collection = settings.collection;
    let schedule = [
        ("PauseThreshold", collection.pause_threshold.to_string()),
        ("DeletionThreshold", collection.deletion_threshold.to_string()),
        ("MutationThreshold", collection.mutation_threshold.to_string()),
        ("ScheduleDelay", format!("{}ms", collection.schedule_delay.as_millis())),
    ];
    let folder = |path: PathBuf| [("root", path.to_string_lossy().into_owned())];
    let mut plugins = vec![
        with(plugin("io.containerd.content.v1", "content"), &[], &[], &folder(settings.content())),
        plugin("io.containerd.event.v1", "exchange"),
        with(plugin("io.containerd.gc.v1", "scheduler"), &[], &[], &schedule),
        with(plugin("io.containerd.metadata.v1", "sqlite"), &[], &[], &[("policy", sharing.to_owned())]),
        with(plugin(RUNTIME_TYPE, RUNTIME_ID), &platforms, &[], &[]),
    ];
    plugins.push(plugin("io.containerd.mount-manager.v1", "local"));
    plugins.extend([plugin("io.containerd.sandbox.store.v1", "local"), plugin("io.containerd.sandbox.controller.v1", SANDBOX_CONTROLLER)]);
    for snapshotter in Snapshotter::ALL {
        let can_remap = snapshots.cannot_remap(snapshotter).is_none();
        let capabilities = [("rebase", snapshotter.can_rebase()), ("remap-ids", can_remap)];
        let capabilities: Vec<_> = capabilities.into_iter().filter(|(_, can)| *can).map(|(name, _)| name).collect();
        let root = folder(snapshots.root_of(snapshotter));
        let mut plugin = with(plugin("io.containerd.snapshotter.v1", snapshotter.name()), &platforms, &capabilities, &root);
        plugin.init_err = snapshots.unusable(snapshotter).map(|why| RpcStatus {
            code: tonic::Code::FailedPrecondition.into(),
            message: why.to_owned(),
            details: Vec::new(),
        });
        plugins.push(plugin);
    }
    for proxy in snapshots.proxies() {
        let proxied = &proxy.plugin;
        let platforms = proxied.platform.as_ref().map_or(platforms.to_vec(), |platform| vec![platform.clone()]);
        let mut shown = plugin("io.containerd.snapshotter.v1", &proxied.name);
        (shown.platforms, shown.capabilities) = (platforms, proxied.capabilities.clone());
        shown.exports = proxied.exports.clone().into_iter().collect();
        shown.exports.insert("address".to_owned(), proxied.address.to_string_lossy().into_owned());
        plugins.push(shown);
    }
    if let Some(proxied) = &settings.content_proxy {
        let mut shown = plugin("io.containerd.content.v1", &proxied.name);
        shown.platforms = proxied.platform.iter().cloned().collect();
        (shown.capabilities, shown.exports) = (proxied.capabilities.clone(), proxied.exports.clone().into_iter().collect());
        shown.exports.insert("address".to_owned(), proxied.address.to_string_lossy().into_owned());
        plugins.push(shown);
    }
    plugins.push(with(plugin("io.containerd.differ.v1", "walking"), &platforms, &[], &[]));
    plugins.push(plugin("io.containerd.streaming.v1", "manager"));
    plugins.push(with(plugin("io.containerd.transfer.v1", "local"), &platforms, &[], &[]));
    let services = [
        "containers",
        "content",
        "diff",
        "events",
        "healthcheck",
        "images",
        "introspection",
        "leases",
        "mounts",
        "namespaces",
        "sandbox-controllers",
        "sandboxes",
        "snapshots",
        "streaming",
        "tasks",
        "transfer",
        "version",
    ];
    plugins.extend(services.map(|service| plugin("io.containerd.grpc.v1", service)));
    plugins.push(plugin("io.containerd.ttrpc.v1", "events"));
    plugins
}

/// The service.
#[derive(Debug)]
pub(crate) struct Introspection {
    /// The answer to `Server`; it stays the same as long as the store exists.
    pub(crate) uuid: String,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) snapshots: Snapshots,
    pub(crate) filters: Filters,
}

impl Introspection {
    pub(super) async fn plugins(self: Arc<Self>, _call: Call, request: PluginsRequest) -> Result<PluginsResponse> {
        let filter = Filter::parse(&request.filters)?;
        Ok(PluginsResponse { plugins: self.filters.matching(&filter, all(&self.settings, &self.snapshots)).await? })
    }

    pub(super) async fn server(self: Arc<Self>, _call: Call, _request: ()) -> Result<ServerResponse> {
        let namespace = Path::new("/proc/self/ns/pid");
        let pidns = std::fs::metadata(namespace).on("look at", namespace)?.ino();
        Ok(ServerResponse { uuid: self.uuid.clone(), pid: std::process::id().into(), pidns, deprecations: Vec::new() })
    }

    pub(super) async fn plugin_info(self: Arc<Self>, _call: Call, request: PluginInfoRequest) -> Result<PluginInfoResponse> {
        let found =
            all(&self.settings, &self.snapshots).into_iter().find(|plugin| plugin.r#type == request.r#type && plugin.id == request.id);
        let plugin = found.ok_or_else(|| Error::NotFound(Object::Plugin { kind: request.r#type, id: request.id }))?;
        let mut extra = None;
        if let Some(options) = request.options.filter(|_| plugin.r#type == RUNTIME_TYPE) {
            let asked = RuntimeRequest::decode(&*options.value).map_err(|error| Error::Invalid(format!("runtime request: {error}")))?;
            let runtime = if asked.runtime_path.is_empty() { DEFAULT_RUNTIME } else { &asked.runtime_path };
            let options = asked.options.filter(|options| !options.type_url.is_empty()).map(wire::to_shim);
            let value = self.tasks.runtime_info(runtime, options.as_ref()).await?;
            extra = Some(Any { type_url: "containerd.types.RuntimeInfo".to_owned(), value });
        }
        Ok(PluginInfoResponse { plugin: Some(plugin), extra })
    }
}

/// `containerd.types.RuntimeRequest`: which runtime is meant, and with which options.
#[derive(Clone, PartialEq, prost::Message)]
struct RuntimeRequest {
    #[prost(string, tag = "1")]
    runtime_path: String,
    #[prost(message, optional, tag = "2")]
    options: Option<Any>,
}

const RUNTIME_TYPE: &str = "io.containerd.runtime.v2";
const RUNTIME_ID: &str = "task";
const DEFAULT_RUNTIME: &str = "io.containerd.runc.v2";
