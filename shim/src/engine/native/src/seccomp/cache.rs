//! Compiled filters in files, since many containers have the same profile.
//!
//! ```text
//!  key: version, architecture, profile ── name of the file: its hash
//!  file: magic, hash of the rest, length of the key, key, filter as CBOR
//! ```
//! An entry contains its whole key, so profiles of equal hashes are told apart, and a hash of its content, so that a damaged one is not used.
//!
//! **Invariant:** an entry is used only if it is whole and for this very profile, and if no one but this user could have written it. Everything else, failures
//! included, is as if there were none: the cache never decides whether a container can be made.
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use oci_spec::runtime::LinuxSeccomp;

use crate::Refused;
use crate::plan::Filter;

/// Compiles a profile, or takes what it was compiled to before from `folder`, which is made if it is missing.
pub(crate) fn compile(profile: &LinuxSeccomp, folder: Option<&Path>) -> Result<Filter, Refused> {
    let entry = folder.and_then(|folder| Some((folder, key(profile)?)));
    let Some((folder, key)) = entry else { return super::compile(profile) };
    if let Some(filter) = read(folder, &key) {
        return Ok(filter);
    }
    let filter = super::compile(profile)?;
    // It is compiled again next time.
    let _ = write(folder, &key, &filter);
    Ok(filter)
}

/// What a filter depends on. `None` if the profile cannot be written as JSON.
fn key(profile: &LinuxSeccomp) -> Option<Vec<u8>> {
    let mut key = format!("{VERSION} {}\n", std::env::consts::ARCH).into_bytes();
    key.extend(serde_json::to_vec(profile).ok()?);
    Some(key)
}

/// An entry.
fn encode(key: &[u8], filter: &Filter) -> Option<Vec<u8>> {
    let mut content = (key.len() as u64).to_le_bytes().to_vec();
    content.extend(key);
    content.extend(minicbor::to_vec(filter).ok()?);
    Some([MAGIC, &hash(&content).to_le_bytes(), &content].concat())
}

/// The filter of an entry, if it is whole and has this key.
fn decode(entry: &[u8], key: &[u8]) -> Option<Filter> {
    let (expected, content) = entry.strip_prefix(MAGIC)?.split_first_chunk()?;
    if hash(content) != u64::from_le_bytes(*expected) {
        return None;
    }
    let (length, rest) = content.split_first_chunk()?;
    let (own, filter) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    if own != key {
        return None;
    }
    minicbor::decode(filter).ok()
}

fn read(folder: &Path, key: &[u8]) -> Option<Filter> {
    if !is_private(folder) {
        return None;
    }
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(folder.join(name(key))).ok()?;
    let mut entry = Vec::new();
    is_own(&file).then(|| file.take(MAX_BYTES).read_to_end(&mut entry).ok())??;
    decode(&entry, key)
}

