//! Activations: mounts that are made on the host for a client which cannot make them, or wants to look into a snapshot for a while.
//!
//! ```text
//! Activate ─▶ STATE/mounts/N/record (being made) ─▶ STATE/mounts/N/0, 1, … mounted ─▶ record ─▶ answered
//! Deactivate, or a collection once nothing holds it ─▶ unmounted, the last one first ─▶ folder removed
//! ```
//! What holds an activation: the lease of its call, and what its labels `containerd.io/gc.bref.…` name, as long as it exists.
//!
//! **Invariant:** nothing below a mount point is removed: folders are, when they are empty. What is true of mounts ends with the boot, as do
//! the records.

pub(crate) mod messages;
mod plan;
#[cfg(test)]
mod tests;
mod unmount;

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use containerd_client::types::Mount;
use log::{debug, warn};
use prost::Message as _;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::diff::blocking_mount;
use crate::error::{Error, IoContext as _, Object, Result};
use crate::gate::Gate;
use crate::name::{self, Namespace};
use crate::pools::Pool;
use crate::snapshots::is_map;
use crate::store::{self, Store};
use crate::timestamp;
use messages::{ActivationInfo, ActiveMount, Record};
use plan::Folder;
use unmount::blocking_unmount;

/// All activations; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Mounts {
    folder: PathBuf,
    /// Below which folders may be made for mounts.
    roots: [PathBuf; 2],
    store: Store,
    pool: Pool,
    /// For one job of it.
    limit: Duration,
    gate: Gate,
    /// Namespaces and names that a call works on.
    busy: Arc<Mutex<HashSet<(String, String)>>>,
    /// Held until a new folder has its first record: one without a record was left by a crash.
    beginning: Arc<Mutex<()>>,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub(crate) struct Activation {
    pub(crate) name: String,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) labels: HashMap<String, String>,
    /// Whether all mounts are to be made.
    pub(crate) temporary: bool,
    /// Holds it, if it is named.
    pub(crate) lease: Option<String>,
}

/// The right to work on an activation.
struct Turn {
    of: (String, String),
    busy: Arc<Mutex<HashSet<(String, String)>>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.of);
    }
}

impl Mounts {
    /// Those below the folder of state. Nothing is made yet.
    pub(crate) fn new(state: &Path, root: &Path, store: Store, pool: Pool, gate: Gate) -> Self {
        let folder = state.join("mounts");
        Self {
            roots: [folder.clone(), root.to_owned()],
            folder,
            store,
            pool,
            limit: LIMIT,
            gate,
            busy: Arc::default(),
            beginning: Arc::default(),
        }
    }

    fn turn(&self, namespace: &str, name: &str) -> Result<Turn> {
        let of = (namespace.to_owned(), name.to_owned());
        if self.busy.lock().unwrap_or_else(PoisonError::into_inner).insert(of.clone()) {
            Ok(Turn { of, busy: Arc::clone(&self.busy) })
        } else {
            Err(Error::Held { reference: format!("mount {name}"), age: Duration::ZERO, since: timestamp::now().to_string() })
        }
    }

    /// Makes mounts, and returns what is left to the client.
    ///
    /// Errors: [`Error::Unimplemented`] when the client can make them all by itself.
    pub(crate) async fn activate(&self, namespace: &Namespace, asked: Activation) -> Result<ActivationInfo> {
        if asked.name.is_empty() || asked.name.len() > MAX_NAME_BYTES {
            return Err(Error::Invalid(format!(
                "mount name of {} bytes; it must have some, and {MAX_NAME_BYTES} at most",
                asked.name.len()
            )));
        }
        name::labels(&asked.labels)?;
        let count = plan::count(&asked.mounts, asked.temporary)?;
        if let Some(lease) = asked.lease.clone() {
            let place = namespace.clone();
            let found = self.store.read(move |db| store::leases::get(db, place.as_str(), &lease)).await?;
            found.ok_or(Error::NotFound(Object::NoLease))?;
        }
        let turn = self.turn(namespace.as_str(), &asked.name)?;
        let _pass = self.gate.enter().await?;
        let (this, namespace) = (self.clone(), namespace.to_string());
        let activated = self.run(move || {
            let activated = this.blocking_activate(&namespace, asked, count);
            drop(turn);
            activated
        });
        activated.await?
    }

