//! Files of a container's root file system, opened so that no link leads out of it: the container's owner chose its content.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Error, IoContext as _, Result};

/// The text of the file at `path` in the root file system `root`; none if there is no such file.
///
/// Errors: if it is no regular file, is longer than a MiB, or is no UTF-8.
pub(crate) fn read_text(root: &Path, path: &str) -> Result<Option<String>> {
    let shown = root.join(path.trim_start_matches('/'));
    let folder = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).on("open", root)?;
    // not blocked by a fifo, and no terminal becomes ours
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = match rustix::fs::openat2(&folder, path, flags, Mode::empty(), resolve) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(error) => return Err(error).on("open", shown),
    };
    let about = rustix::fs::fstat(&file).on("look at", &shown)?;
    if FileType::from_raw_mode(about.st_mode) != FileType::RegularFile {
        return Err(Error::unreadable(shown.display().to_string(), "it is not a regular file"));
    }
    let mut text = String::new();
    File::from(file).take(LONGEST + 1).read_to_string(&mut text).on("read", &shown)?;
    if text.len() as u64 > LONGEST {
        return Err(Error::unreadable(shown.display().to_string(), "it is longer than 1 MiB"));
    }
    Ok(Some(text))
}

/// More than any list of users needs.
const LONGEST: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_end_in_the_root_and_only_files_are_read() {
        let folder = scratch::Folder::new("xctl-open");
        let root = folder.join("root");
        fs::create_dir_all(root.join("etc")).expect("a folder");
        fs::write(root.join("etc/real"), "inside").expect("a file");
        fs::write(folder.join("real"), "outside").expect("a file");
        symlink("/etc/real", root.join("etc/absolute")).expect("a link");
        symlink("../../../../../../real", root.join("etc/up")).expect("a link");
        symlink("/proc/self/root", root.join("etc/magic")).expect("a link");
        let read = |path| read_text(&root, path);
        assert_eq!(read("/etc/real").expect("read"), Some("inside".to_owned()));
        assert_eq!(read("/etc/absolute").expect("read"), Some("inside".to_owned()));
        for missing in ["/etc/up", "/etc/magic/real", "/etc/none", "/etc/real/x"] {
            assert_eq!(read(missing).expect(missing), None, "{missing}");
        }
        assert!(read("/etc").is_err());
        fs::write(root.join("etc/long"), vec![b'x'; (1 << 20) + 1]).expect("a file");
        assert!(read("/etc/long").expect_err("too long").chain().contains("longer"));
    }
}
