//! Makes plans.
use std::path::Path;

use oci_spec::runtime::{Linux, LinuxNamespaceType, LinuxResources, Process as SpecProcess, Spec};

use super::{
    Cgroup, Container, Create, Entry, Exec, Kind, Namespace, RootMount, VERSION, cgroup, devices, hooks, identity, labels, mounts,
    net_devices, root, sysctl, users,
};
use crate::{Host, Refused, seccomp};

/// What a container is made for, beside its configuration.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub id: &'a str,
    /// Absolute path of the bundle: relative paths of the configuration start there.
    pub bundle: &'a Path,
    /// Leave the session keyring of the runtime.
    pub no_new_keyring: bool,
    /// For processes whose configuration has none: the performer's own is the shim's and must not be inherited.
    pub default_oom_score_adj: i32,
    /// A folder of this user's alone for compiled filters; without one, each is compiled anew.
    pub filters: Option<&'a Path>,
    /// Move the root over the host's instead of exchanging them, which an initramfs does not allow.
    pub no_pivot_root: bool,
    /// The root file system, to be mounted in the container's mount namespace alone; none: it is on the host. See
    /// [`super::check_root_mounts`].
    pub root_mounts: &'a [RootMount<'a>],
    /// systemd makes the cgroup: `cgroupsPath` is `SLICE:PREFIX:NAME`. The host needs the cgroups of its first process ([`Host::with_init`]).
    pub systemd_cgroup: bool,
}

impl<'a> Request<'a> {
    /// With a keyring, a score of 0, and nothing of what is not always wanted.
    #[must_use]
    pub const fn new(id: &'a str, bundle: &'a Path) -> Self {
        Self {
            id,
            bundle,
            no_new_keyring: false,
            default_oom_score_adj: 0,
            filters: None,
            no_pivot_root: false,
            root_mounts: &[],
            systemd_cgroup: false,
        }
    }
}

/// Plans the making of a container.
///
/// Errors: a field that the engine does not implement, or that has an invalid value.
pub fn create(spec: &Spec, request: &Request<'_>, host: &Host) -> Result<Create, Refused> {
    check_version(spec.version())?;
    let spec_root = spec.root().as_ref().ok_or_else(|| Refused::invalid("root", "missing"))?;
    let linux = spec.linux().as_ref().ok_or_else(|| Refused::invalid("linux", "missing"))?;
    let process = spec.process().as_ref().ok_or_else(|| Refused::invalid("process", "missing"))?;

    let namespaces = namespaces(linux.namespaces().as_deref().unwrap_or_default())?;
    let find = |kind| namespaces.iter().find(|namespace| namespace.kind == kind);
    let entry = match find(Kind::Mount) {
        Some(_) if request.no_pivot_root => Entry::Move,
        Some(_) => Entry::Pivot,
        None => Entry::Chroot,
    };
    check_entry(entry, spec, linux)?;
    let root_mounts = root::plan(spec, request.root_mounts)?;
    for (field, value) in [("hostname", spec.hostname()), ("domainname", spec.domainname())] {
        if value.as_deref().is_some_and(|name| !name.is_empty()) && find(Kind::Uts).is_none() {
            return Err(Refused::invalid(field, "needs a uts namespace"));
        }
        if value.as_deref().is_some_and(|name| name.contains('\0')) {
            return Err(Refused::invalid(field, "contains a NUL byte"));
        }
    }

    let none = Vec::new();
    let no_mounts = Vec::new();
    let mappings = users::mappings(linux, find(Kind::User))?;
    let wanted = spec.mounts().as_ref().unwrap_or(&no_mounts);
    let (mut cgroup, unit) = cgroup::plan(spec, linux, request, host)?;
    let own_namespace = find(Kind::Cgroup).is_some();
    let place = mounts::Place { bundle: request.bundle, is_mapped: find(Kind::User).is_some() };
    let mut mounts = mounts::plan(wanted, &place, &mounts::Cgroups { host, cgroup: &cgroup, own_namespace })?;
    let mount_label = labels::label(linux.mount_label().as_deref(), "linux.mountLabel", host)?;
    labels::label_mounts(&mut mounts, mount_label.as_deref());
    let own_dev = !wanted.iter().any(|mount| mount.destination() == Path::new("/dev") && mounts::is_bind(mount));
    let filter = linux.seccomp().as_ref().map(|profile| seccomp::compile_cached(profile, request.filters)).transpose()?;
    let keyring = (!request.no_new_keyring).then(|| format!("_ses.{}", request.id));
    let mut planned = identity::plan(process, "process", host)?;
    planned.filter = filter;
    planned.scheduling = planned.scheduling.of_container(linux.personality().as_ref(), linux.memory_policy().as_ref())?;
    planned.keyring = keyring;
    planned.oom_score_adj.get_or_insert(request.default_oom_score_adj);
    planned.umask = process.user().umask().unwrap_or(identity::DEFAULT_UMASK);
    users::check(&mappings, &planned, "process")?;
    if matches!(find(Kind::Cgroup), Some(Namespace { path: None, .. })) && mounts::has_writable_cgroups(wanted) {
        cgroup::give(&mut cgroup, users::outside(&mappings, find(Kind::User).is_some(), planned.uid));
    }

    let (mut propagation, root_propagation) = propagation(linux.rootfs_propagation().as_deref())?;
    if entry == Entry::Move {
        // Mounts of the host are unmounted there: that must not spread.
        propagation |= libc::MS_REC;
    }
    Ok(Create {
        version: VERSION,
        root: absolute(request.bundle, spec_root.path(), "root.path")?,
        root_readonly: spec_root.readonly().unwrap_or(false),
        propagation,
        root_propagation,
        mounts,
        devices: if own_dev { devices::nodes(linux.devices().as_deref().unwrap_or_default())? } else { Vec::new() },
        links: if own_dev { devices::links(host.has_kcore) } else { Vec::new() },
        own_dev: own_dev && entry != Entry::Chroot,
        entry,
        root_mounts,
        masked: absolute_paths(linux.masked_paths().as_ref().unwrap_or(&none), "linux.maskedPaths")?,
        readonly: absolute_paths(linux.readonly_paths().as_ref().unwrap_or(&none), "linux.readonlyPaths")?,
        hostname: spec.hostname().clone().filter(|name| !name.is_empty()),
        domainname: spec.domainname().clone().filter(|name| !name.is_empty()),
        sysctls: sysctl::plan(linux.sysctl().as_ref(), |kind| find(kind).is_some())?,
        process: planned,
        hooks: hooks::plan(spec, request)?,
        mount_label,
        clocks: users::clocks(linux.time_offsets().as_ref(), find(Kind::Time))?,
        mappings,
        net_devices: net_devices::plan(linux.net_devices().as_ref(), find(Kind::Network).is_some())?,
        cgroup,
        unit,
        namespaces,
    })
}

