//! The files of content, where containerd has them too. Everything here blocks.
//!
//! ```text
//! FOLDER/blobs/sha256/HEX            a blob, for reading only
//! FOLDER/ingest/HASH/{ref,data,startedat,updatedat,total,lease}
//! FOLDER/removed/N                   what is being removed
//! ```
//! HASH is the digest of `NAMESPACE/REF`, which is in `ref`. An ingest without a readable `ref`, `data` or `startedat` is begun again.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use containerd_client::services::v1::Status;
use prost_types::Timestamp;

use super::digest::{Algorithm, Digest, Hasher};
use crate::error::{Error, IoContext as _, Result};
use crate::sys::writeback;

/// The folder.
#[derive(Debug)]
pub(super) struct Files {
    folder: PathBuf,
    /// Of what is being removed.
    next: AtomicU64,
}

/// What became of a blob that was removed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Removed {
    /// These bytes are free, none if it was not there.
    Freed(u64),
    /// Its space is freed when this path is removed.
    Aside(PathBuf),
}

/// An ingest that is being written.
#[derive(Debug)]
pub(super) struct Ingest {
    folder: PathBuf,
    data: File,
    hasher: Hasher,
    pub(super) started: Timestamp,
    pub(super) updated: Timestamp,
    pub(super) offset: u64,
    pub(super) total: u64,
    /// Up to where it is being written to the disk.
    begun: u64,
}

