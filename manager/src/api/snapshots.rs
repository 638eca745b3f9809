//! `containerd.services.snapshots.v1.Snapshots`

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use containerd_client::events::{SnapshotCommit, SnapshotPrepare, SnapshotRemove};
use containerd_client::services::v1::snapshots::{
    CleanupRequest, Info, Kind, ListSnapshotsRequest, ListSnapshotsResponse, MountsRequest, MountsResponse, PrepareSnapshotRequest,
    PrepareSnapshotResponse, RemoveSnapshotRequest, StatSnapshotRequest, StatSnapshotResponse, UpdateSnapshotRequest,
    UpdateSnapshotResponse, UsageRequest, UsageResponse, ViewSnapshotRequest, ViewSnapshotResponse,
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use super::call::Call;
use super::mask;
use super::search::{Filters, Search};
use crate::error::{Error, Result};
use crate::events::Exchange;
use crate::filter::{Fields, label, text};
use crate::images::ahead::Ahead;
use crate::name;
use crate::name::Namespace;
use crate::snapshots::{Change, Commit, New, Snapshots};
use crate::store::Store;
use crate::store::snapshots::{Place, page};

/// A commit as containerd 2.2 knows it: that the `containerd-client` crate has not.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct CommitSnapshotRequest {
    #[prost(string, tag = "1")]
    snapshotter: String,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(string, tag = "3")]
    key: String,
    #[prost(map = "string, string", tag = "4")]
    labels: HashMap<String, String>,
    /// What it is put on, if it was prepared without a parent.
    #[prost(string, tag = "5")]
    parent: String,
}

impl Fields for Info {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        match path {
            ["name"] => text(&self.name),
            ["parent"] => text(&self.parent),
            ["kind"] => Some(Cow::Borrowed(match self.kind() {
                Kind::Unknown => "unknown",
                Kind::View => "view",
                Kind::Active => "active",
                Kind::Committed => "committed",
            })),
            ["labels", key @ ..] => label(&self.labels, key),
            _ => None,
        }
    }
}

/// The service.
#[derive(Debug)]
pub(crate) struct SnapshotService {
    pub(crate) snapshots: Snapshots,
    pub(crate) store: Store,
    pub(crate) events: Arc<Exchange>,
    pub(crate) filters: Filters,
    /// May be about to record what a client asks for.
    pub(crate) ahead: Ahead,
}

/// Keys are no identifiers: clients put times and digests into them.
fn key(what: &str, key: &str) -> Result<()> {
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        return Err(Error::Invalid(format!(
            "snapshot {what} of {} bytes; it must not be empty, and not longer than {MAX_KEY_BYTES}",
            key.len()
        )));
    }
    Ok(())
}

impl SnapshotService {
    fn place(&self, call: &Call, snapshotter: &str) -> Result<(Namespace, Place)> {
        let namespace = call.namespace()?;
        self.snapshots.check_name(snapshotter)?;
        let place = Place { namespace: namespace.to_string(), snapshotter: snapshotter.to_owned() };
        Ok((namespace, place))
    }

    pub(super) async fn prepare(self: Arc<Self>, call: Call, request: PrepareSnapshotRequest) -> Result<PrepareSnapshotResponse> {
        let (namespace, place) = self.place(&call, &request.snapshotter)?;
        let new = new(&call, request.key, request.parent, Kind::Active, request.labels)?;
        if let Some(target) = new.target() {
            self.ahead.settle(&place, target, call.lease().as_deref(), call.connection()).await;
        }
        let event = SnapshotPrepare { key: new.key.clone(), parent: new.parent.clone(), snapshotter: place.snapshotter.clone() };
        let mounts = self.snapshots.prepare_unless(&place, new, call.gone()).await?;
        self.events.publish(&namespace, "/snapshot/prepare", &event);
        Ok(PrepareSnapshotResponse { mounts })
    }

    pub(super) async fn view(self: Arc<Self>, call: Call, request: ViewSnapshotRequest) -> Result<ViewSnapshotResponse> {
        let (_, place) = self.place(&call, &request.snapshotter)?;
        let new = new(&call, request.key, request.parent, Kind::View, request.labels)?;
        Ok(ViewSnapshotResponse { mounts: self.snapshots.prepare(&place, new).await? })
    }

    pub(super) async fn mounts(self: Arc<Self>, call: Call, request: MountsRequest) -> Result<MountsResponse> {
        let (_, place) = self.place(&call, &request.snapshotter)?;
        Ok(MountsResponse { mounts: self.snapshots.mounts(&place, &request.key).await? })
    }

    pub(super) async fn commit(self: Arc<Self>, call: Call, request: CommitSnapshotRequest) -> Result<()> {
        let (namespace, place) = self.place(&call, &request.snapshotter)?;
        key("name", &request.name)?;
        let labels = mask::without_empty(request.labels);
        name::labels(&labels)?;
        let event = SnapshotCommit { key: request.key.clone(), name: request.name.clone(), snapshotter: place.snapshotter.clone() };
        let commit = Commit { key: request.key, name: request.name, parent: request.parent, labels, lease: call.lease() };
        self.snapshots.commit(&place, commit).await?;
        self.events.publish(&namespace, "/snapshot/commit", &event);
        Ok(())
    }

