//! Importing: images from an archive, as `docker save` and OCI tools write them.
//!
//! ```text
//! files of the archive ─▶ content, each when it comes ─▶ index.json, or an index made of manifest.json ─▶ unpacked ─▶ named
//! ```
//! **Invariants:** a blob that its name says is of a digest is of that digest. No name is given to an image of which something is missing.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use containerd_client::events::ContentCreate;
use log::debug;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};

use super::Transfers;
use super::ahead::Connection;
use super::archive::{self, Incoming, Part, Parts};
use super::document::{DOCUMENT_BYTES, Descriptor};
use super::ingest::{Ended, Ingesting};
use super::lease::{Lease, Place};
use super::names::Wanted;
use super::progress::{Progress, word};
use super::tree::{Selection, Tree};
use crate::content::{Digest, Opening};
use crate::error::{Error, Result};
use crate::name::Namespace;

/// What to import.
#[derive(Debug)]
pub(crate) struct Import<'a> {
    pub(crate) place: Place,
    /// Of the archive.
    pub(crate) contents: &'a Contents,
    pub(crate) wanted: Wanted,
    /// Whether layers of `docker save` are compressed that are not.
    pub(crate) compresses: bool,
    pub(crate) progress: Progress,
}

/// A file of an archive that is content now.
#[derive(Debug, Clone)]
pub(crate) struct File {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    /// Its first bytes.
    pub(crate) magic: Vec<u8>,
}

/// Everything that an archive has.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    pub(crate) files: HashMap<String, File>,
    pub(crate) links: HashMap<String, String>,
    /// Those that are read as a whole.
    pub(crate) documents: HashMap<String, Vec<u8>>,
    /// If layers are unpacked while the archive comes.
    pub(crate) early: Option<Early>,
}

/// Unpacking that has begun before the images are known. It ends when this is dropped.
#[derive(Debug, Clone)]
pub(crate) struct Early {
    connection: Connection,
    _goes_on: watch::Sender<()>,
}

impl Contents {
    fn connection(&self) -> Option<Connection> {
        self.early.as_ref().map(|early| early.connection.clone())
    }

    /// A file, perhaps by another name.
    pub(super) fn find(&self, path: &str) -> Option<&File> {
        let mut path = archive::clean(path.as_bytes())?;
        for _ in 0..MOST_LINKS {
            match self.links.get(&path) {
                Some(target) => path.clone_from(target),
                None => break,
            }
        }
        self.files.get(&path)
    }

    fn add(&mut self, done: Option<Result<Result<(String, File)>, JoinError>>) -> Result<()> {
        let Some(done) = done else { return Ok(()) };
        let (path, file) = done.unwrap_or_else(|source| Err(Error::Panicked { what: "an import", source }))?;
        self.files.insert(path, file);
        Ok(())
    }
}

impl Transfers {
    /// Makes content of the files of an archive as they arrive. When another process takes over meanwhile, they become content there.
    pub(crate) async fn receive(
        self: &Arc<Self>,
        lease: &Lease,
        namespace: &Namespace,
        bytes: Incoming,
        wanted: &Wanted,
        progress: &Progress,
    ) -> Result<Contents> {
        progress.overall("Importing".to_owned());
        let parts = Parts::read(self.archives.clone(), bytes);
        let (goes_on, connection) = watch::channel(());
        let early = self.begins_early(namespace, lease.id(), wanted, connection).map(|connection| Early { connection, _goes_on: goes_on });
        self.take(namespace, lease.id(), parts, early, progress).await
    }

