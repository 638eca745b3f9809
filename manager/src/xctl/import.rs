//! `import`: images from an archive, as `docker save` and OCI tools write them. The daemon reads it, from a stream of its bytes.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::Args;
use containerd_client::to_any;
use containerd_client::types::transfer::{
    Data, ImageImportStream, ImageReference, ImageStore, Progress as Event, UnpackConfiguration, WindowUpdate,
};
use prost::Message as _;
use tokio::sync::mpsc;

use crate::client::Client;
use crate::error::{Error, IoContext as _, Result};
use crate::transfer::{Beside, Opened, Transfer, open_stream};
use crate::{create, image, images, output};

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
    /// Archive, compressed or not; - for standard input
    file: PathBuf,
}

/// Imports an archive, and prints the names of its images.
pub(crate) async fn run(client: &Client, args: ImportArgs) -> Result<u8> {
    let names = match &args.name {
        None => import(client, &args, usual_names()).await?,
        Some(name) => vec![import_as(client, &args, &image::full_name(name)).await?],
    };
    for name in names {
        output::print(&format!("{name}\n"))?;
    }
    Ok(0)
}

/// The archive's names; where it has only a tag, or none, the day of the import is in the place of a name.
fn usual_names() -> ImageReference {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    let day = output::time(seconds, 0).chars().take(10).collect::<String>();
    ImageReference { name: format!("import-{day}"), is_prefix: true, allow_overwrite: true, add_digest: true, skip_named_digest: true }
}

/// Imports the only image of an archive under another name: first under one that no other image has.
async fn import_as(client: &Client, args: &ImportArgs, name: &str) -> Result<String> {
    let unique = format!("xctl-import-{}", create::random()?);
    let names = ImageReference { name: unique.clone(), is_prefix: true, add_digest: true, ..ImageReference::default() };
    // the lease holds the image until it has its name
    let lease = format!("xctl-{}", create::random()?);
    let leased = image::lease(client, &lease).await?;
    let named = async {
        import(&leased, args, names).await?;
        let imported: Vec<_> = images::all(client).await?.into_iter().filter(|image| image.name.starts_with(&unique)).collect();
        let mut targets: Vec<_> = imported.iter().filter_map(|image| image.target.clone()).collect();
        targets.dedup_by(|one, other| one.digest == other.digest);
        let named = match &targets[..] {
            [target] => images::set(&leased, name, target.clone(), true).await,
            targets => Err(Error::refused(format!("the archive has {} images, and --as names one", targets.len()))),
        };
        for image in imported {
            images::unname(client, &image.name).await?;
        }
        named
    }
    .await;
    // it expires by itself if this fails
    let _ = image::end_lease(client, &lease).await;
    named.map(|()| name.to_owned())
}

async fn import(client: &Client, args: &ImportArgs, names: ImageReference) -> Result<Vec<String>> {
    let shown = if args.file == Path::new("-") { PathBuf::from("standard input") } else { args.file.clone() };
    let (source, total): (Box<dyn Read + Send>, u64) = if args.file == Path::new("-") {
        (Box::new(io::stdin()), 0)
    } else {
        let file = File::open(&args.file).on("open", &args.file)?;
        let total = file.metadata().on("look at", &args.file)?.len();
        (Box::new(file), total)
    };
    let platform = image::this_machine();
    let unpack = UnpackConfiguration { platform: Some(platform.clone()), snapshotter: args.snapshotter.clone() };
    let store = ImageStore {
        platforms: vec![platform],
        extra_references: vec![names],
        unpacks: if args.no_unpack { Vec::new() } else { vec![unpack] },
        ..ImageStore::default()
    };
    let opened = open_stream(client).await?;
    let stream = ImageImportStream { stream: opened.id.clone(), ..ImageImportStream::default() };
    let (report, events) = mpsc::unbounded_channel();
    let bytes = Box::pin(send(opened, source, shown.clone(), total, report));
    let doing = format!("import {}", shown.display());
    let saved = Transfer { doing, source: to_any(&stream), destination: to_any(&store) }.run(client, Beside::Bytes(bytes, events)).await?;
    if saved.is_empty() {
        return Err(Error::refused(format!("no image in {} has a name; --as gives it one", shown.display())));
    }
    Ok(saved)
}

/// Sends bytes as far as the daemon takes them.
async fn send(
    opened: Opened,
    mut source: Box<dyn Read + Send>,
    shown: PathBuf,
    total: u64,
    report: mpsc::UnboundedSender<Event>,
) -> Result<()> {
    let Opened { requests, mut stream, .. } = opened;
    let (parts, mut read) = mpsc::channel::<io::Result<Vec<u8>>>(READ_AHEAD);
    // a thread: a pipe may have nothing for long
    std::thread::spawn(move || {
        loop {
            let mut part = vec![0; PART];
            let next = source.read(&mut part).map(|length| {
                part.truncate(length);
                part
            });
            let is_last = !next.as_ref().is_ok_and(|part| !part.is_empty());
            if parts.blocking_send(next).is_err() || is_last {
                return;
            }
        }
    });
    let (mut window, mut sent): (i64, u64) = (0, 0);
    while let Some(part) = read.recv().await {
        let mut part = part.on("read", &shown)?;
        if part.is_empty() {
            break;
        }
        while !part.is_empty() {
            while window <= 0 {
                match stream.message().await {
                    Ok(Some(update)) => {
                        window += WindowUpdate::decode(update.value.as_slice()).map_or(0, |update| i64::from(update.update.max(0)));
                    }
                    // the transfer has ended, and says why
                    Ok(None) | Err(_) => return Ok(()),
                }
            }
            let length = part.len().min(usize::try_from(window).unwrap_or(usize::MAX));
            let rest = part.split_off(length);
            window -= i64::try_from(length).unwrap_or(i64::MAX);
            sent += length as u64;
            if requests.send(to_any(&Data { data: part })).await.is_err() {
                return Ok(());
            }
            part = rest;
        }
        let number = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let (name, event) = (shown.display().to_string(), if sent == total { "sent" } else { "sending" }.to_owned());
        // what shows it may have ended
        let _ = report.send(Event { event, name, progress: number(sent), total: number(total), ..Event::default() });
    }
    // the end of the requests is the end of the archive
    drop(requests);
    while let Ok(Some(_update)) = stream.message().await {}
    Ok(())
}

/// As much as other clients send at once.
const PART: usize = 32 << 10;
const READ_AHEAD: usize = 16;