    pub(super) async fn remove(self: Arc<Self>, call: Call, request: RemoveSnapshotRequest) -> Result<()> {
        let (namespace, place) = self.place(&call, &request.snapshotter)?;
        self.snapshots.remove(&place, &request.key, call.lease()).await?;
        let event = SnapshotRemove { key: request.key, snapshotter: place.snapshotter };
        self.events.publish(&namespace, "/snapshot/remove", &event);
        Ok(())
    }

    pub(super) async fn stat(self: Arc<Self>, call: Call, request: StatSnapshotRequest) -> Result<StatSnapshotResponse> {
        let (_, place) = self.place(&call, &request.snapshotter)?;
        let lease = call.lease();
        let found = match self.snapshots.find(&place, &request.key, lease.as_deref()).await {
            Err(Error::NotFound(_)) => {
                self.ahead.settle(&place, &request.key, lease.as_deref(), call.connection()).await;
                self.snapshots.find(&place, &request.key, lease.as_deref()).await
            }
            found => found,
        };
        Ok(StatSnapshotResponse { info: Some(found?) })
    }

    pub(super) async fn update(self: Arc<Self>, call: Call, request: UpdateSnapshotRequest) -> Result<UpdateSnapshotResponse> {
        let (_, place) = self.place(&call, &request.snapshotter)?;
        let new = request.info.ok_or_else(|| Error::Invalid("snapshot info must be set".to_owned()))?;
        let change = change(&new, mask::paths(request.update_mask))?;
        Ok(UpdateSnapshotResponse { info: Some(self.snapshots.relabel(&place, &new.name, change).await?) })
    }

    pub(super) async fn list(
        self: Arc<Self>,
        call: Call,
        request: ListSnapshotsRequest,
    ) -> Result<impl Stream<Item = Result<ListSnapshotsResponse, Status>>> {
        let (namespace, place) = self.place(&call, &request.snapshotter)?;
        let page = move |db: &crate::store::Meta<'_>, _namespace: &str, after: &str, wanted: Option<&[crate::store::Wanted]>, bytes| {
            page(db, &place, after, wanted, bytes)
        };
        let search = Search::new(&self.store, &self.filters, namespace, &request.filters, page, |info: &Info| &info.name)?;
        Ok(search.each().await?.map(|info| Ok(ListSnapshotsResponse { info: vec![info?] })))
    }

    pub(super) async fn usage(self: Arc<Self>, call: Call, request: UsageRequest) -> Result<UsageResponse> {
        let (_, place) = self.place(&call, &request.snapshotter)?;
        let usage = self.snapshots.usage(&place, &request.key).await?;
        Ok(UsageResponse { size: usage.bytes, inodes: usage.inodes })
    }

    pub(super) async fn cleanup(self: Arc<Self>, call: Call, request: CleanupRequest) -> Result<()> {
        call.namespace()?;
        self.snapshots.cleanup_of(&request.snapshotter).await
    }
}

fn new(call: &Call, new_key: String, parent: String, kind: Kind, labels: HashMap<String, String>) -> Result<New> {
    key("key", &new_key)?;
    let labels = mask::without_empty(labels);
    name::labels(&labels)?;
    Ok(New { key: new_key, parent, kind, labels, lease: call.lease() })
}

/// What an update does: only labels can change.
fn change(new: &Info, paths: Option<Vec<String>>) -> Result<Change> {
    let wrong = |path: &str| Error::Invalid(format!("cannot update {path:?} field on snapshot {:?}", new.name));
    mask::update_labels(&mut HashMap::new(), &new.labels, paths.as_deref()).map_err(wrong)?;
    let labels = new.labels.clone();
    Ok(Box::new(move |old| {
        // the paths are right
        let _ = mask::update_labels(old, &labels, paths.as_deref());
    }))
}

/// Nothing that clients make up is nearly as long.
const MAX_KEY_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_changes_labels_and_nothing_else() {
        let old = || HashMap::from([("a".to_owned(), "1".to_owned()), ("b.c".to_owned(), "2".to_owned())]);
        let new = Info { labels: [("b.c".to_owned(), "3".to_owned()), ("d".to_owned(), String::new())].into(), ..Info::default() };
        let changed = |paths: &[&str]| {
            let paths = (!paths.is_empty()).then(|| paths.iter().map(|path| (*path).to_owned()).collect());
            let mut labels = old();
            change(&new, paths).map(|change| {
                change(&mut labels);
                labels
            })
        };
        assert_eq!(changed(&["labels.b.c"]).expect("allowed")["b.c"], "3");
        assert_eq!(changed(&["labels.a"]).expect("allowed").len(), 1);
        for paths in [&[][..], &["labels"]] {
            assert_eq!(changed(paths).expect("allowed"), [("b.c".to_owned(), "3".to_owned())].into());
        }
        for fixed in ["name", "parent", "kind", "created_at", "labelsx"] {
            assert_eq!(changed(&[fixed]).expect_err(fixed).code(), tonic::Code::InvalidArgument);
        }
    }
}