    /// Imports what an archive had, and returns the names of its images. When the caller leaves, the import ends, and the collector removes what
    /// has come.
    pub(crate) async fn import(self: &Arc<Self>, lease: &Lease, import: Import<'_>) -> Result<Vec<String>> {
        let Import { place, contents, wanted, compresses, progress } = import;
        let namespace = &place.namespace;
        let index = self.index(namespace, lease.id(), contents, compresses).await?;
        // what an archive does not have of all platforms was not saved
        let skips_missing = wanted.selection.platforms.are_all();
        let selection = Selection { skips_missing, ..wanted.selection.clone() };
        let found = |part: &Descriptor, parents: &[String]| progress.waits(part, parents);
        let tree = Tree::follow(&self.stored(namespace), &index, &selection, found).await?;
        let entries = self.entries(namespace, &index).await?;
        let has = |entry: &&Descriptor| {
            let is_there = |digest: &Digest| tree.nodes.iter().any(|node| node.descriptor.digest == *digest);
            tree.manifests.iter().any(|manifest| manifest.top == entry.digest) || !entry.kind().is_document() && is_there(&entry.digest)
        };
        let present: Vec<_> = entries.iter().filter(has).collect();
        if present.is_empty() {
            return Err(Error::Invalid(format!("the archive has nothing for {}", selection.platforms)));
        }
        let plans = self.plan(namespace, &tree, &wanted).await?;
        if contents.early.is_some() {
            self.finish_early(namespace, lease.id(), &plans, &progress).await;
        }
        let remote = self.begin_remote(namespace, lease.id(), &plans, "").await?;
        self.unpack(namespace, lease.id(), plans, false, &progress).await?;
        self.finish_remote(remote, false, &progress).await?;
        let mut images = wanted.whole(&index);
        images.extend(present.iter().flat_map(|entry| wanted.imported(entry)));
        if images.is_empty() {
            images.extend(present.iter().flat_map(|entry| wanted.by_digest(entry)));
        }
        if images.is_empty() {
            return Err(Error::Invalid("no image of the archive has a name that begins as it should".to_owned()));
        }
        let mut seen = HashSet::new();
        let names: Vec<_> = images.iter().map(|image| image.name.clone()).filter(|name| seen.insert(name.clone())).collect();
        let targets: Vec<_> = images.iter().map(|image| (image.name.clone(), image.target.clone())).collect();
        self.record(namespace, &tree, None, images, place.lease.as_deref()).await?;
        debug!(images = names.len(), blobs = tree.nodes.len(); "archive imported");
        for (name, target) in targets {
            if let Ok(target) = Descriptor::from_wire(&target.unwrap_or_default()) {
                progress.image(word::SAVED, &name, &target);
            }
        }
        progress.overall("Completed import".to_owned());
        Ok(names)
    }

    /// Makes content of an archive's files as they come.
    async fn take(
        self: &Arc<Self>,
        namespace: &Namespace,
        lease: &str,
        mut parts: Parts,
        early: Option<Early>,
        progress: &Progress,
    ) -> Result<Contents> {
        let mut contents = Contents { early, ..Contents::default() };
        let mut commits: JoinSet<Result<(String, File)>> = JoinSet::new();
        while let Some(part) = parts.next().await? {
            let (path, size) = match part {
                Part::File { path, size } => (path, size),
                Part::Link { path, target } => {
                    contents.links.insert(path, target);
                    continue;
                }
                Part::Bytes(_) | Part::End(_) => continue,
            };
            if contents.files.len() + contents.links.len() + commits.len() >= MOST_FILES {
                return Err(Error::Invalid(format!("the archive has more than {MOST_FILES} files")));
            }
            match Use::of(&path) {
                Use::None => {}
                Use::Document if size > DOCUMENT_BYTES => {
                    return Err(Error::Invalid(format!("{path} of the archive has {size} bytes; it may have {DOCUMENT_BYTES} at most")));
                }
                Use::Document => {
                    let mut document = Vec::new();
                    while let Some(bytes) = parts.bytes().await? {
                        document.extend_from_slice(&bytes);
                    }
                    contents.documents.insert(path, document);
                }
                Use::Blob(expected) => {
                    let unnamed = || format!("import-{lease}-{}", contents.files.len() + commits.len());
                    let opening = Opening {
                        namespace: namespace.clone(),
                        reference: expected.as_ref().map_or_else(unnamed, |digest| format!("import-{digest}")),
                        total: size,
                        expected,
                        lease: Some(lease.to_owned()),
                    };
                    let (writer, magic) = self.write(&opening, &mut parts, &path, progress).await?;
                    commits.spawn(Arc::clone(self).commit(opening, path, writer, magic, contents.connection()));
                    if commits.len() > COMMITS {
                        contents.add(commits.join_next().await)?;
                    }
                }
            }
        }
        while let Some(done) = commits.join_next().await {
            contents.add(Some(done))?;
        }
        Ok(contents)
    }

