//! Atomic replacement of files: a reader finds the old content or the new one.
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Replaces or creates a file. After an error the old one is unchanged, and no temporary file is left.
pub(crate) fn blocking_replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(".new");
    let fresh = path.with_file_name(name);
    let write = || {
        OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&fresh)?.write_all(content)?;
        fs::rename(&fresh, path)
    };
    write().inspect_err(|_| {
        // It may not have been created.
        let _ = fs::remove_file(&fresh);
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole() {
        let folder = scratch::Folder::new("whole-file");
        let path = folder.join("name");
        for content in ["one", "", "three"] {
            blocking_replace(&path, content.as_bytes(), 0o600).expect("is written");
            assert_eq!(fs::read_to_string(&path).expect("is there"), content);
        }
        assert_eq!(fs::metadata(&path).expect("is there").mode() & 0o777, 0o600);
    }

    #[test]
    fn a_file_that_cannot_be_replaced_leaves_nothing_beside_it() {
        let folder = scratch::Folder::new("whole-file");
        let path = folder.join("name");
        fs::create_dir_all(path.join("in the way")).expect("is made");
        blocking_replace(&path, b"content", 0o600).expect_err("a folder is in the way");
        assert_eq!(fs::read_dir(&folder).expect("is there").count(), 1);
    }
}
