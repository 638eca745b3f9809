//! What a container gets that joins the pod: the pod's files and memory, added to its configuration.
//!
//! containerd adds them to containers of its own pods. For those of a shim it adds the namespaces alone.
//!
//! **Invariant:** joining can be repeated. What the client mounts at a place stays.
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::config::Pids;
use super::files;
use super::record::Record;
use crate::pod_folder::{self, SHM};
use crate::sys;
use crate::whole_file::blocking_replace;
use crate::worker::container::Shared;
use crate::worker::error::Error;
use crate::worker::id::ContainerId;
use crate::worker::spec::{SpecError, blocking_read_text};

/// Has the container of a bundle join the pod of this shim, if there is one. Returns whether its journal is to be kept with the pod.
///
/// Errors: the pod does not run; the container wants a namespace that the pod does not have.
pub(in crate::worker) fn blocking_join(shared: &Shared, id: &ContainerId, bundle: &Path) -> Result<bool, Error> {
    let Some(pod) = shared.pod.borrow().clone() else { return Ok(false) };
    let pid = match pod.record().phase.pid() {
        Some(pid) if !pod.is_stopping.get() => pid,
        _ => return Err(pod.refused("take a container")),
    };
    let path = bundle.join("config.json");
    let text = blocking_read_text(bundle)?;
    let mut spec: Value = serde_json::from_slice(&text).map_err(|source| SpecError::Malformed { path: path.clone(), source })?;
    let record = pod.record();
    let label = spec["linux"]["mountLabel"].as_str().unwrap_or_default().to_owned();
    if join(&mut spec, &record, pid, id)? {
        let failed = |source| Error::Io { op: "write", path: path.clone(), source };
        let mode = fs::metadata(&path).map_err(failed)?.permissions().mode() & 0o777;
        blocking_replace(&path, spec.to_string().as_bytes(), mode).map_err(failed)?;
    }
    if !label.is_empty() {
        FILES.iter().try_for_each(|name| blocking_label(&files::folder(&record).join(name), &label))?;
    }
    drop(record);
    pod.update(|record| record.bundles = bundle.parent().map(Path::to_owned));
    Ok(true)
}

/// Keeps the journal of a container that joins the pod with the pod's files.
pub(in crate::worker) fn blocking_keep_journal(shared: &Shared, id: &ContainerId, journal: &Path) -> Result<(), Error> {
    let Some(pod) = shared.pod.borrow().clone() else { return Ok(()) };
    match pod_folder::blocking_link_journal(&pod.record().bundle, id.as_str(), journal) {
        // The bundles are on other file systems. The container has a `delete` of its own.
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            log::debug!(container:% = id, error:%; "the journal of a container is not kept with its pod");
            Ok(())
        }
        other => other.map_err(|source| Error::Io { op: "link", path: journal.to_owned(), source }),
    }
}

/// A container of the pod is deleted. Failures are logged: its journal says that it has exited.
pub(in crate::worker) fn blocking_forget_journal(shared: &Shared, id: &ContainerId) {
    let Some(pod) = shared.pod.borrow().clone() else { return };
    if let Err(error) = pod_folder::blocking_unlink_journal(&pod.record().bundle, id.as_str()) {
        log::debug!(container:% = id, error:%; "cannot remove the journal of a container from its pod");
    }
}

const FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// Adds what is missing. Whether anything was.
fn join(spec: &mut Value, record: &Record, pid: u32, id: &ContainerId) -> Result<bool, Error> {
    let joins = |kind: &str, file: &str| {
        let own = format!("/proc/{pid}/ns/{file}");
        let namespaces = spec["linux"]["namespaces"].as_array().into_iter().flatten();
        namespaces.filter(|namespace| namespace["type"] == kind).any(|namespace| namespace["path"] == own)
    };
    if record.config.pids == Pids::Container && joins("pid", "pid") {
        let why = "the pod has no pid namespace: the container would be in the host's";
        return Err(Error::NotOfPod { id: id.clone(), pod: record.id.clone(), field: "linux.namespaces", why });
    }
    let shares_memory = !record.config.host_ipc && joins("ipc", "ipc");
    let access = if spec["root"]["readonly"] == true { "ro" } else { "rw" };
    if !spec["mounts"].is_array() {
        spec["mounts"] = json!([]);
    }
    let Some(mounts) = spec["mounts"].as_array_mut() else { return Ok(false) };
    let folder = files::folder(record);
    let bind = |at: &Path, source: PathBuf, access: &str| json!({ "destination": at, "type": "bind", "source": source, "options": ["rbind", "rprivate", access] });
    let mut is_changed = false;
    for name in FILES {
        let at = Path::new("/etc").join(name);
        if find(mounts, &at).is_none() {
            mounts.push(bind(&at, folder.join(name), access));
            is_changed = true;
        }
    }
    let at = Path::new("/dev/shm");
    if shares_memory {
        match find(mounts, at) {
            // The client's, or added before.
            Some(mount) if mount["type"] == "bind" => {}
            Some(mount) => {
                *mount = bind(at, folder.join(SHM), "rw");
                is_changed = true;
            }
            None => {
                mounts.push(bind(at, folder.join(SHM), "rw"));
                is_changed = true;
            }
        }
    }
    Ok(is_changed)
}

