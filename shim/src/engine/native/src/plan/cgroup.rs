//! Plans the folders of a cgroup, and its limits.
use std::path::{Component, Path};

use oci_spec::runtime::{Linux, LinuxResources, Spec};

use super::devices::{self, Allowed};
use super::make::Request;
use super::unit::{self, Unit};
use super::{Cgroup, Folder, Hierarchy, device_program, limits_v1, limits_v2};
use crate::Refused;
use crate::host::{Host, MountedHierarchy};

/// Plans the cgroup of a container, and the unit in which systemd makes it, if it is to.
pub(super) fn plan(spec: &Spec, linux: &Linux, request: &Request<'_>, host: &Host) -> Result<(Cgroup, Option<Unit>), Refused> {
    let none = LinuxResources::default();
    let resources = linux.resources().as_ref().unwrap_or(&none);
    let wanted = linux.cgroups_path().as_deref().unwrap_or(Path::new(""));
    if wanted.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(Refused::invalid("linux.cgroupsPath", "contains a NUL byte"));
    }
    let allowed = devices::allowed(resources.devices().as_deref().unwrap_or_default())?;
    let place = if request.systemd_cgroup {
        let wanted = wanted.to_str().ok_or_else(|| Refused::invalid("linux.cgroupsPath", "not UTF-8"))?;
        Place::Unit(unit::Place::parse(wanted, request.id)?)
    } else if wanted.to_str().is_some_and(|text| text.contains(':') && !text.contains('/')) {
        return Err(Refused::unsupported("linux.cgroupsPath of systemd's form without the option SystemdCgroup"));
    } else {
        Place::Path(if wanted.as_os_str().is_empty() { Path::new(request.id) } else { wanted })
    };
    let mut cgroup = match &host.hierarchies[..] {
        [] => return Err(Refused::invalid("linux.cgroupsPath", "no cgroups are mounted on this host")),
        [unified] if unified.controllers.is_empty() => v2(&place, resources, &allowed, unified)?,
        several => v1(&place, resources, &allowed, several)?,
    };
    let Place::Unit(place) = place else { return Ok((cgroup, None)) };
    let limits = unit::settle(&mut cgroup, unit::Bandwidth::default())?;
    let unit = place.unit(spec, request.id, &allowed, &host.hierarchies, limits)?;
    Ok((cgroup, Some(unit)))
}

/// Plans the cgroup that is to hold those of a pod's containers, without limits: the folders of a path, or where `has_systemd` the unit of a slice too.
pub fn parent(wanted: &str, has_systemd: bool, host: &Host) -> Result<(Cgroup, Option<Unit>), Refused> {
    let name = wanted.rsplit('/').find(|part| !part.is_empty()).unwrap_or_default();
    let place = match has_systemd && name.ends_with(".slice") {
        true => Place::Unit(unit::Place::parse(&format!("::{name}"), "")?),
        false => Place::Path(Path::new(wanted)),
    };
    let (none, allowed) = (LinuxResources::default(), Allowed::least());
    let mut cgroup = match &host.hierarchies[..] {
        [] => return Err(Refused::invalid("linux.cgroup_parent", "no cgroups are mounted on this host")),
        [unified] if unified.controllers.is_empty() => v2(&place, &none, &allowed, unified)?,
        several => v1(&place, &none, &allowed, several)?,
    };
    for folder in &mut cgroup.folders {
        (folder.limits, folder.devices) = (Vec::new(), None);
    }
    let Place::Unit(place) = place else { return Ok((cgroup, None)) };
    let unit = place.slice(&host.hierarchies);
    Ok((cgroup, Some(unit)))
}

/// Where the folders are.
enum Place<'a> {
    Path(&'a Path),
    Unit(unit::Place),
}

impl Place<'_> {
    /// The path in a hierarchy. `base`: where a relative one begins.
    fn folder(&self, hierarchy: &MountedHierarchy, base: &str) -> Result<String, Refused> {
        match self {
            Self::Path(wanted) => path(wanted, base, &hierarchy.root),
            Self::Unit(place) => Ok(place.folder(hierarchy)),
        }
    }
}

/// A folder of each hierarchy, the limits of a controller in its own.
fn v1(place: &Place<'_>, resources: &LinuxResources, allowed: &Allowed, hierarchies: &[MountedHierarchy]) -> Result<Cgroup, Refused> {
    let mut limits = limits_v1::plan(resources)?;
    limits.extend(allowed.v1().into_iter().map(|write| ("devices", write)));
    let mut folders = Vec::new();
    for hierarchy in hierarchies {
        let is_of = |controller: &str| hierarchy.controllers.iter().any(|own| own == controller);
        let (own, others) = limits.into_iter().partition(|(controller, _)| is_of(controller));
        limits = others;
        folders.push(Folder {
            mount: hierarchy.mount.clone(),
            path: place.folder(hierarchy, &hierarchy.own)?,
            hierarchy: match () {
                () if hierarchy.controllers.is_empty() => Hierarchy::Unified,
                () if is_of("cpuset") => Hierarchy::Cpuset,
                () => Hierarchy::V1,
            },
            limits: own.into_iter().map(|(_, write)| write).collect(),
            controllers: Vec::new(),
            of: hierarchy.controllers.clone(),
            devices: None,
            owner: None,
        });
    }
    match limits.first() {
        Some((controller, write)) => Err(missing(controller, &write.file)),
        None => Ok(Cgroup { folders, placeholder: None }),
    }
}

