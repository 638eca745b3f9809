//! The configuration file, TOML.
//!
//! **Invariant:** an unknown key or invalid value is refused with its line; nothing in a file is ignored.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::types::Platform;
use log::LevelFilter;
use serde::Deserialize;

use crate::host;
use crate::name::{Namespace, identifier};
use crate::settings::{ContentProxy, MetricsAddress, ProxyPlugin, Settings, Sharing};
use crate::snapshots::Snapshotter;

/// Every key with its default, commented.
pub(crate) const DEFAULT: &str = include_str!("../default.toml");

/// Why a file cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ConfigError {
    /// It cannot be read.
    #[error("{}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        reason: String,
    },
    /// A line is invalid.
    #[error("{}, line {line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Why.
        reason: String,
    },
    /// A value is invalid.
    #[error("{}: {key} {value:?}: should be {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// The values that are allowed.
        expected: &'static str,
    },
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    root: Option<PathBuf>,
    state: Option<PathBuf>,
    address: Option<PathBuf>,
    group: Option<Group>,
    log_level: Option<String>,
    metrics: Metrics,
    restart: Restart,
    content: Content,
    images: Images,
    gc: Gc,
    transfer: Transfer,
    limits: Limits,
    proxy_plugins: BTreeMap<String, Proxy>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Proxy {
    r#type: String,
    address: String,
    /// Not in containerd's.
    #[serde(default)]
    snapshotter: Option<String>,
    /// Not in containerd's.
    #[serde(default)]
    namespace: Option<String>,
    #[serde(default)]
    platform: String,
    #[serde(default)]
    exports: BTreeMap<String, String>,
    #[serde(default)]
    capabilities: Vec<String>,
}

