//! The folder of a task or of a sandbox, as containerd lays it out and shims expect it.
//!
//! ```text
//! STATE/io.containerd.runtime.v2.task/NAMESPACE/ID/, or io.containerd.sandbox.controller.v1.shim/NAMESPACE/ID/
//!   config.json         the spec, if any   address           where the shim serves, as text
//!   rootfs/             for its mounts     bootstrap.json    the same, with version and protocol
//!   work ─▶ ROOT/…/ID   outlives a reboot  shim-binary-path  the program that was started
//!   log                 a fifo             sandbox           of a task: the sandbox whose shim it has, if it has not started one
//!                                          created           of a sandbox: that its shim has created it
//!                                          …                 what the shim puts there
//! ```

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::mounts;
use crate::error::{IoContext as _, Result};
use crate::name::Namespace;
use crate::settings::Settings;
use crate::store::Kind;

/// Where a shim serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Address {
    /// Of the task service: 2 or 3.
    pub(crate) version: i32,
    /// `unix:///path`, or `/path`.
    pub(crate) address: String,
    /// `ttrpc`.
    pub(crate) protocol: String,
}

/// The lock of a bundle, held to change it and to run programs for it. The kernel releases it when the process exits.
///
/// After a handover the old process finishes its work on a bundle, and the new one waits for that.
#[derive(Debug)]
pub(crate) struct Claim {
    /// None for a bundle that is not there.
    _lock: Option<File>,
}

/// What a bundle begins with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    /// The JSON of config.json, which a sandbox may lack.
    pub(crate) spec: Option<Vec<u8>>,
    /// The sandbox that a task is in.
    pub(crate) sandbox: Option<String>,
}

/// The folder of a task or sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bundle {
    path: PathBuf,
    work: PathBuf,
}

