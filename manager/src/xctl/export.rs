//! `export`: images as one archive, that `xctl import`, `ctr images import`, `docker load` and OCI tools read.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use clap::Args;
use containerd_client::types::Descriptor;
use serde_json::{Value, json};

use crate::archive::Writer;
use crate::client::Client;
use crate::error::{Error, IoContext as _, Result};
use crate::{content, image};

/// Arguments of `export`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ExportArgs {
    /// Archive to write; - for standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Images
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

/// Writes an archive. A file that is not complete is removed again.
pub(crate) async fn run(client: &Client, args: ExportArgs) -> Result<u8> {
    if args.output.as_os_str() == "-" {
        if rustix::termios::isatty(io::stdout()) {
            return Err(Error::refused("an archive is not written to a terminal; name a file with --output"));
        }
        export(client, &args.images, BufWriter::new(io::stdout())).await?;
        return Ok(0);
    }
    let file = File::create_new(&args.output).on("create", &args.output)?;
    let exported = export(client, &args.images, BufWriter::new(file)).await;
    if exported.is_err() {
        // what is there is of no use
        let _ = std::fs::remove_file(&args.output);
    }
    exported.map(|()| 0)
}

async fn export(client: &Client, images: &[String], out: impl Write) -> Result<()> {
    let name = "the archive";
    let mut archive = Writer::new(out);
    archive.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#).on("write", name)?;
    archive.folder("blobs").on("write", name)?;
    archive.folder("blobs/sha256").on("write", name)?;
    let (mut written, mut index, mut saved) = (HashSet::new(), Vec::new(), Vec::new());
    for text in images {
        let image = image::get(client, text).await?;
        let target = image.target.clone().ok_or_else(|| Error::unreadable(format!("image {}", image.name), "it has no target"))?;
        let manifest = image::manifest(client, &image.name, &target.digest).await?;
        tree(client, &image.name, &target, &mut archive, &mut written).await?;
        for layer in manifest.layers.iter().map(|layer| &layer.digest).chain([&manifest.digest, &manifest.configuration_digest]) {
            if !written.contains(layer) {
                return Err(incomplete(&image.name, layer));
            }
        }
        let tag = image.name.rsplit_once(':').map_or("", |(_, tag)| tag);
        index.push(json!({
            "mediaType": target.media_type, "digest": target.digest, "size": target.size,
            "annotations": { "io.containerd.image.name": image.name, "org.opencontainers.image.ref.name": tag },
        }));
        let blob = |digest: &str| format!("blobs/{}", digest.replacen(':', "/", 1));
        saved.push(json!({
            "Config": blob(&manifest.configuration_digest),
            "RepoTags": [image.name.strip_prefix("docker.io/library/").unwrap_or(&image.name)],
            "Layers": manifest.layers.iter().map(|layer| blob(&layer.digest)).collect::<Vec<_>>(),
        }));
    }
    let index = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": index });
    archive.file("index.json", index.to_string().as_bytes()).on("write", name)?;
    archive.file("manifest.json", Value::from(saved).to_string().as_bytes()).on("write", name)?;
    archive.finish().on("write", name)
}

fn incomplete(name: &str, digest: &str) -> Error {
    Error::refused(format!("image {name} is incomplete: the store does not have {digest}; pull it again"))
}

/// Writes what an image leads to. Of an index, what the store does not have is left out: it is for other machines.
async fn tree<W: Write>(
    client: &Client,
    name: &str,
    target: &Descriptor,
    archive: &mut Writer<W>,
    written: &mut HashSet<String>,
) -> Result<()> {
    let mut stack = vec![(target.digest.clone(), target.media_type.clone(), true)];
    while let Some((digest, media_type, is_needed)) = stack.pop() {
        let Some(info) = content::info(client, &digest).await? else {
            if is_needed {
                return Err(incomplete(name, &digest));
            }
            continue;
        };
        if !written.insert(digest.clone()) {
            continue;
        }
        let what = format!("blob {digest} of image {name}");
        let size = u64::try_from(info.size).map_err(|error| Error::unreadable(&what, error))?;
        if !content::is_digest(&digest) {
            return Err(Error::unreadable(what, "its digest is not one of SHA-256"));
        }
        let is_index = media_type.contains("manifest.list") || media_type.contains("image.index");
        if is_index || media_type.contains("manifest") {
            let bytes = content::read(client, &what, &digest).await?;
            let node: Value = serde_json::from_slice(&bytes).map_err(|error| Error::unreadable(&what, error))?;
            let children = ["manifests", "layers"].iter().filter_map(|key| node[key].as_array()).flatten().chain(node.get("config"));
            for child in children {
                let text = |key: &str| child[key].as_str().unwrap_or_default().to_owned();
                stack.push((text("digest"), text("mediaType"), is_needed && !is_index));
            }
        }
        archive.begin(&format!("blobs/{}", digest.replacen(':', "/", 1)), size).on("write", "the archive")?;
        let mut length = 0;
        content::copy(client, &what, &digest, |part| {
            length += part.len() as u64;
            archive.part(part).on("write", "the archive")
        })
        .await?;
        if length != size {
            return Err(Error::unreadable(what, format!("it has {length} bytes, and {size} by the store")));
        }
        archive.end(size).on("write", "the archive")?;
    }
    Ok(())
}