    /// Writes a file as it comes, unless the store has it. Returns its writer, if there is something to commit, and its first bytes.
    async fn write(
        self: &Arc<Self>,
        opening: &Opening,
        parts: &mut Parts,
        path: &str,
        progress: &Progress,
    ) -> Result<(Option<Ingesting>, Vec<u8>)> {
        let size = opening.total;
        let mut writer = self.ingest(opening).await?;
        let mut is_needed = false;
        if let Some(writer) = &mut writer {
            let has = writer.offset();
            // another namespace may have all of it, or an import that was killed; that may also have left as many other bytes
            is_needed = has != size || opening.expected.as_ref() != Some(writer.digest());
            if is_needed && has > 0 {
                // what another import has left
                writer.truncate().await?;
            }
        }
        // clients shorten what ends with a digest
        let shown = opening.expected.as_ref().map_or_else(|| path.to_owned(), |digest| format!("blob-{digest}"));
        let (mut magic, mut done) = (Vec::new(), 0);
        while let Some(bytes) = parts.bytes().await? {
            magic.extend_from_slice(&bytes[..bytes.len().min(MAGIC_BYTES - magic.len())]);
            done += bytes.len() as u64;
            if let Some(writer) = writer.as_mut().filter(|_| is_needed) {
                writer.write(bytes).await?;
            }
            if size >= WORTH_SHOWING_BYTES {
                progress.named(word::IMPORTING, &shown, done, size);
            }
        }
        if done != size {
            return Err(Error::Invalid(format!("the archive ends within {path}")));
        }
        if size >= WORTH_SHOWING_BYTES {
            progress.named(word::COMPLETE, &shown, size, size);
        }
        Ok((writer, magic))
    }

    /// Makes content of a file that has come; its disk is waited for while the next one comes.
    async fn commit(
        self: Arc<Self>,
        opening: Opening,
        path: String,
        writer: Option<Ingesting>,
        magic: Vec<u8>,
        early: Option<Connection>,
    ) -> Result<(String, File)> {
        let Opening { namespace, total: size, expected, lease, .. } = opening;
        let seen = |digest: &Digest| {
            if early.is_some() {
                self.ahead.seen(&namespace, lease.as_deref(), early.as_ref(), digest);
            }
        };
        let Some(writer) = writer else {
            let digest = expected.ok_or_else(|| Error::Invalid(format!("{path} of the archive has no digest")))?;
            seen(&digest);
            return Ok((path, File { digest, size, magic }));
        };
        let digest = match expected {
            Some(expected) => expected,
            None => writer.digest().clone(),
        };
        match writer.commit(size, &digest).await {
            Ok(Ended::Here) => {
                let event = ContentCreate { digest: digest.to_string(), size: i64::try_from(size).unwrap_or(i64::MAX) };
                self.events.publish(&namespace, "/content/create", &event);
            }
            Ok(Ended::There) | Err(Error::AlreadyExists(_)) => {}
            Err(Error::Precondition(why)) => return Err(Error::Invalid(format!("{path} of the archive: {why}"))),
            Err(error) => return Err(error),
        }
        seen(&digest);
        Ok((path, File { digest, size, magic }))
    }
}

/// What is done with a file of an archive.
#[derive(Debug, PartialEq, Eq)]
enum Use {
    /// It is read as a whole.
    Document,
    /// Content, of a digest if its name says so.
    Blob(Option<Digest>),
    /// What old versions of Docker read.
    None,
}

impl Use {
    fn of(path: &str) -> Self {
        if matches!(path, "oci-layout" | "index.json" | "manifest.json") {
            return Self::Document;
        }
        let (folder, name) = path.rsplit_once('/').unwrap_or_default();
        if path.is_empty() || path == "repositories" || (!folder.is_empty() && matches!(name, "VERSION" | "json")) {
            return Self::None;
        }
        let digest = folder.strip_prefix("blobs/").and_then(|algorithm| Digest::of(&format!("{algorithm}:{name}")));
        Self::Blob(digest)
    }
}

