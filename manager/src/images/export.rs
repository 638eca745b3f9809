//! Exporting: images as one archive, an OCI layout that `docker load` reads too.
//!
//! ```text
//! oci-layout, index.json, manifest.json, blobs/sha256/…: what describes the archive comes first, so that a reader knows what it has
//! ```

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::{self, Write as _};

use hyper::body::Bytes;
use serde::Serialize;
use tokio::sync::mpsc;

use super::Transfers;
use super::document::{Descriptor, OCI_INDEX, RawDescriptor};
use super::index::LAYOUT_VERSION;
use super::lease::{Lease, Place};
use super::names::{IMAGE_NAME, REF_NAME, familiar, tag};
use super::platform::{Platform, Platforms};
use super::progress::{Progress, word};
use super::tree::{Selection, Tree};
use crate::chunks::{CHUNK_BYTES, Sink};
use crate::content::{Blob, Digest, Hasher};
use crate::error::{Error, Object, Result};
use crate::layers::tar::{Entry, Kind as File, Time, Writer};

/// What to export.
#[derive(Debug)]
pub(crate) struct Export {
    pub(crate) place: Place,
    /// In the store.
    pub(crate) names: Vec<String>,
    /// None for this machine's alone.
    pub(crate) platforms: Platforms,
    pub(crate) all_platforms: bool,
    /// Leaves out what `docker load` needs.
    pub(crate) skips_manifest_json: bool,
    /// Leaves out layers that must not be distributed.
    pub(crate) skips_non_distributable: bool,
    pub(crate) progress: Progress,
    /// Where the archive goes.
    pub(crate) bytes: mpsc::Sender<Bytes>,
}

/// A file of the archive.
enum Record {
    Small(String, Vec<u8>),
    Folder(String),
    Blob(Descriptor),
    /// Without it the archive is cut off.
    End,
}

/// The same, with what is read of it.
type Opened = (Record, Option<Blob>);

/// An image as `docker load` knows it.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Vec<String>,
    layers: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u8,
    media_type: &'static str,
    manifests: Vec<RawDescriptor>,
}

impl Transfers {
    /// Writes an archive. It ends with its caller, or with the receiver of its bytes.
    ///
    /// Errors: [`Error::Retired`] only before the first byte.
    pub(crate) async fn export(&self, lease: &Lease, export: Export) -> Result<()> {
        let Export { bytes, progress, .. } = &export;
        progress.overall("Exporting".to_owned());
        let records = self.records(lease, &export).await?;
        let (send, report) = (bytes.clone(), progress.clone());
        let (next, opened) = mpsc::channel(1);
        let write = self.archives.run(move || blocking_write(opened, send, &report));
        // one blob is open, and the next
        let open = async {
            let next = next;
            for record in records {
                let blob = match &record {
                    Record::Blob(part) => Some(self.content.read(&export.place.namespace, &part.digest).await?),
                    Record::Small(..) | Record::Folder(_) | Record::End => None,
                };
                if next.send((record, blob)).await.is_err() {
                    // the writer has failed, and reports why
                    return Ok(());
                }
            }
            Ok::<_, Error>(())
        };
        let (written, opened) = tokio::join!(write, open);
        opened?;
        written??;
        progress.overall("Completed export".to_owned());
        Ok(())
    }