    /// Does something that may hang: mounts of servers that do not answer, and folders on them.
    ///
    /// Errors: [`Error::Exhausted`] when it takes too long. It is done then or later, or not at all.
    async fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let limit = self.limit;
        let late =
            |_elapsed| Error::Exhausted(format!("mounting and unmounting is not done after {limit:?}: a file system may not answer"));
        tokio::time::timeout(limit, self.pool.run(job)).await.map_err(late)?
    }

    fn blocking_activate(&self, namespace: &str, asked: Activation, count: usize) -> Result<ActivationInfo> {
        for (folder, record) in self.blocking_records()? {
            if record.namespace == namespace && record.info.as_ref().is_some_and(|info| info.name == asked.name) {
                return Err(Error::AlreadyExists(Object::Mount(asked.name)));
            }
            if record.info.is_none() && record.namespace == unfinished(namespace, &asked.name) {
                // a process was killed while it made it
                blocking_undo(&folder)?;
            }
        }
        let (folder, begun) = {
            let _alone = self.beginning.lock().unwrap_or_else(PoisonError::into_inner);
            let folder = self.blocking_folder()?;
            let begun = write(&folder, &Record { namespace: unfinished(namespace, &asked.name), ..Record::default() });
            (folder, begun)
        };
        let record = |info| Record { namespace: namespace.to_owned(), info, lease: asked.lease.clone().unwrap_or_default() };
        let made = begun.and_then(|()| {
            let info = self.blocking_mount(&folder, &asked, count)?;
            write(&folder, &record(Some(info.clone())))?;
            Ok(info)
        });
        if made.is_err()
            && let Err(error) = blocking_undo(&folder)
        {
            warn!(folder:% = folder.display(), error = error.chain(); "cannot undo mounts; a collection tries again");
        }
        made
    }

    fn blocking_mount(&self, folder: &Path, asked: &Activation, count: usize) -> Result<ActivationInfo> {
        let mut info = ActivationInfo { name: asked.name.clone(), labels: asked.labels.clone(), ..ActivationInfo::default() };
        for (number, mount) in asked.mounts[..count].iter().enumerate() {
            let mount = self.blocking_transformed(mount, &info.active)?;
            if mount.options.iter().any(|option| is_map(option)) {
                return Err(Error::Unimplemented("mounts with maps of users and groups".to_owned()));
            }
            // a path in what is mounted already, whose links lead anywhere
            if !mount.target.trim_matches('/').is_empty() {
                return Err(Error::Unimplemented("mounts with a target of their own".to_owned()));
            }
            let point = folder.join(number.to_string());
            DirBuilder::new().mode(0o700).create(&point).on("make mount point", &point)?;
            blocking_mount(&mount, &point)?;
            let mount_point = point.to_string_lossy().into_owned();
            info.active.push(ActiveMount { mount: Some(mount), mounted_at: Some(timestamp::now()), mount_point, data: HashMap::new() });
        }
        if let Some(first) = asked.mounts.get(count) {
            info.system.push(self.blocking_transformed(first, &info.active)?);
            info.system.extend(asked.mounts[count + 1..].iter().cloned());
        }
        if asked.temporary
            && let Some(last) = info.active.last()
        {
            let (kind, source) = ("bind".to_owned(), last.mount_point.clone());
            info.system.push(Mount { r#type: kind, source, target: String::new(), options: vec!["rbind".to_owned()] });
        }
        Ok(info)
    }

    fn blocking_transformed(&self, mount: &Mount, active: &[ActiveMount]) -> Result<Mount> {
        let (mount, folders) = plan::transformed(mount, active)?;
        folders.iter().try_for_each(|folder| self.blocking_make(folder))?;
        Ok(mount)
    }

    /// Makes a folder below one of the roots, without following links.
    fn blocking_make(&self, folder: &Folder) -> Result<()> {
        let path = Path::new(&folder.path);
        let below = self.roots.iter().find_map(|root| Some((root, path.strip_prefix(root).ok()?)));
        let (Some((root, below)), Some(name)) = (below, below.and_then(|(_root, below)| below.file_name())) else {
            let roots = self.roots.each_ref().map(|root| root.display().to_string()).join(" or ");
            return Err(Error::Invalid(format!("folder {:?} is not below {roots}", folder.path)));
        };
        let made = || -> rustix::io::Result<()> {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = rustix::fs::open(root, flags, Mode::empty())?;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let above = below.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let above = openat2(&root, above, flags, Mode::empty(), resolve)?;
            match rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(folder.mode)) {
                Err(rustix::io::Errno::EXIST) => {
                    openat2(&above, name, flags, Mode::empty(), resolve)?;
                    return Ok(());
                }
                made => made?,
            }
            let made = openat2(&above, name, flags, Mode::empty(), resolve)?;
            rustix::fs::fchmod(&made, Mode::from_raw_mode(folder.mode))?;
            if let Some((user, group)) = folder.owner {
                rustix::fs::fchown(&made, Some(rustix::fs::Uid::from_raw(user)), Some(rustix::fs::Gid::from_raw(group)))?;
            }
            Ok(())
        };
        made().map_err(io::Error::from).on("make folder", path)
    }

    fn blocking_folder(&self) -> Result<PathBuf> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder).on("make folder", &self.folder)?;
        for number in 1.. {
            let folder = self.folder.join(number.to_string());
            match DirBuilder::new().mode(0o700).create(&folder) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => return made.on("make folder", &folder).map(|()| folder),
            }
        }
        Err(Error::Exhausted("no number is left for a mount".to_owned()))
    }

    /// All folders with their records.
    fn blocking_records(&self) -> Result<Vec<(PathBuf, Record)>> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.on("list", &self.folder)?,
        };
        let mut records = Vec::new();
        for entry in entries {
            let folder = entry.on("list", &self.folder)?.path();
            let record = read(&folder);
            records.push((folder, record));
        }
        Ok(records)
    }

    async fn records(&self) -> Result<Vec<(PathBuf, Record)>> {
        let this = self.clone();
        self.run(move || this.blocking_records()).await?
    }

    /// The activations of a namespace.
    pub(crate) async fn list(&self, namespace: &Namespace) -> Result<Vec<ActivationInfo>> {
        let records = self.records().await?.into_iter();
        let mut all: Vec<_> =
            records.filter(|(_, record)| record.namespace == namespace.as_str()).filter_map(|(_, record)| record.info).collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(all)
    }

    async fn find(&self, namespace: &Namespace, name: &str) -> Result<(PathBuf, Record)> {
        let is_it = |record: &Record| record.namespace == namespace.as_str() && record.info.as_ref().is_some_and(|info| info.name == name);
        let found = self.records().await?.into_iter().find(|(_, record)| is_it(record));
        found.ok_or_else(|| Error::NotFound(Object::Mount(name.to_owned())))
    }

    /// One of them.
    pub(crate) async fn info(&self, namespace: &Namespace, name: &str) -> Result<ActivationInfo> {
        Ok(self.find(namespace, name).await?.1.info.unwrap_or_default())
    }

    /// Changes the labels of one.
    pub(crate) async fn relabel(
        &self,
        namespace: &Namespace,
        name: &str,
        change: impl FnOnce(&mut HashMap<String, String>) -> Result<()>,
    ) -> Result<ActivationInfo> {
        let turn = self.turn(namespace.as_str(), name)?;
        let _pass = self.gate.enter().await?;
        let (folder, mut record) = self.find(namespace, name).await?;
        let mut info = record.info.take().unwrap_or_default();
        change(&mut info.labels)?;
        name::labels(&info.labels)?;
        record.info = Some(info.clone());
        self.run(move || write(&folder, &record)).await??;
        drop(turn);
        Ok(info)
    }

    /// Unmounts what was mounted.
    ///
    /// Errors: [`Error::Precondition`] while something is in use; the activation stays then.
    pub(crate) async fn deactivate(&self, namespace: &Namespace, name: &str) -> Result<()> {
        let turn = self.turn(namespace.as_str(), name)?;
        let _pass = self.gate.enter().await?;
        let (folder, _) = self.find(namespace, name).await?;
        let undone = self.run(move || {
            let undone = blocking_undo(&folder);
            drop(turn);
            undone
        });
        undone.await?
    }

    /// Undoes what nothing holds.
    ///
    /// Errors: it cannot be found out; what cannot be undone is logged.
    pub(crate) async fn collect(&self) -> Result<()> {
        let records = self.records().await?;
        if records.is_empty() {
            return Ok(());
        }
        let now = timestamp::to_nanos(&timestamp::now());
        let unheld = self.store.read(move |db| {
            let mut unheld = Vec::new();
            for (folder, record) in records {
                let is_held = match &record.info {
                    Some(info) => store::is_mount_held(db, &record.namespace, &record.lease, &info.labels, now)?,
                    None => false,
                };
                if !is_held {
                    unheld.push((folder, record));
                }
            }
            Ok(unheld)
        });
        for (folder, record) in unheld.await? {
            let (namespace, name) = match &record.info {
                Some(info) if !info.name.is_empty() => (record.namespace.clone(), info.name.clone()),
                _ => split_unfinished(&record.namespace),
            };
            // a call that works on it decides
            let Ok(turn) = self.turn(&namespace, &name) else { continue };
            let _pass = self.gate.enter().await?;
            let this = self.clone();
            let undone = self.run(move || {
                let undone = this.blocking_undo_if(&folder, &record);
                drop(turn);
                undone
            });
            match undone.await.flatten() {
                Ok(true) => debug!(mount = name; "a mount that nothing held is undone"),
                Ok(false) => {}
                Err(error) => {
                    warn!(mount = name, error = error.chain(); "cannot undo a mount that nothing holds; a later collection tries again")
                }
            }
        }
        Ok(())
    }

    /// Undoes an activation if its record is still the one that was seen: it may have other labels by now, or its folder be another's.
    fn blocking_undo_if(&self, folder: &Path, seen: &Record) -> Result<bool> {
        let is_same = {
            let _alone = self.beginning.lock().unwrap_or_else(PoisonError::into_inner);
            read(folder) == *seen
        };
        if is_same { blocking_undo(folder).map(|()| true) } else { Ok(false) }
    }
}

