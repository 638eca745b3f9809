//! Archives of images as streams: their files one after the other, in and out. A thread reads or writes the tar format.
//!
//! **Invariants:** an archive is never held as a whole. Names of files are keys, and no paths of the host. When one side ends, so does the other.

use std::io::{self, BufReader, Read};

use hyper::body::Bytes;
use tokio::sync::mpsc;

use crate::chunks::CHUNK_BYTES;
use crate::error::{Error, Result, chain};
use crate::layers::decode::Decoder;
use crate::layers::tar::{Kind, Limits, Reader, TarError};
use crate::pools::Pool;

/// What comes of an archive.
#[derive(Debug)]
pub(super) enum Part {
    /// A file begins, whose bytes follow.
    File { path: String, size: u64 },
    /// More of the file.
    Bytes(Bytes),
    /// Another name of a file. Both are clean.
    Link { path: String, target: String },
    /// There is no more: it is whole, or not.
    End(Result<()>),
}

/// Parts in their order.
#[derive(Debug)]
pub(super) struct Parts {
    parts: mpsc::Receiver<Part>,
    /// One that was looked at, and not taken.
    seen: Option<Part>,
}

impl Parts {
    /// Reads an archive in a pool's thread.
    pub(super) fn read(pool: Pool, bytes: Incoming) -> Self {
        let (send, parts) = mpsc::channel(PARTS);
        // it ends when one of the channels does
        tokio::spawn(async move { pool.run(move || blocking_read(bytes, &send)).await });
        Self { parts, seen: None }
    }

    /// The next file or link; none at the end. Bytes of the one before are passed over.
    pub(super) async fn next(&mut self) -> Result<Option<Part>> {
        while self.bytes().await?.is_some() {}
        Ok(self.seen.take())
    }

    /// The next bytes of a file; none at its end.
    pub(super) async fn bytes(&mut self) -> Result<Option<Bytes>> {
        if self.seen.is_some() {
            return Ok(None);
        }
        match self.parts.recv().await {
            Some(Part::Bytes(bytes)) => Ok(Some(bytes)),
            Some(Part::End(ended)) => ended.map(|()| None),
            None => Ok(None),
            seen => {
                self.seen = seen;
                Ok(None)
            }
        }
    }
}

/// Bytes of an archive as they arrive.
pub(crate) type Incoming = mpsc::Receiver<Result<Bytes>>;

/// Reads an archive, which may be compressed as a whole, and passes on what it has. Blocks.
fn blocking_read(bytes: Incoming, parts: &mpsc::Sender<Part>) {
    let mut source = Source { bytes, current: Bytes::new(), error: None };
    let read = read(&mut source, parts);
    // the sender's own error is the cause
    let ended = source.error.take().map_or(read, Err);
    // a receiver that has ended reports an error of its own
    let _ = parts.blocking_send(Part::End(ended));
}

fn read(source: &mut Source, parts: &mpsc::Sender<Part>) -> Result<()> {
    let decoder = Decoder::new(source).map_err(|error| Error::Invalid(format!("the archive cannot be read: {error}")))?;
    let limits = Limits { entries: MOST_ENTRIES, file_bytes: u64::MAX >> 1 };
    let mut reader = Reader::new(BufReader::with_capacity(CHUNK_BYTES, decoder), limits);
    let wrong = |error: TarError| Error::Invalid(format!("the archive cannot be read: {}", chain(&error)));
    while let Some(entry) = reader.next().map_err(wrong)? {
        let path = clean(&entry.path);
        let part = match (entry.kind, path) {
            (Kind::File { size }, path) => {
                let path = path.unwrap_or_default();
                let holes = || Error::Invalid(format!("{path:?} of the archive is stored with holes"));
                if parts.blocking_send(Part::File { path: path.clone(), size }).is_err() {
                    return Ok(());
                }
                let (mut passed, mut chunk) = (0, Vec::new());
                while let Some((offset, data)) = reader.data().map_err(wrong)? {
                    if offset != passed {
                        return Err(holes());
                    }
                    passed += data.len() as u64;
                    // clients send small pieces, and each chunk goes through several threads
                    if !chunk.is_empty() && chunk.len() + data.len() > CHUNK_BYTES && !send(parts, &mut chunk) {
                        return Ok(());
                    }
                    if chunk.capacity() == 0 {
                        let left = usize::try_from(size.saturating_sub(passed)).unwrap_or(usize::MAX).saturating_add(data.len());
                        chunk.reserve_exact(left.min(CHUNK_BYTES).max(data.len()));
                    }
                    chunk.extend_from_slice(data);
                }
                if !chunk.is_empty() && !send(parts, &mut chunk) {
                    return Ok(());
                }
                if passed != size {
                    return Err(holes());
                }
                continue;
            }
            (Kind::Symlink { target }, Some(path)) => {
                let target = relative(&path, &target).ok_or_else(|| outside(&path, &target))?;
                Part::Link { path, target }
            }
            (Kind::HardLink { target }, Some(path)) => {
                let target = clean(&target).ok_or_else(|| outside(&path, &target))?;
                Part::Link { path, target }
            }
            _ => continue,
        };
        if parts.blocking_send(part).is_err() {
            return Ok(());
        }
    }
    reader.drain().map_err(wrong).map(drop)
}

/// Passes a chunk on. False if its receiver has ended.
fn send(parts: &mpsc::Sender<Part>, chunk: &mut Vec<u8>) -> bool {
    parts.blocking_send(Part::Bytes(std::mem::take(chunk).into())).is_ok()
}