/// The last mount at a place: the one that is seen there.
fn find<'a>(mounts: &'a mut [Value], at: &Path) -> Option<&'a mut Value> {
    mounts.iter_mut().rev().find(|mount| mount["destination"].as_str().is_some_and(|found| Path::new(found) == at))
}

/// Gives a file the label of SELinux's that the container's own files have.
fn blocking_label(path: &Path, label: &str) -> Result<(), Error> {
    match sys::mount::set_selinux_label(path, label) {
        // The file system takes none.
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOTSUP) => Ok(()),
        other => other.map_err(|source| Error::Io { op: "label", path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::Config;
    use super::super::record::tests::record;
    use super::*;

    fn id() -> ContainerId {
        ContainerId::new("c1").expect("a valid id")
    }

    fn spec(mounts: Value) -> Value {
        json!({
            "root": { "path": "rootfs", "readonly": true },
            "mounts": mounts,
            "linux": { "namespaces": [{ "type": "ipc", "path": "/proc/7/ns/ipc" }, { "type": "pid" }] },
        })
    }

    fn mounts(spec: &Value) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let all = spec["mounts"].as_array().expect("a list").iter();
        all.map(|mount| (text(&mount["destination"]), text(&mount["source"]))).collect()
    }

    #[test]
    fn a_container_gets_the_files_of_its_pod_once() {
        let mut joined = spec(json!([{ "destination": "/dev/shm", "type": "tmpfs", "source": "shm" }]));
        assert!(join(&mut joined, &record(), 7, &id()).expect("joins"));
        let pairs = [
            ("/dev/shm", "/bundle/pod/shm"),
            ("/etc/hostname", "/bundle/pod/hostname"),
            ("/etc/hosts", "/bundle/pod/hosts"),
            ("/etc/resolv.conf", "/bundle/pod/resolv.conf"),
        ];
        assert_eq!(mounts(&joined), pairs.map(|(at, source)| (at.to_owned(), source.to_owned())));
        assert_eq!(joined["mounts"][1]["options"], json!(["rbind", "rprivate", "ro"]), "as the root");
        assert_eq!(joined["mounts"][0]["options"], json!(["rbind", "rprivate", "rw"]));
        let before = joined.clone();
        assert!(!join(&mut joined, &record(), 7, &id()).expect("joins again"));
        assert_eq!(joined, before);
    }

    #[test]
    fn what_the_client_mounts_stays() {
        let own = json!([
            { "destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts" },
            { "destination": "/dev/shm/", "type": "bind", "source": "/volume" },
        ]);
        let mut joined = spec(own);
        assert!(join(&mut joined, &record(), 7, &id()).expect("joins"));
        let found = mounts(&joined);
        assert_eq!(found[0].1, "/kubelet/hosts");
        assert_eq!(found[1].1, "/volume");
        assert_eq!(found.len(), 4);
    }

    #[test]
    fn only_a_container_in_the_pods_ipc_namespace_shares_its_memory() {
        let memory = json!([{ "destination": "/dev/shm", "type": "tmpfs", "source": "shm" }]);
        for (pid, host_ipc) in [(8, false), (7, true)] {
            let mut joined = spec(memory.clone());
            let record = Record { config: Config { host_ipc, ..Config::default() }, ..record() };
            join(&mut joined, &record, pid, &id()).expect("joins");
            assert_eq!(mounts(&joined)[0].1, "shm");
        }
    }

    #[test]
    fn a_container_does_not_get_the_hosts_pid_namespace_for_the_pods() {
        let mut joined = spec(json!([]));
        joined["linux"]["namespaces"][1] = json!({ "type": "pid", "path": "/proc/7/ns/pid" });
        let with = |pids| Record { config: Config { pids, ..Config::default() }, ..record() };
        let error = join(&mut joined, &with(Pids::Container), 7, &id()).expect_err("it has none");
        assert!(error.to_string().contains("linux.namespaces"), "{error}");
        for pids in [Pids::Pod, Pids::Node] {
            assert!(join(&mut joined.clone(), &with(pids), 7, &id()).is_ok());
        }
    }
}
