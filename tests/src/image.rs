//! Images whose layers a test knows file by file: what a client uploads, and what the folder of each snapshot must hold then.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::dice::Dice;
use crate::registry::Registry;

/// What a name in a layer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A folder, with its mode.
    Folder(u32),
    /// A file, with its mode and bytes.
    File(u32, Vec<u8>),
    /// A symbolic link.
    Link(String),
    /// A name that lower layers have, and this one removes.
    Removed,
}

/// A layer.
#[derive(Debug)]
pub struct Layer {
    /// An archive that is not compressed: its digest is also its diff ID.
    pub archive: Vec<u8>,
    /// Of the archive.
    pub digest: String,
    /// By path; a folder comes before what is in it.
    pub nodes: BTreeMap<String, Node>,
}

/// An image.
#[derive(Debug, Clone)]
pub struct Image {
    /// As clients name it.
    pub name: String,
    /// The lowest first.
    pub layers: Vec<Arc<Layer>>,
    /// Bytes of its configuration.
    pub config: Vec<u8>,
    /// Bytes of its manifest, which is its target.
    pub manifest: Vec<u8>,
}

/// The digest of bytes, as content is named by it.
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

impl Layer {
    /// A layer of some `files`, of 1 B to 128 KiB each and one of 1 MiB, in folders; the same for the same dice. Number 0 is the lowest, and has a
    /// file that each of the others up to 9 removes.
    pub fn random(dice: &mut Dice, number: u64, files: u64) -> Self {
        let mut nodes = BTreeMap::new();
        for file in 0..files {
            let folder = format!("d{}", dice.below(4));
            nodes.entry(folder.clone()).or_insert(Node::Folder(0o755));
            let magnitude = 4 + dice.below(14);
            let bytes = if file == 0 { 1 << 20 } else { 1 + dice.below(1 << magnitude) };
            let mode = if dice.below(8) == 0 { 0o4755 } else { 0o644 };
            let data = dice.bytes(usize::try_from(bytes).expect("it is small"));
            nodes.insert(format!("{folder}/f{file}-{}", dice.below(1000)), Node::File(mode, data));
        }
        nodes.insert("d0".to_owned(), Node::Folder(0o750));
        nodes.insert("d0/empty".to_owned(), Node::File(0o600, Vec::new()));
        nodes.insert("link".to_owned(), Node::Link(format!("d0/{}", dice.below(1000))));
        match number {
            0 => nodes.extend((1..10).map(|other| (format!("removed-{other}"), Node::File(0o644, vec![b'r'; 10])))),
            _ => drop(nodes.insert(format!("removed-{number}"), Node::Removed)),
        }
        Self::of(nodes)
    }

    /// A layer with these nodes.
    pub fn of(nodes: BTreeMap<String, Node>) -> Self {
        let mut archive = Vec::new();
        for (path, node) in &nodes {
            append(&mut archive, path, node);
        }
        archive.extend([0; 1024]);
        Self { digest: digest(&archive), archive, nodes }
    }

    /// How the folder of a snapshot differs from this layer, if it does.
    pub fn differs(&self, tree: &Path) -> Option<String> {
        match found(tree) {
            Err(error) => Some(format!("{}: {error}", tree.display())),
            Ok(found) => self.nodes.iter().find_map(|(path, node)| differs(path, node, found.get(path))).or_else(|| {
                let foreign = found.keys().find(|path| !self.nodes.contains_key(*path))?;
                Some(format!("{foreign} is not of the layer"))
            }),
        }
        .map(|difference| format!("{}: {difference}", tree.display()))
    }
}

fn differs(path: &str, node: &Node, found: Option<&Node>) -> Option<String> {
    match (node, found) {
        (_, None) => Some(format!("{path} is missing")),
        (node, Some(found)) if node == found => None,
        (Node::File(_, expected), Some(Node::File(_, bytes))) if bytes.len() != expected.len() => {
            Some(format!("{path} has {} bytes instead of {}", bytes.len(), expected.len()))
        }
        (Node::File(expected, bytes), Some(Node::File(mode, found))) if bytes == found => {
            Some(format!("{path} has mode {mode:o} instead of {expected:o}"))
        }
        (Node::File(..), Some(Node::File(_, bytes))) => {
            Some(format!("{path} has other bytes{}", if bytes.iter().all(|byte| *byte == 0) { ": zeros" } else { "" }))
        }
        _ => Some(format!("{path} is something else")),
    }
}

