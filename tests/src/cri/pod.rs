//! Pods and containers as a test describes them, and the messages that the kubelet would send for them.

use std::collections::BTreeMap;

use prost::{Message as _, Name as _};
use prost_types::Any;

use super::messages::{ContainerConfig, ContainerMetadata, ContainerSecurity, ImageSpec, LinuxContainer, Resources};
use crate::pod_config::{self, Dns, IdMapping, Linux, Metadata, Namespaces, PodConfig, Security, UserNamespace};

/// The first id of the host that a pod with a user namespace gets, and how many.
pub const HOST_IDS: (u32, u32) = (300_000, 65_536);

/// Whose namespace a container is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Namespace {
    /// One for all containers of the pod.
    Pod = pod_config::POD,
    /// Its own.
    Container = pod_config::CONTAINER,
    /// The host's.
    Node = pod_config::NODE,
    /// Another container's.
    Target = pod_config::TARGET,
}

/// A pod to be made.
#[derive(Debug, Clone)]
pub struct PodSpec {
    pub(super) name: String,
    pub(super) network: Option<Namespace>,
    pid: Namespace,
    ipc: Namespace,
    has_user_namespace: bool,
    hostname: String,
    sysctls: BTreeMap<String, String>,
    dns: Option<Dns>,
}

impl PodSpec {
    /// A pod whose containers have pid namespaces of their own, on the network that its [`super::Cri`] gives to pods.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            network: None,
            pid: Namespace::Container,
            ipc: Namespace::Pod,
            has_user_namespace: false,
            hostname: String::new(),
            sysctls: BTreeMap::new(),
            dns: None,
        }
    }

    /// Chooses its network.
    #[must_use]
    pub fn network(self, network: Namespace) -> Self {
        Self { network: Some(network), ..self }
    }

    /// Chooses the pid namespace of its containers.
    #[must_use]
    pub fn pid(self, pid: Namespace) -> Self {
        Self { pid, ..self }
    }

    /// Chooses the IPC namespace of its containers.
    #[must_use]
    pub fn ipc(self, ipc: Namespace) -> Self {
        Self { ipc, ..self }
    }

    /// Gives it a user namespace, with [`HOST_IDS`].
    #[must_use]
    pub fn user_namespace(self) -> Self {
        Self { has_user_namespace: true, ..self }
    }

    /// Gives it a host name.
    #[must_use]
    pub fn hostname(self, hostname: &str) -> Self {
        Self { hostname: hostname.to_owned(), ..self }
    }

    /// Sets a sysctl.
    #[must_use]
    pub fn sysctl(mut self, name: &str, value: &str) -> Self {
        self.sysctls.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Gives it a name server, a search domain and an option.
    #[must_use]
    pub fn dns(self, server: &str, search: &str, option: &str) -> Self {
        let [servers, searches, options] = [server, search, option].map(|word| vec![word.to_owned()]);
        Self { dns: Some(Dns { servers, searches, options }), ..self }
    }

    /// Its message, on the host's network, as containerd hands it to a shim.
    pub fn on_the_hosts_network(&self, cgroup_parent: &str) -> Any {
        let config = self.config(Namespace::Node, String::new(), cgroup_parent.to_owned());
        Any { type_url: PodConfig::full_name(), value: config.encode_to_vec() }
    }

    pub(super) fn config(&self, network: Namespace, log_directory: String, cgroup_parent: String) -> PodConfig {
        PodConfig {
            metadata: Some(Metadata {
                name: self.name.clone(),
                uid: format!("uid-{}", self.name),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: self.hostname.clone(),
            log_directory,
            dns: self.dns.clone(),
            linux: Some(Linux {
                cgroup_parent,
                security_context: Some(Security { namespaces: Some(self.namespaces(network)), ..Security::default() }),
                sysctls: self.sysctls.clone(),
            }),
        }
    }

    fn namespaces(&self, network: Namespace) -> Namespaces {
        let ids = vec![IdMapping { host_id: HOST_IDS.0, container_id: 0, length: HOST_IDS.1 }];
        let user = UserNamespace { mode: Namespace::Pod as i32, uids: ids.clone(), gids: ids };
        Namespaces {
            network: network as i32,
            pid: self.pid as i32,
            ipc: self.ipc as i32,
            target_id: String::new(),
            users: self.has_user_namespace.then_some(user),
        }
    }
}

/// A container to be made in a pod.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    pub(super) name: String,
    command: Vec<String>,
    memory_bytes: i64,
    pid: Option<(Namespace, String)>,
}

impl ContainerSpec {
    /// A container with the namespaces of its pod, without a limit of memory.
    pub fn new(name: &str, command: &[&str]) -> Self {
        let command = command.iter().map(|word| (*word).to_owned()).collect();
        Self { name: name.to_owned(), command, memory_bytes: 0, pid: None }
    }

    /// Limits its memory.
    #[must_use]
    pub fn memory(self, bytes: i64) -> Self {
        Self { memory_bytes: bytes, ..self }
    }

    /// Chooses another pid namespace than that of its pod's other containers.
    #[must_use]
    pub fn pid(self, pid: Namespace) -> Self {
        Self { pid: Some((pid, String::new())), ..self }
    }

    /// Puts it into the pid namespace of the container `id`.
    #[must_use]
    pub fn pid_of(self, id: &str) -> Self {
        Self { pid: Some((Namespace::Target, id.to_owned())), ..self }
    }

    pub(super) fn config(&self, image: &str, pod: &PodConfig) -> ContainerConfig {
        let security = pod.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let mut namespaces = security.and_then(|security| security.namespaces.clone()).unwrap_or_default();
        if let Some((pid, target)) = &self.pid {
            namespaces.pid = *pid as i32;
            namespaces.target_id.clone_from(target);
        }
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: self.name.clone(), attempt: 0 }),
            image: Some(ImageSpec { image: image.to_owned() }),
            command: self.command.clone(),
            log_path: format!("{}.log", self.name),
            linux: Some(LinuxContainer {
                resources: Some(Resources { memory_limit_in_bytes: self.memory_bytes, memory_swap_limit_in_bytes: self.memory_bytes }),
                security_context: Some(ContainerSecurity { namespace_options: Some(namespaces) }),
            }),
        }
    }
}
