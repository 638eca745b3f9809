//! The configuration of a pod, checked.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{NSFS_MAGIC, statfs};
use protobuf::well_known_types::any::Any;
use serde::{Deserialize, Serialize};
use x_engine::plan;
use x_proto::pod::{Dns, Mode, PodConfig, Selinux, TYPE_URL};

use super::selinux::{self, Asked};
use crate::worker::error::Error;

/// The longest configuration of which a record is made, in bytes, labels and annotations included. The kubelet's is a few KiB.
const MAX_BYTES: usize = 1 << 20;
/// The longest record that is made of one.
const MAX_KEPT_BYTES: usize = 256 << 10;
/// The kernel's limit.
const MAX_HOSTNAME_BYTES: usize = 64;

/// What a pod is to have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::worker) struct Config {
    /// Its name and namespace in Kubernetes, for operators.
    pub(in crate::worker) name: String,
    pub(in crate::worker) namespace: String,
    /// The host's, if it is absent.
    pub(in crate::worker) hostname: Option<String>,
    /// The content of `resolv.conf`; the host's, if it is absent.
    pub(in crate::worker) resolver: Option<String>,
    pub(in crate::worker) cgroup_parent: String,
    pub(in crate::worker) sysctls: BTreeMap<String, String>,
    /// Its network namespace; the host's, if it is absent.
    pub(in crate::worker) network: Option<PathBuf>,
    pub(in crate::worker) host_ipc: bool,
    pub(in crate::worker) pids: Pids,
    /// It has the user namespace that owns its network namespace.
    pub(in crate::worker) user: bool,
    /// The SELinux level of its processes.
    pub(in crate::worker) selinux_level: Option<String>,
    /// The other parts of the label of its own process, where it has one.
    pub(in crate::worker) selinux_user: Option<String>,
    pub(in crate::worker) selinux_role: Option<String>,
    pub(in crate::worker) selinux_type: Option<String>,
}

/// Who shares a pid namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::worker) enum Pids {
    /// The containers of the pod.
    Pod,
    /// Each container has its own.
    #[default]
    Container,
    /// The host.
    Node,
}

impl Config {
    /// Reads what a client has sent. Without a configuration, the pod has the host's network if no namespace is named, and a pid namespace for each container.
    pub(super) fn blocking_read(id: &str, options: Option<&Any>, network: &str) -> Result<Self, Error> {
        let network = (!network.is_empty()).then(|| PathBuf::from(network));
        let config = match options {
            None => Self { network, ..Self::default() },
            Some(options) => Self::of(id, &parse(id, options)?, network)?,
        };
        config.blocking_check(id)?;
        Ok(config.with_defaults())
    }

    fn of(id: &str, sent: &PodConfig, network: Option<PathBuf>) -> Result<Self, Error> {
        let invalid = |field: &str, why: String| Error::PodConfig { id: id.to_owned(), field: field.to_owned(), why };
        let modes = sent.linux.namespaces;
        let not_a_mode = |field: &str, mode: Mode| invalid(field, format!("{mode:?} is not a mode that a pod can have"));
        let is_of_host = |field: &str, mode| match mode {
            Mode::Pod => Ok(false),
            Mode::Node => Ok(true),
            other => Err(not_a_mode(field, other)),
        };
        if is_of_host("linux.security_context.namespace_options.network", modes.network)? != network.is_none() {
            let why = match network {
                Some(_) => "the pod is to be in the host's network, and a namespace is named",
                None => "the pod is to have a network namespace of its own, and none is named",
            };
            return Err(invalid("netns_path", why.to_owned()));
        }
        let pids = match modes.pid {
            Mode::Pod => Pids::Pod,
            Mode::Container => Pids::Container,
            Mode::Node => Pids::Node,
            other => return Err(not_a_mode("linux.security_context.namespace_options.pid", other)),
        };
        let user = match modes.user {
            None => false,
            Some(mode) => !is_of_host("linux.security_context.namespace_options.userns_options.mode", mode)?,
        };
        if user && network.is_none() {
            let why = "a pod in the host's network has no user namespace: it is the owner of the network namespace";
            return Err(invalid("linux.security_context.namespace_options.userns_options", why.to_owned()));
        }
        let selinux =
            |part: fn(&Selinux) -> &String| sent.linux.selinux.as_ref().map(|label| part(label).clone()).filter(|part| !part.is_empty());
        Ok(Self {
            name: sent.name.clone(),
            namespace: sent.namespace.clone(),
            hostname: (!sent.hostname.is_empty()).then(|| sent.hostname.clone()),
            resolver: sent.dns.as_ref().map(|dns| resolver(id, dns)).transpose()?,
            cgroup_parent: sent.linux.cgroup_parent.clone(),
            sysctls: sent.linux.sysctls.clone(),
            network,
            host_ipc: is_of_host("linux.security_context.namespace_options.ipc", modes.ipc)?,
            pids,
            user,
            selinux_level: selinux(|label| &label.level),
            selinux_user: selinux(|label| &label.user),
            selinux_role: selinux(|label| &label.role),
            selinux_type: selinux(|label| &label.kind),
        })
    }

