//! `containerd.services.transfer.v1.Transfer`: which transfer is asked for, and the streams that belong to it.
//!
//! ```text
//! client ─▶ streams, lease ─▶ transfer ─┬─▶ answer
//!                                       └─ another process takes over ─▶ the same call there, with the streams connected ─▶ its answer
//! ```

use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::TransferRequest;
use containerd_client::to_any;
use containerd_client::types::Platform as WirePlatform;
use containerd_client::types::transfer::{ImageExportStream, ImageImportStream, ImageStore, OciRegistry, Progress as WireEvent};
use log::info;
use prost_types::Any;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::asking::Asking;
use super::call::Call;
use super::stream::{Stream, decode};
use super::streaming::Streams;
use super::{contents, mask};
use crate::error::{Error, Object, Result};
use crate::gate::Gate;
use crate::images::registry::{Credentials, Options, Reference, Registry};
use crate::images::{
    Contents, Event, Export, Import, Lease, NameRule, Place, Platform, Platforms, Progress, Pull, Push, Reader, Selection, Transfers,
    UnpackFor, Wanted, Where,
};
use crate::name::{self, Namespace};
use crate::successor::{Successor, remote};

/// The service.
#[derive(Debug)]
pub(crate) struct TransferService {
    pub(crate) transfers: Arc<Transfers>,
    pub(crate) streams: Arc<Streams>,
    pub(crate) gate: Gate,
    /// Does the rest of a transfer, once another process serves.
    pub(crate) successor: Successor,
    /// Folders of hosts.toml for clients that name none.
    pub(crate) config_path: String,
}

/// One side of a transfer.
enum Side {
    Registry(OciRegistry),
    Store(ImageStore),
    Import(ImageImportStream),
    Export(ImageExportStream),
    /// What an import has made content of, before another process took over, and whether it compresses layers.
    Contents(Contents, bool),
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
            contents::TYPE => contents::of_any(&any).map(|(contents, compresses)| Self::Contents(contents, compresses)),
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
            Self::Contents(..) => "an archive that has come",
        }
    }
}

/// Streams of a client that a transfer has taken, and that go on with it elsewhere: their names, themselves, and what is to come in them for this process.
type Kept = Vec<(String, Stream, usize)>;

/// How a transfer has ended here.
enum Ended {
    Done(Result<()>),
    /// Another process has taken over, which can do the rest, perhaps of what has come of an archive.
    Remains {
        streams: Kept,
        contents: Option<Contents>,
    },
}

impl TransferService {
    pub(super) async fn transfer(self: Arc<Self>, call: Call, request: TransferRequest) -> Result<()> {
        let place = Place { namespace: call.namespace()?, lease: call.lease(), begun: call.transfer_lease() };
        let source = Side::of(request.source.clone(), "source")?;
        let destination = Side::of(request.destination.clone(), "destination")?;
        // a process that is succeeded stays until it has ended
        let _open = self.gate.stream();
        let lease = match (&source, &destination) {
            // these create nothing that would have to be held
            (Side::Store(_), Side::Store(_)) | (Side::Import(_), Side::Export(_)) => None,
            _ => match self.transfers.lease(&place).await {
                Err(Error::Retired) if self.gate.is_succeeded() => return self.go_on(&call, request, None, Vec::new(), None).await,
                lease => Some(lease?),
            },
        };
        let reported = request.options.as_ref().map(|options| options.progress_stream.clone()).filter(|id| !id.is_empty());
        let (progress, report) = match reported {
            Some(id) => {
                let stream = match self.streams.take(&place.namespace, &id) {
                    // it is there
                    Err(Error::NotFound(_)) if self.gate.is_succeeded() => {
                        return self.go_on(&call, request, lease, Vec::new(), None).await;
                    }
                    stream => stream?,
                };
                let (progress, reader) = Progress::new();
                (progress, Some((id, tokio::spawn(report(reader, stream)))))
            }
            None => (Progress::default(), None),
        };
        let reports = Reports(progress.clone());
        let ended = self.run(place, lease.as_ref(), source, destination, progress).await;
        drop(reports);
        let mut reported = None;
        if let Some((id, mut report)) = report {
            match tokio::time::timeout(LAST_REPORTS, &mut report).await {
                Ok(Ok(Some(stream))) => reported = Some((id, stream, 0)),
                Ok(_) => {}
                Err(_elapsed) => report.abort(),
            }
        }
        match ended {
            Ended::Done(done) => {
                let ended = match lease {
                    Some(lease) => lease.end().await,
                    None => Ok(()),
                };
                done.and(ended)
            }
            Ended::Remains { mut streams, contents } => {
                streams.extend(reported);
                self.go_on(&call, request, lease, streams, contents).await
            }
        }
    }

