//! A file that grows: what a shim appends to it is printed as it comes.
//!
//! **Invariant:** waiting is for the kernel's word that the file has changed, not for a clock.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

use crate::error::{IoContext as _, Result};
use crate::output;

/// Where to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    /// With the first byte.
    Beginning,
    /// With this many lines before the end.
    Lines(usize),
    /// With what comes.
    End,
}

/// A file, and the position up to which it was printed.
#[derive(Debug)]
pub(crate) struct Follower {
    file: File,
    position: u64,
    path: std::path::PathBuf,
}

impl Follower {
    /// Opens the file.
    pub(crate) fn open(path: &Path, from: From) -> Result<Self> {
        let mut file = File::open(path).on("open", path)?;
        let length = file.metadata().on("look at", path)?.len();
        let position = match from {
            From::Beginning => 0,
            From::End => length,
            From::Lines(lines) => lines_from_end(&mut file, length, lines).on("read", path)?,
        };
        Ok(Self { file, position, path: path.to_owned() })
    }

    /// Prints what there is.
    pub(crate) fn print(&mut self) -> Result<()> {
        while self.print_some()? {}
        Ok(())
    }

    /// Prints a few MiB at most. True if there may be more.
    fn print_some(&mut self) -> Result<bool> {
        let length = self.file.metadata().on("look at", &self.path)?.len();
        // cut by a rotation, as with copytruncate
        if length < self.position {
            self.position = 0;
        }
        self.file.seek(SeekFrom::Start(self.position)).on("read", &self.path)?;
        let mut buffer = vec![0; 64 << 10];
        for _part in 0..PARTS {
            let count = self.file.read(&mut buffer).on("read", &self.path)?;
            if count == 0 {
                return Ok(false);
            }
            self.position += count as u64;
            output::print_bytes(&buffer[..count])?;
        }
        Ok(true)
    }

    /// Prints what comes, until `ended` is ready and nothing has come for a moment: a shim writes the last bytes after the exit of the process.
    pub(crate) async fn print_until<T>(&mut self, ended: impl Future<Output = T>) -> Result<T> {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        let watch: OwnedFd = inotify::init(flags).on("watch", &self.path)?;
        inotify::add_watch(&watch, &self.path, inotify::WatchFlags::MODIFY).on("watch", &self.path)?;
        let watch = crate::sys::ready::to_read(watch).on("watch", &self.path)?;
        tokio::pin!(ended);
        let mut result = None;
        loop {
            let has_more = self.print_some()?;
            tokio::select! {
                value = &mut ended, if result.is_none() => result = Some(value),
                () = tokio::task::yield_now(), if has_more => {}
                changed = changed(&watch) => changed.on("watch", &self.path)?,
                () = tokio::time::sleep(QUIET), if result.is_some() => {
                    self.print()?;
                    if let Some(value) = result {
                        return Ok(value);
                    }
                }
            }
        }
    }
}

/// Waits for a change, and takes all that are known.
async fn changed(watch: &AsyncFd<OwnedFd>) -> std::io::Result<()> {
    let mut ready = watch.readable().await?;
    let mut buffer = [0; 4096];
    loop {
        match rustix::io::read(watch.get_ref(), &mut buffer) {
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN) => break,
            Err(error) => return Err(error.into()),
        }
    }
    ready.clear_ready();
    Ok(())
}

/// Where the last `lines` lines begin; a file that does not end with a line break ends with a line all the same.
fn lines_from_end(file: &mut File, length: u64, lines: usize) -> std::io::Result<u64> {
    if lines == 0 {
        return Ok(length);
    }
    let mut buffer = vec![0; 64 << 10];
    let (mut end, mut found) = (length, 0);
    while end > 0 {
        let begin = end.saturating_sub(buffer.len() as u64);
        let part = &mut buffer[..usize::try_from(end - begin).unwrap_or(0)];
        file.seek(SeekFrom::Start(begin))?;
        file.read_exact(part)?;
        for (offset, byte) in part.iter().enumerate().rev() {
            let position = begin + offset as u64;
            if *byte == b'\n' && position + 1 != length {
                found += 1;
                if found == lines {
                    return Ok(position + 1);
                }
            }
        }
        end = begin;
    }
    Ok(0)
}

/// Of 64 KiB, before anything else has its turn.
const PARTS: usize = 64;
/// Longer than a shim takes to move what is in a pipe, shorter than people wait.
const QUIET: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_begin_where_they_do() {
        let folder = scratch::Folder::new("xctl-lines");
        let path = folder.join("log");
        for (text, lines, rest) in [
            ("a\nb\nc\n", 1, "c\n"),
            ("a\nb\nc", 1, "c"),
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc\n", 9, "a\nb\nc\n"),
            ("a\nb\nc\n", 0, ""),
            ("\n\n\n", 2, "\n\n"),
            ("", 3, ""),
        ] {
            std::fs::write(&path, text).expect("a file");
            let mut file = File::open(&path).expect("it is there");
            let begin = lines_from_end(&mut file, text.len() as u64, lines).expect("it is read");
            assert_eq!(&text[usize::try_from(begin).expect("short")..], rest, "{lines} of {text:?}");
        }
        let long = "x".repeat(100_000);
        std::fs::write(&path, format!("a\n{long}\nc\n")).expect("a file");
        let mut file = File::open(&path).expect("it is there");
        assert_eq!(lines_from_end(&mut file, 100_005, 2).expect("it is read"), 2);
    }
}