    fn blocking_check(&self, id: &str) -> Result<(), Error> {
        let invalid = |field: &str, why: String| Err(Error::PodConfig { id: id.to_owned(), field: field.to_owned(), why });
        let is_unfit = |name: &String| name.len() > MAX_HOSTNAME_BYTES || name.contains(['\0', '\n', '/']);
        if let Some(hostname) = self.hostname.as_ref().filter(|name| is_unfit(name)) {
            return invalid("hostname", format!("{hostname:?} is not a name of at most {MAX_HOSTNAME_BYTES} bytes"));
        }
        let is_unfit = |level: &String| level.contains(|letter: char| !letter.is_ascii_alphanumeric() && !":,.-".contains(letter));
        if let Some(level) = self.selinux_level.as_ref().filter(|level| is_unfit(level)) {
            return invalid("linux.security_context.selinux_options.level", format!("{level:?} is not a level"));
        }
        for (part, value) in [("user", &self.selinux_user), ("role", &self.selinux_role), ("type", &self.selinux_type)] {
            let is_unfit = |name: &&String| name.contains(|letter: char| !letter.is_ascii_alphanumeric() && !"_.-".contains(letter));
            if let Some(value) = value.as_ref().filter(is_unfit) {
                return invalid(&format!("linux.security_context.selinux_options.{part}"), format!("{value:?} is not a name"));
            }
        }
        if self.cgroup_parent.contains('\0') {
            return invalid("linux.cgroup_parent", "contains a NUL byte".to_owned());
        }
        let kept = serde_json::to_vec(self).map_or(usize::MAX, |bytes| bytes.len());
        if kept > MAX_KEPT_BYTES {
            return invalid("options", format!("{kept} bytes are to be kept of it, {MAX_KEPT_BYTES} are the most"));
        }
        if let Some(path) = &self.network {
            return blocking_check_network(path).or_else(|why| invalid("netns_path", format!("{}: {why}", path.display())));
        }
        Ok(())
    }

    /// Adds the settings that containerd's own pods have, where the client does not set them.
    fn with_defaults(mut self) -> Self {
        if self.network.is_some() {
            let mut set = |name: &str, value: &str| {
                self.sysctls.entry(name.to_owned()).or_insert_with(|| value.to_owned());
            };
            set("net.ipv4.ip_unprivileged_port_start", "0");
            // The kernel refuses (EINVAL) groups that the user namespace does not map.
            if !self.user && !blocking_is_in_user_namespace() {
                set("net.ipv4.ping_group_range", "0 2147483647");
            }
        }
        self
    }

    /// Whether it has a UTS namespace: a pod in the host's network has the host's name.
    pub(super) fn has_uts(&self) -> bool {
        self.network.is_some()
    }

    /// Whether its containers share a pid namespace of the pod's.
    pub(super) fn shares_pids(&self) -> bool {
        self.pids == Pids::Pod
    }

    /// The SELinux label of its own process.
    fn blocking_label(&self, id: &str) -> Result<Option<String>, Error> {
        let asked = Asked {
            user: self.selinux_user.as_deref(),
            role: self.selinux_role.as_deref(),
            kind: self.selinux_type.as_deref(),
            level: self.selinux_level.as_deref(),
        };
        selinux::blocking_label_of_process(asked).map_err(|why| Error::PodConfig {
            id: id.to_owned(),
            field: "linux.security_context.selinux_options".to_owned(),
            why,
        })
    }

