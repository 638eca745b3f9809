//! `import`: images from an archive, as `docker save` and OCI tools write them.
//!
//! ```text
//!  oci-layout, index.json, blobs/…      names from annotations of the index
//!  manifest.json, configurations, layers  a manifest is made for each image
//! ```
//! Blobs are written, then named, then unpacked, under one lease: an import that is interrupted leaves nothing that stays.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::{Path, PathBuf};

use clap::Args;
use containerd_client::types::Descriptor;
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::archive::Archive;
use crate::client::Client;
use crate::error::{Error, IoContext as _, Result};
use crate::{content, create, image, images, output, unpack};

/// Arguments of `import`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ImportArgs {
    /// Name for the image, in the place of those in the archive
    #[arg(long = "as", value_name = "NAME")]
    name: Option<String>,
    /// Do not unpack the image: containers need it unpacked
    #[arg(long)]
    no_unpack: bool,
    /// Snapshotter to unpack it in
    #[arg(long, value_name = "NAME", default_value = "overlayfs")]
    snapshotter: String,
    /// Archive, not compressed as a whole; - for standard input
    file: PathBuf,
}

/// An image in an archive, whose blobs are written.
struct Found {
    names: Vec<String>,
    target: Descriptor,
}

/// Imports an archive, and prints the names of its images.
pub(crate) async fn run(client: &Client, args: ImportArgs) -> Result<u8> {
    let (shown, file) = open(&args.file)?;
    let mut archive = Archive::open(&shown, file)?;
    let lease = format!("xctl-{}", create::random()?);
    let leased = image::lease(client, &lease).await?;
    let imported = import(&leased, &args, &mut archive, &shown).await;
    // it expires by itself if this fails
    let _ = image::end_lease(client, &lease).await;
    for name in imported? {
        output::print(&format!("{name}\n"))?;
    }
    Ok(0)
}

/// Standard input is spooled: names are looked up, so that an archive is not read in its order.
fn open(path: &Path) -> Result<(PathBuf, File)> {
    if path != Path::new("-") {
        return Ok((path.to_owned(), File::open(path).on("open", path)?));
    }
    let shown = PathBuf::from("standard input");
    let folder = std::env::temp_dir();
    // without a name, so that nothing is left of it
    let flags = rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
    let mut file =
        File::from(rustix::fs::open(&folder, flags, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).on("make a file in", &folder)?);
    io::copy(&mut io::stdin().lock(), &mut file).on("read", &shown)?;
    file.rewind().on("read", &shown)?;
    Ok((shown, file))
}

async fn import(client: &Client, args: &ImportArgs, archive: &mut Archive, shown: &Path) -> Result<Vec<String>> {
    let found = if archive.has("oci-layout") && archive.has("index.json") {
        of_layout(client, archive).await?
    } else if archive.has("manifest.json") {
        of_docker(client, archive).await?
    } else {
        let why =
            "it has neither index.json nor manifest.json: it is no archive of images; a root file system is run with `xctl run --rootfs`";
        return Err(Error::unreadable(format!("the archive {}", shown.display()), why));
    };
    if args.name.is_some() && found.len() != 1 {
        return Err(Error::refused(format!("the archive has {} images, and --as names one", found.len())));
    }
    let mut names = Vec::new();
    for each in found {
        let own = args.name.as_ref().map(|name| vec![image::full_name(name)]).unwrap_or(each.names);
        if own.is_empty() {
            return Err(Error::refused(format!("image {} in the archive has no name; --as gives it one", each.target.digest)));
        }
        let manifest = image::manifest(client, &own[0], &each.target.digest).await?;
        if !args.no_unpack {
            unpack::unpack(client, &manifest, &args.snapshotter, |layer| eprintln!("unpacked {layer}")).await?;
        }
        for name in own {
            images::set(client, &name, each.target.clone(), true).await?;
            names.push(name);
        }
    }
    Ok(names)
}

/// An index, or a manifest, as far as it is looked at.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    #[serde(default)]
    manifests: Vec<Child>,
    config: Option<Child>,
    #[serde(default)]
    layers: Vec<Child>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Child {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: HashMap<String, String>,
}

impl Child {
    /// Where an OCI layout has it.
    ///
    /// Errors: a digest that is none could be any path.
    fn path(&self) -> Result<String> {
        if !content::is_digest(&self.digest) {
            return Err(Error::unreadable(
                format!("a descriptor of {:?}", output::printable(&self.digest)),
                "it is not a digest of SHA-256",
            ));
        }
        Ok(format!("blobs/sha256/{}", self.digest.trim_start_matches("sha256:")))
    }

    fn descriptor(&self) -> Descriptor {
        let (media_type, size) = (self.media_type.clone(), i64::try_from(self.size).unwrap_or(i64::MAX));
        Descriptor { media_type, digest: self.digest.clone(), size, ..Descriptor::default() }
    }
}

async fn of_layout(client: &Client, archive: &mut Archive) -> Result<Vec<Found>> {
    let index: Node = serde_json::from_slice(&archive.bytes("index.json")?).map_err(|error| Error::unreadable("index.json", error))?;
    let mut found: Vec<Found> = Vec::new();
    for child in index.manifests {
        write_tree(client, archive, &child).await?;
        let names = [NAME, REF_NAME].iter().filter_map(|key| child.annotations.get(*key)).take(1);
        // a tag alone is no name
        let names: Vec<_> = names.filter(|name| name.contains(['/', ':'])).map(|name| image::full_name(name)).collect();
        match found.iter_mut().find(|other| other.target.digest == child.digest) {
            Some(other) => other.names.extend(names),
            None => found.push(Found { names, target: child.descriptor() }),
        }
    }
    Ok(found)
}