/// Writes an entry under a temporary name and renames it, so that a reader finds a whole entry or none.
fn write(folder: &Path, key: &[u8], filter: &Filter) -> Option<()> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    if !fs::exists(folder).ok()? {
        DirBuilder::new().mode(0o700).create(folder).ok()?;
    }
    let entry = encode(key, filter).filter(|entry| (entry.len() as u64) < MAX_BYTES)?;
    if !is_private(folder) || fs::read_dir(folder).ok()?.count() >= MAX_ENTRIES {
        return None;
    }
    let new = folder.join(format!(".{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new);
    let written = file.and_then(|mut file| file.write_all(&entry)).and_then(|()| fs::rename(&new, folder.join(name(key))));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written.ok()
}

/// Whether only this user can put something there.
fn is_private(folder: &Path) -> bool {
    fs::symlink_metadata(folder)
        .is_ok_and(|about| about.is_dir() && about.uid() == nix::unistd::geteuid().as_raw() && about.mode() & 0o077 == 0)
}

fn is_own(file: &File) -> bool {
    file.metadata().is_ok_and(|about| about.is_file() && about.uid() == nix::unistd::geteuid().as_raw() && about.mode() & 0o022 == 0)
}

fn name(key: &[u8]) -> String {
    format!("{:016x}", hash(key))
}

/// FNV-1a: against damage and for names, not against anyone.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Of what the compiler makes of a profile: another one finds none of the entries. To be raised with every change of its output.
const VERSION: u32 = 1;

const MAGIC: &[u8] = b"x-engine filter\n";

/// More than the longest filter and a long profile have.
const MAX_BYTES: u64 = 1 << 20;

/// Profiles are few. Should they not be, the first ones stay.
const MAX_ENTRIES: usize = 256;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;

    fn profile(call: &str) -> LinuxSeccomp {
        let rule = json!({ "names": [call], "action": "SCMP_ACT_ERRNO" });
        serde_json::from_value(json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule] })).expect("a profile")
    }

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("x-engine-filters-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&folder);
            Self(folder)
        }

        fn entries(&self) -> Vec<PathBuf> {
            fs::read_dir(&self.0).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_filter_is_taken_from_its_entry() {
        let folder = Folder::new("taken");
        let compiled = compile(&profile("mkdir"), Some(&folder.0)).expect("accepted");
        assert_eq!(compiled, compile(&profile("mkdir"), None).expect("accepted"));
        let [entry] = &folder.entries()[..] else { panic!("{:?}", folder.entries()) };
        assert_eq!(fs::metadata(entry).expect("a file").mode() & 0o777, 0o600);
        // Another filter in the entry shows which one is used.
        let key = key(&profile("mkdir")).expect("a key");
        let other = compile(&profile("rmdir"), None).expect("accepted");
        fs::write(entry, encode(&key, &other).expect("an entry")).expect("written");
        assert_eq!(compile(&profile("mkdir"), Some(&folder.0)).expect("accepted"), other);
        compile(&profile("rmdir"), Some(&folder.0)).expect("accepted");
        assert_eq!(folder.entries().len(), 2);
    }

    #[test]
    fn no_damaged_entry_is_used() {
        let key = key(&profile("mkdir")).expect("a key");
        let filter = compile(&profile("mkdir"), None).expect("accepted");
        let entry = encode(&key, &filter).expect("an entry");
        assert_eq!(decode(&entry, &key), Some(filter.clone()));
        for at in 0..entry.len() {
            let mut damaged = entry.clone();
            damaged[at] ^= 1;
            assert_eq!(decode(&damaged, &key), None, "{at}");
            assert_eq!(decode(&entry[..at], &key), None, "{at}");
        }
        assert_eq!(decode(&[&entry[..], b"x"].concat(), &key), None);
        let folder = Folder::new("damaged");
        compile(&profile("mkdir"), Some(&folder.0)).expect("accepted");
        let [file] = &folder.entries()[..] else { panic!("{:?}", folder.entries()) };
        fs::write(file, &entry[..entry.len() - 1]).expect("written");
        assert_eq!(compile(&profile("mkdir"), Some(&folder.0)).expect("accepted"), filter);
        // And it is whole again.
        assert_eq!(fs::read(file).expect("a file"), entry);
    }

    #[test]
    fn an_entry_of_another_profile_or_version_is_not_used() {
        let (one, other) = (key(&profile("mkdir")).expect("a key"), key(&profile("rmdir")).expect("a key"));
        assert_ne!(name(&one), name(&other));
        let entry = encode(&one, &compile(&profile("mkdir"), None).expect("accepted")).expect("an entry");
        assert_eq!(decode(&entry, &other), None);
        assert!(one.starts_with(format!("{VERSION} {}\n", std::env::consts::ARCH).as_bytes()));
    }

    #[test]
    fn what_others_could_have_written_is_not_used() {
        let folder = Folder::new("others");
        compile(&profile("mkdir"), Some(&folder.0)).expect("accepted");
        let key = key(&profile("mkdir")).expect("a key");
        assert!(read(&folder.0, &key).is_some());
        let entry = folder.0.join(name(&key));
        fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o777)).expect("permissions");
        assert_eq!(read(&folder.0, &key), None);
        assert_eq!(write(&folder.0, &key, &compile(&profile("mkdir"), None).expect("accepted")), None);
        fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o700)).expect("permissions");
        fs::set_permissions(&entry, fs::Permissions::from_mode(0o666)).expect("permissions");
        assert_eq!(read(&folder.0, &key), None);
        let elsewhere = folder.0.join("elsewhere");
        fs::set_permissions(&entry, fs::Permissions::from_mode(0o600)).expect("permissions");
        fs::rename(&entry, &elsewhere).expect("renamed");
        std::os::unix::fs::symlink(&elsewhere, &entry).expect("a link");
        assert_eq!(read(&folder.0, &key), None);
    }

    #[test]
    fn a_cache_that_cannot_be_written_hinders_nothing() {
        let filter = compile(&profile("mkdir"), None).expect("accepted");
        for folder in ["/proc/not-there", "/dev/null", "/dev/null/x"] {
            assert_eq!(compile(&profile("mkdir"), Some(Path::new(folder))).expect("accepted"), filter);
        }
    }
}
