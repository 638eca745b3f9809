//! `pull` and `push`: the daemon talks to the registry, by its transfer service, and reports progress.
//!
//! ```text
//!  Transfer ─────────────▶ answered at the end
//!  Streaming, progress ──▶ what each part is at
//!  Streaming, auth     ──▶ the registry asks for a name and a secret, which only this xctl knows
//! ```

use std::io::Read as _;
use std::path::PathBuf;

use clap::Args;
use containerd_client::services::v1::{StreamInit, TransferOptions, TransferRequest};
use containerd_client::to_any;
use containerd_client::types::Platform;
use containerd_client::types::transfer::{
    AuthRequest, AuthResponse, AuthType, ImageStore, OciRegistry, Progress as Event, RegistryResolver, UnpackConfiguration,
};
use prost::Message as _;
use prost_types::Any;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::client::{Client, call, call_within};
use crate::error::{Error, IoContext as _, Result};
use crate::progress::Progress;
use crate::{create, image, output};

/// How a registry is spoken to.
#[derive(Debug, Clone, Args)]
struct Registry {
    /// User name at the registry; the password is read from standard input, or from the variable XCTL_PASSWORD
    #[arg(short, long, value_name = "NAME")]
    user: Option<String>,
    /// Speak HTTP without TLS
    #[arg(long)]
    plain_http: bool,
    /// Folder with a hosts.toml for each registry, on the daemon's host
    #[arg(long, value_name = "FOLDER")]
    hosts_dir: Option<PathBuf>,
}

/// Arguments of `pull`.
#[derive(Debug, Clone, Args)]
pub(crate) struct PullArgs {
    #[command(flatten)]
    registry: Registry,
    /// Snapshotter to unpack the image in
    #[arg(long, value_name = "NAME", default_value = "overlayfs")]
    snapshotter: String,
    /// Image
    image: String,
}

/// Arguments of `push`.
#[derive(Debug, Clone, Args)]
pub(crate) struct PushArgs {
    #[command(flatten)]
    registry: Registry,
    /// Image in the store
    image: String,
    /// Name at the registry [default: the image's]
    destination: Option<String>,
}

/// Fetches an image, and unpacks it.
pub(crate) async fn pull(client: &Client, args: PullArgs) -> Result<u8> {
    let name = image::full_name(&args.image);
    let platform = Platform { os: "linux".to_owned(), architecture: oci_spec::image::Arch::default().to_string(), ..Platform::default() };
    let store = ImageStore {
        name: name.clone(),
        platforms: vec![platform.clone()],
        unpacks: vec![UnpackConfiguration { platform: Some(platform), snapshotter: args.snapshotter.clone() }],
        ..ImageStore::default()
    };
    let (registry, secret) = registry(client, &name, &args.registry).await?;
    transfer(client, format!("pull {name}"), to_any(&registry), to_any(&store), secret).await?;
    output::print(&format!("{name}\n"))?;
    Ok(0)
}

/// Sends an image.
pub(crate) async fn push(client: &Client, args: PushArgs) -> Result<u8> {
    let image = image::get(client, &args.image).await?;
    let name = args.destination.as_deref().map_or_else(|| image.name.clone(), image::full_name);
    let store = ImageStore { name: image.name, ..ImageStore::default() };
    let (registry, secret) = registry(client, &name, &args.registry).await?;
    transfer(client, format!("push {name}"), to_any(&store), to_any(&registry), secret).await?;
    output::print(&format!("{name}\n"))?;
    Ok(0)
}

/// A stream on which the daemon asks for a secret, and the answer.
struct Secret {
    stream: Streaming<Any>,
    requests: mpsc::Sender<Any>,
    answer: AuthResponse,
}

async fn registry(client: &Client, name: &str, args: &Registry) -> Result<(OciRegistry, Option<Secret>)> {
    let mut resolver = RegistryResolver::default();
    if args.plain_http {
        resolver.default_scheme = "http".to_owned();
    }
    if let Some(folder) = &args.hosts_dir {
        resolver.host_dir = folder.to_string_lossy().into_owned();
    }
    let mut secret = None;
    if let Some(user) = &args.user {
        let answer = AuthResponse {
            auth_type: AuthType::Credentials.into(),
            username: user.clone(),
            secret: password()?,
            ..AuthResponse::default()
        };
        let (id, requests, stream) = open_stream(client).await?;
        resolver.auth_stream = id;
        secret = Some(Secret { stream, requests, answer });
    }
    Ok((OciRegistry { reference: name.to_owned(), resolver: Some(resolver) }, secret))
}