/// One folder, in which every controller of the hierarchy is enabled.
fn v2(place: &Place<'_>, resources: &LinuxResources, allowed: &Allowed, unified: &MountedHierarchy) -> Result<Cgroup, Refused> {
    let limits = limits_v2::plan(resources)?;
    if let Some((controller, write)) = limits.iter().find(|(controller, _)| unified.available.iter().all(|own| own != controller)) {
        return Err(missing(controller, &write.file));
    }
    // A cgroup with processes has no controllers for those below it, so a relative path begins beside the own one.
    let beside = Path::new(&unified.own).parent().and_then(Path::to_str).unwrap_or("/");
    let folder = Folder {
        mount: unified.mount.clone(),
        path: place.folder(unified, beside)?,
        hierarchy: Hierarchy::Unified,
        limits: limits.into_iter().map(|(_, write)| write).collect(),
        controllers: unified.available.clone(),
        of: Vec::new(),
        devices: Some(device_program::assemble(allowed)),
        owner: None,
    };
    Ok(Cgroup { folders: vec![folder], placeholder: None })
}

/// Gives the folder of cgroup v2 to a user, who may divide it. Folders of v1 are the runtime's alone.
pub(super) fn give(cgroup: &mut Cgroup, owner: Option<u32>) {
    if let [folder @ Folder { hierarchy: Hierarchy::Unified, .. }] = &mut cgroup.folders[..] {
        folder.owner = owner;
    }
}

/// The files to change in the folders of a container.
pub(super) fn update(resources: &LinuxResources, cgroup: &Cgroup) -> Result<Cgroup, Refused> {
    let is_v2 = matches!(&cgroup.folders[..], [Folder { hierarchy: Hierarchy::Unified, .. }]);
    let limits = if is_v2 { limits_v2::plan(resources)? } else { limits_v1::plan(resources)? };
    let mut changed = cgroup.clone();
    changed.folders.iter_mut().for_each(|folder| folder.limits.clear());
    for (controller, write) in limits {
        let is_of = |folder: &Folder| if is_v2 { &folder.controllers } else { &folder.of }.iter().any(|own| own == controller);
        let folder = changed.folders.iter_mut().find(|folder| is_of(folder)).ok_or_else(|| missing(controller, &write.file))?;
        folder.limits.push(write);
    }
    Ok(changed)
}

fn missing(controller: &str, file: &str) -> Refused {
    Refused::invalid("linux.resources", format!("{file} needs the cgroup controller {controller}"))
}

/// The path below the mount point: an absolute one starts there, any other at `base`, of which `root` is mounted.
fn path(wanted: &Path, base: &str, root: &str) -> Result<String, Refused> {
    let base = Path::new(base);
    let base = if wanted.is_absolute() { Path::new("/") } else { base.strip_prefix(root).unwrap_or(base) };
    let mut parts: Vec<&str> = base.to_str().into_iter().flat_map(|text| text.split('/')).filter(|part| !part.is_empty()).collect();
    let least = parts.len();
    for component in wanted.components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str().ok_or_else(|| Refused::invalid("linux.cgroupsPath", "not UTF-8"))?),
            // Cleaned as if its beginning were a root.
            Component::ParentDir if parts.len() > least => {
                parts.pop();
            }
            Component::ParentDir | Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    if parts.len() == least {
        return Err(Refused::invalid("linux.cgroupsPath", format!("{} is not below the root of the cgroups", wanted.display())));
    }
    Ok(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_of_a_pods_cgroups_has_no_limits() {
        for host in [Host::example_v1(), Host::example_v2()] {
            let (cgroup, unit) = parent("/kubepods/burstable/pod1", false, &host).expect("a path");
            assert!(unit.is_none() && !cgroup.folders.is_empty());
            assert!(cgroup.folders.iter().all(|folder| folder.path == "kubepods/burstable/pod1"));
            assert!(cgroup.folders.iter().all(|folder| folder.limits.is_empty() && folder.devices.is_none()));
            assert!(parent("/", false, &host).is_err());
            // Without systemd it is a path like any other.
            let (cgroup, unit) = parent("/kubepods.slice/kubepods-pod1.slice", false, &host).expect("a path");
            assert!(unit.is_none() && cgroup.folders[0].path == "kubepods.slice/kubepods-pod1.slice");
        }
    }

    #[test]
    fn a_slice_is_where_its_name_puts_it() {
        let host = Host::example_v2();
        for wanted in ["/kubepods.slice/kubepods-pod1.slice", "kubepods-pod1.slice"] {
            let (cgroup, unit) = parent(wanted, true, &host).expect("a slice");
            let unit = unit.expect("systemd starts it");
            assert_eq!(unit.name, "kubepods-pod1.slice");
            assert!(unit.is_slice() && unit.control_group.ends_with("/kubepods.slice/kubepods-pod1.slice") && unit.limits.is_empty());
            assert!(cgroup.folders[0].path.ends_with("kubepods.slice/kubepods-pod1.slice"));
        }
        assert!(parent("a--b.slice", true, &host).is_err());
    }

    #[test]
    fn paths_stay_below_the_mount() {
        let path = |wanted: &str, (root, own): &(&str, &str)| path(Path::new(wanted), own, root);
        let host = ("/", "/system.slice/containerd");
        assert_eq!(path("/default/c1", &host).expect("a path"), "default/c1");
        assert_eq!(path("id", &host).expect("a path"), "system.slice/containerd/id");
        assert_eq!(path("a/../b", &host).expect("a path"), "system.slice/containerd/b");
        assert_eq!(path("../../../b", &host).expect("a path"), "system.slice/containerd/b");
        assert_eq!(path("/../x", &host).expect("a path"), "x");
        let nested = ("/docker/a", "/docker/a/inner");
        assert_eq!(path("id", &nested).expect("a path"), "inner/id");
        assert!(path("/", &host).is_err());
    }
}