    /// Plans its namespaces.
    pub(super) fn blocking_plan(&self, id: &str) -> Result<plan::Pod, Error> {
        let network = self.network.as_ref().map(|path| path.to_string_lossy().into_owned());
        let own = plan::Pod {
            network,
            user: self.user,
            pid: self.shares_pids(),
            ipc: !self.host_ipc,
            uts: self.has_uts(),
            hostname: self.hostname.clone(),
            ..plan::Pod::default()
        };
        let label = if own.needs_holder() { self.blocking_label(id)? } else { None };
        let own = plan::Pod { label, ..own };
        plan::pod(own, &self.sysctls).map_err(|refused| {
            let why = crate::chain::chain(&refused);
            Error::PodConfig { id: id.to_owned(), field: "linux.sysctls".to_owned(), why }
        })
    }
}

fn parse(id: &str, options: &Any) -> Result<PodConfig, Error> {
    let invalid = |why: String| Error::PodConfig { id: id.to_owned(), field: "options".to_owned(), why };
    // Some clients put a host's name before it.
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    if name != TYPE_URL {
        return Err(invalid(format!("of the type {:?}, which is not {TYPE_URL}", options.type_url.chars().take(100).collect::<String>())));
    }
    if options.value.len() > MAX_BYTES {
        return Err(invalid(format!("{} bytes, {MAX_BYTES} are the most", options.value.len())));
    }
    PodConfig::parse_from_bytes(&options.value).map_err(|error| invalid(format!("not a PodSandboxConfig: {error}")))
}

/// The content of `resolv.conf`.
fn resolver(id: &str, dns: &Dns) -> Result<String, Error> {
    let all = [&dns.servers, &dns.searches, &dns.options];
    if let Some(text) = all.into_iter().flatten().find(|text| text.contains(['\n', '\0'])) {
        let why = format!("{text:?} has a line break in it");
        return Err(Error::PodConfig { id: id.to_owned(), field: "dns_config".to_owned(), why });
    }
    let mut content = String::new();
    if !dns.searches.is_empty() {
        content += &format!("search {}\n", dns.searches.join(" "));
    }
    dns.servers.iter().for_each(|server| content += &format!("nameserver {server}\n"));
    if !dns.options.is_empty() {
        content += &format!("options {}\n", dns.options.join(" "));
    }
    Ok(content)
}

/// Errors: why a path is not that of a namespace.
fn blocking_check_network(path: &Path) -> Result<(), String> {
    if !path.is_absolute() || path.to_str().is_none() {
        return Err("is not an absolute path".to_owned());
    }
    match statfs(path) {
        Ok(about) if about.filesystem_type() == NSFS_MAGIC => Ok(()),
        Ok(_) => Err("is not a namespace".to_owned()),
        Err(error) => Err(error.desc().to_owned()),
    }
}

/// Whether this shim has the ids of a user namespace only.
fn blocking_is_in_user_namespace() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_ascii_whitespace().collect::<Vec<_>>() != ["0", "0", "4294967295"]
}

#[cfg(test)]
mod tests {
    use x_proto::pod::{Linux, Namespaces};

    use super::*;

    fn sent(namespaces: Namespaces) -> PodConfig {
        PodConfig { linux: Linux { namespaces, ..Linux::default() }, ..PodConfig::default() }
    }