impl Bundle {
    /// Where the folder is, or would be.
    pub(crate) fn of(settings: &Settings, kind: Kind, namespace: &Namespace, id: &str) -> Self {
        let below = |folder: PathBuf| folder.join(namespace.as_str()).join(id);
        Self { path: below(settings.bundles(kind)), work: below(settings.works(kind)) }
    }

    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Locks it; none while another process, or another part of this one, holds the lock.
    pub(crate) fn claim(&self) -> Result<Option<Claim>> {
        let folder = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(Claim { _lock: None })),
            folder => folder.on("open bundle", &self.path)?,
        };
        match folder.try_lock() {
            Ok(()) => Ok(Some(Claim { _lock: Some(folder) })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).on("lock bundle", &self.path),
        }
    }

    /// Makes it.
    ///
    /// Errors: nothing is left of it; one that was there before is not touched.
    pub(crate) fn blocking_create(&self, contents: &Contents) -> Result<()> {
        for folder in [&self.path, &self.work] {
            let parent = folder.parent().unwrap_or(Path::new("/"));
            DirBuilder::new().recursive(true).mode(0o711).create(parent).on("make folder", parent)?;
        }
        DirBuilder::new().mode(0o700).create(&self.path).on("make bundle", &self.path)?;
        let filled = self.fill(contents);
        if filled.is_err() {
            // the first error is the one that counts
            let _ = self.blocking_remove();
        }
        filled
    }

    fn fill(&self, contents: &Contents) -> Result<()> {
        if let Some(gid) = contents.spec.as_deref().and_then(group_of_root) {
            chown(&self.path, None, Some(gid)).on("give away bundle", &self.path)?;
            fs::set_permissions(&self.path, fs::Permissions::from_mode(0o710)).on("open up bundle", &self.path)?;
        }
        let rootfs = self.path.join("rootfs");
        DirBuilder::new().mode(0o711).create(&rootfs).on("make folder", &rootfs)?;
        // leftovers of an earlier task with the same id
        mounts::remove_tree(&self.work)?;
        DirBuilder::new().mode(0o711).create(&self.work).on("make work folder", &self.work)?;
        let link = self.path.join("work");
        symlink(&self.work, &link).on("make link", &link)?;
        let files = [("config.json", contents.spec.as_deref()), (SANDBOX, contents.sandbox.as_deref().map(str::as_bytes))];
        for (name, bytes) in files {
            if let Some(bytes) = bytes {
                let path = self.path.join(name);
                fs::write(&path, bytes).on("write", &path)?;
            }
        }
        Ok(())
    }

    /// The sandbox that the task is in, if it is in one.
    ///
    /// Errors: the file cannot be read.
    pub(crate) fn sandbox(&self) -> Result<Option<String>> {
        Ok(self.read(SANDBOX)?.and_then(|bytes| String::from_utf8(bytes).ok()))
    }

    /// Notes which program is about to be started.
    pub(crate) fn write_program(&self, program: &Path) -> Result<()> {
        let path = self.path.join(PROGRAM);
        fs::write(&path, program.as_os_str().as_encoded_bytes()).on("write", &path)
    }

    /// Which program was started; none if none was.
    ///
    /// Errors: the file cannot be read.
    pub(crate) fn program(&self) -> Result<Option<PathBuf>> {
        let program = self.read(PROGRAM)?;
        Ok(program.map(|bytes| PathBuf::from(OsString::from_vec(bytes))))
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.path.join(name);
        match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.on("read", &path).map(Some),
        }
    }

    /// Notes where the shim serves. Both files are replaced in one step each: a reader never sees half of one.
    pub(crate) fn write_address(&self, address: &Address) -> Result<()> {
        let json = serde_json::to_vec(address).expect("it has no map and no foreign type");
        self.replace("bootstrap.json", &json)?;
        self.replace("address", address.address.as_bytes())
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let (new, path) = (self.path.join(format!(".{name}")), self.path.join(name));
        fs::write(&new, bytes).on("write", &new)?;
        fs::rename(&new, &path).on("replace", &path)
    }

    /// Where the shim serves; none when that was never noted.
    ///
    /// Errors: the file cannot be read.
    pub(crate) fn address(&self) -> Result<Option<Address>> {
        if let Some(json) = self.read("bootstrap.json")?
            && let Ok(address) = serde_json::from_slice(&json)
        {
            return Ok(Some(address));
        }
        let text = self.read("address")?.and_then(|bytes| String::from_utf8(bytes).ok()).filter(|text| !text.is_empty());
        Ok(text.map(|address| Address { version: 2, address, protocol: "ttrpc".to_owned() }))
    }

    /// Whether `start` was answered, and its address noted here: only then was the shim asked to create anything. Shims note an address too.
    pub(crate) fn was_started(&self) -> Result<bool> {
        Ok(self.read("bootstrap.json")?.is_some())
    }

    /// Notes that the shim has created the sandbox.
    pub(crate) fn write_created(&self) -> Result<()> {
        let path = self.path.join(CREATED);
        fs::write(&path, []).on("write", &path)
    }

    /// Whether the shim has created the sandbox, as far as is noted: only then can a client know of it.
    pub(crate) fn was_created(&self) -> Result<bool> {
        Ok(self.read(CREATED)?.is_some())
    }

    /// Removes it with what is mounted in it, the work folder too. That there is none is fine.
    pub(crate) fn blocking_remove(&self) -> Result<()> {
        let parent = self.path.parent().unwrap_or(Path::new("/"));
        let name = self.path.file_name().unwrap_or_default();
        // first out of the way, so that the id is free, or still whole; with its mounts, which go before its files
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // the next start removes what cannot be removed now
        let hidden = parent.join(format!(".{}.{now}.{number}", name.to_string_lossy()));
        match fs::rename(&self.path, &hidden) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed.on("remove bundle", &self.path)?,
        }
        mounts::remove_tree(&hidden)?;
        mounts::remove_tree(&self.work)
    }
}