    /// Has the process that has taken over do the rest.
    async fn go_on(
        &self,
        call: &Call,
        mut request: TransferRequest,
        lease: Option<Lease>,
        streams: Kept,
        contents: Option<Contents>,
    ) -> Result<()> {
        let namespace = call.namespace()?;
        info!(namespace:%; "a transfer goes on in the process that has taken over");
        // of those that nothing has taken, it may need some
        self.streams.hand_over().await;
        let mut relays = JoinSet::new();
        for (id, stream, passed_over) in streams {
            if let Some(relay) = self.streams.connect(&namespace, &id, stream, passed_over).await {
                relays.spawn(relay);
            }
        }
        if let Some(contents) = contents {
            let compresses = match Side::of(request.source.take(), "source")? {
                Side::Import(import) => import.force_compress,
                Side::Contents(_, compresses) => compresses,
                _ => false,
            };
            request.source = Some(contents::to_any(contents, compresses));
        }
        let mut headers = call.headers();
        headers.transfer = lease.as_ref().and_then(|lease| lease.own_id().map(ToOwned::to_owned)).or(headers.transfer);
        let connected = self.successor.connect().await.map_err(remote)?;
        let done = connected.unary::<_, ()>(TRANSFER, &headers, request).await.map_err(remote);
        // it was that transfer's
        lease.into_iter().for_each(Lease::leave);
        let last = async { while relays.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(LAST_REPORTS, last).await;
        done
    }

    /// What a transfer needs is dropped when another process takes over, if that can do the rest.
    async fn here(&self, transfer: impl Future<Output = Result<()>>) -> Result<()> {
        tokio::select! {
            biased;
            done = transfer => done,
            () = self.gate.retired() => Err(Error::Retired),
        }
    }

    /// What comes of it, with the streams that it has had.
    async fn ended(&self, done: Result<()>, streams: impl Future<Output = Kept>) -> Ended {
        match done {
            // a stream that is not here is there
            Err(Error::Retired | Error::NotFound(Object::Stream(_))) if self.gate.is_succeeded() => {
                Ended::Remains { streams: streams.await, contents: None }
            }
            done => Ended::Done(done),
        }
    }

    async fn run(&self, place: Place, lease: Option<&Lease>, source: Side, destination: Side, progress: Progress) -> Ended {
        match self.tried(place, lease, source, destination, progress).await {
            Ok(ended) => ended,
            Err(error) => self.ended(Err(error), async { Vec::new() }).await,
        }
    }

    async fn tried(&self, place: Place, lease: Option<&Lease>, source: Side, destination: Side, progress: Progress) -> Result<Ended> {
        let transfers = &self.transfers;
        Ok(match (source, destination, lease) {
            (Side::Registry(registry), Side::Store(store), Some(lease)) => {
                let wanted = wanted(store, |name| transfers.snapshotter(name))?;
                let id = auth_stream(&registry);
                let (registry, asking) = self.registry(&place.namespace, registry).await?;
                let pull = Pull { place, registry, wanted, progress };
                let done = self.here(async { transfers.pull(lease, &pull).await.map(drop) }).await;
                drop(pull);
                self.ended(done, credentials(id, asking)).await
            }
            (Side::Store(store), Side::Registry(registry), Some(lease)) => {
                bound("platforms", store.platforms.len())?;
                let platforms = platforms(&store.platforms);
                let id = auth_stream(&registry);
                let (registry, asking) = self.registry(&place.namespace, registry).await?;
                let push = Push { place, name: store.name, platforms, registry, progress };
                let done = self.here(transfers.push(lease, push)).await;
                self.ended(done, credentials(id, asking)).await
            }
            (Side::Store(source), Side::Store(destination), _) => {
                let done = transfers.tag(&place, &source.name, &wanted(destination, |name| transfers.snapshotter(name))?).await;
                self.ended(done, async { Vec::new() }).await
            }
            (Side::Import(import), Side::Store(store), Some(lease)) => {
                let wanted = wanted(store, |name| transfers.snapshotter(name))?;
                let stream = self.streams.take(&place.namespace, &import.stream)?;
                let (send, bytes) = mpsc::channel(CHUNKS);
                let receiving = async {
                    stream.receive_bytes(send).await;
                    // the import knows how it ends
                    std::future::pending().await
                };
                let contents = tokio::select! {
                    contents = transfers.receive(lease, &place.namespace, bytes, &wanted, &progress) => contents?,
                    never = receiving => never,
                };
                self.import(place, lease, contents, import.force_compress, wanted, progress).await
            }
            (Side::Contents(contents, compresses), Side::Store(store), Some(lease)) => {
                let wanted = wanted(store, |name| transfers.snapshotter(name))?;
                self.import(place, lease, contents, compresses, wanted, progress).await
            }
            (Side::Store(store), Side::Export(export), Some(lease)) => {
                let names = names(&store)?;
                bound("platforms", export.platforms.len())?;
                let id = export.stream.clone();
                let mut stream = self.streams.take(&place.namespace, &id)?;
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
                let (exported, sent) = tokio::join!(transfers.export(lease, export), stream.send_bytes(from));
                // when the client is gone, the export fails for that reason
                self.ended(sent.and(exported), async { vec![(id, stream, 0)] }).await
            }
            (Side::Import(import), Side::Export(export), _) => {
                let from = self.streams.take(&place.namespace, &import.stream)?;
                let to = self.streams.take(&place.namespace, &export.stream)?;
                Ended::Done(echo(from, to).await)
            }
            (source, destination, _) => {
                return Err(Error::Unimplemented(format!("unable to transfer from {} to {}", source.name(), destination.name())));
            }
        })
    }

    /// Imports what has come of an archive.
    async fn import(&self, place: Place, lease: &Lease, contents: Contents, compresses: bool, wanted: Wanted, progress: Progress) -> Ended {
        let import = Import { place, contents: &contents, wanted, compresses, progress };
        match self.here(async { self.transfers.import(lease, import).await.map(drop) }).await {
            Err(Error::Retired) if self.gate.is_succeeded() => Ended::Remains { streams: Vec::new(), contents: Some(contents) },
            done => Ended::Done(done),
        }
    }

    /// The client of a registry, with what the daemon's client says of it.
    async fn registry(&self, namespace: &Namespace, registry: OciRegistry) -> Result<(Registry, Option<Arc<Asking>>)> {
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
        let asking = match resolver.auth_stream.as_str() {
            "" => None,
            id => Some(Arc::new(Asking::new(self.streams.take(namespace, id)?))),
        };
        let credentials = asking.clone().map(|asking| asking as Arc<dyn Credentials>);
        let options = Options {
            config_path: Options::folders(folders),
            plain_http,
            headers: resolver.headers.into_iter().collect(),
            credentials,
            ..Options::default()
        };
        Ok((Registry::new(reference, options).await?, asking))
    }
}

/// Ends the reports of a transfer, also when its client does not wait any more.
struct Reports(Progress);

impl Drop for Reports {
    fn drop(&mut self) {
        self.0.end();
    }
}

fn auth_stream(registry: &OciRegistry) -> String {
    registry.resolver.as_ref().map(|resolver| resolver.auth_stream.clone()).unwrap_or_default()
}

/// The stream of a client's credentials, once nothing asks any more.
async fn credentials(id: String, asking: Option<Arc<Asking>>) -> Kept {
    let Some(asking) = asking else { return Vec::new() };
    asking.leave().await.into_iter().map(|(stream, passed_over)| (id.clone(), stream, passed_over)).collect()
}

/// Passes on what happens, as fast as the client reads it, and returns the stream.
async fn report(mut reader: Reader, stream: Stream) -> Option<Stream> {
    while let Some(event) = reader.next().await {
        let Event { event, name, parents, progress, total, descriptor } = event;
        let number = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let desc = descriptor.map(|descriptor| descriptor.to_wire());
        let event = WireEvent { event, name, parents, progress: number(progress), total: number(total), desc };
        if stream.send(to_any(&event)).await.is_err() {
            return None;
        }
    }
    Some(stream)
}

/// What comes in one stream goes into another.
async fn echo(from: Stream, mut to: Stream) -> Result<()> {
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
            Side::Import(_) | Side::Contents(..) => {}
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

const TRANSFER: &str = "/containerd.services.transfer.v1.Transfer/Transfer";
/// Chunks on their way between a stream and an archive.
const CHUNKS: usize = 8;
/// For what is reported last.
const LAST_REPORTS: Duration = Duration::from_secs(2);
/// Platforms, names and snapshotters of one transfer.
const MOST_OPTIONS: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::stream::stream;

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
}
