//! Plans mounts.
use std::path::Path;

use oci_spec::runtime::Mount as SpecMount;

use super::make::{absolute, absolute_path};
use super::options::{self, ATIME, NODEV, NODIRATIME, NOEXEC, NOSUID, NOSYMFOLLOW, Options, RDONLY};
use super::{Attributes, Cgroup, MappedIds, Mount, Source, users};
use crate::Refused;
use crate::host::{Host, MountedHierarchy};

/// What mounts of type `cgroup` show.
pub(super) struct Cgroups<'a> {
    pub(super) host: &'a Host,
    pub(super) cgroup: &'a Cgroup,
    /// The container has a cgroup namespace of its own.
    pub(super) own_namespace: bool,
}

/// What paths and owners of sources are relative to.
pub(super) struct Place<'a> {
    pub(super) bundle: &'a Path,
    /// The container has a user namespace.
    pub(super) is_mapped: bool,
}

/// Whether a mount is a bind: its type is ignored then.
pub(super) fn is_bind(mount: &SpecMount) -> bool {
    let by_option = mount.options().iter().flatten().any(|word| word == "bind" || word == "rbind");
    by_option || mount.typ().as_deref() == Some("bind")
}

/// Whether the container may write to cgroups at their usual place.
pub(super) fn has_writable_cgroups(mounts: &[SpecMount]) -> bool {
    mounts.iter().any(|mount| {
        let options = options::sort(mount.options().iter().flatten().map(String::as_str));
        mount.typ().as_deref() == Some("cgroup") && mount.destination() == Path::new("/sys/fs/cgroup") && !options.readonly
    })
}

/// Plans the mounts of a configuration, in its order.
pub(super) fn plan(mounts: &[SpecMount], place: &Place<'_>, cgroups: &Cgroups<'_>) -> Result<Vec<Mount>, Refused> {
    let mut planned = Vec::new();
    for (index, mount) in mounts.iter().enumerate() {
        let field = format!("mounts[{index}]");
        let options = options::sort(mount.options().iter().flatten().map(String::as_str));
        let target = target(mount.destination(), &field)?;
        if (!is_bind(mount) || options.remount)
            && (options.idmap.is_some() || !users::pair(mount.uid_mappings().as_ref(), mount.gid_mappings().as_ref(), &field)?.is_empty())
        {
            return Err(Refused::invalid(format!("{field}.uidMappings"), "only a bind can show other owners"));
        }
        if options.copy_up && (mount.typ().as_deref() != Some("tmpfs") || is_bind(mount) || options.remount) {
            return Err(Refused::unsupported(format!("{field}.options tmpcopyup of anything but a new tmpfs")));
        }
        match mount.typ().as_deref() {
            _ if options.remount => planned.push(remount(target, options, is_bind(mount), &field)?),
            _ if is_bind(mount) => planned.push(bind(mount, target, options, place, &field)?),
            Some("cgroup") => planned.extend(cgroup(&target, &options, cgroups, &field)?),
            Some(kind) if !kind.is_empty() => planned.push(new(mount, kind, target, options, &field)?),
            Some(_) | None => return Err(Refused::invalid(format!("{field}.type"), "missing")),
        }
    }
    Ok(planned)
}

/// The target: a clean absolute path, and not one that would hide the root or a part of procfs.
fn target(path: &Path, field: &str) -> Result<String, Refused> {
    let field = format!("{field}.destination");
    let text = absolute_path(&Path::new("/").join(path), &field)?;
    let mut parts: Vec<&str> = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    if parts.is_empty() {
        return Err(Refused::invalid(field, "cannot mount on the root"));
    }
    Ok(format!("/{}", parts.join("/")))
}

/// Below `/proc` only files whose content the kernel does not rely on may be covered.
const COVERED_IN_PROC: [&str; 10] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

fn check_proc(target: &str, is_procfs: bool, field: &str) -> Result<(), Refused> {
    let is_inside = target.starts_with("/proc/");
    if (target == "/proc" && !is_procfs) || (is_inside && !COVERED_IN_PROC.contains(&target)) {
        return Err(Refused::invalid(format!("{field}.destination"), format!("{target} is inside procfs and cannot be covered")));
    }
    Ok(())
}

/// A new file system, of any type that the kernel has.
fn new(mount: &SpecMount, kind: &str, target: String, options: Options, field: &str) -> Result<Mount, Refused> {
    check_proc(&target, kind == "proc", field)?;
    if kind.contains('\0') {
        return Err(Refused::invalid(format!("{field}.type"), "contains a NUL byte"));
    }
    let is_tmpfs = kind == "tmpfs";
    // A later mount or device may be made inside a tmpfs.
    let late_readonly = options.readonly && (is_tmpfs || target == "/dev");
    let mut parameters =
        vec![("source".to_owned(), Some(mount.source().as_ref().map_or_else(|| kind.to_owned(), |source| source.display().to_string())))];
    if options.readonly && !late_readonly {
        parameters.push(("ro".to_owned(), None));
    }
    parameters.extend(if kind == "overlay" { layers(options.parameters) } else { options.parameters });
    let has_mode = parameters.iter().any(|(key, _)| key == "mode");
    let set = if late_readonly { options.attributes.set & !RDONLY } else { options.attributes.set };
    Ok(Mount {
        target,
        source: Source::New {
            strict: kind == "proc" || kind == "sysfs",
            keep_mode: is_tmpfs && !has_mode,
            late_readonly,
            kind: kind.to_owned(),
            parameters,
            copy_up: options.copy_up,
        },
        attributes: Attributes { set, clear: 0 },
        recursive: options.recursive,
        propagation: options.propagation,
        lenient: 0,
        ids: None,
    })
}