/// In a user namespace: the group that its root is outside.
fn group_of_root(spec: &[u8]) -> Option<u32> {
    #[derive(Deserialize)]
    struct Spec {
        linux: Option<Linux>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Linux {
        #[serde(default)]
        namespaces: Vec<LinuxNamespace>,
        #[serde(default)]
        gid_mappings: Vec<Mapping>,
    }
    #[derive(Deserialize)]
    struct LinuxNamespace {
        r#type: String,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Mapping {
        #[serde(rename = "containerID")]
        container_id: u32,
        #[serde(rename = "hostID")]
        host_id: u32,
    }
    let linux = serde_json::from_slice::<Spec>(spec).ok()?.linux?;
    linux.namespaces.iter().find(|namespace| namespace.r#type == "user")?;
    linux.gid_mappings.iter().find(|mapping| mapping.container_id == 0).map(|mapping| mapping.host_id)
}

const PROGRAM: &str = "shim-binary-path";
const SANDBOX: &str = "sandbox";
const CREATED: &str = "created";

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> (scratch::Folder, Bundle) {
        let folder = scratch::Folder::new(name);
        let settings = Settings { root: folder.join("root"), state: folder.join("state"), ..Settings::default() };
        let bundle = Bundle::of(&settings, Kind::Task, &Namespace::parse("ns").expect("a name"), "c1");
        (folder, bundle)
    }

    #[test]
    fn a_bundle_is_laid_out_as_shims_expect_it_and_leaves_nothing() {
        let (_folder, bundle) = folder("layout");
        let contents = Contents { spec: Some(b"{}".to_vec()), sandbox: Some("s1".to_owned()) };
        bundle.blocking_create(&contents).expect("a bundle");
        assert_eq!(bundle.sandbox().expect("readable").as_deref(), Some("s1"));
        let claim = bundle.claim().expect("readable").expect("it is free");
        assert!(bundle.claim().expect("readable").is_none(), "it is claimed");
        drop(claim);
        assert!(bundle.claim().expect("readable").is_some(), "it is free again");
        let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o7777;
        assert_eq!((mode(bundle.path()), mode(&bundle.path().join("rootfs"))), (0o700, 0o711));
        assert!(bundle.path().join("work").is_dir());
        assert_eq!(bundle.address().expect("readable"), None);
        let address = Address { version: 3, address: "unix:///s".into(), protocol: "ttrpc".into() };
        assert!(!bundle.was_started().expect("readable"));
        bundle.write_address(&address).expect("written");
        assert!(bundle.was_started().expect("readable"));
        assert_eq!(bundle.address().expect("readable"), Some(address));
        assert_eq!(fs::read_to_string(bundle.path().join("address")).expect("text"), "unix:///s");
        fs::remove_file(bundle.path().join("bootstrap.json")).expect("removal");
        assert_eq!(bundle.address().expect("readable").map(|address| address.version), Some(2));
        assert!(bundle.blocking_create(&contents).is_err(), "taken");
        assert!(bundle.path().join("address").exists() && bundle.path().join("work").is_dir(), "and not touched");
        bundle.blocking_remove().expect("removed");
        bundle.blocking_remove().expect("and again");
        assert_eq!(fs::read_dir(bundle.path().parent().expect("a parent")).expect("a folder").count(), 0);
        bundle.blocking_create(&Contents::default()).expect("a bundle without a spec");
        assert!(!bundle.path().join("config.json").exists() && bundle.sandbox().expect("readable").is_none());
        bundle.blocking_remove().expect("removed");
    }

    #[test]
    fn root_of_a_user_namespace_may_enter() {
        let spec = r#"{"linux":{"namespaces":[{"type":"user"}],"gidMappings":[{"containerID":0,"hostID":4711,"size":10}]}}"#;
        assert_eq!(group_of_root(spec.as_bytes()), Some(4711));
        for other in [r#"{"linux":{"gidMappings":[{"containerID":0,"hostID":4711,"size":10}]}}"#, "{}", "no json"] {
            assert_eq!(group_of_root(other.as_bytes()), None);
        }
    }
}
