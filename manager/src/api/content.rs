//! `containerd.services.content.v1.Content`

use std::borrow::Cow;
use std::sync::Arc;

use containerd_client::events::{ContentCreate, ContentDelete};
use containerd_client::services::v1::{
    AbortRequest, DeleteContentRequest, Info, InfoRequest, InfoResponse, ListContentRequest, ListContentResponse, ListStatusesRequest,
    ListStatusesResponse, ReadContentRequest, ReadContentResponse, Status as Ingest, StatusRequest, StatusResponse, UpdateRequest,
    UpdateResponse, WriteAction, WriteContentResponse,
};
use hyper::body::Bytes;
use log::debug;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Status, Streaming};

use super::call::Call;
use super::mask;
use super::search::{Filters, Search};
use super::uncopied::WriteRequest;
use crate::content::{self, Content, Digest, Opening, Writer};
use crate::error::{Error, Result};
use crate::events::Exchange;
use crate::filter::{Fields, Filter, label, text};
use crate::gate::Gate;
use crate::images::ahead::Ahead;
use crate::name::{self, Namespace};
use crate::pools::Pool;
use crate::store::{Store, blobs};
use crate::successor::{Relay, Successor};
use crate::timestamp;

impl Fields for Info {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        match path {
            ["digest"] => text(&self.digest),
            ["labels", key @ ..] => label(&self.labels, key),
            _ => None,
        }
    }
}

impl Fields for Ingest {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        match path {
            ["ref"] => text(&self.r#ref),
            _ => None,
        }
    }
}

/// The service.
#[derive(Debug)]
pub(crate) struct ContentService {
    pub(crate) content: Arc<Content>,
    pub(crate) store: Store,
    pub(crate) events: Arc<Exchange>,
    pub(crate) filters: Filters,
    pub(crate) gate: Gate,
    /// Reads blobs.
    pub(crate) pool: Pool,
    /// Learns from what clients write which images they pull.
    pub(crate) ahead: Ahead,
    /// Goes on with writes, once another process serves.
    pub(crate) successor: Successor,
}

impl ContentService {
    pub(super) async fn info(self: Arc<Self>, call: Call, request: InfoRequest) -> Result<InfoResponse> {
        let digest = Digest::parse(&request.digest)?;
        Ok(InfoResponse { info: Some(self.content.info(&call.namespace()?, &digest).await?) })
    }

    pub(super) async fn update(self: Arc<Self>, call: Call, request: UpdateRequest) -> Result<UpdateResponse> {
        let new = request.info.ok_or_else(|| Error::Invalid("info must be set".to_owned()))?;
        let (digest, namespace, paths) = (Digest::parse(&new.digest)?, call.namespace()?, mask::paths(request.update_mask));
        let updated = self
            .store
            .write(move |db| {
                let found = blobs::get(db, namespace.as_str(), digest.as_str())?;
                let mut info = found.ok_or_else(|| content::not_found(&digest))?;
                let wrong = |path: &str| Error::Invalid(format!("cannot update {path:?} field on content info {:?}", new.digest));
                mask::update_labels(&mut info.labels, &new.labels, paths.as_deref()).map_err(wrong)?;
                name::labels(&info.labels)?;
                info.updated_at = Some(timestamp::now());
                blobs::put(db, namespace.as_str(), digest.as_str(), &info)?;
                Ok(info)
            })
            .await?;
        Ok(UpdateResponse { info: Some(updated) })
    }

    /// Some at a time, as containerd does.
    pub(super) async fn list(
        self: Arc<Self>,
        call: Call,
        request: ListContentRequest,
    ) -> Result<impl Stream<Item = Result<ListContentResponse, Status>>> {
        let search = Search::new(&self.store, &self.filters, call.namespace()?, &request.filters, blobs::page, |info| &info.digest)?;
        let found = search.pages().await?;
        Ok(found.map(|page| Ok(ListContentResponse { info: page? })))
    }

