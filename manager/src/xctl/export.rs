//! `export`: images as one archive, that `xctl import`, `ctr images import`, `docker load` and OCI tools read. The daemon makes it.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use containerd_client::to_any;
use containerd_client::types::transfer::{Data, ImageExportStream, ImageReference, ImageStore, WindowUpdate};
use prost::Message as _;
use tokio::sync::watch;

use crate::client::Client;
use crate::error::{Error, IoContext as _, Result};
use crate::image;
use crate::transfer::{Beside, Opened, Transfer, open_stream};

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
        export(client, &args.images, Path::new("standard output"), Box::new(io::stdout())).await?;
        return Ok(0);
    }
    let file = match File::create_new(&args.output) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let path = args.output.display();
            return Err(Error::refused(format!("{path} exists and is not overwritten; remove it, or name another file with --output")));
        }
        created => created.on("create", &args.output)?,
    };
    let exported = export(client, &args.images, &args.output, Box::new(file)).await;
    if exported.is_err() {
        // what is there is of no use
        let _ = std::fs::remove_file(&args.output);
    }
    exported.map(|()| 0)
}

async fn export(client: &Client, images: &[String], shown: &Path, out: Box<dyn Write>) -> Result<()> {
    let mut names = Vec::new();
    for text in images {
        names.push(image::get(client, text).await?.name);
    }
    let doing = format!("export {}", names.join(", "));
    let mut names = names.into_iter();
    let store = ImageStore {
        name: names.next().unwrap_or_default(),
        extra_references: names.map(|name| ImageReference { name, ..ImageReference::default() }).collect(),
        ..ImageStore::default()
    };
    let opened = open_stream(client).await?;
    let platforms = vec![image::this_machine()];
    let stream = ImageExportStream { stream: opened.id.clone(), platforms, ..ImageExportStream::default() };
    let (answer, answered) = watch::channel(false);
    let bytes = Box::pin(receive(opened, shown.to_owned(), out, answered));
    let transfer = Transfer { doing, source: to_any(&store), destination: to_any(&stream) };
    transfer.run(client, Beside::AllBytes(bytes, answer)).await.map(drop)
}

/// Writes what comes. containerd 2.1 leaves the stream open at the end.
async fn receive(opened: Opened, shown: PathBuf, out: Box<dyn Write>, mut answered: watch::Receiver<bool>) -> Result<()> {
    let Opened { requests, mut stream, .. } = opened;
    // at the end of an archive two blocks are zeros
    let mut zeros = 0;
    let mut out = BufWriter::with_capacity(BUFFER, out);
    let mut window: i64 = 0;
    loop {
        if window < i64::from(WINDOW / 2) {
            // a daemon that has sent everything takes no more
            let _ = requests.send(to_any(&WindowUpdate { update: WINDOW })).await;
            window += i64::from(WINDOW);
        }
        let is_complete = zeros >= END;
        let over = async {
            // its sender is there as long as this is
            let _ = answered.wait_for(|answered| *answered).await;
            tokio::time::sleep(if is_complete { LAST_BYTES } else { LATE }).await;
        };
        let message = tokio::select! {
            message = stream.message() => message.map_err(|status| Error::Call { doing: "receive the archive".to_owned(), status })?,
            () = over => {
                if is_complete {
                    break;
                }
                return Err(Error::unreadable("the archive", "the daemon has not sent all of it"));
            }
        };
        let Some(message) = message else { break };
        let data = Data::decode(message.value.as_slice()).map_err(|error| Error::unreadable("the archive", error))?.data;
        window -= i64::try_from(data.len()).unwrap_or(i64::MAX);
        zeros = match data.iter().rposition(|byte| *byte != 0) {
            Some(last) => data.len() - 1 - last,
            None => zeros + data.len(),
        };
        out.write_all(&data).on("write", &shown)?;
    }
    out.flush().on("write", &shown)
}

const END: usize = 1024;
/// For bytes that are still on their way when the transfer is answered.
const LAST_BYTES: Duration = Duration::from_secs(1);
const LATE: Duration = Duration::from_secs(30);
/// What the daemon may send before the next update.
const WINDOW: i32 = 4 << 20;
const BUFFER: usize = 1 << 20;
