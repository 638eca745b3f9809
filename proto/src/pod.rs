//! `runtime.v1.PodSandboxConfig`: what CRI sends a shim that is to run a pod.
//!
//! The fields that a shim needs; all others are skipped. Every list and text is bounded by the message, which is read once.
use std::collections::BTreeMap;

use protobuf::{CodedInputStream, Error};

use crate::linux_runc::skip;

/// Type URL of [`PodConfig`], as containerd writes it.
pub const TYPE_URL: &str = "runtime.v1.PodSandboxConfig";

/// The configuration of a pod.
///
/// Source: Kubernetes' CRI, `runtime.v1`, `PodSandboxConfig`: `metadata` = 1, `hostname` = 2, `dns_config` = 4, `linux` = 8.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodConfig {
    /// Its name in Kubernetes.
    pub name: String,
    /// Its namespace in Kubernetes.
    pub namespace: String,
    /// Empty for the host's.
    pub hostname: String,
    /// The content of `resolv.conf`; the host's file if it is absent.
    pub dns: Option<Dns>,
    /// Absent from a pod that wants nothing of Linux.
    pub linux: Linux,
}

/// `DNSConfig`: `servers` = 1, `searches` = 2, `options` = 3.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of name servers.
    pub servers: Vec<String>,
    /// Domains that are searched.
    pub searches: Vec<String>,
    /// Options of the resolver.
    pub options: Vec<String>,
}

/// `LinuxPodSandboxConfig`: `cgroup_parent` = 1, `security_context` = 2, `sysctls` = 3. Of the security context: `namespace_options` = 1,
/// `selinux_options` = 2.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Linux {
    /// A path, or the name of a slice of systemd's.
    pub cgroup_parent: String,
    /// Settings of the kernel by their names, as `net.ipv4.ip_forward`.
    pub sysctls: BTreeMap<String, String>,
    /// The namespaces of the pod.
    pub namespaces: Namespaces,
    /// The SELinux label of its processes.
    pub selinux: Option<Selinux>,
}

/// `NamespaceOption`: `network` = 1, `pid` = 2, `ipc` = 3, `userns_options` = 5.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// The pod's, or the host's.
    pub network: Mode,
    /// Of all containers together, of each, or the host's.
    pub pid: Mode,
    /// The pod's, or the host's.
    pub ipc: Mode,
    /// The mode of the user namespace; absent for the host's.
    pub user: Option<Mode>,
}

/// `NamespaceMode`: who shares a namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// The containers of the pod.
    #[default]
    Pod,
    /// Not shared: each container has its own.
    Container,
    /// The whole node.
    Node,
    /// A container with another one.
    Target,
    /// A number that this version does not know.
    Unknown(i32),
}

/// `SELinuxOption`: `user` = 1, `role` = 2, `type` = 3, `level` = 4.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selinux {
    /// The user.
    pub user: String,
    /// The role.
    pub role: String,
    /// The type.
    pub kind: String,
    /// The level, as `s0:c1,c2`.
    pub level: String,
}

impl PodConfig {
    /// Decodes the message; unknown fields are skipped.
    pub fn parse_from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let mut config = Self::default();
        each(bytes, |tag, input| {
            match tag {
                0x0a => each(&input.read_bytes()?, |tag, input| {
                    match tag {
                        0x0a => config.name = input.read_string()?,
                        0x1a => config.namespace = input.read_string()?,
                        other => skip(input, other)?,
                    }
                    Ok(())
                })?,
                0x12 => config.hostname = input.read_string()?,
                0x22 => config.dns = Some(Dns::parse(&input.read_bytes()?)?),
                0x42 => config.linux = Linux::parse(&input.read_bytes()?)?,
                other => skip(input, other)?,
            }
            Ok(())
        })?;
        Ok(config)
    }
}

impl Dns {
    fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut dns = Self::default();
        each(bytes, |tag, input| {
            match tag {
                0x0a => dns.servers.push(input.read_string()?),
                0x12 => dns.searches.push(input.read_string()?),
                0x1a => dns.options.push(input.read_string()?),
                other => skip(input, other)?,
            }
            Ok(())
        })?;
        Ok(dns)
    }
}

impl Linux {
    fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut linux = Self::default();
        each(bytes, |tag, input| {
            match tag {
                0x0a => linux.cgroup_parent = input.read_string()?,
                0x12 => {
                    let context = input.read_bytes()?;
                    linux.read_security_context(&context)?;
                }
                0x1a => {
                    let (name, value) = entry(&input.read_bytes()?)?;
                    linux.sysctls.insert(name, value);
                }
                other => skip(input, other)?,
            }
            Ok(())
        })?;
        Ok(linux)
    }

    fn read_security_context(&mut self, bytes: &[u8]) -> Result<(), Error> {
        each(bytes, |tag, input| {
            match tag {
                0x0a => self.namespaces = Namespaces::parse(&input.read_bytes()?)?,
                0x12 => self.selinux = Some(Selinux::parse(&input.read_bytes()?)?),
                other => skip(input, other)?,
            }
            Ok(())
        })
    }
}

