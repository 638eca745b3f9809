//! The kubelet's description of a pod, `runtime.v1.PodSandboxConfig`: the fields that the tests set. CRI gets it in its calls, and hands it to a shim that is to
//! hold the pod.

use std::collections::BTreeMap;

use prost::{Message, Name};
use protobuf::well_known_types::any::Any;

/// Namespaces of the pod.
pub const POD: i32 = 0;
/// A namespace for each container.
pub const CONTAINER: i32 = 1;
/// The host's namespace.
pub const NODE: i32 = 2;
/// Another container's namespace.
pub const TARGET: i32 = 3;

/// A pod.
#[derive(Clone, PartialEq, Message)]
pub struct PodConfig {
    /// Its name.
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<Metadata>,
    /// Its host name.
    #[prost(string, tag = "2")]
    pub hostname: String,
    /// Where the logs of its containers are.
    #[prost(string, tag = "3")]
    pub log_directory: String,
    /// Its name servers.
    #[prost(message, optional, tag = "4")]
    pub dns: Option<Dns>,
    /// The part for Linux.
    #[prost(message, optional, tag = "8")]
    pub linux: Option<Linux>,
}

impl Name for PodConfig {
    const PACKAGE: &'static str = "runtime.v1";
    const NAME: &'static str = "PodSandboxConfig";
}

/// The name of a pod.
#[derive(Clone, PartialEq, Message)]
pub struct Metadata {
    /// Its name in its namespace.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its number in the cluster.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// Its namespace.
    #[prost(string, tag = "3")]
    pub namespace: String,
    /// How often it has been tried before.
    #[prost(uint32, tag = "4")]
    pub attempt: u32,
}

/// Name servers of a pod.
#[derive(Clone, PartialEq, Message)]
pub struct Dns {
    /// Their addresses.
    #[prost(string, repeated, tag = "1")]
    pub servers: Vec<String>,
    /// Domains in which names are looked for.
    #[prost(string, repeated, tag = "2")]
    pub searches: Vec<String>,
    /// Options of the resolver.
    #[prost(string, repeated, tag = "3")]
    pub options: Vec<String>,
}

/// The part of a pod for Linux.
#[derive(Clone, PartialEq, Message)]
pub struct Linux {
    /// The cgroup of all its containers.
    #[prost(string, tag = "1")]
    pub cgroup_parent: String,
    /// Its namespaces.
    #[prost(message, optional, tag = "2")]
    pub security_context: Option<Security>,
    /// Its sysctls.
    #[prost(btree_map = "string, string", tag = "3")]
    pub sysctls: BTreeMap<String, String>,
}

/// The security context of a pod.
#[derive(Clone, PartialEq, Message)]
pub struct Security {
    /// Its namespaces.
    #[prost(message, optional, tag = "1")]
    pub namespaces: Option<Namespaces>,
    /// The SELinux label of its processes.
    #[prost(message, optional, tag = "2")]
    pub selinux: Option<Selinux>,
    /// The seccomp profile of its processes.
    #[prost(message, optional, tag = "9")]
    pub seccomp: Option<Profile>,
}

/// An SELinux label.
#[derive(Clone, PartialEq, Message)]
pub struct Selinux {
    /// The user.
    #[prost(string, tag = "1")]
    pub user: String,
    /// The role.
    #[prost(string, tag = "2")]
    pub role: String,
    /// The type.
    #[prost(string, tag = "3")]
    pub kind: String,
    /// The level.
    #[prost(string, tag = "4")]
    pub level: String,
}

/// A profile of a security module.
#[derive(Clone, PartialEq, Message)]
pub struct Profile {
    /// 0: the runtime's own; 1: none; 2: that of a file.
    #[prost(int32, tag = "1")]
    pub kind: i32,
    /// The file.
    #[prost(string, tag = "2")]
    pub file: String,
}

/// The namespaces of a pod or of a container: [`POD`], [`CONTAINER`], [`NODE`] or [`TARGET`].
#[derive(Clone, PartialEq, Message)]
pub struct Namespaces {
    /// Of the network.
    #[prost(int32, tag = "1")]
    pub network: i32,
    /// Of processes.
    #[prost(int32, tag = "2")]
    pub pid: i32,
    /// Of shared memory.
    #[prost(int32, tag = "3")]
    pub ipc: i32,
    /// The container that [`TARGET`] means.
    #[prost(string, tag = "4")]
    pub target_id: String,
    /// Of users; absent for the host's.
    #[prost(message, optional, tag = "5")]
    pub users: Option<UserNamespace>,
}

/// A user namespace.
#[derive(Clone, PartialEq, Message)]
pub struct UserNamespace {
    /// [`POD`] or [`NODE`].
    #[prost(int32, tag = "1")]
    pub mode: i32,
    /// Its users.
    #[prost(message, repeated, tag = "2")]
    pub uids: Vec<IdMapping>,
    /// Its groups.
    #[prost(message, repeated, tag = "3")]
    pub gids: Vec<IdMapping>,
}

/// A range of ids.
#[derive(Clone, PartialEq, Message)]
pub struct IdMapping {
    /// The first one on the host.
    #[prost(uint32, tag = "1")]
    pub host_id: u32,
    /// The first one inside.
    #[prost(uint32, tag = "2")]
    pub container_id: u32,
    /// How many.
    #[prost(uint32, tag = "3")]
    pub length: u32,
}

impl PodConfig {
    /// A pod with a name server, whose containers have process ids of their own.
    pub fn new(name: &str, cgroup_parent: &str) -> Self {
        Self {
            metadata: Some(Metadata { name: name.to_owned(), uid: format!("uid-{name}"), namespace: "default".to_owned(), attempt: 0 }),
            hostname: format!("{name}-host"),
            log_directory: String::new(),
            dns: Some(Dns {
                servers: vec!["192.0.2.53".to_owned()],
                searches: vec!["pods.example".to_owned()],
                options: vec!["ndots:5".to_owned()],
            }),
            linux: Some(Linux {
                cgroup_parent: cgroup_parent.to_owned(),
                security_context: Some(Security {
                    namespaces: Some(Namespaces { pid: CONTAINER, ..Namespaces::default() }),
                    ..Security::default()
                }),
                sysctls: BTreeMap::new(),
            }),
        }
    }

    /// Its namespaces.
    pub fn namespaces(&mut self) -> &mut Namespaces {
        self.security().namespaces.get_or_insert_default()
    }

    /// Its security context.
    pub fn security(&mut self) -> &mut Security {
        self.linux.get_or_insert_default().security_context.get_or_insert_default()
    }

    /// The options of the request that creates its sandbox.
    pub fn any(&self) -> Any {
        Any { type_url: Self::full_name(), value: self.encode_to_vec(), ..Any::default() }
    }
}