/// What is in the folder of a snapshot.
fn found(tree: &Path) -> io::Result<BTreeMap<String, Node>> {
    let (mut all, mut folders) = (BTreeMap::new(), vec![String::new()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(tree.join(&folder))? {
            let path = entry?.path();
            let about = fs::symlink_metadata(&path)?;
            let name = path.strip_prefix(tree).expect("it is in there").to_string_lossy().into_owned();
            let (kind, mode) = (about.file_type(), about.permissions().mode() & 0o7777);
            let node = if kind.is_dir() {
                folders.push(name.clone());
                Node::Folder(mode)
            } else if kind.is_symlink() {
                Node::Link(fs::read_link(&path)?.to_string_lossy().into_owned())
            } else if kind.is_char_device() && about.rdev() == 0 {
                Node::Removed
            } else {
                Node::File(mode, fs::read(&path)?)
            };
            all.insert(name, node);
        }
    }
    Ok(all)
}

/// Appends an entry as `ustar` has it, and as layers name what they remove.
fn append(archive: &mut Vec<u8>, path: &str, node: &Node) {
    let (kind, mode, data, link) = match node {
        Node::Folder(mode) => (b'5', *mode, &[][..], ""),
        Node::File(mode, data) => (b'0', *mode, &data[..], ""),
        Node::Link(target) => (b'2', 0o777, &[][..], target.as_str()),
        Node::Removed => (b'0', 0, &[][..], ""),
    };
    let name = match (node, path.rsplit_once('/')) {
        (Node::Removed, None) => format!(".wh.{path}"),
        (Node::Removed, Some((folder, name))) => format!("{folder}/.wh.{name}"),
        _ => path.to_owned(),
    };
    let mut header = [0_u8; 512];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, &name);
    put(100, &format!("{mode:07o}"));
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{:011o}", data.len()));
    put(136, "14700000000");
    put(148, "        ");
    put(157, link);
    put(257, "ustar");
    put(263, "00");
    header[156] = kind;
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    archive.extend(header);
    archive.extend(data);
    archive.resize(archive.len().next_multiple_of(512), 0);
}

impl Image {
    /// An image of these layers.
    pub fn new(name: &str, layers: &[Arc<Layer>]) -> Self {
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.digest.as_str()).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": { "Labels": { "name": name } },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        })
        .to_string();
        let described = |kind: &str, bytes: &[u8]| json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest(bytes), "size": bytes.len() });
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": described("config.v1+json", config.as_bytes()),
            "layers": layers.iter().map(|layer| described("layer.v1.tar", &layer.archive)).collect::<Vec<_>>(),
        })
        .to_string();
        Self { name: name.to_owned(), layers: layers.to_vec(), config: config.into_bytes(), manifest: manifest.into_bytes() }
    }

    /// Everything that a client uploads, with its digest.
    pub fn blobs(&self) -> impl Iterator<Item = (String, &[u8])> {
        let layers = self.layers.iter().map(|layer| (layer.digest.clone(), &layer.archive[..]));
        layers.chain([(digest(&self.config), &self.config[..]), (digest(&self.manifest), &self.manifest[..])])
    }

    /// The chain ID of each layer, under which clients keep its snapshot.
    pub fn chains(&self) -> Vec<String> {
        let mut chains: Vec<String> = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let chain = chains.last().map_or_else(|| layer.digest.clone(), |below| digest(format!("{below} {}", layer.digest).as_bytes()));
            chains.push(chain);
        }
        chains
    }

    /// Puts everything into a registry, which the image's name names.
    pub fn publish(&self, registry: &Registry) {
        let (repository, tag) = self.name.split_once('/').and_then(|(_host, name)| name.split_once(':')).unwrap_or_default();
        self.blobs().for_each(|(_, bytes)| drop(registry.put_blob(repository, bytes)));
        registry.put_manifest(repository, tag, MANIFEST, &self.manifest);
    }

    /// The image as an OCI layout in an archive, as clients import it.
    pub fn archive(&self) -> Vec<u8> {
        let index = json!({
            "schemaVersion": 2,
            "manifests": [{
                "mediaType": MANIFEST, "digest": digest(&self.manifest), "size": self.manifest.len(),
                "annotations": { "io.containerd.image.name": self.name, "org.opencontainers.image.ref.name": self.name },
            }],
        });
        let mut nodes = BTreeMap::new();
        let mut put = |path: String, data: &[u8]| nodes.insert(path, Node::File(0o644, data.to_vec()));
        put("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#);
        put("index.json".to_owned(), index.to_string().as_bytes());
        for (digest, data) in self.blobs() {
            put(format!("blobs/{}", digest.replace(':', "/")), data);
        }
        Layer::of(nodes).archive
    }
}

/// The media type of the target.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