    pub(super) async fn delete(self: Arc<Self>, call: Call, request: DeleteContentRequest) -> Result<()> {
        let (namespace, digest) = (call.namespace()?, Digest::parse(&request.digest)?);
        self.content.delete(&namespace, &digest, call.lease()).await?;
        self.events.publish(&namespace, "/content/delete", &ContentDelete { digest: request.digest });
        Ok(())
    }

    /// A slow client holds one block, and one that is on its way. What is one block is answered without a task.
    pub(super) async fn read(
        self: Arc<Self>,
        call: Call,
        request: ReadContentRequest,
    ) -> Result<impl Stream<Item = Result<ReadContentResponse, Status>>> {
        let digest = Digest::parse(&request.digest)?;
        let namespace = call.namespace()?;
        let begin = u64::try_from(request.offset).unwrap_or_default();
        let most = u64::try_from(request.size).ok().filter(|size| *size > 0);
        let at_first = most.and_then(|most| usize::try_from(most).ok()).map_or(READ_BYTES, |most| most.min(READ_BYTES));
        let (blob, first) = self.content.read_from(&namespace, &digest, begin, at_first).await?;
        self.ahead.seen(&namespace, call.lease().as_deref(), call.connection(), &digest);
        let left = blob.size.checked_sub(begin);
        let left = left.ok_or_else(|| Error::OutOfRange(format!("read past object length {} bytes", blob.size)))?;
        let length = most.map_or(left, |most| most.min(left));
        let (send, blocks) = mpsc::channel(1);
        let mut done = first.len() as u64;
        let first = (!first.is_empty()).then_some(Ok(ReadContentResponse { offset: 0, data: first }));
        // until the client has been sent the last block: it may be slow to take it
        let open = self.gate.stream();
        let answered = tokio_stream::iter(first).chain(ReceiverStream::new(blocks)).map(move |block| {
            let _open = &open;
            block
        });
        if done == length {
            // Docker reads blobs by 32 KiB a call
            self.content.reads_on(&namespace, &digest, begin + done, blob);
            return Ok(answered);
        }
        tokio::spawn(async move {
            while done < length {
                let Ok(place) = send.reserve().await else { return };
                let bytes = usize::try_from(length - done).unwrap_or(usize::MAX).min(READ_BYTES);
                let (from, offset) = (blob.clone(), begin + done);
                let read = self.pool.run(move || from.blocking_read(offset, bytes)).await;
                match read {
                    Ok(Ok(data)) => {
                        // as containerd counts it: from where the client began
                        let offset = i64::try_from(done).unwrap_or(i64::MAX);
                        done += data.len() as u64;
                        place.send(Ok(ReadContentResponse { offset, data }));
                    }
                    Ok(Err(error)) | Err(error) => return place.send(Err(error.into())),
                }
            }
        });
        Ok(answered)
    }

