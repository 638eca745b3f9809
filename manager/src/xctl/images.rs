//! `images`, `tag`, `rmi`: the names in the daemon's image store.

use std::collections::HashSet;

use clap::Args;
use containerd_client::services::v1::{CreateImageRequest, DeleteImageRequest, Image, ListImagesRequest, UpdateImageRequest};
use containerd_client::types::Descriptor;
use prost_types::FieldMask;
use serde::Serialize;
use serde_json::{Value, json};
use tonic::Code;

use crate::client::{Client, call};
use crate::error::{Error, Result};
use crate::output::{self, Format, Table};
use crate::{containers, content, image};

/// Arguments of `images`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ImagesArgs {
    /// Names alone
    #[arg(short, long)]
    quiet: bool,
}

/// Arguments of `tag`.
#[derive(Debug, Clone, Args)]
pub(crate) struct TagArgs {
    /// Give the name to this image even if another one has it
    #[arg(short, long)]
    force: bool,
    /// Image
    source: String,
    /// New names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// Arguments of `rmi`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RmiArgs {
    /// Names that containers were made from, too
    #[arg(short, long)]
    force: bool,
    /// Images
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    digest: String,
    media_type: String,
    /// Of the blobs for this machine; none if they are not all here.
    size_bytes: Option<u64>,
    created_at: Option<String>,
    updated_at: Option<String>,
    #[serde(skip)]
    age: String,
}

/// Lists images.
pub(crate) async fn list(client: &Client, format: Format, args: ImagesArgs) -> Result<u8> {
    let mut rows = Vec::new();
    for image in all(client).await? {
        let target = image.target.clone().unwrap_or_default();
        // an image whose content is not all here is listed all the same
        let manifest = if args.quiet { None } else { image::manifest(client, &image.name, &target.digest).await.ok() };
        rows.push(Row {
            name: image.name,
            digest: target.digest,
            media_type: target.media_type,
            size_bytes: manifest.map(|manifest| manifest.layers.iter().map(|layer| u64::try_from(layer.size).unwrap_or(0)).sum()),
            created_at: output::timestamp(image.created_at.as_ref()),
            updated_at: output::timestamp(image.updated_at.as_ref()),
            age: output::age(image.updated_at.as_ref()),
        });
    }
    rows.sort_by(|one, other| one.name.cmp(&other.name));
    if args.quiet {
        let names: String = rows.iter().map(|row| format!("{}\n", row.name)).collect();
        return output::print(&names).map(|()| 0);
    }
    output::print_list(format, &rows, |rows| {
        let mut table = Table::new(&["IMAGE", "DIGEST", "SIZE", "AGE"]);
        for row in rows {
            let size = row.size_bytes.map_or_else(|| "incomplete".to_owned(), output::size);
            table.row(vec![row.name.clone(), output::shorten(&row.digest, 20), size, row.age.clone()]);
        }
        table
    })?;
    Ok(0)
}

/// All of the namespace.
pub(crate) async fn all(client: &Client) -> Result<Vec<Image>> {
    let request = client.request(ListImagesRequest { filters: Vec::new() });
    Ok(call("list images", client.images().list(request)).await?.images)
}

/// Gives an image more names.
pub(crate) async fn tag(client: &Client, args: TagArgs) -> Result<u8> {
    let source = image::get(client, &args.source).await?;
    let target = source.target.ok_or_else(|| Error::unreadable(format!("image {}", source.name), "it has no target"))?;
    for name in &args.names {
        let name = image::full_name(name);
        set(client, &name, target.clone(), args.force).await?;
        output::print(&format!("{name}\n"))?;
    }
    Ok(0)
}

/// Names an image. Another image loses the name only with `replaces`.
pub(crate) async fn set(client: &Client, name: &str, target: Descriptor, replaces: bool) -> Result<()> {
    let image = Image { name: name.to_owned(), target: Some(target.clone()), ..Image::default() };
    let request = client.request(CreateImageRequest { image: Some(image.clone()), source_date_epoch: None });
    match call(format!("create image {name}"), client.images().create(request)).await {
        Err(error) if error.code() == Some(Code::AlreadyExists) => {}
        created => return created.map(drop),
    }
    let before = image::get(client, name).await?;
    if before.target.as_ref().is_some_and(|before| before.digest == target.digest) {
        return Ok(());
    }
    if !replaces {
        return Err(Error::refused(format!(
            "the name {name} is another image's; --force gives it to this one, `xctl rmi {name}` removes that"
        )));
    }
    let mask = FieldMask { paths: vec!["target".to_owned()] };
    let request = client.request(UpdateImageRequest { image: Some(image), update_mask: Some(mask), source_date_epoch: None });
    call(format!("update image {name}"), client.images().update(request)).await.map(drop)
}

/// Removes a name, at once.
pub(crate) async fn unname(client: &Client, name: &str) -> Result<()> {
    let request = client.request(DeleteImageRequest { name: name.to_owned(), sync: false, target: None });
    call(format!("remove image {name}"), client.images().delete(request)).await.map(drop)
}

/// Removes names of images; what no name and no container needs any more, the daemon collects.
pub(crate) async fn remove(client: &Client, args: RmiArgs) -> Result<u8> {
    let used: HashSet<String> = containers::list(client).await?.into_iter().map(|container| container.image).collect();
    let mut failed = 0;
    for text in &args.images {
        let removed = async {
            let image = image::get(client, text).await?;
            if used.contains(&image.name) && !args.force {
                return Err(Error::refused(format!(
                    "image {} is in use by a container, which keeps its own snapshot; `xctl ps --all` lists it, --force removes the image",
                    image.name
                )));
            }
            // the answer waits until what is not needed is gone
            let request = client.request(DeleteImageRequest { name: image.name.clone(), sync: true, target: None });
            call(format!("remove image {}", image.name), client.images().delete(request)).await?;
            Ok(image.name)
        };
        match removed.await {
            Ok(name) => output::print(&format!("{name}\n"))?,
            Err(error) => {
                failed = 1;
                eprintln!("xctl: {}", error.chain());
            }
        }
    }
    Ok(failed)
}

/// Everything that is known of an image, as JSON.
pub(crate) async fn inspect(client: &Client, text: &str) -> Result<Value> {
    let image = image::get(client, text).await?;
    let target = image.target.clone().unwrap_or_default();
    let manifest = image::manifest(client, &image.name, &target.digest).await?;
    let mut layers = Vec::new();
    for layer in &manifest.layers {
        let here = content::info(client, &layer.digest).await?.is_some();
        layers.push(json!({ "digest": layer.digest, "media_type": layer.media_type, "size_bytes": layer.size, "stored": here }));
    }
    Ok(json!({
        "name": image.name,
        "namespace": client.namespace(),
        "target": { "digest": target.digest, "media_type": target.media_type, "size_bytes": target.size },
        "manifest": manifest.digest,
        "layers": layers,
        "labels": image.labels,
        "created_at": output::timestamp(image.created_at.as_ref()),
        "updated_at": output::timestamp(image.updated_at.as_ref()),
        "configuration": serde_json::to_value(&manifest.configuration).unwrap_or_default(),
    }))
}