/// Plans another process for a container. `cgroup` paths, filter, umask, keyring and OOM score are the container's; of the host, its cgroups are not needed.
pub fn exec(process: &SpecProcess, container: &Container, host: &Host) -> Result<Exec, Refused> {
    let mut planned = identity::plan(process, "process", host)?;
    if process.capabilities().is_none() {
        planned.capabilities = container.capabilities;
    }
    planned.filter.clone_from(&container.filter);
    planned.keyring.clone_from(&container.keyring);
    planned.scheduling = planned.scheduling.or(&container.scheduling);
    if planned.selinux_label.is_none() {
        planned.selinux_label.clone_from(&container.selinux_label);
    }
    planned.umask = container.umask;
    planned.oom_score_adj = container.oom_score_adj;
    users::check(&container.mappings, &planned, "process")?;
    Ok(Exec {
        version: VERSION,
        namespaces: container.namespaces,
        cgroup: container.cgroup.clone(),
        process: planned,
        state: container.hooks.state.clone(),
        chroot: container.chroot.clone(),
    })
}

/// Plans a change of a container's limits: its cgroup, with the files to write. What is absent is not changed, nor are devices.
pub fn update(resources: &LinuxResources, container: &Container) -> Result<Cgroup, Refused> {
    cgroup::update(resources, &container.cgroup)
}

