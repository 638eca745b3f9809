//! Proxies: snapshotters that other processes serve (`[proxy_plugins]`). The rows are ours, so that collections and leases see their snapshots
//! too; the files and the mounts are theirs.
//!
//! ```text
//! row NAMESPACE, NAME, key, number ─▶ the proxy's key NAMESPACE/NUMBER/key, which changes with ours when it is committed
//! Prepare: row ─▶ proxy     Commit: proxy ─▶ row     Remove: row ─▶ proxy, after the answer
//! ```
//! What a crash leaves is a row without a snapshot, which can be removed like any other, or a snapshot without a row, which a collection that
//! looks for all removes.
//!
//! **Invariants:** what the proxy has under other keys is not touched. A proxy that is gone, or hangs, holds up nothing but its own calls.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, Kind, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
    StatSnapshotRequest, UsageRequest, ViewSnapshotRequest,
};
use containerd_client::types::Mount;
use log::warn;
use tonic::Code;
use tonic::transport::Channel;

use crate::error::{Error, Result};
use crate::proxy::{ANSWER_BYTES, Client, LONG, SHORT, within};
use crate::settings::ProxyPlugin;
use crate::store::snapshots::Usage;

/// A snapshotter of another process; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Proxy {
    pub(crate) plugin: Arc<ProxyPlugin>,
    client: Client,
    /// One removal at a time.
    removing: Arc<tokio::sync::Mutex<()>>,
}

/// All of them, by name.
pub(super) type Proxies = Arc<BTreeMap<String, Proxy>>;

/// Those that are configured.
pub(super) fn all(plugins: &[ProxyPlugin]) -> Proxies {
    let proxy = |plugin: &ProxyPlugin| Proxy {
        client: Client::new(&format!("snapshotter {}", plugin.name), &plugin.address),
        plugin: Arc::new(plugin.clone()),
        removing: Arc::default(),
    };
    Arc::new(plugins.iter().map(|plugin| (plugin.name.clone(), proxy(plugin))).collect())
}

/// What a proxy calls a snapshot.
pub(super) fn key_of(namespace: &str, number: i64, key: &str) -> String {
    format!("{namespace}/{number}/{key}")
}

/// The number in such a key, of a namespace.
fn number_in(namespace: &str, key: &str) -> Option<i64> {
    let (number, key) = key.strip_prefix(namespace)?.strip_prefix('/')?.split_once('/')?;
    let parsed: i64 = number.parse().ok()?;
    // as numbers are written here
    (!key.is_empty() && parsed > 0 && parsed.to_string() == number).then_some(parsed)
}

