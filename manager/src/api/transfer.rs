//! `containerd.services.transfer.v1.Transfer`: which transfer is asked for, and the streams that belong to it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_client::services::v1::TransferRequest;
use containerd_client::to_any;
use containerd_client::types::Platform as WirePlatform;
use containerd_client::types::transfer::{
    AuthRequest, AuthResponse, AuthType, ImageExportStream, ImageImportStream, ImageStore, OciRegistry, Progress as WireEvent,
};
use prost_types::Any;
use tokio::sync::{Mutex, mpsc};

use super::call::Call;
use super::mask;
use super::streaming::{Stream, Streams, decode};
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::images::registry::{Challenge, Credentials, Options, Reference, Registry, Secret};
use crate::images::{
    Event, Export, Import, NameRule, Place, Platform, Platforms, Progress, Pull, Push, Reader, Selection, Transfers, UnpackFor, Wanted,
    Where,
};
use crate::name::{self, Namespace};

/// The service.
#[derive(Debug)]
pub(crate) struct TransferService {
    pub(crate) transfers: Arc<Transfers>,
    pub(crate) streams: Arc<Streams>,
    pub(crate) gate: Gate,
    /// Folders of hosts.toml for clients that name none.
    pub(crate) config_path: String,
}

/// One side of a transfer.
enum Side {
    Registry(OciRegistry),
    Store(ImageStore),
    Import(ImageImportStream),
    Export(ImageExportStream),
}

impl Side {
    fn of(any: Option<Any>, what: &str) -> Result<Self> {
        let any = any.ok_or_else(|| Error::Invalid(format!("the {what} of the transfer must be set")))?;
        let unreadable = || Error::Invalid(format!("the {what} of the transfer cannot be read"));
        match any.type_url.rsplit('/').next().unwrap_or_default() {
            "containerd.types.transfer.OCIRegistry" => decode(&any).map(Self::Registry).ok_or_else(unreadable),
            "containerd.types.transfer.ImageStore" => decode(&any).map(Self::Store).ok_or_else(unreadable),
            "containerd.types.transfer.ImageImportStream" => decode(&any).map(Self::Import).ok_or_else(unreadable),
            "containerd.types.transfer.ImageExportStream" => decode(&any).map(Self::Export).ok_or_else(unreadable),
            other => {
                let shown: String = other.chars().take(100).collect();
                Err(Error::Unimplemented(format!("{shown:?} as the {what} of a transfer")))
            }
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Registry(_) => "a registry",
            Self::Store(_) => "the image store",
            Self::Import(_) => "an import stream",
            Self::Export(_) => "an export stream",
        }
    }
}

impl TransferService {
    pub(super) async fn transfer(self: Arc<Self>, call: Call, request: TransferRequest) -> Result<()> {
        let place = Place { namespace: call.namespace()?, lease: call.lease() };
        let source = Side::of(request.source, "source")?;
        let destination = Side::of(request.destination, "destination")?;
        let reported = request.options.map(|options| options.progress_stream).filter(|id| !id.is_empty());
        let (progress, report) = match reported {
            Some(id) => {
                let stream = self.streams.take(&place.namespace, &id)?;
                let (progress, reader) = Progress::new();
                (progress, Some(tokio::spawn(report(reader, stream))))
            }
            None => (Progress::default(), None),
        };
        let reports = Reports(progress.clone());
        let done = tokio::select! {
            done = self.run(place, source, destination, progress) => done,
            // another process has taken over, where a client can repeat it
            () = self.gate.retired() => Err(Error::Retired),
        };
        drop(reports);
        if let Some(mut report) = report
            && tokio::time::timeout(LAST_REPORTS, &mut report).await.is_err()
        {
            report.abort();
        }
        done
    }