impl Namespaces {
    fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut namespaces = Self::default();
        each(bytes, |tag, input| {
            match tag {
                0x08 => namespaces.network = Mode::of(input.read_int32()?),
                0x10 => namespaces.pid = Mode::of(input.read_int32()?),
                0x18 => namespaces.ipc = Mode::of(input.read_int32()?),
                0x2a => {
                    let mut mode = Mode::default();
                    each(&input.read_bytes()?, |tag, input| {
                        match tag {
                            0x08 => mode = Mode::of(input.read_int32()?),
                            other => skip(input, other)?,
                        }
                        Ok(())
                    })?;
                    namespaces.user = Some(mode);
                }
                other => skip(input, other)?,
            }
            Ok(())
        })?;
        Ok(namespaces)
    }
}

impl Mode {
    fn of(number: i32) -> Self {
        match number {
            0 => Self::Pod,
            1 => Self::Container,
            2 => Self::Node,
            3 => Self::Target,
            other => Self::Unknown(other),
        }
    }
}

impl Selinux {
    fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut label = Self::default();
        each(bytes, |tag, input| {
            match tag {
                0x0a => label.user = input.read_string()?,
                0x12 => label.role = input.read_string()?,
                0x1a => label.kind = input.read_string()?,
                0x22 => label.level = input.read_string()?,
                other => skip(input, other)?,
            }
            Ok(())
        })?;
        Ok(label)
    }
}

/// An entry of a map of texts.
fn entry(bytes: &[u8]) -> Result<(String, String), Error> {
    let (mut key, mut value) = (String::new(), String::new());
    each(bytes, |tag, input| {
        match tag {
            0x0a => key = input.read_string()?,
            0x12 => value = input.read_string()?,
            other => skip(input, other)?,
        }
        Ok(())
    })?;
    Ok((key, value))
}

/// Calls `read` with the tag of each field.
fn each(bytes: &[u8], mut read: impl FnMut(u32, &mut CodedInputStream<'_>) -> Result<(), Error>) -> Result<(), Error> {
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        read(tag, &mut input)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field with a length.
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, content.len() as u8], content].concat()
    }

    #[test]
    fn the_fields_of_a_pod_are_read_and_others_skipped() {
        let metadata = [field(1, b"web"), field(2, b"uid"), field(3, b"default"), vec![0x20, 1]].concat();
        let namespaces = [vec![0x08, 2, 0x10, 1, 0x18, 7], field(5, &[0x08, 0])].concat();
        let context = [field(1, &namespaces), field(2, &field(4, b"s0:c1,c2")), vec![0x30, 1], field(9, &[])].concat();
        let sysctl = [field(1, b"net.core.somaxconn"), field(2, b"7")].concat();
        let linux = [field(1, b"/kubepods/p"), field(2, &context), field(3, &sysctl), field(4, b"\x08\x01")].concat();
        let dns = [field(1, b"1.1.1.1"), field(2, b"a.b"), field(2, b"b"), field(3, b"ndots:5")].concat();
        let bytes =
            [field(1, &metadata), field(2, b"host"), field(3, b"/logs"), field(4, &dns), field(6, &sysctl), field(8, &linux)].concat();
        let config = PodConfig::parse_from_bytes(&bytes).expect("a configuration");
        assert_eq!((config.name.as_str(), config.namespace.as_str(), config.hostname.as_str()), ("web", "default", "host"));
        let dns = config.dns.expect("it has servers");
        assert_eq!((dns.servers.len(), dns.searches, dns.options), (1, vec!["a.b".to_owned(), "b".into()], vec!["ndots:5".to_owned()]));
        let Linux { cgroup_parent, sysctls, namespaces, selinux } = config.linux;
        assert_eq!(cgroup_parent, "/kubepods/p");
        assert_eq!(sysctls, BTreeMap::from([("net.core.somaxconn".to_owned(), "7".to_owned())]));
        let expected = Namespaces { network: Mode::Node, pid: Mode::Container, ipc: Mode::Unknown(7), user: Some(Mode::Pod) };
        assert_eq!(namespaces, expected);
        assert_eq!(selinux.map(|label| label.level).as_deref(), Some("s0:c1,c2"));
    }

    #[test]
    fn bytes_that_are_no_configuration_are_an_error() {
        assert_eq!(PodConfig::parse_from_bytes(&[]).expect("all fields may be absent"), PodConfig::default());
        let whole = field(8, &field(2, &field(1, &[0x08, 2])));
        assert!((1..whole.len()).all(|end| PodConfig::parse_from_bytes(&whole[..end]).is_err()));
        for bytes in [&[0xff; 9][..], &[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f], &[0x0f]] {
            assert!(PodConfig::parse_from_bytes(bytes).is_err(), "{bytes:?}");
        }
    }
}
