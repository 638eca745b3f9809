//! Transfers: the daemon moves images, by its transfer service, and reports progress. `pull` and `push` are two of them.
//!
//! ```text
//!  Transfer ─────────────▶ answered at the end
//!  Streaming, progress ──▶ what each part is at
//!  Streaming, auth     ──▶ the registry asks for a name and a secret, which only this xctl knows
//!  Streaming, data     ──▶ bytes of an archive, which only this xctl can read or write
//! ```

use std::io::Read as _;
use std::path::PathBuf;
use std::pin::Pin;

use clap::Args;
use containerd_client::services::v1::{StreamInit, TransferOptions, TransferRequest};
use containerd_client::to_any;
use containerd_client::types::transfer::{
    AuthRequest, AuthResponse, AuthType, ImageStore, OciRegistry, Progress as Event, RegistryResolver, UnpackConfiguration,
};
use prost::Message as _;
use prost_types::Any;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::client::{Client, call, call_within};
use crate::error::{Error, IoContext as _, Result};
use crate::progress::Progress;
use crate::{create, image, output};

/// How a registry is spoken to.
#[derive(Debug, Clone, Default, Args)]
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

/// Fetches an image, unpacks it, and prints its name.
pub(crate) async fn pull(client: &Client, args: PullArgs) -> Result<u8> {
    let name = image::full_name(&args.image);
    fetch(client, &name, &args.snapshotter, &args.registry).await?;
    output::print(&format!("{name}\n"))?;
    Ok(0)
}

/// The same for a registry that needs no login, without a word on standard output.
pub(crate) async fn pull_for_run(client: &Client, name: &str, snapshotter: &str, plain_http: bool) -> Result<()> {
    fetch(client, name, snapshotter, &Registry { plain_http, ..Registry::default() }).await
}

async fn fetch(client: &Client, name: &str, snapshotter: &str, registry_args: &Registry) -> Result<()> {
    let platform = image::this_machine();
    let store = ImageStore {
        name: name.to_owned(),
        platforms: vec![platform.clone()],
        unpacks: vec![UnpackConfiguration { platform: Some(platform), snapshotter: snapshotter.to_owned() }],
        ..ImageStore::default()
    };
    let (registry, secret) = registry(client, name, registry_args).await?;
    let pull = Transfer { doing: format!("pull {name}"), source: to_any(&registry), destination: to_any(&store) };
    pull.run(client, Beside::Secret(secret)).await.map(drop)
}

/// Sends an image.
pub(crate) async fn push(client: &Client, args: PushArgs) -> Result<u8> {
    let image = image::get(client, &args.image).await?;
    let name = args.destination.as_deref().map_or_else(|| image.name.clone(), image::full_name);
    let store = ImageStore { name: image.name, ..ImageStore::default() };
    let (registry, secret) = registry(client, &name, &args.registry).await?;
    let push = Transfer { doing: format!("push {name}"), source: to_any(&store), destination: to_any(&registry) };
    push.run(client, Beside::Secret(secret)).await?;
    output::print(&format!("{name}\n"))?;
    Ok(0)
}

/// What a transfer moves.
#[derive(Debug)]
pub(crate) struct Transfer {
    /// For a message.
    pub(crate) doing: String,
    pub(crate) source: Any,
    pub(crate) destination: Any,
}

/// What goes on beside a transfer.
pub(crate) enum Beside {
    /// The daemon asks for a secret, if there is one.
    Secret(Option<Box<Secret>>),
    /// Bytes are sent until the transfer ends.
    Bytes(Pin<Box<dyn Future<Output = Result<()>>>>, mpsc::UnboundedReceiver<Event>),
    /// Bytes are received, to their end; the channel says when the transfer was answered.
    AllBytes(Pin<Box<dyn Future<Output = Result<()>>>>, watch::Sender<bool>),
}

/// A stream on which the daemon asks for a secret, and the answer.
///
/// **Invariant:** the secret goes to the registry that the user has named, not to its mirrors, nor to where they lead.
pub(crate) struct Secret {
    stream: Opened,
    registry: String,
    answer: AuthResponse,
}