fn bind(mount: &SpecMount, target: String, options: Options, place: &Place<'_>, field: &str) -> Result<Mount, Refused> {
    let source = mount.source().as_ref().ok_or_else(|| Refused::invalid(format!("{field}.source"), "missing"))?;
    let source = absolute(place.bundle, source, &format!("{field}.source"))?;
    // Whether it is one, only the performer can see.
    let procfs = target == "/proc";
    check_proc(&target, procfs, field)?;
    check_bind_words(&options, field)?;
    let ids = ids(mount, &options, place.is_mapped, field)?;
    let Bound { attributes, lenient } = bind_attributes(options.attributes);
    Ok(Mount {
        target,
        source: Source::Bind { path: source, recursive: options.bind.unwrap_or(false), procfs },
        attributes,
        recursive: options.recursive,
        propagation: options.propagation,
        lenient,
        ids,
    })
}

pub(super) fn check_bind_words(options: &Options, field: &str) -> Result<(), Refused> {
    match options.parameters.iter().find(|(word, _)| !is_flag(word)) {
        Some((word, _)) => Err(Refused::invalid(format!("{field}.options"), format!("{word} has no meaning for a bind mount"))),
        None => Ok(()),
    }
}

/// Words that mount(2) takes as flags, and fsconfig(2) as parameters.
pub(super) fn is_flag(word: &str) -> bool {
    matches!(word, "sync" | "dirsync" | "lazytime" | "mand" | "iversion")
}

/// The parameters of an overlay: a list of folders that is too long for one is given folder by folder.
pub(super) fn layers(parameters: Vec<(String, Option<String>)>) -> Vec<(String, Option<String>)> {
    let split = |(key, value): (String, Option<String>)| -> Vec<(String, Option<String>)> {
        let Some(list) = value.as_deref().filter(|list| key == "lowerdir" && list.len() > MAX_PARAMETER_BYTES) else {
            return vec![(key, value)];
        };
        let mut found = vec![("lowerdir+", String::new())];
        let mut letters = list.chars().peekable();
        while let Some(letter) = letters.next() {
            match letter {
                '\\' => found.last_mut().expect("never empty").1.extend(letters.next()),
                // After two, a folder has content alone.
                ':' if letters.next_if_eq(&':').is_some() => found.push(("datadir+", String::new())),
                ':' => found.push(("lowerdir+", String::new())),
                letter => found.last_mut().expect("never empty").1.push(letter),
            }
        }
        found.into_iter().map(|(key, folder)| (key.to_owned(), Some(folder))).collect()
    };
    parameters.into_iter().flat_map(split).collect()
}

/// Of a value that fsconfig(2) takes.
pub(super) const MAX_PARAMETER_BYTES: usize = 255;

/// A change of what is mounted: of its file system too, unless it is of the mount alone.
fn remount(target: String, options: Options, is_bind: bool, field: &str) -> Result<Mount, Refused> {
    check_proc(&target, true, field)?;
    let readonly = (if options.readonly { "ro" } else { "rw" }).to_owned();
    let parameters = std::iter::once((readonly, None)).chain(options.parameters.clone()).collect();
    if is_bind {
        check_bind_words(&options, field)?;
    }
    let Bound { attributes, lenient } = all_attributes(options.attributes);
    Ok(Mount {
        target,
        source: Source::Existing { parameters: (!is_bind).then_some(parameters) },
        attributes,
        recursive: options.recursive,
        propagation: options.propagation,
        lenient,
        ids: None,
    })
}

/// Whether owners are mapped, and how.
fn ids(mount: &SpecMount, options: &Options, is_mapped: bool, field: &str) -> Result<Option<MappedIds>, Refused> {
    let mappings = users::pair(mount.uid_mappings().as_ref(), mount.gid_mappings().as_ref(), field)?;
    if options.idmap.is_none() && mappings.is_empty() {
        return Ok(None);
    }
    if mappings.is_empty() && !is_mapped {
        return Err(Refused::invalid(
            format!("{field}.uidMappings"),
            "missing: the container has no user namespace whose mappings could be used",
        ));
    }
    Ok(Some(MappedIds { recursive: options.idmap.unwrap_or(false), mappings }))
}

/// As a remount does it: where any attribute is given, the others are cleared; access times stay unless they are given.
pub(super) fn bind_attributes(wanted: Attributes) -> Bound {
    if wanted.is_empty() {
        return Bound { attributes: wanted, lenient: 0 };
    }
    all_attributes(wanted)
}