    pub(super) async fn status(self: Arc<Self>, call: Call, request: StatusRequest) -> Result<StatusResponse> {
        Ok(StatusResponse { status: Some(self.content.status(&call.namespace()?, &request.r#ref).await?) })
    }

    pub(super) async fn list_statuses(self: Arc<Self>, call: Call, request: ListStatusesRequest) -> Result<ListStatusesResponse> {
        let (filter, namespace) = (Filter::parse(&request.filters)?, call.namespace()?);
        self.ahead.meant(&namespace, call.lease().as_deref(), call.connection());
        let statuses = self.content.statuses(&namespace).await?;
        Ok(ListStatusesResponse { statuses: self.filters.matching(&filter, statuses).await? })
    }

    pub(super) async fn abort(self: Arc<Self>, call: Call, request: AbortRequest) -> Result<()> {
        self.content.abort(&call.namespace()?, &request.r#ref).await
    }

    /// One answer to each request.
    pub(super) async fn write(
        self: Arc<Self>,
        call: Call,
        requests: Requests,
    ) -> Result<impl Stream<Item = Result<WriteContentResponse, Status>>> {
        let (namespace, lease) = (call.namespace()?, call.lease());
        let (send, answers) = mpsc::channel(1);
        tokio::spawn(async move {
            let reference = String::new();
            let mut session = Session { service: self, call, namespace, lease, writer: None, reference, total: 0, expected: None };
            session.run(requests, send).await;
        });
        Ok(ReceiverStream::new(answers))
    }
}

/// A stream of writes to one reference.
struct Session {
    service: Arc<ContentService>,
    call: Call,
    namespace: Namespace,
    lease: Option<String>,
    writer: Option<Writer>,
    /// Empty before the first message.
    reference: String,
    total: u64,
    expected: Option<Digest>,
}

type Requests = Streaming<WriteRequest>;
type Answers = mpsc::Sender<Result<WriteContentResponse, Status>>;

impl Session {
    async fn run(&mut self, mut requests: Requests, answers: Answers) {
        let mut open = None;
        // a client that is gone, or sends what is no request, leaves what it has written
        while let Some(Ok(mut request)) = requests.next().await {
            let _open = open.get_or_insert_with(|| self.service.gate.stream());
            let is_commit = request.action == WriteAction::Commit as i32;
            let data = std::mem::take(&mut request.data);
            let carried = self.service.gate.carry();
            let answer = self.answer(request.clone(), data.clone()).await;
            drop(carried);
            if matches!(answer, Err(Error::Retired)) {
                self.writer = None;
                request.data = data;
                return self.relay(request, requests, answers).await;
            }
            let is_last = is_commit || answer.is_err();
            if is_last {
                // before the client can ask for it again
                self.close().await;
            }
            drop(data);
            self.call.answered();
            let is_gone = answers.send(answer.map_err(Into::into)).await.is_err();
            if is_last || is_gone {
                break;
            }
        }
        self.close().await;
    }

    /// Goes on through the process that has taken over, from a message on that was not acted on.
    async fn relay(&self, mut request: WriteRequest, mut requests: Requests, answers: Answers) {
        let mut relay: Option<Relay> = None;
        loop {
            let is_last = request.action == WriteAction::Commit as i32;
            let answer = self.relayed(&mut relay, request).await;
            let is_last = is_last || answer.is_err();
            self.call.answered();
            if answers.send(answer).await.is_err() || is_last {
                return;
            }
            match requests.next().await {
                Some(Ok(next)) => request = next,
                _ => return,
            }
        }
    }

    async fn relayed(&self, relay: &mut Option<Relay>, mut request: WriteRequest) -> Result<WriteContentResponse, Status> {
        let (successor, headers) = (&self.service.successor, self.call.headers());
        if let Some(relay) = relay {
            return relay.pass(request).await;
        }
        if self.reference.is_empty() {
            let (begun, answer) = Relay::begin(successor, &headers, request).await?;
            *relay = Some(begun);
            return Ok(answer);
        }
        let first = WriteRequest {
            r#ref: self.reference.clone(),
            total: signed(self.total),
            expected: self.expected.as_ref().map(Digest::to_string).unwrap_or_default(),
            ..WriteRequest::default()
        };
        let begin = async |first| Relay::begin(successor, &headers, first).await;
        let (mut begun, mut found) = begin(first.clone()).await?;
        if request.offset > 0 && found.offset != request.offset && !first.expected.is_empty() {
            // another client has stored the same content meanwhile, and nothing more is asked for: this one goes on with what it has written
            drop(begun);
            request.expected.clone_from(&first.expected);
            (begun, found) = begin(WriteRequest { expected: String::new(), ..first }).await?;
        }
        // of a commit that another process was taking over from, the bytes may have been written
        if request.offset > 0
            && !request.data.is_empty()
            && found.offset == request.offset.saturating_add(signed(request.data.len() as u64))
        {
            request.offset = found.offset;
            request.data.clear();
        }
        request.r#ref.clone_from(&self.reference);
        let answer = begun.pass(request).await;
        *relay = Some(begun);
        answer
    }

    async fn close(&mut self) {
        if let Some(writer) = self.writer.take()
            && let Err(error) = writer.close().await
        {
            debug!(error = error.chain(); "cannot close an ingest");
        }
    }

    async fn answer(&mut self, request: WriteRequest, data: Bytes) -> Result<WriteContentResponse> {
        let total = u64::try_from(request.total).map_err(|_| Error::Invalid(format!("a total of {} bytes", request.total)))?;
        let offset = u64::try_from(request.offset).map_err(|_| Error::Invalid(format!("an offset of {} bytes", request.offset)))?;
        let action = WriteAction::try_from(request.action).map_err(|_| Error::Invalid(format!("write action {}", request.action)))?;
        let expected = if request.expected.is_empty() { None } else { Some(Digest::parse(&request.expected)?) };
        let content = Arc::clone(&self.service.content);
        let mut writer = match self.writer.take() {
            Some(writer) => {
                if let Some(digest) = &expected
                    && content.is_whole(&self.namespace, digest).await?
                {
                    writer.abort().await?;
                    return Err(Error::Exists(format!("blob with expected digest {digest} exists")));
                }
                writer
            }
            None if request.r#ref.is_empty() => return Err(Error::Invalid("first message must have a reference".to_owned())),
            None => {
                if request.r#ref.starts_with(IMPORT) {
                    self.service.ahead.imports(&self.namespace, self.lease.as_deref(), self.call.connection());
                }
                let (namespace, reference, lease) = (self.namespace.clone(), request.r#ref, self.lease.clone());
                let opening = Opening { namespace, reference: reference.clone(), total, expected: expected.clone(), lease };
                let writer = match content.write(opening).await {
                    Err(error @ Error::AlreadyExists(_)) => {
                        expected.iter().for_each(|digest| self.seen(digest));
                        return Err(error);
                    }
                    writer => writer?,
                };
                self.reference = reference;
                writer
            }
        };
        self.expected = expected.or_else(|| self.expected.take());
        if total > 0 {
            self.total = total;
        }
        let answer = self.act(&mut writer, action, offset, data, request.labels).await;
        self.writer = Some(writer);
        answer
    }

    /// The client has this blob now.
    fn seen(&self, digest: &Digest) {
        self.service.ahead.seen(&self.namespace, self.lease.as_deref(), self.call.connection(), digest);
    }

    async fn act(
        &self,
        writer: &mut Writer,
        action: WriteAction,
        offset: u64,
        data: Bytes,
        labels: std::collections::HashMap<String, String>,
    ) -> Result<WriteContentResponse> {
        let before = writer.progress()?;
        let mut answer = WriteContentResponse { action: action as i32, ..WriteContentResponse::default() };
        if action == WriteAction::Stat {
            answer.offset = signed(before.offset);
            answer.total = signed(self.total);
            answer.digest = before.digest.to_string();
            (answer.started_at, answer.updated_at) = (Some(before.started), Some(before.updated));
            return Ok(answer);
        }
        if offset > 0 && offset != before.offset {
            return Err(Error::OutOfRange(format!("write @{offset} must occur at current offset {}", before.offset)));
        }
        if offset == 0 && before.offset > 0 && (action == WriteAction::Write || !data.is_empty()) {
            writer.truncate().await?;
        }
        writer.write(data).await?;
        let after = writer.progress()?;
        answer.offset = signed(after.offset);
        answer.digest = after.digest.to_string();
        if action == WriteAction::Commit {
            let digest = writer.commit(self.total, self.expected.as_ref(), mask::without_empty(labels)).await?;
            let event = ContentCreate { digest: digest.to_string(), size: answer.offset };
            self.service.events.publish(&self.namespace, "/content/create", &event);
            self.seen(&digest);
            answer.digest = digest.to_string();
        }
        Ok(answer)
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// What containerd's clients call files of an archive that they import begins so.
const IMPORT: &str = "tar-";
/// What is read at once.
const READ_BYTES: usize = 256 << 10;
