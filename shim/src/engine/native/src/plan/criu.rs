//! Plans what criu does with a container: a checkpoint of its processes, and their restore from one.
use minicbor::{Decode, Encode};

use super::{Create, Entry, Kind, Source, VERSION};
use crate::Refused;

/// How criu is run.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Criu {
    /// Absolute path of the program.
    #[n(0)]
    pub program: String,
    /// PATH, in which it looks for the programs that it executes itself (tar, iptables).
    #[n(1)]
    pub search_path: String,
    /// The folder of the image.
    #[n(2)]
    pub image: String,
    /// The folder for its own files, the log among them.
    #[n(3)]
    pub work: String,
    /// Connections of TCP are saved and restored.
    #[n(4)]
    pub open_tcp: bool,
    /// Sockets whose other end is outside are saved and restored.
    #[n(5)]
    pub external_unix_sockets: bool,
    /// The terminal belongs to a process outside.
    #[n(6)]
    pub shell_job: bool,
    #[n(7)]
    pub file_locks: bool,
    #[n(8)]
    pub cgroups: CgroupMode,
    /// After which it is killed.
    #[n(9)]
    pub within_seconds: u32,
}

/// What criu saves and restores of cgroups.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum CgroupMode {
    /// Nothing: every process is in the container's cgroup. In a hierarchy in which the container has no cgroup of its own criu would save those of the host,
    /// and make them again below the container's.
    #[default]
    #[n(0)]
    Ignore,
    /// Membership alone.
    #[n(1)]
    None,
    #[n(2)]
    Properties,
    /// Properties of the cgroups that it makes.
    #[n(3)]
    Soft,
    #[n(4)]
    Full,
    /// None of the cgroups may exist.
    #[n(5)]
    Strict,
}

impl CgroupMode {
    /// By the words of criu's command line, which runc's and containerd's options have too.
    ///
    /// Errors: a word that is none of them.
    pub fn parse(word: &str) -> Result<Self, Refused> {
        Ok(match word {
            "" | "ignore" => Self::Ignore,
            "soft" => Self::Soft,
            "cg-none" | "none" => Self::None,
            "props" => Self::Properties,
            "full" => Self::Full,
            "strict" => Self::Strict,
            word => return Err(Refused::invalid("the mode of cgroups for criu", format!("{word:?} is unknown"))),
        })
    }
}

/// A container and its image.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct Imaged {
    #[n(0)]
    pub version: u16,
    #[n(1)]
    pub criu: Criu,
    /// How the container was made, or what surrounds the processes of one to be restored: root, sources of mounts, cgroup, namespaces by path. What is inside
    /// comes from the image.
    #[n(2)]
    pub create: Create,
}

/// A checkpoint of a container.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct Checkpoint {
    /// The cgroup in it is the one that the container has.
    #[n(0)]
    pub imaged: Imaged,
    /// The container ends with it.
    #[n(1)]
    pub exit: bool,
    /// Its processes are frozen, and are so afterwards.
    #[n(2)]
    pub is_paused: bool,
}

/// Plans a checkpoint of a container that was made by `create`.
///
/// Errors: what criu cannot save.
pub fn checkpoint(create: Create, criu: Criu, exit: bool, is_paused: bool) -> Result<Checkpoint, Refused> {
    check(&create, "a checkpoint")?;
    Ok(Checkpoint { imaged: Imaged { version: VERSION, criu, create }, exit, is_paused })
}

/// Plans a restore.
///
/// Errors: what the engine cannot restore.
pub fn restore(create: Create, criu: Criu) -> Result<Imaged, Refused> {
    check_restore(&create)?;
    Ok(Imaged { version: VERSION, criu, create })
}

/// Whether a container of this plan can be made from a checkpoint.
///
/// Errors: the field on account of which it cannot.
pub fn check_restore(create: &Create) -> Result<(), Refused> {
    check(create, "a restore")?;
    let joined = |kind| create.namespaces.iter().any(|namespace| namespace.kind == kind && namespace.path.is_some());
    for (kind, name) in [(Kind::Ipc, "ipc"), (Kind::Uts, "uts"), (Kind::Cgroup, "cgroup")] {
        if joined(kind) {
            return Err(Refused::unsupported(format!("linux.namespaces: a restore into a {name} namespace by its path")));
        }
    }
    if create.process.filter.as_ref().is_some_and(|filter| filter.agent.is_some()) {
        return Err(Refused::unsupported("linux.seccomp.listenerPath in a restore"));
    }
    if create.mounts.iter().any(|mount| mount.ids.is_some()) {
        return Err(Refused::unsupported("mounts that show other owners in a restore"));
    }
    if create.mount_label.is_some() {
        return Err(Refused::unsupported("linux.mountLabel in a restore"));
    }
    if !create.hooks.create_container.is_empty() || !create.hooks.start_container.is_empty() {
        return Err(Refused::unsupported("hooks of kind createContainer and startContainer in a restore"));
    }
    Ok(())
}