impl Files {
    /// Makes the folders.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        for (path, mode) in [(folder.to_owned(), 0o700), (folder.join("ingest"), 0o755), (folder.join("removed"), 0o700)] {
            DirBuilder::new().recursive(true).mode(mode).create(&path).on("make folder", &path)?;
        }
        for algorithm in Algorithm::ALL {
            let path = folder.join("blobs").join(algorithm.name());
            DirBuilder::new().recursive(true).mode(0o755).create(&path).on("make folder", &path)?;
        }
        Ok(Self { folder: folder.to_owned(), next: AtomicU64::new(0) })
    }

    /// Where a blob is.
    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs(digest.algorithm()).join(digest.hex())
    }

    fn blobs(&self, algorithm: Algorithm) -> PathBuf {
        self.folder.join("blobs").join(algorithm.name())
    }

    fn ingest(&self, name: &str) -> PathBuf {
        self.folder.join("ingest").join(Digest::of_text(name).hex())
    }

    /// The size of a blob, if it is there.
    pub(super) fn size(&self, digest: &Digest) -> Option<u64> {
        fs::symlink_metadata(self.blob(digest)).ok().filter(fs::Metadata::is_file).map(|about| about.len())
    }

    /// The digests of all blobs that are there.
    pub(super) fn all(&self) -> Result<Vec<Digest>> {
        let mut all = Vec::new();
        for algorithm in Algorithm::ALL {
            let folder = self.blobs(algorithm);
            for entry in fs::read_dir(&folder).on("list", &folder)? {
                let name = entry.on("list", &folder)?.file_name();
                // what is called otherwise is not ours
                all.extend(Digest::of(&format!("{}:{}", algorithm.name(), name.to_string_lossy())));
            }
        }
        Ok(all)
    }

    /// Takes a blob away at once; its space is freed when the returned path is removed.
    pub(super) fn take_away(&self, digest: &Digest) -> Result<Option<PathBuf>> {
        let (from, to) = (self.blob(digest), self.unused());
        match fs::rename(&from, &to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            moved => moved.on("remove", &from).map(|()| Some(to)),
        }
    }

    /// A file without a name, to write and read it.
    pub(super) fn unnamed(&self) -> Result<File> {
        let path = self.unused();
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path).on("make", &path)?;
        // one that a process leaves that is killed here is taken for a removed one
        fs::remove_file(&path).on("remove", &path)?;
        Ok(file)
    }

    /// What the file system has left.
    pub(super) fn free_bytes(&self) -> Result<u64> {
        let about = rustix::fs::statvfs(&self.folder).map_err(io::Error::from).on("look at the file system of", &self.folder)?;
        Ok(about.f_bavail.saturating_mul(about.f_frsize))
    }

    /// Removes a blob: a small one at once, for which a change of one folder is enough, a large one is taken away.
    pub(super) fn remove(&self, digest: &Digest) -> Result<Removed> {
        let path = self.blob(digest);
        match fs::symlink_metadata(&path) {
            Ok(about) if about.is_file() && about.len() <= SMALL_BYTES => {
                fs::remove_file(&path).on("remove", &path).map(|()| Removed::Freed(about.len()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Removed::Freed(0)),
            _ => self.take_away(digest).map(|path| path.map_or(Removed::Freed(0), Removed::Aside)),
        }
    }

    fn unused(&self) -> PathBuf {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.folder.join("removed").join(format!("{}-{number}", std::process::id()))
    }

    /// What was taken away, also by a process that was killed.
    pub(super) fn taken(&self) -> Result<Vec<PathBuf>> {
        let folder = self.folder.join("removed");
        let entries = fs::read_dir(&folder).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
        entries.on("list", &folder)
    }

    /// Reads a blob, and returns whether its bytes are those of its digest; none if it is not there, or it is to stop.
    pub(super) fn verify(&self, digest: &Digest, stops: &dyn Fn() -> bool) -> Result<Option<bool>> {
        let path = self.blob(digest);
        let data = match OpenOptions::new().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            data => data.on("open", &path)?,
        };
        let (mut hasher, mut buffer, mut offset) = (Hasher::new(digest.algorithm()), vec![0; BUFFER_BYTES], 0);
        loop {
            if stops() {
                return Ok(None);
            }
            match data.read_at(&mut buffer, offset).on("read", &path)? {
                0 => return Ok(Some(hasher.digest() == *digest)),
                count => {
                    hasher.update(&buffer[..count]);
                    offset += count as u64;
                }
            }
        }
    }

    /// Begins an ingest, or resumes one: the bytes that it already has are read and hashed.
    pub(super) fn begin(&self, name: &str, total: u64, algorithm: Algorithm, lease: Option<&str>) -> Result<Ingest> {
        let folder = self.ingest(name);
        let mut ingest = match self.resume(&folder, name, total, algorithm) {
            Ok(Some(ingest)) => ingest,
            Ok(None) => start(&folder, name, total, algorithm)?,
            Err(error) => {
                log::info!(reference = name, error = error.chain(); "cannot resume an ingest, it begins again");
                self.abort(name)?;
                start(&folder, name, total, algorithm)?
            }
        };
        ingest.folder = folder;
        if let Some(lease) = lease {
            write(&ingest.folder.join("lease"), lease)?;
        }
        Ok(ingest)
    }

    fn resume(&self, folder: &Path, name: &str, total: u64, algorithm: Algorithm) -> Result<Option<Ingest>> {
        let status = match self.status_in(folder)? {
            None if folder.symlink_metadata().is_err() => return Ok(None),
            None => return Err(Error::Precondition(format!("{} lacks a file", folder.display()))),
            Some(status) => status,
        };
        if status.r#ref != name {
            return Err(Error::Precondition(format!("{} is of reference {:?}", folder.display(), status.r#ref)));
        }
        let known = u64::try_from(status.total).unwrap_or_default();
        if total > 0 && known > 0 && total != known {
            return Err(Error::Precondition(format!("provided total differs from status: {total} != {known}")));
        }
        let path = folder.join("data");
        let data = OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_NOFOLLOW).open(&path).on("open", &path)?;
        let mut hasher = Hasher::new(algorithm);
        let offset = hash(&data, &mut hasher).on("read", &path)?;
        let (started, updated) = (status.started_at.unwrap_or_default(), status.updated_at.unwrap_or_default());
        let total = if known > 0 { known } else { total };
        Ok(Some(Ingest { folder: folder.to_owned(), data, hasher, started, updated, offset, total, begun: offset }))
    }

    /// What is known of an ingest, if it is there.
    pub(super) fn status(&self, name: &str) -> Result<Option<Status>> {
        self.status_in(&self.ingest(name))
    }

    /// The same with the lease under which it was begun.
    pub(super) fn status_with_lease(&self, name: &str) -> Result<Option<(Status, Option<String>)>> {
        let folder = self.ingest(name);
        let Some(status) = self.status_in(&folder)? else { return Ok(None) };
        Ok(Some((status, read(&folder.join("lease"))?)))
    }

    /// All ingests, with the leases under which they were begun.
    pub(super) fn statuses(&self) -> Result<Vec<(Status, Option<String>)>> {
        let folder = self.folder.join("ingest");
        let mut statuses = Vec::new();
        for entry in fs::read_dir(&folder).on("list", &folder)? {
            let path = entry.on("list", &folder)?.path();
            // one that ends meanwhile, or lacks a file, is none
            if let Some(status) = self.status_in(&path)? {
                statuses.push((status, read(&path.join("lease"))?));
            }
        }
        Ok(statuses)
    }

    fn status_in(&self, folder: &Path) -> Result<Option<Status>> {
        let Some(name) = read(&folder.join("ref"))? else { return Ok(None) };
        let Some(started) = read(&folder.join("startedat"))?.and_then(|text| text.parse::<Timestamp>().ok()) else { return Ok(None) };
        let path = folder.join("data");
        let about = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            about => about.on("look at", &path)?,
        };
        let noted = read(&folder.join("updatedat"))?.and_then(|text| text.parse::<Timestamp>().ok());
        let written = about.modified().ok().map(Timestamp::from);
        let updated = noted.into_iter().chain(written).max_by_key(crate::timestamp::to_nanos);
        Ok(Some(Status {
            r#ref: name,
            offset: i64::try_from(about.len()).unwrap_or(i64::MAX),
            total: read(&folder.join("total"))?.and_then(|text| text.parse().ok()).unwrap_or_default(),
            started_at: Some(started),
            updated_at: updated,
            expected: String::new(),
        }))
    }

    /// Names of ingests of which something is missing, so that none can go on with them: the folders.
    pub(super) fn broken(&self) -> Result<Vec<PathBuf>> {
        let folder = self.folder.join("ingest");
        let mut broken = Vec::new();
        for entry in fs::read_dir(&folder).on("list", &folder)? {
            let path = entry.on("list", &folder)?.path();
            let is_whole = self.status_in(&path)?.is_some_and(|status| self.ingest(&status.r#ref) == path);
            if !is_whole {
                broken.push(path);
            }
        }
        Ok(broken)
    }

    /// Removes an ingest. False if there was none.
    pub(super) fn abort(&self, name: &str) -> Result<bool> {
        let path = self.ingest(name);
        let is_there = path.symlink_metadata().is_ok();
        remove(&path)?;
        Ok(is_there)
    }

    /// Makes a blob of an ingest that is on the disk; nothing is left of the ingest. The blob may be there already. False if the ingest was
    /// removed meanwhile.
    pub(super) fn publish(&self, ingest: Ingest, digest: &Digest) -> Result<bool> {
        let (target, data) = (self.blob(digest), ingest.folder.join("data"));
        // one of another length was damaged
        if self.size(digest) != Some(ingest.offset) {
            ingest.data.set_permissions(Permissions::from_mode(0o444)).on("set mode of", &data)?;
            match fs::rename(&data, &target) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && data.symlink_metadata().is_err() => return Ok(false),
                renamed => renamed.on("name", &target)?,
            }
        }
        // also for a name that exists: the process that made it may have been killed before it synced the folder
        let folder = self.blobs(digest.algorithm());
        File::open(&folder).and_then(|folder| folder.sync_all()).on("write", &folder)?;
        remove(&ingest.folder).map(|()| true)
    }
}

impl Ingest {
    /// Its bytes, to read them while more are written.
    pub(super) fn reader(&self) -> Result<File> {
        self.data.try_clone().on("open", &self.folder.join("data"))
    }

    /// Appends bytes.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let path = self.folder.join("data");
        // by offset: what a failed write has left is overwritten by the next
        self.data.write_all_at(bytes, self.offset).on("write", &path)?;
        self.hasher.update(bytes);
        self.offset += bytes.len() as u64;
        if self.offset - self.begun >= WRITEBACK_BYTES {
            // so that a commit waits for the last part only; if it fails, that reports it
            let _ = writeback::begin(&self.data, self.begun, self.offset - self.begun);
            self.begun = self.offset;
        }
        self.updated = crate::timestamp::now();
        Ok(())
    }

    /// Appends the beginning of another file.
    pub(super) fn copy(&mut self, file: &File, from: &Path, bytes: u64) -> Result<()> {
        let mut buffer = vec![0; BUFFER_BYTES];
        while self.offset < bytes {
            let count = file.read_at(&mut buffer, self.offset).on("read", from)?;
            if count == 0 {
                return Err(Error::DataLoss(format!("{} ends at {} of {bytes} bytes", from.display(), self.offset)));
            }
            self.append(&buffer[..count])?;
        }
        Ok(())
    }

    /// Drops everything that has been written.
    pub(super) fn truncate(&mut self) -> Result<()> {
        self.data.set_len(0).on("truncate", &self.folder.join("data"))?;
        self.hasher = Hasher::new(self.hasher.algorithm());
        (self.offset, self.begun) = (0, 0);
        Ok(())
    }

    /// The digest of what has been written.
    pub(super) fn digest(&self) -> Digest {
        self.hasher.digest()
    }

    /// The digest by another algorithm, for which all is read again.
    pub(super) fn digest_by(&self, algorithm: Algorithm) -> Result<Digest> {
        if algorithm == self.hasher.algorithm() {
            return Ok(self.digest());
        }
        let mut hasher = Hasher::new(algorithm);
        hash(&self.data, &mut hasher).on("read", &self.folder.join("data"))?;
        Ok(hasher.digest())
    }

    /// Brings what has been written to the disk.
    pub(super) fn sync(&self) -> Result<()> {
        let path = self.folder.join("data");
        self.cut()?;
        let length = self.data.metadata().on("look at", &path)?.len();
        if length < self.offset {
            return Err(Error::DataLoss(format!("{} has {length} of {} bytes", path.display(), self.offset)));
        }
        self.data.sync_all().on("write", &path)
    }

    /// Cuts off what a write that failed has left beyond what was acknowledged.
    fn cut(&self) -> Result<()> {
        let path = self.folder.join("data");
        let length = self.data.metadata().on("look at", &path)?.len();
        if length > self.offset { self.data.set_len(self.offset).on("truncate", &path) } else { Ok(()) }
    }

    /// Records the time of the last write, for the process that resumes it.
    pub(super) fn close(self) -> Result<()> {
        self.cut()?;
        write(&self.folder.join("updatedat"), &self.updated.to_string())
    }
}