impl Proxy {
    fn service(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.client.channel()).max_decoding_message_size(ANSWER_BYTES)
    }

    /// Makes an active snapshot or a view, and returns its mounts.
    pub(super) async fn make(
        &self,
        namespace: &str,
        key: String,
        parent: String,
        is_view: bool,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>> {
        let (mut service, snapshotter) = (self.service(), self.plugin.snapshotter.clone());
        if is_view {
            let request = ViewSnapshotRequest { snapshotter, key, parent, labels };
            let answer = self.client.call(LONG, namespace, request, |request| async move { service.view(request).await });
            return Ok(answer.await?.mounts);
        }
        let request = PrepareSnapshotRequest { snapshotter, key, parent, labels };
        let answer = self.client.call(LONG, namespace, request, |request| async move { service.prepare(request).await });
        Ok(answer.await?.mounts)
    }

    pub(super) async fn mounts(&self, namespace: &str, key: String) -> Result<Vec<Mount>> {
        let mut service = self.service();
        let request = MountsRequest { snapshotter: self.plugin.snapshotter.clone(), key };
        let answer = self.client.call(SHORT, namespace, request, |request| async move { service.mounts(request).await });
        Ok(answer.await?.mounts)
    }

    pub(super) async fn usage(&self, namespace: &str, key: String) -> Result<Usage> {
        let mut service = self.service();
        let request = UsageRequest { snapshotter: self.plugin.snapshotter.clone(), key };
        let answer = self.client.call(LONG, namespace, request, |request| async move { service.usage(request).await }).await?;
        Ok(Usage { bytes: answer.size, inodes: answer.inodes })
    }

    /// Commits a snapshot. That it is committed under that name already is fine: an earlier attempt was cut off.
    pub(super) async fn commit(&self, namespace: &str, key: String, name: String, labels: HashMap<String, String>) -> Result<()> {
        let (mut service, snapshotter) = (self.service(), self.plugin.snapshotter.clone());
        let request = CommitSnapshotRequest { snapshotter, key, name: name.clone(), labels };
        let committed = self.client.call(LONG, namespace, request, |request| async move { service.commit(request).await }).await;
        match committed {
            Err(error) if matches!(error.code(), Code::NotFound | Code::AlreadyExists) => {
                self.stat(namespace, name).await.map_err(|_| error)
            }
            committed => committed,
        }
    }

    async fn stat(&self, namespace: &str, key: String) -> Result<()> {
        let mut service = self.service();
        let request = StatSnapshotRequest { snapshotter: self.plugin.snapshotter.clone(), key };
        self.client.call(SHORT, namespace, request, |request| async move { service.stat(request).await }).await.map(drop)
    }

    pub(super) async fn remove(&self, namespace: &str, key: &str) -> Result<()> {
        let mut service = self.service();
        let request = RemoveSnapshotRequest { snapshotter: self.plugin.snapshotter.clone(), key: key.to_owned() };
        match self.client.call(SHORT, namespace, request, |request| async move { service.remove(request).await }).await {
            Err(error) if error.code() == Code::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// The turn to remove snapshots, or to give one a row.
    pub(super) async fn turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.removing.lock().await
    }

    /// Its own name of a layer that it has by itself, on a parent that is its own too, or empty.
    pub(super) async fn find(&self, namespace: &str, target: &str, parent: &str) -> Result<Option<String>> {
        let mut service = self.service();
        // not every proxy filters: it is looked at here, too
        let filters = vec![format!("labels.{TARGET_LABEL:?}=={target:?},parent=={parent:?}")];
        let request = ListSnapshotsRequest { snapshotter: self.plugin.snapshotter.clone(), filters };
        let mut pages = self.client.call(SHORT, namespace, request, |request| async move { service.list(request).await }).await?;
        let is_it = |info: &Info| {
            info.kind() == Kind::Committed && info.parent == parent && info.labels.get(TARGET_LABEL).is_some_and(|label| label == target)
        };
        let found = async {
            while let Some(page) = pages.message().await? {
                if let Some(found) = page.info.into_iter().find(is_it) {
                    return Ok(Some(found.name));
                }
            }
            Ok(None)
        };
        within(LONG, found).await.map_err(|status| self.client.failed(&status))
    }

    /// Removes snapshots, by namespace and key, children first. What cannot be removed is logged, and `has_left` set.
    pub(super) async fn remove_all(&self, keys: Vec<(String, String)>, has_left: &AtomicBool) {
        let _turn = self.removing.lock().await;
        for (namespace, key) in keys {
            let Err(error) = self.remove(&namespace, &key).await else { continue };
            has_left.store(true, Ordering::Relaxed);
            warn!(snapshot = key, error = error.chain(); "cannot remove a snapshot of a proxy; a later collection tries again");
            if error.code() == Code::Unavailable {
                return;
            }
        }
    }

    /// Its snapshots of a namespace that are ours by their keys: key, parent, and number.
    pub(super) async fn ours(&self, namespace: &str) -> Result<Vec<(String, String, i64)>> {
        let all = self.list(namespace).await?.into_iter();
        Ok(all.filter_map(|(key, parent)| number_in(namespace, &key).map(|number| (key, parent, number))).collect())
    }

    /// Removes snapshots, each with its parent, in an order in which that can be done.
    pub(super) async fn remove_in_order(&self, namespace: &str, mut unknown: Vec<(String, String)>) -> Result<()> {
        let _turn = self.removing.lock().await;
        while !unknown.is_empty() {
            let needed: HashSet<String> = unknown.iter().map(|(_, parent)| parent.clone()).collect();
            let (parents, leaves): (Vec<_>, Vec<_>) = unknown.into_iter().partition(|(key, _)| needed.contains(key));
            if leaves.is_empty() {
                return Ok(());
            }
            for (key, _) in leaves {
                self.remove(namespace, &key).await?;
            }
            unknown = parents;
        }
        Ok(())
    }

    /// Keys and parents of all snapshots that it has in a namespace.
    async fn list(&self, namespace: &str) -> Result<Vec<(String, String)>> {
        let mut service = self.service();
        let request = ListSnapshotsRequest { snapshotter: self.plugin.snapshotter.clone(), filters: Vec::new() };
        let mut pages = self.client.call(SHORT, namespace, request, |request| async move { service.list(request).await }).await?;
        let mut all = Vec::new();
        let every = async {
            while let Some(page) = pages.message().await? {
                all.extend(page.info.into_iter().map(|info| (info.name, info.parent)));
                if all.len() > MOST_SNAPSHOTS {
                    break;
                }
            }
            Ok(())
        };
        within(LONG, every).await.map_err(|status| self.client.failed(&status))?;
        Ok(all)
    }

    /// Has it clean up. That it has no such method is fine.
    pub(super) async fn cleanup(&self, namespace: &str) -> Result<()> {
        let mut service = self.service();
        let request = CleanupRequest { snapshotter: self.plugin.snapshotter.clone() };
        match self.client.call(LONG, namespace, request, |request| async move { service.cleanup(request).await }).await {
            Err(Error::Remote { code: Code::Unimplemented, .. }) => Ok(()),
            cleaned => cleaned,
        }
    }
}

/// Labels that are passed to a proxy: containerd's own rule.
pub(super) fn inherited(labels: &HashMap<String, String>) -> HashMap<String, String> {
    let is_inherited = |key: &str| key == TARGET_LABEL || key.starts_with("containerd.io/snapshot/");
    labels.iter().filter(|(key, _)| is_inherited(key)).map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// The name that a snapshot is to have when it is committed.
const TARGET_LABEL: &str = "containerd.io/snapshot.ref";
/// Of one namespace, that a cleanup looks at.
const MOST_SNAPSHOTS: usize = 1_000_000;