fn check(create: &Create, what: &str) -> Result<(), Refused> {
    if create.entry == Entry::Chroot {
        return Err(Refused::unsupported(format!("{what} without a mount namespace")));
    }
    for (kind, name) in [(Kind::User, "user"), (Kind::Time, "time")] {
        if create.has(kind) {
            return Err(Refused::unsupported(format!("{what} with a {name} namespace")));
        }
    }
    let is_joined = create.namespaces.iter().any(|namespace| namespace.kind == Kind::Mount && namespace.path.is_some());
    if is_joined {
        return Err(Refused::unsupported(format!("{what} with a mount namespace by its path")));
    }
    Ok(())
}

impl Create {
    /// What is mounted from outside of the container: the path in it, by which images name it, and the path on the host.
    pub(crate) fn external_mounts(&self) -> impl Iterator<Item = (&str, &str)> {
        let binds = self.mounts.iter().filter_map(|mount| match &mount.source {
            Source::Bind { path, .. } => Some((mount.target.as_str(), path.as_str())),
            _ => None,
        });
        // Where no node can be made, the host's is mounted.
        let devices = self.devices.iter().map(|device| (device.path.as_str(), device.path.as_str()));
        binds.chain(devices)
    }

    /// The path of a namespace to join.
    pub(crate) fn joined(&self, kind: Kind) -> Option<&str> {
        self.namespaces.iter().find(|namespace| namespace.kind == kind)?.path.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Request;
    use super::*;
    use crate::{Host, spec};
    use serde_json::{Value, json};

    fn planned(change: impl FnOnce(&mut Value)) -> Create {
        let mut config = json!({
            "ociVersion": "1.0.2",
            "process": { "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/" },
            "root": { "path": "rootfs" },
            "mounts": [],
            "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "network" }] },
        });
        change(&mut config);
        let spec = spec::parse(config.to_string().as_bytes()).expect("a configuration");
        super::super::create(&spec, &Request::new("c", std::path::Path::new("/b")), &Host::example_v1()).expect("a plan")
    }

    #[test]
    fn what_cannot_be_restored_is_refused_by_its_name() {
        let namespace = |kind: &'static str, path: Option<&'static str>| {
            planned(move |config| {
                let namespaces = config["linux"]["namespaces"].as_array_mut().expect("a list");
                namespaces.retain(|namespace| namespace["type"] != json!(kind));
                namespaces.push(match path {
                    Some(path) => json!({ "type": kind, "path": path }),
                    None => json!({ "type": kind }),
                });
            })
        };
        for plan in [planned(|_| {}), namespace("network", Some("/n")), namespace("pid", Some("/n")), namespace("ipc", None)] {
            check_restore(&plan).expect("restored");
        }
        for (plan, words) in [
            (namespace("ipc", Some("/n")), "ipc namespace by its path"),
            (namespace("uts", Some("/n")), "uts namespace by its path"),
            (namespace("mount", Some("/n")), "mount namespace by its path"),
            (namespace("time", None), "time namespace"),
            (planned(|config| config["linux"]["namespaces"] = json!([{ "type": "pid" }])), "without a mount namespace"),
            (planned(|config| config["hooks"] = json!({ "startContainer": [{ "path": "/h" }] })), "startContainer"),
        ] {
            let error = check_restore(&plan).expect_err(words).to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn binds_are_from_outside_and_new_file_systems_are_not() {
        let plan = planned(|config| {
            config["mounts"] = json!([
                { "destination": "/t", "type": "tmpfs", "source": "t" },
                { "destination": "/volume/../v", "source": "/host/v", "options": ["rbind"] },
            ]);
        });
        assert!(plan.external_mounts().any(|pair| pair == ("/v", "/host/v")));
        assert!(!plan.external_mounts().any(|(target, _)| target == "/t"));
    }
}