/// Refuses what needs a root that is entered in another way.
fn check_entry(entry: Entry, spec: &Spec, linux: &Linux) -> Result<(), Refused> {
    let propagation = linux.rootfs_propagation().as_deref().unwrap_or_default();
    match entry {
        Entry::Pivot => Ok(()),
        // What is mounted below the host's root would come out of it.
        Entry::Move if matches!(propagation, "private" | "rprivate") => {
            Err(Refused::invalid("linux.rootfsPropagation", format!("{propagation} is not safe without pivot_root")))
        }
        Entry::Move => Ok(()),
        Entry::Chroot => {
            let asked_for = |list: &Option<Vec<String>>| list.as_ref().is_some_and(|list| !list.is_empty());
            // No engine hides what it cannot mount on.
            for (field, list) in [("linux.maskedPaths", linux.masked_paths()), ("linux.readonlyPaths", linux.readonly_paths())] {
                if asked_for(list) {
                    return Err(Refused::invalid(field, "needs a mount namespace"));
                }
            }
            let fields = [
                // They would be the host's, and stay there when the container is removed.
                ("mounts", spec.mounts().as_ref().is_some_and(|mounts| !mounts.is_empty())),
                ("root.readonly", spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly) == Some(true)),
                ("linux.rootfsPropagation", !propagation.is_empty()),
            ];
            match fields.into_iter().find(|(_, is_asked)| *is_asked) {
                Some((field, _)) => Err(Refused::unsupported(format!("{field} without a mount namespace"))),
                None => Ok(()),
            }
        }
    }
}

/// The version of the specification: 1.x, of which later ones only add fields.
fn check_version(version: &str) -> Result<(), Refused> {
    if version.split('.').next() == Some("1") {
        return Ok(());
    }
    Err(Refused::invalid("ociVersion", format!("{version:?} is not 1.x")))
}

fn namespaces(wanted: &[oci_spec::runtime::LinuxNamespace]) -> Result<Vec<Namespace>, Refused> {
    let mut found: Vec<Namespace> = Vec::new();
    for namespace in wanted {
        let kind = match namespace.typ() {
            LinuxNamespaceType::Mount => Kind::Mount,
            LinuxNamespaceType::Pid => Kind::Pid,
            LinuxNamespaceType::Network => Kind::Network,
            LinuxNamespaceType::Ipc => Kind::Ipc,
            LinuxNamespaceType::Uts => Kind::Uts,
            LinuxNamespaceType::Cgroup => Kind::Cgroup,
            LinuxNamespaceType::User => Kind::User,
            LinuxNamespaceType::Time => Kind::Time,
        };
        if found.iter().any(|other| other.kind == kind) {
            return Err(Refused::invalid("linux.namespaces", format!("{:?} is listed twice", namespace.typ())));
        }
        let path = match namespace.path() {
            Some(path) if path.as_os_str().is_empty() => None,
            Some(path) => Some(absolute_path(path, "linux.namespaces[].path")?),
            None => None,
        };
        found.push(Namespace { kind, path });
    }
    Ok(found)
}

/// Flags for the host's mounts in the new namespace, and for the root.
fn propagation(word: Option<&str>) -> Result<(u64, Option<u64>), Refused> {
    const HOST: u64 = libc::MS_SLAVE | libc::MS_REC;
    Ok(match word {
        None | Some("" | "rslave") => (HOST, None),
        Some("slave") => (libc::MS_SLAVE, None),
        Some("private") => (libc::MS_PRIVATE, None),
        Some("rprivate") => (libc::MS_PRIVATE | libc::MS_REC, None),
        Some("shared") => (HOST, Some(libc::MS_SHARED)),
        Some("rshared") => (HOST, Some(libc::MS_SHARED | libc::MS_REC)),
        Some("unbindable") => (HOST, Some(libc::MS_UNBINDABLE)),
        Some("runbindable") => (HOST, Some(libc::MS_UNBINDABLE | libc::MS_REC)),
        Some(word) => return Err(Refused::invalid("linux.rootfsPropagation", format!("{word:?} is unknown"))),
    })
}

fn absolute_paths(paths: &[String], field: &str) -> Result<Vec<String>, Refused> {
    let mut found: Vec<String> = Vec::new();
    for path in paths {
        let path = absolute_path(Path::new(path), field)?;
        if !found.contains(&path) {
            found.push(path);
        }
    }
    Ok(found)
}

pub(super) fn absolute_path(path: &Path, field: &str) -> Result<String, Refused> {
    let text = path.to_str().filter(|text| text.starts_with('/') && !text.contains('\0'));
    text.map(str::to_owned).ok_or_else(|| Refused::invalid(field, format!("{} is not an absolute path", path.display())))
}

/// A path of the host, relative to the bundle if it is not absolute.
pub(super) fn absolute(bundle: &Path, path: &Path, field: &str) -> Result<String, Refused> {
    absolute_path(&bundle.join(path), field)
}

#[cfg(test)]
mod clients;
#[cfg(test)]
mod fields;
#[cfg(test)]
mod tests;