/// A stream that the daemon knows by its id.
pub(crate) struct Opened {
    pub(crate) id: String,
    pub(crate) requests: mpsc::Sender<Any>,
    pub(crate) stream: Streaming<Any>,
}

async fn registry(client: &Client, name: &str, args: &Registry) -> Result<(OciRegistry, Option<Box<Secret>>)> {
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
        let stream = open_stream(client).await?;
        resolver.auth_stream.clone_from(&stream.id);
        let registry = name.split('/').next().unwrap_or_default().to_owned();
        secret = Some(Box::new(Secret { stream, registry, answer }));
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
pub(crate) async fn open_stream(client: &Client) -> Result<Opened> {
    let id = format!("xctl-{}", create::random()?);
    let (requests, receiver) = mpsc::channel(4);
    let doing = "open a stream to the daemon";
    let lost = || Error::unreadable("a stream of the daemon", "it has ended");
    requests.send(to_any(&StreamInit { id: id.clone() })).await.map_err(|_| lost())?;
    let opened = call(doing, client.api().streaming().stream(client.request(ReceiverStream::new(receiver)))).await;
    let mut stream = opened.map_err(unserved)?;
    match tokio::time::timeout(OPENED, stream.message()).await {
        Ok(Ok(Some(_ready))) => Ok(Opened { id, requests, stream }),
        Ok(Ok(None)) => Err(lost()),
        Ok(Err(status)) => Err(unserved(Error::Call { doing: doing.to_owned(), status })),
        Err(_elapsed) => Err(Error::Late { doing: doing.to_owned(), limit: OPENED }),
    }
}

/// A pull or a push may have failed at the registry.
fn explained(error: Error, beside: &Beside) -> Error {
    match error {
        Error::Call { doing, status } if status.code() == Code::Unavailable && matches!(beside, Beside::Secret(_)) => {
            Error::Registry { doing, status }
        }
        error => unserved(error),
    }
}

/// containerd before 1.7.
fn unserved(error: Error) -> Error {
    if error.code() != Some(Code::Unimplemented) {
        return error;
    }
    Error::refused("this daemon does not transfer images so: containerd has its transfer service since 1.7, x-manager always")
}

impl Transfer {
    /// Runs it, shows its progress, and returns the names of images that were saved.
    pub(crate) async fn run(self, client: &Client, mut beside: Beside) -> Result<Vec<String>> {
        let Opened { id, requests: _requests, stream: mut events } = open_stream(client).await?;
        let request = TransferRequest {
            source: Some(self.source),
            destination: Some(self.destination),
            options: Some(TransferOptions { progress_stream: id }),
        };
        let mut service = client.api().transfer();
        let transferred = call_within(TRANSFERRED, self.doing, service.transfer(client.request(request)));
        tokio::pin!(transferred);
        let mut shown = Shown { progress: Progress::new(), saved: Vec::new(), is_complete: false };
        let (mut has_events, mut is_moving, mut is_transferred) = (true, true, false);
        while !is_transferred || is_moving && matches!(beside, Beside::AllBytes(..)) {
            tokio::select! {
                result = &mut transferred, if !is_transferred => {
                    if let Err(error) = result {
                        // the terminal first: a message is for people
                        shown.progress.stop();
                        return Err(explained(error, &beside));
                    }
                    is_transferred = true;
                    if let Beside::AllBytes(_, answered) = &beside {
                        answered.send_replace(true);
                    }
                }
                event = events.message(), if has_events => match event {
                    Ok(Some(event)) => shown.take(&event),
                    // the transfer goes on without its progress
                    Ok(None) | Err(_) => has_events = false,
                },
                moved = beside.go_on(&mut shown.progress), if is_moving => {
                    is_moving = false;
                    // the daemon's error is the better one, if it has one
                    if let Err(error) = moved {
                        let late = tokio::time::timeout(LAST_EVENTS, &mut transferred).await;
                        shown.progress.stop();
                        return Err(match late {
                            Ok(Err(theirs)) if !is_transferred => explained(theirs, &beside),
                            _ => error,
                        });
                    }
                }
            }
        }
        // what was saved may be reported after the answer
        let rest = async {
            while has_events && !shown.is_complete {
                match events.message().await {
                    Ok(Some(event)) => shown.take(&event),
                    Ok(None) | Err(_) => break,
                }
            }
        };
        let _ = tokio::time::timeout(LAST_EVENTS, rest).await;
        shown.progress.finish();
        Ok(shown.saved)
    }
}

/// What the daemon has reported.
struct Shown {
    progress: Progress,
    saved: Vec<String>,
    is_complete: bool,
}

impl Shown {
    fn take(&mut self, event: &Any) {
        let Ok(event) = Event::decode(event.value.as_slice()) else { return };
        if event.event == "saved" && !self.saved.contains(&event.name) {
            self.saved.push(event.name.clone());
        }
        self.is_complete |= event.name.is_empty() && event.event.starts_with("Completed ");
        self.progress.take(&event);
    }
}

impl Beside {
    /// Until there is no more to do.
    async fn go_on(&mut self, progress: &mut Progress) -> Result<()> {
        match self {
            Self::Secret(None) => Ok(()),
            Self::Secret(Some(secret)) => {
                secret.answer_all().await;
                Ok(())
            }
            Self::AllBytes(bytes, _) => bytes.await,
            Self::Bytes(bytes, events) => loop {
                tokio::select! {
                    moved = &mut *bytes => return moved,
                    Some(event) = events.recv() => progress.take(&event),
                }
            },
        }
    }
}

impl Secret {
    /// Answers each question of the registry's.
    async fn answer_all(&mut self) {
        while let Ok(Some(any)) = self.stream.stream.message().await {
            let Ok(question) = AuthRequest::decode(any.value.as_slice()) else { return };
            let answer = if is_host_of(&self.registry, &question.host) {
                self.answer.clone()
            } else {
                eprintln!("xctl: {} asks for a password; the one for {} is not sent to it", question.host, self.registry);
                AuthResponse::default()
            };
            if self.stream.requests.send(to_any(&answer)).await.is_err() {
                return;
            }
        }
    }
}

/// Whether a host is the registry of a reference. The port of its scheme may be left out.
fn is_host_of(registry: &str, host: &str) -> bool {
    if registry == "docker.io" {
        return DOCKER_HUB.contains(&host);
    }
    let without_port = |name: &str| name.strip_suffix(":443").or_else(|| name.strip_suffix(":80")).map(ToOwned::to_owned);
    host == registry || without_port(registry).is_some_and(|name| name == host)
}

/// Names of one registry, and of what issues its tokens.
const DOCKER_HUB: [&str; 4] = ["docker.io", "registry-1.docker.io", "index.docker.io", "auth.docker.io"];

/// After the answer.
const LAST_EVENTS: std::time::Duration = std::time::Duration::from_secs(2);
const OPENED: std::time::Duration = std::time::Duration::from_secs(30);
/// An image may have many gigabytes, and a registry be slow.
const TRANSFERRED: std::time::Duration = std::time::Duration::from_secs(24 * 3600);
const LONGEST_SECRET: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_for_the_registry_of_the_reference_only() {
        for (registry, host, expected) in [
            ("r.example", "r.example", true),
            ("r.example:5000", "r.example:5000", true),
            ("r.example:443", "r.example", true),
            ("r.example:80", "r.example", true),
            ("docker.io", "registry-1.docker.io", true),
            ("docker.io", "auth.docker.io", true),
            ("r.example", "m.example", false),
            ("r.example", "r.example:5000", false),
            ("r.example:5000", "r.example", false),
            ("r.example", "r.example.m.example", false),
            ("r.example", "registry-1.docker.io", false),
            ("docker.io", "m.example", false),
            ("r.example", "", false),
        ] {
            assert_eq!(is_host_of(registry, host), expected, "{registry} {host}");
        }
    }
}