fn start(folder: &Path, name: &str, total: u64, algorithm: Algorithm) -> Result<Ingest> {
    let made = start_in(folder, name, total, algorithm);
    if made.is_err() {
        // on a full disk; the first error is the one that counts
        let _ = remove(folder);
    }
    made
}

fn start_in(folder: &Path, name: &str, total: u64, algorithm: Algorithm) -> Result<Ingest> {
    DirBuilder::new().mode(0o755).create(folder).on("make folder", folder)?;
    let started = crate::timestamp::now();
    write(&folder.join("ref"), name)?;
    write(&folder.join("startedat"), &started.to_string())?;
    write(&folder.join("updatedat"), &started.to_string())?;
    if total > 0 {
        write(&folder.join("total"), &total.to_string())?;
    }
    let path = folder.join("data");
    let data = OpenOptions::new().read(true).write(true).create_new(true).mode(0o644).open(&path).on("make", &path)?;
    Ok(Ingest { folder: folder.to_owned(), data, hasher: Hasher::new(algorithm), started, updated: started, offset: 0, total, begun: 0 })
}

fn hash(data: &File, hasher: &mut Hasher) -> io::Result<u64> {
    let (mut buffer, mut offset) = (vec![0; BUFFER_BYTES], 0);
    loop {
        let count = data.read_at(&mut buffer, offset)?;
        if count == 0 {
            return Ok(offset);
        }
        hasher.update(&buffer[..count]);
        offset += count as u64;
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    let file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o644).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).on("write", path)
}

/// A small text file; none if it is not there, or no such file.
fn read(path: &Path) -> Result<Option<String>> {
    let opened = OpenOptions::new().read(true).custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK).open(path);
    let file = match opened {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
        file => file.on("open", path)?,
    };
    let mut bytes = Vec::new();
    file.take(TEXT_BYTES).read_to_end(&mut bytes).on("read", path)?;
    Ok(String::from_utf8(bytes).ok().filter(|text| !text.is_empty()))
}

/// Removes a file or folder, if it is there.
pub(super) fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(about) if about.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.on("remove", path),
    }
}

/// When a file was changed last.
pub(super) fn age_of(path: &Path) -> Option<std::time::Duration> {
    let changed = fs::symlink_metadata(path).ok()?.modified().ok()?;
    SystemTime::now().duration_since(changed).ok()
}

/// What is written to the disk at once, while more comes.
const WRITEBACK_BYTES: u64 = 2 << 20;
/// The largest blob whose space is freed as fast as it is renamed.
pub(super) const SMALL_BYTES: u64 = 128 << 10;
/// What is hashed at once.
const BUFFER_BYTES: usize = 256 << 10;
/// The longest text of an ingest: a reference with its namespace.
const TEXT_BYTES: u64 = 8192;