    async fn run(&self, place: Place, source: Side, destination: Side, progress: Progress) -> Result<()> {
        let transfers = &self.transfers;
        match (source, destination) {
            (Side::Registry(registry), Side::Store(store)) => {
                let wanted = wanted(store, |name| transfers.snapshotter(name))?;
                let registry = self.registry(&place.namespace, registry).await?;
                transfers.pull(Pull { place, registry, wanted, progress }).await.map(drop)
            }
            (Side::Store(store), Side::Registry(registry)) => {
                bound("platforms", store.platforms.len())?;
                let platforms = platforms(&store.platforms);
                let registry = self.registry(&place.namespace, registry).await?;
                transfers.push(Push { place, name: store.name, platforms, registry, progress }).await
            }
            (Side::Store(source), Side::Store(destination)) => {
                let wanted = wanted(destination, |name| transfers.snapshotter(name))?;
                transfers.tag(&place, &source.name, &wanted).await
            }
            (Side::Import(import), Side::Store(store)) => {
                let wanted = wanted(store, |name| transfers.snapshotter(name))?;
                let stream = self.streams.take(&place.namespace, &import.stream)?;
                let (send, bytes) = mpsc::channel(CHUNKS);
                let importing = transfers.import(Import { place, bytes, wanted, compresses: import.force_compress, progress });
                let receiving = async {
                    stream.receive_bytes(send).await;
                    // the import knows how it ends
                    std::future::pending().await
                };
                tokio::select! { imported = importing => imported.map(drop), never = receiving => never }
            }
            (Side::Store(store), Side::Export(export)) => {
                let names = names(&store)?;
                bound("platforms", export.platforms.len())?;
                let stream = self.streams.take(&place.namespace, &export.stream)?;
                let (bytes, from) = mpsc::channel(CHUNKS);
                let export = Export {
                    place,
                    names,
                    platforms: platforms(&export.platforms),
                    all_platforms: export.all_platforms,
                    skips_manifest_json: export.skip_compatibility_manifest,
                    skips_non_distributable: export.skip_non_distributable,
                    progress,
                    bytes,
                };
                let (exported, sent) = tokio::join!(transfers.export(export), stream.send_bytes(from));
                // when the client is gone, the export fails for that reason
                sent.and(exported)
            }
            (Side::Import(import), Side::Export(export)) => {
                let from = self.streams.take(&place.namespace, &import.stream)?;
                let to = self.streams.take(&place.namespace, &export.stream)?;
                echo(from, to).await
            }
            (source, destination) => {
                Err(Error::Unimplemented(format!("unable to transfer from {} to {}", source.name(), destination.name())))
            }
        }
    }

    /// The client of a registry, with what the daemon's client says of it.
    async fn registry(&self, namespace: &Namespace, registry: OciRegistry) -> Result<Registry> {
        let reference = Reference::parse(&registry.reference)?;
        let resolver = registry.resolver.unwrap_or_default();
        let folders = if resolver.host_dir.is_empty() { &self.config_path } else { &resolver.host_dir };
        let plain_http = match resolver.default_scheme.as_str() {
            "" => None,
            "http" => Some(true),
            "https" => Some(false),
            other => {
                let shown: String = other.chars().take(20).collect();
                return Err(Error::Invalid(format!("default scheme {shown:?}; it is http or https")));
            }
        };
        let credentials = match resolver.auth_stream.as_str() {
            "" => None,
            id => Some(Arc::new(Asking(Mutex::new(Some(self.streams.take(namespace, id)?)))) as Arc<dyn Credentials>),
        };
        let options = Options {
            config_path: Options::folders(folders),
            plain_http,
            headers: resolver.headers.into_iter().collect(),
            credentials,
            ..Options::default()
        };
        Ok(Registry::new(reference, options).await?)
    }
}

/// Ends the reports of a transfer, also when its client does not wait any more.
struct Reports(Progress);