/// Unmounts everything in the folder of an activation, and removes that.
fn blocking_undo(folder: &Path) -> Result<()> {
    let mut points: Vec<_> = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.and_then(Iterator::collect::<io::Result<Vec<_>>>).on("list", folder)?,
    };
    let number = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().parse::<u32>().ok();
    points.retain(|entry| number(entry).is_some());
    points.sort_by_key(|entry| std::cmp::Reverse(number(entry)));
    for point in points.iter().map(fs::DirEntry::path) {
        blocking_unmount(&point)?;
        fs::remove_dir(&point).on("remove", &point)?;
    }
    // the last thing: without it nothing is known of the mounts
    for record in [NEW, RECORD].map(|name| folder.join(name)) {
        match fs::remove_file(&record) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).on("remove", &record),
            _ => {}
        }
    }
    fs::remove_dir(folder).on("remove", folder)
}

/// The record in a folder; an empty one if it has none that can be read.
fn read(folder: &Path) -> Record {
    fs::read(folder.join(RECORD)).ok().and_then(|bytes| Record::decode(&*bytes).ok()).unwrap_or_default()
}

fn write(folder: &Path, record: &Record) -> Result<()> {
    let (path, new) = (folder.join(RECORD), folder.join(NEW));
    fs::write(&new, record.encode_to_vec()).on("write", &new)?;
    fs::rename(&new, &path).on("write", &path)
}

/// In the place of a namespace: one that is being made is found by no client.
fn unfinished(namespace: &str, name: &str) -> String {
    format!("{namespace}\n{name}")
}

fn split_unfinished(text: &str) -> (String, String) {
    let (namespace, name) = text.split_once('\n').unwrap_or(("", text));
    (namespace.to_owned(), name.to_owned())
}

/// For making or undoing an activation.
const LIMIT: Duration = Duration::from_secs(60);
const RECORD: &str = "record";
const NEW: &str = "record.new";
/// As long as keys of snapshots, which clients take for names.
const MAX_NAME_BYTES: usize = 4096;