fn all_attributes(wanted: Attributes) -> Bound {
    let is_of_times = wanted.set & (ATIME | NODIRATIME) != 0 || wanted.clear & (ATIME | NODIRATIME) != 0;
    let times = if is_of_times { ATIME | NODIRATIME } else { 0 };
    let every = RDONLY | NOSUID | NODEV | NOEXEC | NOSYMFOLLOW | times;
    // The field of access times is cleared whole even where a value is set.
    let clear = every & !wanted.set | (every & ATIME);
    Bound { attributes: Attributes { set: wanted.set, clear }, lenient: clear & !wanted.clear }
}

/// What a bind's attributes become.
pub(super) struct Bound {
    pub(super) attributes: Attributes,
    lenient: u64,
}

/// A view of the cgroups: on v1 a tmpfs with a mount for each hierarchy.
fn cgroup(target: &str, options: &Options, cgroups: &Cgroups<'_>, field: &str) -> Result<Vec<Mount>, Refused> {
    if !options.recursive.is_empty() {
        return Err(Refused::unsupported(format!("{field}.options: recursive attributes of cgroups")));
    }
    check_proc(target, false, field)?;
    if let [unified] = &cgroups.host.hierarchies[..]
        && unified.controllers.is_empty()
    {
        let parameters = vec![("source".to_owned(), Some("cgroup".to_owned()))];
        let new =
            Source::New { kind: "cgroup2".to_owned(), parameters, strict: false, keep_mode: false, late_readonly: false, copy_up: false };
        // Without a cgroup namespace a new mount would take the options from the host's (`nsdelegate`, `memory_recursiveprot`): they are those of all. And
        // root of a user namespace may mount it for a cgroup namespace of its own only.
        let (source, bound) = if !cgroups.own_namespace {
            let path = unified.mount.clone();
            (Source::Bind { path, recursive: false, procfs: false }, bind_attributes(options.attributes))
        } else {
            (new, Bound { attributes: Attributes { set: options.attributes.set, clear: 0 }, lenient: 0 })
        };
        return Ok(vec![Mount {
            target: target.to_owned(),
            source,
            attributes: bound.attributes,
            recursive: Attributes::default(),
            propagation: options.propagation.clone(),
            lenient: bound.lenient,
            ids: None,
        }]);
    }
    // The folders in it can be read-only, it is not: as runc's, in which programs make folders of their own.
    let attributes = Attributes { set: options.attributes.set & !RDONLY, clear: 0 };
    let mut mounts = vec![Mount {
        target: target.to_owned(),
        source: Source::New {
            kind: "tmpfs".to_owned(),
            parameters: vec![("source".to_owned(), Some("tmpfs".to_owned())), ("mode".to_owned(), Some("755".to_owned()))],
            strict: false,
            keep_mode: false,
            late_readonly: false,
            copy_up: false,
        },
        attributes,
        recursive: Attributes::default(),
        propagation: options.propagation.clone(),
        lenient: 0,
        ids: None,
    }];
    for hierarchy in &cgroups.host.hierarchies {
        let name = Path::new(&hierarchy.mount).file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let bound = if cgroups.own_namespace {
            Bound { attributes: Attributes { set: options.attributes.set, clear: 0 }, lenient: 0 }
        } else {
            bind_attributes(options.attributes)
        };
        mounts.push(Mount {
            target: format!("{target}/{name}"),
            source: cgroup_source(hierarchy, cgroups),
            attributes: bound.attributes,
            recursive: Attributes::default(),
            propagation: Vec::new(),
            lenient: bound.lenient,
            ids: None,
        });
        if hierarchy.controllers.len() > 1 {
            let links = hierarchy.controllers.iter().filter(|controller| !controller.starts_with("name="));
            mounts.extend(links.map(|controller| link(format!("{target}/{controller}"), name.clone())));
        }
    }
    Ok(mounts)
}

fn cgroup_source(hierarchy: &MountedHierarchy, cgroups: &Cgroups<'_>) -> Source {
    if cgroups.own_namespace {
        let kind = if hierarchy.controllers.is_empty() { "cgroup2" } else { "cgroup" };
        let source = if hierarchy.controllers == ["name=systemd"] { "systemd" } else { kind };
        let mut parameters = vec![("source".to_owned(), Some(source.to_owned()))];
        parameters.extend(hierarchy.controllers.iter().map(|controller| match controller.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (controller.clone(), None),
        }));
        return Source::New { kind: kind.to_owned(), parameters, strict: false, keep_mode: false, late_readonly: false, copy_up: false };
    }
    let own = cgroups.cgroup.folders.iter().find(|folder| folder.mount == hierarchy.mount);
    let path = own.map_or_else(|| hierarchy.mount.clone(), |folder| folder.absolute().display().to_string());
    Source::Bind { path, recursive: false, procfs: false }
}

fn link(path: String, to: String) -> Mount {
    Mount {
        target: path,
        source: Source::Link { to },
        attributes: Attributes::default(),
        recursive: Attributes::default(),
        propagation: Vec::new(),
        lenient: 0,
        ids: None,
    }
}
