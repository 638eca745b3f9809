//! What unit tests share: temporary folders, cgroups, inputs of parsers, and waiting for what other processes do.
//!
//! A folder is removed with its owner. Those of a test that was killed are removed when the next one makes its first folder: their owner
//! holds a lock while it lives.

pub mod cgroups;
pub mod corpus;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use std::{env, process};

/// Waits for what another process or the kernel does, for a minute at most.
///
/// Panics: when it is not true by then.
pub fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_true() {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What the names of all such folders begin with.
const PREFIX: &str = "x-unit-test-";

/// A temporary folder, removed with its owner.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    /// Makes an empty folder, with `name` in its own, so that it is known what left it.
    ///
    /// Panics: when it cannot be made.
    pub fn new(name: &str) -> Self {
        static SWEEP: Once = Once::new();
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        SWEEP.call_once(|| remove_left(&env::temp_dir()));
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let path = env::temp_dir().join(format!("{PREFIX}{}-{number}-{name}", process::id()));
            match fs::create_dir(&path) {
                Ok(()) => {}
                // a process of another pid namespace has that number too
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                Err(error) => panic!("make {}: {error}", path.display()),
            }
            // another process may take it for left before it is locked, and remove it
            let Ok(lock) = File::open(&path) else { continue };
            lock.lock().expect("a folder can be locked");
            if path.exists() {
                return Self { path, _lock: lock };
            }
        }
    }
}

impl Deref for Folder {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

impl AsRef<Path> for Folder {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // what is left is removed by the next test
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes the folders in `folder` whose owners were killed.
fn remove_left(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        if let Ok(lock) = File::open(entry.path())
            && lock.try_lock().is_ok()
        {
            // another test may remove it at the same time
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_killed_tests_are_removed_and_those_in_use_are_not() {
        let outer = Folder::new("sweep");
        let [left, used, other] =
            [format!("{PREFIX}1-0-left"), format!("{PREFIX}1-1-used"), "other".to_owned()].map(|name| outer.join(name));
        for path in [&left, &used, &other] {
            fs::create_dir_all(path.join("full")).expect("a folder");
        }
        let lock = File::open(&used).expect("it is there");
        lock.lock().expect("it is free");
        remove_left(&outer);
        assert_eq!([&left, &used, &other].map(|path| path.exists()), [false, true, true]);
        drop(lock);
        remove_left(&outer);
        assert!(!used.exists());
    }

    #[test]
    fn a_folder_is_removed_with_its_owner() {
        let folder = Folder::new("owned");
        let path = folder.to_owned();
        fs::write(folder.join("file"), "").expect("a file");
        assert!(path.exists());
        drop(folder);
        assert!(!path.exists());
    }
}
