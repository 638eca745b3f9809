//! The files of a pod: `hostname`, `hosts`, `resolv.conf` and the memory that its containers share, in the folder `pod` of its bundle.
//!
//! Not in containerd's own folder of the sandbox, which it removes when it finds no container there.
//!
//! **Invariant:** making and removing can be repeated. Memory that is mounted stays: a container may use it.
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::record::Record;
use super::selinux::blocking_label_of_files;
use crate::pod_folder::{FOLDER, SHM};
use crate::sys;
use crate::whole_file::blocking_replace;
use crate::worker::error::Error;

/// As containerd's.
const SHM_BYTES: u64 = 64 << 20;

/// The folder of a pod's files.
pub(super) fn folder(record: &Record) -> PathBuf {
    record.bundle.join(FOLDER)
}

/// Makes the folder.
pub(super) fn blocking_make_folder(record: &Record) -> Result<(), Error> {
    make_folder(&folder(record), 0o711)
}

/// Makes the list of what the pod makes outside of its bundle. The folder must be there.
pub(super) fn blocking_list_leftovers(record: &Record) -> Result<(), Error> {
    let folder = folder(record);
    let written = record.cgroup.leftovers().blocking_write(&record.bundle);
    written.map_err(|source| Error::Io { op: "write", path: folder, source })
}

/// Makes the files. The folder must be there.
pub(super) fn blocking_make(record: &Record) -> Result<(), Error> {
    let folder = folder(record);
    let hostname = record.config.hostname.clone().map_or_else(host_name, Ok)?;
    write(&folder.join("hostname"), format!("{hostname}\n").as_bytes())?;
    write(&folder.join("hosts"), &copy_of("/etc/hosts")?)?;
    let resolver = record.config.resolver.as_ref().map(|text| text.clone().into_bytes());
    write(&folder.join("resolv.conf"), &resolver.map_or_else(|| copy_of("/etc/resolv.conf"), Ok)?)?;
    if record.config.host_ipc {
        return Ok(());
    }
    let shm = folder.join(SHM);
    make_folder(&shm, 0o700)?;
    if is_mounted(&shm)? {
        return Ok(());
    }
    let flags = MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let label = blocking_label_of_files(record.config.selinux_level.as_deref());
    let options = format!("mode=1777,size={SHM_BYTES}{}", label.map(|label| format!(",context=\"{label}\"")).unwrap_or_default());
    mount(Some("shm"), &shm, Some("tmpfs"), flags, Some(options.as_str())).map_err(failed("mount", &shm))
}

/// Removes the files.
pub(super) fn blocking_remove(record: &Record) -> Result<(), Error> {
    crate::pod_folder::blocking_remove(&record.bundle).map_err(|source| Error::Io { op: "remove", path: folder(record), source })
}

fn is_mounted(path: &Path) -> Result<bool, Error> {
    let open = fs::File::open(path).and_then(|folder| sys::mount::is_mount_root(folder.as_fd()));
    open.map_err(|source| Error::Io { op: "look at", path: path.to_owned(), source })
}

fn make_folder(path: &Path, mode: u32) -> Result<(), Error> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => Err(Error::Io { op: "make folder", path: path.to_owned(), source }),
        _ => Ok(()),
    }
}

fn write(path: &Path, content: &[u8]) -> Result<(), Error> {
    // A container of this pod may have the file mounted: one that has it already keeps it.
    if fs::read(path).is_ok_and(|found| found == content) {
        return Ok(());
    }
    blocking_replace(path, content, 0o644).map_err(|source| Error::Io { op: "write", path: path.to_owned(), source })
}

/// The content of a file of the host. None is the same as an empty one.
fn copy_of(path: &str) -> Result<Vec<u8>, Error> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(|source| Error::Io { op: "read", path: path.into(), source }),
    }
}

fn host_name() -> Result<String, Error> {
    let name = copy_of("/proc/sys/kernel/hostname")?;
    Ok(String::from_utf8_lossy(&name).trim().to_owned())
}

fn failed(op: &'static str, path: &Path) -> impl FnOnce(Errno) -> Error {
    let path = path.to_owned();
    move |error| Error::Io { op, path, source: error.into() }
}

#[cfg(test)]
mod tests {
    use super::super::config::Config;
    use super::super::record::tests::record;
    use super::*;

    #[test]
    fn files_are_made_and_removed_as_often_as_one_likes() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: only root can mount");
            return;
        }
        let bundle = scratch::Folder::new("pod-files");
        let config = Config { hostname: Some("web".into()), resolver: Some("nameserver 1.1.1.1\n".into()), ..Config::default() };
        let record = Record { bundle: bundle.to_owned(), config, ..record() };
        let read = |name: &str| fs::read_to_string(bundle.join("pod").join(name)).expect("a file");
        for _ in 0..2 {
            for _ in 0..2 {
                blocking_make_folder(&record).expect("made");
                blocking_list_leftovers(&record).expect("made");
                blocking_make(&record).expect("made");
                assert_eq!((read("hostname").as_str(), read("resolv.conf").as_str()), ("web\n", "nameserver 1.1.1.1\n"));
                assert_eq!(read("hosts").as_bytes(), fs::read("/etc/hosts").unwrap_or_default());
            }
            let mounts = crate::mountinfo::blocking_list(|entry| entry.mount_point.starts_with(&*bundle)).expect("readable");
            assert_eq!(mounts.len(), 1, "mounted once");
            for _ in 0..2 {
                blocking_remove(&record).expect("removed");
                assert!(!bundle.join("pod").exists());
            }
        }
    }
}