/// A group by name or number.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Group {
    Number(u32),
    Name(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Metrics {
    address: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Restart {
    enabled: Option<bool>,
    interval: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Content {
    sharing_policy: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Images {
    unpack_while_arriving: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Gc {
    pause_threshold: Option<f64>,
    deletion_threshold: Option<u32>,
    mutation_threshold: Option<u32>,
    schedule_delay_ms: Option<u32>,
    startup_delay_ms: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Transfer {
    max_concurrent_downloads: Option<u32>,
    max_concurrent_uploaded_layers: Option<u32>,
    config_path: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Limits {
    connections: Option<u32>,
    subscribers: Option<u32>,
    event_queue_bytes: Option<u32>,
    store_bytes: Option<u64>,
    layer_bytes: Option<u64>,
    layer_entries: Option<u64>,
}

/// Reads a file over the defaults.
pub(crate) fn read(path: &Path) -> Result<Settings, ConfigError> {
    let text = std::fs::read_to_string(path);
    let text = text.map_err(|error| ConfigError::Unreadable { path: path.to_owned(), reason: error.to_string() })?;
    parse(path, &text)
}

fn parse(path: &Path, text: &str) -> Result<Settings, ConfigError> {
    let file: File = toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let line = text.bytes().take(start).filter(|byte| *byte == b'\n').count() + 1;
        ConfigError::Line { path: path.to_owned(), line, reason: error.message().replace('\n', " ") }
    })?;
    let bad = |key, value: &dyn std::fmt::Display, expected| ConfigError::Value {
        path: path.to_owned(),
        key,
        value: value.to_string(),
        expected,
    };
    let mut settings = Settings::default();
    let paths = [
        ("root", file.root, &mut settings.root),
        ("state", file.state, &mut settings.state),
        ("address", file.address, &mut settings.address),
    ];
    for (key, value, place) in paths {
        if let Some(value) = value {
            if !value.is_absolute() {
                return Err(bad(key, &value.display(), "an absolute path"));
            }
            *place = value;
        }
    }
    match file.group {
        None => {}
        Some(Group::Number(gid)) => settings.gid = gid,
        Some(Group::Name(name)) => {
            settings.gid = host::group(&name).map_err(|_| bad("group", &name, "a number, or a name that is in /etc/group"))?;
        }
    }
    if let Some(level) = file.log_level {
        settings.log_level =
            level.parse::<LevelFilter>().map_err(|_| bad("log_level", &level, "one of off, error, warn, info, debug, trace"))?;
    }
    let metrics = file.metrics.address;
    settings.metrics = match metrics.strip_prefix("unix://") {
        _ if metrics.is_empty() => None,
        Some(path) if path.starts_with('/') => Some(MetricsAddress::Unix(path.into())),
        _ => {
            let expected = "like 127.0.0.1:9120, unix:///run/a.sock, or localhost:9120 with a host that is in /etc/hosts";
            let address = host::address(&metrics).map_err(|_| bad("metrics.address", &metrics, expected))?;
            Some(MetricsAddress::Tcp(address))
        }
    };
    let default_interval = settings.restart_interval.map_or(0, |interval| u32::try_from(interval.as_secs()).unwrap_or(u32::MAX));
    let interval = file.restart.interval.unwrap_or(default_interval);
    if interval == 0 {
        return Err(bad("restart.interval", &interval, "at least one second"));
    }
    settings.restart_interval = file.restart.enabled.unwrap_or(true).then(|| Duration::from_secs(interval.into()));
    if let Some(policy) = file.content.sharing_policy {
        settings.sharing = match policy.as_str() {
            "shared" => Sharing::Shared,
            "isolated" => Sharing::Isolated,
            _ => return Err(bad("content.sharing_policy", &policy, "shared or isolated")),
        };
    }
    settings.unpacks_ahead = file.images.unpack_while_arriving.unwrap_or(settings.unpacks_ahead);
    let collection = &mut settings.collection;
    if let Some(threshold) = file.gc.pause_threshold {
        if !(0.0..=0.5).contains(&threshold) {
            return Err(bad("gc.pause_threshold", &threshold, "from 0 to 0.5"));
        }
        collection.pause_threshold = threshold;
    }
    collection.deletion_threshold = file.gc.deletion_threshold.map_or(collection.deletion_threshold, u64::from);
    collection.mutation_threshold = file.gc.mutation_threshold.map_or(collection.mutation_threshold, u64::from);
    let delay = |millis: Option<u32>, default| millis.map_or(default, |millis| Duration::from_millis(millis.into()));
    collection.schedule_delay = delay(file.gc.schedule_delay_ms, collection.schedule_delay);
    collection.startup_delay = delay(file.gc.startup_delay_ms, collection.startup_delay);
    let transfer = &mut settings.transfer;
    let counts = [
        ("transfer.max_concurrent_downloads", file.transfer.max_concurrent_downloads, &mut transfer.max_concurrent_downloads),
        (
            "transfer.max_concurrent_uploaded_layers",
            file.transfer.max_concurrent_uploaded_layers,
            &mut transfer.max_concurrent_uploaded_layers,
        ),
    ];
    for (key, value, place) in counts {
        if let Some(value) = value {
            if !(1..=1000).contains(&value) {
                return Err(bad(key, &value, "from 1 to 1000"));
            }
            *place = usize::try_from(value).unwrap_or(1);
        }
    }
    if let Some(folders) = file.transfer.config_path {
        if !folders.is_empty() && !folders.split(':').all(|folder| folder.starts_with('/')) {
            return Err(bad("transfer.config_path", &folders, "absolute paths of folders, joined by ':'"));
        }
        transfer.config_path = folders;
    }
    for (name, proxy) in file.proxy_plugins {
        if identifier("proxy", &name).is_err() || Snapshotter::parse(&name).is_ok() {
            return Err(bad(
                "proxy_plugins",
                &name,
                "letters, digits, and single dots, dashes and underscores; and not overlayfs or native",
            ));
        }
        let is_content = match proxy.r#type.as_str() {
            "snapshot" => false,
            "content" => true,
            other => return Err(bad("proxy_plugins.NAME.type", &other, PROXY_TYPES)),
        };
        let address = proxy.address.strip_prefix("unix://").unwrap_or(&proxy.address);
        if !address.starts_with('/') {
            return Err(bad("proxy_plugins.NAME.address", &proxy.address, "the absolute path of a unix socket"));
        }
        let platform = match proxy.platform.split('/').collect::<Vec<_>>()[..] {
            [""] => None,
            [os, architecture] => Some(Platform { os: os.to_owned(), architecture: architecture.to_owned(), ..Platform::default() }),
            [os, architecture, variant] => {
                let (os, architecture, variant) = (os.to_owned(), architecture.to_owned(), variant.to_owned());
                Some(Platform { os, architecture, variant, ..Platform::default() })
            }
            _ => return Err(bad("proxy_plugins.NAME.platform", &proxy.platform, "like linux/amd64, or linux/arm/v7")),
        };
        let (address, exports, capabilities) = (PathBuf::from(address), proxy.exports, proxy.capabilities);
        if !is_content && let Some(namespace) = proxy.namespace {
            return Err(bad("proxy_plugins.NAME.namespace", &namespace, "there for a proxy of type content only"));
        }
        if is_content {
            if let Some(snapshotter) = proxy.snapshotter {
                return Err(bad("proxy_plugins.NAME.snapshotter", &snapshotter, "there for a proxy of type snapshot only"));
            }
            let namespace = proxy.namespace.unwrap_or_else(|| CONTENT_NAMESPACE.to_owned());
            if Namespace::parse(&namespace).is_err() {
                return Err(bad("proxy_plugins.NAME.namespace", &namespace, "the name of a namespace"));
            }
            if address == settings.address {
                return Err(bad("proxy_plugins.NAME.address", &proxy.address, "the socket of another process"));
            }
            if settings.content_proxy.is_some() {
                return Err(bad("proxy_plugins", &name, "the only one of type content: its blobs take the place of files"));
            }
            settings.content_proxy = Some(ContentProxy { name, namespace, address, platform, exports, capabilities });
            continue;
        }
        let snapshotter = proxy.snapshotter.unwrap_or_else(|| name.clone());
        settings.proxies.push(ProxyPlugin { name, snapshotter, address, platform, exports, capabilities });
    }
    let limits = &mut settings.limits;
    let counts = [
        ("limits.connections", file.limits.connections, &mut limits.connections, 1),
        ("limits.subscribers", file.limits.subscribers, &mut limits.subscribers, 1),
        // the longest event must fit
        ("limits.event_queue_bytes", file.limits.event_queue_bytes, &mut limits.event_queue_bytes, 2 << 20),
    ];
    for (key, value, place, least) in counts {
        if let Some(value) = value {
            *place = usize::try_from(value).unwrap_or(usize::MAX);
            if *place < least {
                return Err(bad(key, &value, if least == 1 { "at least 1" } else { "at least 2097152" }));
            }
        }
    }
    limits.store_bytes = file.limits.store_bytes.unwrap_or(limits.store_bytes);
    if limits.store_bytes < LEAST_STORE_BYTES {
        return Err(bad("limits.store_bytes", &limits.store_bytes, "at least 1048576"));
    }
    let layers = &mut limits.layers;
    let bounds = [
        ("limits.layer_bytes", file.limits.layer_bytes, &mut layers.layer_bytes),
        ("limits.layer_entries", file.limits.layer_entries, &mut layers.entries),
    ];
    for (key, value, place) in bounds {
        if let Some(value) = value {
            if value == 0 {
                return Err(bad(key, &value, "at least 1"));
            }
            *place = value;
        }
    }
    Ok(settings)
}

const LEAST_STORE_BYTES: u64 = 1 << 20;
const PROXY_TYPES: &str = "snapshot or content: containerd has proxies of type sandbox and diff too, which x-manager does not use";
/// What containerd's clients use if they are not asked for another one.
const CONTENT_NAMESPACE: &str = "default";

#[cfg(test)]
mod tests {
    use super::*;

    fn sentence(text: &str) -> String {
        parse(Path::new("/c.toml"), text).expect_err(text).to_string()
    }

    #[test]
    fn the_default_file_states_the_defaults_and_names_every_key() {
        assert_eq!(parse(Path::new("/c.toml"), DEFAULT), Ok(Settings::default()));
        let uncommented: String = DEFAULT
            .lines()
            .map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line))
            .fold(String::new(), |mut all, line| {
                all.push_str(line);
                all.push('\n');
                all
            });
        assert_eq!(parse(Path::new("/c.toml"), &uncommented), Ok(Settings::default()));
        let keys = uncommented.lines().filter(|line| line.contains(" = ") && !line.starts_with('#')).count();
        assert_eq!(keys, 24);
    }

    #[test]
    fn a_typo_is_refused_with_its_key_and_line() {
        let error = sentence("root = \"/a\"\n\n[limits]\nconections = 7\n");
        assert!(error.starts_with("/c.toml, line 4: unknown field `conections`"), "{error}");
        assert!(error.contains("connections"), "{error}");
        assert!(sentence("group = true").starts_with("/c.toml, line 1: "));
        assert!(sentence("a = 1\nroot = [").starts_with("/c.toml, line"));
    }

    #[test]
    fn a_value_that_cannot_be_used_is_refused_with_what_could_be() {
        assert_eq!(sentence("root = \"relative\""), "/c.toml: root \"relative\": should be an absolute path");
        assert_eq!(
            sentence("[metrics]\naddress = \"here\""),
            "/c.toml: metrics.address \"here\": should be like 127.0.0.1:9120, unix:///run/a.sock, or localhost:9120 with a host that is in /etc/hosts"
        );
        for bad in [
            "group = \"no such group\"",
            "log_level = \"loud\"",
            "[restart]\ninterval = 0",
            "[limits]\nsubscribers = 0",
            "[limits]\nstore_bytes = 1",
            "[content]\nsharing_policy = \"both\"",
            "[gc]\npause_threshold = 0.6",
            "[transfer]\nmax_concurrent_downloads = 0",
            "[transfer]\nconfig_path = \"/a:b\"",
            "[proxy_plugins.x]\ntype = \"diff\"\naddress = \"/x\"",
            "[proxy_plugins.x]\ntype = \"content\"\naddress = \"x\"",
            "[proxy_plugins.x]\ntype = \"content\"\naddress = \"/x\"\nsnapshotter = \"x\"",
            "[proxy_plugins.x]\ntype = \"content\"\naddress = \"/x\"\nnamespace = \"a b\"",
            "[proxy_plugins.x]\ntype = \"snapshot\"\naddress = \"/x\"\nnamespace = \"a\"",
            "address = \"/x\"\n[proxy_plugins.x]\ntype = \"content\"\naddress = \"unix:///x\"",
            "[proxy_plugins.native]\ntype = \"snapshot\"\naddress = \"/x\"",
            "[proxy_plugins.x]\ntype = \"snapshot\"\naddress = \"x\"",
            "[proxy_plugins.x]\ntype = \"snapshot\"\naddress = \"/x\"\nplatform = \"linux\"",
        ] {
            assert!(sentence(bad).contains("should be"), "{bad}");
        }
    }

    #[test]
    fn a_proxy_is_described_as_in_containerds_configuration() {
        let text = "[proxy_plugins.fuse-overlayfs]\ntype = \"snapshot\"\naddress = \"unix:///run/f.sock\"\nplatform = \"linux/arm/v7\"\ncapabilities = [\"remap-ids\"]\n[proxy_plugins.fuse-overlayfs.exports]\nroot = \"/r\"";
        let proxies = parse(Path::new("/c.toml"), text).expect("all of it is right").proxies;
        let [proxy] = &proxies[..] else { panic!("{proxies:?}") };
        assert_eq!(
            (proxy.name.as_str(), proxy.address.to_str(), proxy.exports["root"].as_str()),
            ("fuse-overlayfs", Some("/run/f.sock"), "/r")
        );
        assert_eq!(
            (proxy.platform.as_ref().map(|platform| platform.variant.as_str()), &proxy.capabilities[..]),
            (Some("v7"), &["remap-ids".to_owned()][..])
        );
        assert!(sentence("[proxy_plugins.x]\ntype = \"snapshot\"").contains("missing field `address`"));
    }

    #[test]
    fn one_content_proxy_is_taken_and_other_types_are_refused_by_name() {
        let one = "[proxy_plugins.cache]\ntype = \"content\"\naddress = \"/run/c.sock\"\n";
        let settings = parse(Path::new("/c.toml"), one).expect("all of it is right");
        let proxy = settings.content_proxy.expect("one");
        assert_eq!((proxy.name.as_str(), proxy.namespace.as_str(), proxy.address.to_str()), ("cache", "default", Some("/run/c.sock")));
        assert!(settings.proxies.is_empty());
        let two = sentence(&format!("{one}namespace = \"k8s.io\"\n{}", one.replace("cache", "more")));
        assert_eq!(two, "/c.toml: proxy_plugins \"more\": should be the only one of type content: its blobs take the place of files");
        assert!(sentence(&one.replace("content", "sandbox")).contains("sandbox and diff too, which x-manager does not use"));
    }

    #[test]
    fn the_configuration_file_is_applied() {
        let text = "state = \"/s\"\ngroup = \"root\"\nlog_level = \"debug\"\n[metrics]\naddress = \"unix:///m\"\n[restart]\nenabled = false\n[content]\nsharing_policy = \"isolated\"\n[gc]\nschedule_delay_ms = 7\n[limits]\nstore_bytes = 2000000";
        let settings = parse(Path::new("/c.toml"), text).expect("all of it is right");
        assert_eq!(settings.metrics, Some(MetricsAddress::Unix("/m".into())));
        assert_eq!((settings.restart_interval, settings.limits.store_bytes), (None, 2_000_000));
        assert_eq!((settings.sharing, settings.collection.schedule_delay), (Sharing::Isolated, Duration::from_millis(7)));
        assert_eq!((settings.state.to_str(), settings.log_level), (Some("/s"), LevelFilter::Debug));
    }
}