/// Never on the command line, where every user of the host could read it.
fn password() -> Result<String> {
    if let Ok(password) = std::env::var("XCTL_PASSWORD") {
        return Ok(password);
    }
    let mut text = String::new();
    std::io::stdin().lock().take(LONGEST_SECRET).read_to_string(&mut text).on("read the password from", "standard input")?;
    let text = text.trim_end_matches(['\r', '\n']).to_owned();
    if text.is_empty() {
        Err(Error::refused("--user needs a password: on standard input, or in the variable XCTL_PASSWORD"))
    } else {
        Ok(text)
    }
}

/// Opens a stream under a new name, which the daemon knows when this returns.
async fn open_stream(client: &Client) -> Result<(String, mpsc::Sender<Any>, Streaming<Any>)> {
    let id = format!("xctl-{}", create::random()?);
    let (requests, receiver) = mpsc::channel(4);
    let doing = "open a stream to the daemon";
    let lost = || Error::unreadable("a stream of the daemon", "it has ended");
    requests.send(to_any(&StreamInit { id: id.clone() })).await.map_err(|_| lost())?;
    let opened = call(doing, client.api().streaming().stream(client.request(ReceiverStream::new(receiver)))).await;
    let mut stream = opened.map_err(unserved)?;
    match tokio::time::timeout(OPENED, stream.message()).await {
        Ok(Ok(Some(_ready))) => Ok((id, requests, stream)),
        Ok(Ok(None)) => Err(lost()),
        Ok(Err(status)) => Err(unserved(Error::Call { doing: doing.to_owned(), status })),
        Err(_elapsed) => Err(Error::Late { doing: doing.to_owned(), limit: OPENED }),
    }
}

/// containerd before 1.7, and x-manager for now.
fn unserved(error: Error) -> Error {
    if error.code() != Some(Code::Unimplemented) {
        return error;
    }
    Error::refused(
        "this daemon has no transfer service, which containerd has since 1.7: it cannot pull or push by itself; \
         fetch the image elsewhere, and read it with `xctl import`",
    )
}

async fn transfer(client: &Client, doing: String, source: Any, destination: Any, secret: Option<Secret>) -> Result<()> {
    let (id, _requests, mut events) = open_stream(client).await?;
    let options = TransferOptions { progress_stream: id };
    let request = TransferRequest { source: Some(source), destination: Some(destination), options: Some(options) };
    let mut service = client.api().transfer();
    let transferred = call_within(TRANSFERRED, doing, service.transfer(client.request(request)));
    tokio::pin!(transferred);
    let answering = answer(secret);
    tokio::pin!(answering);
    let mut progress = Progress::new();
    let (mut has_events, mut is_asked) = (true, true);
    loop {
        tokio::select! {
            result = &mut transferred => {
                // the terminal first: a message is for people
                progress.finish();
                return result.map_err(unserved);
            }
            event = events.message(), if has_events => match event {
                Ok(Some(any)) => if let Ok(event) = Event::decode(any.value.as_slice()) { progress.take(&event) },
                // the transfer goes on without its progress
                Ok(None) | Err(_) => has_events = false,
            },
            () = &mut answering, if is_asked => is_asked = false,
        }
    }
}

/// Answers each question of the registry's.
async fn answer(secret: Option<Secret>) {
    let Some(mut secret) = secret else { return };
    while let Ok(Some(any)) = secret.stream.message().await {
        if AuthRequest::decode(any.value.as_slice()).is_err() || secret.requests.send(to_any(&secret.answer)).await.is_err() {
            return;
        }
    }
}

const OPENED: std::time::Duration = std::time::Duration::from_secs(30);
/// An image may have many gigabytes, and a registry be slow.
const TRANSFERRED: std::time::Duration = std::time::Duration::from_secs(24 * 3600);
const LONGEST_SECRET: u64 = 64 << 10;