impl Drop for Reports {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// The client that has the credentials, asked over its stream.
///
/// **Invariant:** after a question that was not answered in time there is no stream. The late answer would be taken for that to the next
/// question, and a credential go to another host.
struct Asking(Mutex<Option<Stream>>);

#[async_trait]
impl Credentials for Asking {
    async fn of(&self, challenge: &Challenge<'_>) -> Result<Option<Secret>> {
        let request = AuthRequest {
            host: challenge.host.to_owned(),
            reference: challenge.reference.to_owned(),
            wwwauthenticate: challenge.headers.to_vec(),
        };
        // one question at a time
        let mut place = self.0.lock().await;
        let unanswered = || Error::Precondition("a question for credentials was not answered".to_owned());
        let mut stream = place.take().ok_or_else(unanswered)?;
        stream.send(to_any(&request)).await?;
        let answer = stream.receive().await?;
        *place = Some(stream);
        drop(place);
        let gone = || Error::Precondition("the client has closed the stream of its credentials".to_owned());
        let answer: AuthResponse =
            decode(&answer.ok_or_else(gone)?).ok_or_else(|| Error::Invalid("credentials cannot be read".to_owned()))?;
        Ok(match answer.auth_type() {
            AuthType::None => None,
            _ if answer.secret.is_empty() => None,
            AuthType::Credentials => Some(Secret::Password { user: answer.username, password: answer.secret }),
            AuthType::Refresh => Some(Secret::RefreshToken(answer.secret)),
            AuthType::Header => Some(Secret::Header(answer.secret)),
        })
    }
}

/// Passes on what happens, as fast as the client reads it.
async fn report(mut reader: Reader, stream: Stream) {
    while let Some(event) = reader.next().await {
        let Event { event, name, parents, progress, total, descriptor } = event;
        let number = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let desc = descriptor.map(|descriptor| descriptor.to_wire());
        let event = WireEvent { event, name, parents, progress: number(progress), total: number(total), desc };
        if stream.send(to_any(&event)).await.is_err() {
            return;
        }
    }
}

/// What comes in one stream goes into another.
async fn echo(from: Stream, to: Stream) -> Result<()> {
    let (send, mut received) = mpsc::channel(CHUNKS);
    let (pass, passed) = mpsc::channel(CHUNKS);
    let pump = async move {
        while let Some(bytes) = received.recv().await {
            if pass.send(bytes?).await.is_err() {
                break;
            }
        }
        Ok(())
    };
    let receive = async move {
        from.receive_bytes(send).await;
        Ok(())
    };
    // the first error ends both streams
    tokio::try_join!(receive, pump, to.send_bytes(passed)).map(|_moved| ())
}

fn platform(wire: &WirePlatform) -> Platform {
    Platform::new(if wire.os.is_empty() { "linux" } else { &wire.os }, &wire.architecture, &wire.variant)
}

fn platforms(wire: &[WirePlatform]) -> Platforms {
    Platforms::of(wire.iter().map(platform))
}

/// Names of images in the store.
fn names(store: &ImageStore) -> Result<Vec<String>> {
    if store.extra_references.iter().any(|reference| reference.is_prefix) {
        return Err(Error::Unimplemented("a lookup of images by the beginning of their names".to_owned()));
    }
    bound("references", store.extra_references.len())?;
    let own = Some(store.name.clone()).filter(|name| !name.is_empty());
    Ok(own.into_iter().chain(store.extra_references.iter().map(|reference| reference.name.clone())).collect())
}

/// Reads a request as a transfer does before it begins.
#[cfg(any(test, fuzzing))]
pub(super) fn parsed(request: TransferRequest) -> Result<()> {
    for side in [Side::of(request.source, "source")?, Side::of(request.destination, "destination")?] {
        match side {
            Side::Registry(registry) => drop(Reference::parse(&registry.reference)?),
            Side::Store(store) => {
                names(&store)?;
                let wanted = wanted(store, |name| crate::snapshots::Snapshotter::parse(name).map(Where::Own))?;
                assert!(wanted.references.len().max(wanted.unpacks.len()) <= MOST_OPTIONS);
            }
            Side::Export(export) => drop(platforms(&export.platforms)),
            Side::Import(_) => {}
        }
    }
    Ok(())
}

/// Refuses more of something than a transfer may name.
fn bound(what: &str, count: usize) -> Result<()> {
    if count > MOST_OPTIONS { Err(Error::Invalid(format!("{count} {what}; the most is {MOST_OPTIONS}"))) } else { Ok(()) }
}

fn wanted(store: ImageStore, snapshotter_of: impl Fn(&str) -> Result<Where>) -> Result<Wanted> {
    let labels = mask::without_empty(store.labels);
    name::labels(&labels)?;
    bound("platforms", store.platforms.len())?;
    bound("references", store.extra_references.len())?;
    bound("unpacks", store.unpacks.len())?;
    let unpacks = store.unpacks.iter().map(|unpack| {
        let snapshotter = if unpack.snapshotter.is_empty() { "overlayfs" } else { &unpack.snapshotter };
        let platform = unpack.platform.as_ref().map_or_else(Platform::host, platform);
        Ok(UnpackFor { platform, snapshotter: snapshotter_of(snapshotter)? })
    });
    let references = store.extra_references.into_iter().map(|reference| NameRule {
        name: reference.name,
        is_prefix: reference.is_prefix,
        allow_overwrite: reference.allow_overwrite,
        add_digest: reference.add_digest,
        skip_named_digest: reference.skip_named_digest,
    });
    Ok(Wanted {
        unpacks: unpacks.collect::<Result<_>>()?,
        references: references.collect(),
        name: store.name,
        labels,
        selection: Selection {
            platforms: platforms(&store.platforms),
            all_metadata: store.all_metadata,
            manifest_limit: usize::try_from(store.manifest_limit).unwrap_or(usize::MAX),
            skips_missing: false,
        },
    })
}

/// Chunks on their way between a stream and an archive.
const CHUNKS: usize = 8;
/// For what is reported last.
const LAST_REPORTS: Duration = Duration::from_secs(2);
/// Platforms, names and snapshotters of one transfer.
const MOST_OPTIONS: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::streaming::stream;