/// Writes what a descriptor leads to, children first; those that the archive does not have are for other machines.
async fn write_tree(client: &Client, archive: &mut Archive, root: &Child) -> Result<()> {
    // each with whether its children were put before it
    let mut stack = vec![(root.clone(), false)];
    let mut written = 0_usize;
    while let Some((child, is_ready)) = stack.pop() {
        let path = child.path()?;
        if !archive.has(&path) {
            if child.digest == root.digest {
                return Err(Error::unreadable("the archive", format!("its index names {path}, which it does not have")));
            }
            continue;
        }
        let mut labels = HashMap::new();
        if child.media_type.contains("manifest") || child.media_type.contains("image.index") {
            let node: Node = serde_json::from_slice(&archive.bytes(&path)?).map_err(|error| Error::unreadable(&path, error))?;
            let children = node.manifests.iter().enumerate().map(|(index, child)| (format!("m.{index}"), child));
            let children = children.chain(node.config.iter().map(|child| ("config".to_owned(), child)));
            let children: Vec<_> =
                children.chain(node.layers.iter().enumerate().map(|(index, child)| (format!("l.{index}"), child))).collect();
            if !is_ready {
                let more: Vec<_> = children.iter().map(|(_, child)| ((*child).clone(), false)).collect();
                stack.push((child, true));
                stack.extend(more);
                continue;
            }
            for (key, child) in children {
                // what is not here is not kept
                if child.path().is_ok_and(|path| archive.has(&path)) {
                    labels.insert(format!("containerd.io/gc.ref.content.{key}"), child.digest.clone());
                }
            }
        }
        written += 1;
        if written > MOST_BLOBS || stack.len() > MOST_BLOBS {
            return Err(Error::unreadable("the archive", format!("an image of it has more than {MOST_BLOBS} blobs, or contains itself")));
        }
        let (mut source, size) = archive.file(&path)?;
        if size != child.size {
            return Err(Error::unreadable(&path, format!("it has {size} bytes, and {} by its descriptor", child.size)));
        }
        content::write(client, &child.digest, size, &mut source, labels).await?;
    }
    Ok(())
}

/// An entry of `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

async fn of_docker(client: &Client, archive: &mut Archive) -> Result<Vec<Found>> {
    let all: Vec<Saved> =
        serde_json::from_slice(&archive.bytes("manifest.json")?).map_err(|error| Error::unreadable("manifest.json", error))?;
    let mut found = Vec::new();
    for saved in all {
        let config = archive.bytes(&saved.config)?;
        let config_digest = format!("sha256:{}", content::hex(&Sha256::digest(&config)));
        content::write(client, &config_digest, config.len() as u64, &mut config.as_slice(), HashMap::new()).await?;
        let mut labels = HashMap::from([(format!("{REF}.config"), config_digest.clone())]);
        let mut layers = Vec::new();
        for (index, name) in saved.layers.iter().enumerate() {
            let (digest, size, media_type) = look_through(archive, name)?;
            let (mut source, _size) = archive.file(name)?;
            content::write(client, &digest, size, &mut source, HashMap::new()).await?;
            labels.insert(format!("{REF}.l.{index}"), digest.clone());
            layers.push(json!({ "mediaType": media_type, "digest": digest, "size": size }));
        }
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": { "mediaType": "application/vnd.docker.container.image.v1+json", "digest": config_digest, "size": config.len() },
            "layers": layers,
        });
        let bytes = serde_json::to_vec(&manifest).map_err(|error| Error::unreadable("the manifest that was made", error))?;
        let digest = format!("sha256:{}", content::hex(&Sha256::digest(&bytes)));
        content::write(client, &digest, bytes.len() as u64, &mut bytes.as_slice(), labels).await?;
        let names = saved.repo_tags.unwrap_or_default().iter().map(|name| image::full_name(name)).collect();
        let size = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
        found.push(Found { names, target: Descriptor { media_type: MANIFEST.to_owned(), digest, size, ..Descriptor::default() } });
    }
    Ok(found)
}

/// The digest of a layer, its length, and what it is.
fn look_through(archive: &mut Archive, name: &str) -> Result<(String, u64, &'static str)> {
    let (mut source, size) = archive.file(name)?;
    let (mut hash, mut buffer, mut magic) = (Sha256::new(), vec![0; 1 << 20], Vec::new());
    loop {
        let length = source.read(&mut buffer).on("read", name)?;
        if length == 0 {
            break;
        }
        if magic.len() < 4 {
            magic.extend_from_slice(&buffer[..length.min(4)]);
        }
        hash.update(&buffer[..length]);
    }
    let media_type = match magic.as_slice() {
        [0x1f, 0x8b, ..] => "application/vnd.docker.image.rootfs.diff.tar.gzip",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "application/vnd.docker.image.rootfs.diff.tar.zstd",
        _ => "application/vnd.docker.image.rootfs.diff.tar",
    };
    Ok((format!("sha256:{}", content::hex(&hash.finalize())), size, media_type))
}

/// A whole name, as containerd and docker write it.
const NAME: &str = "io.containerd.image.name";
/// A name, or a tag alone.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const REF: &str = "containerd.io/gc.ref.content";
const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const MOST_BLOBS: usize = 10_000;