    async fn records(&self, lease: &Lease, export: &Export) -> Result<Vec<Record>> {
        let namespace = &export.place.namespace;
        let platforms = match (export.all_platforms, export.platforms.are_all()) {
            (true, _) => Platforms::default(),
            (false, true) => Platforms::of([Platform::host()]),
            (false, false) => export.platforms.clone(),
        };
        let preferred = if export.platforms.are_all() { Platforms::of([Platform::host()]) } else { export.platforms.clone() };
        let selection = Selection { platforms: platforms.clone(), ..Selection::default() };
        let (mut tops, mut parts, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
        let mut saved: BTreeMap<String, Saved> = BTreeMap::new();
        if export.names.is_empty() {
            return Err(Error::Invalid("an image to export must be named".to_owned()));
        }
        for name in &export.names {
            let mut top = self.target(namespace, name).await?;
            lease.hold(&top.digest).await?;
            let missing = |error| match error {
                Error::NotFound(Object::ContentDigest(digest)) => Error::Precondition(format!(
                    "image {name} is incomplete: the store does not have {digest}; pull it again, for all platforms if all are exported"
                )),
                error => error,
            };
            let tree = Tree::follow(&self.stored(namespace), &top, &selection, |_, _| ()).await.map_err(missing)?;
            if tree.manifests.is_empty() && !platforms.are_all() {
                return Err(Error::Invalid(format!("image {name} has nothing for {platforms}")));
            }
            for node in &tree.nodes {
                let part = &node.descriptor;
                if export.skips_non_distributable && part.is_non_distributable() || !seen.insert(part.digest.clone()) {
                    continue;
                }
                let info = self.content.info(namespace, &part.digest).await.map_err(missing)?;
                // by its length here: a document may say anything
                parts.push(Descriptor { size: u64::try_from(info.size).unwrap_or_default(), ..part.clone() });
            }
            top.annotations.insert(IMAGE_NAME.to_owned(), name.clone());
            top.annotations.insert(REF_NAME.to_owned(), tag(name));
            tops.push(RawDescriptor::from(&top));
            // an artifact is nothing that Docker could load
            if let Some(manifest) = self.choose(namespace, &tree, &preferred).await.map_err(missing)?.first()
                && let Some(config) = &manifest.config
            {
                let new = || Saved {
                    config: path(&config.digest),
                    repo_tags: Vec::new(),
                    layers: manifest.layers.iter().map(|layer| path(&layer.digest)).collect(),
                };
                saved.entry(manifest.descriptor.digest.to_string()).or_insert_with(new).repo_tags.push(familiar(name));
            }
        }
        let mut records = vec![Record::Small("oci-layout".to_owned(), format!("{{\"imageLayoutVersion\":\"{LAYOUT_VERSION}\"}}").into())];
        let index = Index { schema_version: 2, media_type: OCI_INDEX, manifests: tops };
        records.push(Record::Small("index.json".to_owned(), json(&index)?));
        if !export.skips_manifest_json && !saved.is_empty() {
            records.push(Record::Small("manifest.json".to_owned(), json(&saved.into_values().collect::<Vec<_>>())?));
        }
        let algorithms: BTreeSet<_> = parts.iter().map(|part| part.digest.algorithm().name()).collect();
        records.push(Record::Folder("blobs/".to_owned()));
        records.extend(algorithms.into_iter().map(|algorithm| Record::Folder(format!("blobs/{algorithm}/"))));
        records.extend(parts.into_iter().map(Record::Blob));
        records.push(Record::End);
        Ok(records)
    }
}

/// Writes the archive; every blob is checked against its digest once more.
fn blocking_write(mut records: mpsc::Receiver<Opened>, send: mpsc::Sender<Bytes>, progress: &Progress) -> Result<()> {
    let lost = |error: io::Error| Error::Invalid(format!("the archive was not taken: {error}"));
    let mut archive = Writer::new(Sink::new(send));
    let entry = |path: &str, kind: File, mode: u32| Entry {
        path: path.as_bytes().to_vec(),
        kind,
        mode,
        uid: 0,
        gid: 0,
        mtime: Time::default(),
        xattrs: Vec::new(),
    };
    loop {
        match records.blocking_recv() {
            None => return Err(Error::Invalid("the archive was not completed".to_owned())),
            Some((Record::End, _)) => break,
            Some((Record::Folder(path), _)) => archive.begin(&entry(&path, File::Folder, 0o755)).map_err(lost)?,
            Some((Record::Small(path, bytes), _)) => {
                archive.begin(&entry(&path, File::File { size: bytes.len() as u64 }, 0o644)).map_err(lost)?;
                archive.data(&bytes).map_err(lost)?;
            }
            Some((Record::Blob(_), None)) => {}
            Some((Record::Blob(part), Some(blob))) => {
                archive.begin(&entry(&path(&part.digest), File::File { size: blob.size }, 0o444)).map_err(lost)?;
                let (mut hasher, mut offset) = (Hasher::new(part.digest.algorithm()), 0);
                while offset < blob.size {
                    let bytes = blob.blocking_read(offset, CHUNK_BYTES)?;
                    offset += bytes.len() as u64;
                    hasher.update(&bytes);
                    archive.data(&bytes).map_err(lost)?;
                    progress.part(word::EXPORTING, &part, offset);
                }
                if hasher.digest() != part.digest {
                    return Err(Error::DataLoss(format!("content {} is damaged", part.digest)));
                }
                progress.part(word::COMPLETE, &part, blob.size);
            }
        }
    }
    archive.finish().and_then(|mut sink| sink.flush()).map_err(lost)
}

/// Where an OCI layout has a blob.
fn path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

fn json<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Error::Invalid(format!("the index of the archive: {error}")))
}