    fn field(result: Result<Config, Error>) -> Option<String> {
        match result {
            Ok(_) => None,
            Err(Error::PodConfig { field, .. }) => Some(field.rsplit('.').next().unwrap_or_default().to_owned()),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_mode_that_a_pod_cannot_have_is_refused_by_its_name() {
        let own = || Some(PathBuf::from("/proc/self/ns/net"));
        let node = Namespaces { network: Mode::Node, ..Namespaces::default() };
        for (namespaces, network, refused) in [
            (Namespaces::default(), own(), None),
            (Namespaces::default(), None, Some("netns_path")),
            (node, None, None),
            (node, own(), Some("netns_path")),
            (Namespaces { network: Mode::Container, ..node }, own(), Some("network")),
            (Namespaces { pid: Mode::Target, ..node }, None, Some("pid")),
            (Namespaces { ipc: Mode::Unknown(9), ..node }, None, Some("ipc")),
            (Namespaces { user: Some(Mode::Pod), ..node }, None, Some("userns_options")),
            (Namespaces { user: Some(Mode::Node), ..node }, None, None),
            (Namespaces { user: Some(Mode::Pod), ..Namespaces::default() }, own(), None),
            (Namespaces { user: Some(Mode::Target), ..Namespaces::default() }, own(), Some("mode")),
        ] {
            assert_eq!(field(Config::of("p1", &sent(namespaces), network)).as_deref(), refused, "{namespaces:?}");
        }
    }

    #[test]
    fn what_is_asked_for_of_a_label_is_kept() {
        let label = Selinux { user: "u".to_owned(), kind: "t".to_owned(), level: "s0".to_owned(), ..Selinux::default() };
        let mut asked = sent(Namespaces { network: Mode::Node, ..Namespaces::default() });
        asked.linux.selinux = Some(label);
        let config = Config::of("p1", &asked, None).expect("valid");
        let kept = [&config.selinux_user, &config.selinux_role, &config.selinux_type, &config.selinux_level];
        assert_eq!(kept.map(Option::as_deref), [Some("u"), None, Some("t"), Some("s0")]);
    }

    #[test]
    fn a_value_that_would_leave_its_place_is_refused() {
        let check = |config: Config| field(config.blocking_check("p1").map(|()| Config::default()));
        let named = |name: &str| Config { hostname: Some(name.to_owned()), ..Config::default() };
        assert_eq!(check(named(&"h".repeat(64))), None);
        for hostname in ["a\nb", "a/b", &"h".repeat(65)] {
            assert_eq!(check(named(hostname)).as_deref(), Some("hostname"));
        }
        for network in ["relative", "/proc/self/status", "/no/such/path"] {
            assert_eq!(check(Config { network: Some(network.into()), ..Config::default() }).as_deref(), Some("netns_path"));
        }
        let level = |level: &str| Config { selinux_level: Some(level.to_owned()), ..Config::default() };
        assert_eq!(check(level("s0:c1,c2.c5")), None);
        assert_eq!(check(level("s0\",rw")).as_deref(), Some("level"));
        let kind = |kind: &str| Config { selinux_type: Some(kind.to_owned()), ..Config::default() };
        assert_eq!(check(kind("container_t")), None);
        assert_eq!(check(kind("container_t:s0")).as_deref(), Some("type"));
        let sysctls = BTreeMap::from([("net.x".to_owned(), "1".repeat(MAX_KEPT_BYTES))]);
        assert_eq!(check(Config { sysctls, ..Config::default() }).as_deref(), Some("options"));
    }

    #[test]
    fn options_of_another_type_or_too_long_are_refused() {
        let any = |type_url: &str, value| Any { type_url: type_url.to_owned(), value, ..Any::default() };
        assert!(parse("p1", &any(TYPE_URL, Vec::new())).is_ok());
        assert!(parse("p1", &any(&format!("type.googleapis.com/{TYPE_URL}"), Vec::new())).is_ok());
        for options in [any("x.y", Vec::new()), any(TYPE_URL, vec![0xff; 9]), any(TYPE_URL, vec![0; MAX_BYTES + 1])] {
            assert!(parse("p1", &options).is_err());
        }
    }

    #[test]
    fn the_resolver_is_configured_line_by_line() {
        let list = |items: &[&str]| items.iter().map(|item| (*item).to_owned()).collect::<Vec<_>>();
        let dns = Dns { servers: list(&["1.1.1.1", "2.2.2.2"]), searches: list(&["a.b", "b"]), options: list(&["ndots:5"]) };
        assert_eq!(resolver("p1", &dns).expect("valid"), "search a.b b\nnameserver 1.1.1.1\nnameserver 2.2.2.2\noptions ndots:5\n");
        assert_eq!(resolver("p1", &Dns::default()).expect("valid"), "");
        assert!(resolver("p1", &Dns { servers: list(&["1.1.1.1\noptions x"]), ..Dns::default() }).is_err());
    }

    #[test]
    fn a_pod_with_a_network_of_its_own_gets_the_settings_that_containerds_pods_have() {
        let own = || Config { network: Some("/n".into()), ..Config::default() };
        let names = |config: Config| config.with_defaults().sysctls.into_keys().collect::<Vec<_>>();
        assert!(names(own()).contains(&"net.ipv4.ip_unprivileged_port_start".to_owned()));
        assert_eq!(names(Config { user: true, ..own() }), ["net.ipv4.ip_unprivileged_port_start"]);
        assert!(names(Config::default()).is_empty());
        let set = BTreeMap::from([("net.ipv4.ip_unprivileged_port_start".to_owned(), "1024".to_owned())]);
        let kept = Config { sysctls: set, ..own() }.with_defaults();
        assert_eq!(kept.sysctls["net.ipv4.ip_unprivileged_port_start"], "1024");
    }
}