    #[tokio::test]
    async fn reports_end_with_their_transfer_also_when_it_is_given_up() {
        let (progress, mut reader) = Progress::new();
        drop(Reports(progress));
        assert!(reader.next().await.is_none());
    }

    #[tokio::test]
    async fn an_echo_ends_when_one_of_its_clients_leaves() {
        let ((from, _sender, _updates), (to, _grants, received)) = (stream(), stream());
        let echoing = tokio::spawn(echo(from, to));
        drop(received);
        let ended = tokio::time::timeout(Duration::from_secs(20), echoing).await.expect("it ends").expect("no panic");
        ended.expect_err("the receiver has left");
    }

    #[tokio::test]
    async fn a_credential_that_comes_late_goes_to_no_other_host() {
        let answer = AuthResponse { auth_type: AuthType::Credentials.into(), secret: "s".to_owned(), ..AuthResponse::default() };
        let of = |host| Challenge { host, reference: "r", headers: &[] };
        let (in_time, client, _questions) = stream();
        let asking = Asking(Mutex::new(Some(in_time)));
        for host in ["one", "two"] {
            client.send(Ok(to_any(&answer))).await.expect("it receives");
            assert!(asking.of(&of(host)).await.expect("an answer").is_some());
        }
        let given_up = tokio::time::timeout(Duration::from_millis(20), asking.of(&of("one"))).await;
        assert!(given_up.is_err(), "there is no answer yet");
        // its end of the stream may be gone
        let _ = client.send(Ok(to_any(&answer))).await;
        assert_eq!(asking.of(&of("two")).await.expect_err("it was one's").code(), tonic::Code::FailedPrecondition);
    }
}