fn outside(path: &str, target: &[u8]) -> Error {
    let target: String = String::from_utf8_lossy(target).chars().take(100).collect();
    Error::Invalid(format!("{path:?} of the archive is a link to {target:?}, which leads out of it"))
}

/// A name without `.` and `..`; none if it leads out of the archive, is no text, or longer than any that is needed: all names are kept.
pub(super) fn clean(path: &[u8]) -> Option<String> {
    if path.len() > MOST_NAME_BYTES {
        return None;
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in std::str::from_utf8(path).ok()?.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// Where a symbolic link leads.
fn relative(path: &str, target: &[u8]) -> Option<String> {
    if target.starts_with(b"/") {
        return None;
    }
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    clean(&[folder.as_bytes(), b"/", target].concat())
}

/// Bytes as they come from another task.
struct Source {
    bytes: Incoming,
    current: Bytes,
    error: Option<Error>,
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.bytes.blocking_recv() {
                None => return Ok(0),
                Some(Ok(bytes)) => self.current = bytes,
                Some(Err(error)) => {
                    self.error = Some(error);
                    return Err(io::Error::other("its sender has failed"));
                }
            }
        }
        let count = self.current.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.current[..count]);
        self.current = self.current.slice(count..);
        Ok(count)
    }
}

/// On their way to where they are taken.
const PARTS: usize = 8;
/// As many as parts of the largest images, and their folders.
const MOST_ENTRIES: u64 = 50_000;
/// As long as a path may be.
const MOST_NAME_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::layers::tar::{Entry, Time, Writer};

    fn archive(entries: &[(&str, Kind, &[u8])]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        for (path, kind, data) in entries {
            let (path, kind) = (path.as_bytes().to_vec(), kind.clone());
            writer.begin(&Entry { path, kind, mode: 0o644, uid: 0, gid: 0, mtime: Time::default(), xattrs: Vec::new() }).expect("memory");
            writer.data(data).expect("memory");
        }
        writer.finish().expect("memory")
    }

    async fn parts(bytes: Vec<u8>) -> (Result<()>, Vec<String>) {
        let (send, incoming) = mpsc::channel(100);
        for chunk in bytes.chunks(1000) {
            send.send(Ok(Bytes::copy_from_slice(chunk))).await.expect("there is room");
        }
        drop(send);
        let mut parts = Parts::read(Pool::new("test", 1), incoming);
        let mut all = Vec::new();
        loop {
            match parts.next().await {
                Err(error) => return (Err(error), all),
                Ok(None) => return (Ok(()), all),
                Ok(Some(Part::File { path, size })) => {
                    let mut text = format!("{path} {size} ");
                    loop {
                        match parts.bytes().await {
                            Ok(Some(bytes)) => text.push_str(&String::from_utf8_lossy(&bytes)),
                            Ok(None) => break,
                            Err(error) => return (Err(error), all),
                        }
                    }
                    all.push(text);
                }
                Ok(Some(Part::Link { path, target })) => all.push(format!("{path} -> {target}")),
                Ok(Some(other)) => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn files_and_links_come_by_clean_names_from_plain_and_compressed_archives() {
        let link = |target: &str| Kind::Symlink { target: target.as_bytes().to_vec() };
        let plain = archive(&[
            ("./a/", Kind::Folder, b""),
            ("./a/../b", Kind::File { size: 3 }, b"abc"),
            ("a/l", link("../b"), b""),
            ("h", Kind::HardLink { target: b"./b".to_vec() }, b""),
            ("empty", Kind::File { size: 0 }, b""),
            // nothing needs it
            (&format!("{}x", "long/".repeat(1000)), Kind::File { size: 3 }, b"def"),
        ]);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).expect("memory");
        let zstd = zstd::encode_all(&plain[..], 1).expect("memory");
        for bytes in [plain, gzip.finish().expect("memory"), zstd] {
            let (read, parts) = parts(bytes).await;
            read.expect("it is whole");
            assert_eq!(parts, ["b 3 abc", "a/l -> b", "h -> b", "empty 0 ", " 3 def"]);
        }
    }

    #[tokio::test]
    async fn links_out_of_an_archive_and_broken_archives_are_refused() {
        for target in ["/etc/passwd", "../x", "../../x", "a/../../../x"] {
            let bytes = archive(&[("a/l", Kind::Symlink { target: target.as_bytes().to_vec() }, b"")]);
            let (read, _) = parts(bytes).await;
            assert_eq!(read.is_ok(), target == "../x", "{target}");
        }
        let mut cut = archive(&[("a", Kind::File { size: 2000 }, &[7; 2000])]);
        cut.truncate(1500);
        assert_eq!(parts(cut).await.0.expect_err("cut off").code(), tonic::Code::InvalidArgument);
        assert!(parts(b"no archive".repeat(200)).await.0.is_err());
    }

    #[tokio::test]
    async fn the_error_of_the_sender_is_the_one_that_is_reported() {
        let (send, incoming) = mpsc::channel(2);
        send.send(Ok(Bytes::from_static(b"x"))).await.expect("there is room");
        send.send(Err(Error::Exhausted("idle".to_owned()))).await.expect("there is room");
        let mut parts = Parts::read(Pool::new("test", 1), incoming);
        assert_eq!(parts.next().await.expect_err("it failed").to_string(), "idle");
    }
}