/// Files whose disk is waited for, beside the one that comes.
const COMMITS: usize = 4;
const MAGIC_BYTES: usize = 4;
const MOST_FILES: usize = 10_000;
/// Links to links.
const MOST_LINKS: usize = 8;
const WORTH_SHOWING_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::layers::testing::{Archive, is_root};
    use crate::settings::Settings;

    #[test]
    fn a_file_of_an_archive_is_used_by_its_name() {
        let digest = Digest::of_bytes(b"x");
        let path = format!("blobs/sha256/{}", digest.hex());
        assert_eq!(Use::of(&path), Use::Blob(Some(digest)));
        for (path, used) in [
            ("index.json", Use::Document),
            ("a/index.json", Use::Blob(None)),
            ("repositories", Use::None),
            ("0f/VERSION", Use::None),
            ("0f/json", Use::None),
            ("0f/layer.tar", Use::Blob(None)),
            ("0f.json", Use::Blob(None)),
            ("blobs/sha256/0f", Use::Blob(None)),
            ("", Use::None),
        ] {
            assert_eq!(Use::of(path), used, "{path}");
        }
    }

    #[test]
    fn links_are_followed_within_the_archive_and_not_for_ever() {
        let mut contents = Contents::default();
        let file = File { digest: Digest::of_bytes(b"x"), size: 1, magic: Vec::new() };
        contents.files.insert("a/layer.tar".to_owned(), file);
        for (path, target) in [("b/layer.tar", "a/layer.tar"), ("c", "b/layer.tar"), ("loop", "loop"), ("gone", "nothing")] {
            contents.links.insert(path.to_owned(), target.to_owned());
        }
        for (path, is_there) in
            [("./a/layer.tar", true), ("b/layer.tar", true), ("c", true), ("loop", false), ("gone", false), ("../c", false)]
        {
            assert_eq!(contents.find(path).is_some(), is_there, "{path}");
        }
    }

    #[tokio::test]
    async fn what_a_killed_import_has_left_is_written_again_unless_it_is_the_file() {
        if !is_root() {
            return;
        }
        let folder = scratch::Folder::new("import-left");
        let settings = Settings { root: folder.join("root"), state: folder.join("state"), ..Settings::default() };
        let parts = crate::parts::Parts::open(&settings).await.expect("a store");
        let (transfers, namespace) = (Arc::clone(&parts.transfers), Namespace::parse("n").expect("a name"));
        for left in ["wrong", "right", "rig", "too long"] {
            let text = format!("right {left}");
            let (file, left) = (text.as_bytes().to_vec(), text.replace("right", left));
            let digest = Digest::of_bytes(&file);
            let opening = Opening {
                namespace: namespace.clone(),
                reference: format!("import-{digest}"),
                total: 0,
                expected: Some(digest.clone()),
                lease: None,
            };
            let mut writer = transfers.content.write(opening).await.expect("a writer");
            writer.write(left.clone().into()).await.expect("written");
            writer.close().await.expect("closed");
            let place = Place { namespace: namespace.clone(), lease: None, begun: None };
            let lease = transfers.lease(&place).await.expect("a lease");
            let path = format!("blobs/sha256/{}", digest.hex());
            let (send, bytes) = mpsc::channel(1);
            send.send(Ok(Archive::default().file(&path, &file).end().into())).await.expect("room");
            drop(send);
            let received = transfers.receive(&lease, &namespace, bytes, &Wanted::default(), &Progress::default()).await;
            let contents = received.unwrap_or_else(|error| panic!("{left:?}: {}", error.chain()));
            assert_eq!(contents.files[&path].digest, digest, "{left:?}");
            let blob = transfers.content.read(&namespace, &digest).await.expect("content");
            assert_eq!(blob.blocking_read(0, 100).expect("bytes"), file);
            lease.end().await.expect("ended");
        }
    }
}
