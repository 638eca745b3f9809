//! What the daemon does with snapshots of proxies: the same as with its own, but for the files.

use containerd_client::services::v1::snapshots::Kind;
use containerd_client::types::Mount;

use super::commit::{self, Commit};
use super::prepare::{self, New};
use super::proxy::{Proxy, inherited, key_of};
use super::{Snapshots, existing, parent};
use crate::content::hold;
use crate::error::{Error, Result};
use crate::store::snapshots::{Place, Snapshot, Usage, kind_of};
use crate::store::{self, Meta, Resource, namespaces, resources};

impl Snapshots {
    /// The proxy that serves a snapshotter, if one does.
    pub(super) fn proxy(&self, snapshotter: &str) -> Option<&Proxy> {
        self.proxies.get(snapshotter)
    }

    pub(super) async fn prepare_at(&self, proxy: &Proxy, place: &Place, new: New) -> Result<Vec<Mount>> {
        let (at, asked) = (place.clone(), new.clone());
        let insert = move |db: &mut Meta<'_>| {
            let chain = prepare::check(db, &at, &asked)?;
            namespaces::ensure(db, &at.namespace)?;
            let id = store::snapshots::insert(db, &at, &asked.key, chain.first().copied(), asked.kind, &asked.labels)?;
            hold(db, &at.namespace, asked.lease.as_deref(), &kind_of(&at.snapshotter), &asked.key)?;
            let above = if asked.parent.is_empty() { None } else { Some(parent(db, &at, &asked.parent)?.id) };
            Ok((id, above))
        };
        let (id, above) = {
            let _pass = self.gate.enter().await?;
            self.store.write(insert).await?
        };
        let key = key_of(&place.namespace, id, &new.key);
        let above = above.map_or_else(String::new, |number| key_of(&place.namespace, number, &new.parent));
        let made = proxy.make(&place.namespace, key, above, new.kind == Kind::View, inherited(&new.labels)).await;
        if let Err(error) = &made {
            let (at, key, lease) = (place.clone(), new.key, new.lease);
            let _pass = self.gate.enter().await?;
            let undo = move |db: &mut Meta<'_>| {
                store::snapshots::remove(db, id)?;
                match &lease {
                    Some(lease) => {
                        resources::remove(db, &at.namespace, lease, &Resource { kind: kind_of(&at.snapshotter), id: key.clone() })
                    }
                    None => Ok(()),
                }
            };
            self.store.remove(undo).await?;
            if error.code() == tonic::Code::AlreadyExists {
                // not of a snapshot of ours: a client would look for it here
                return Err(Error::Precondition(format!("{}; snapshots that a proxy has by itself are not used", error.chain())));
            }
        }
        made
    }

    pub(super) async fn mounts_at(&self, proxy: &Proxy, place: &Place, key: &str) -> Result<Vec<Mount>> {
        let snapshot = self.row(place, key).await?;
        if snapshot.info.kind() == Kind::Committed {
            return Err(Error::Precondition(format!("requested snapshot {key} not active or view")));
        }
        proxy.mounts(&place.namespace, key_of(&place.namespace, snapshot.id, key)).await
    }

    pub(super) async fn usage_at(&self, proxy: &Proxy, place: &Place, key: &str) -> Result<Usage> {
        let snapshot = self.row(place, key).await?;
        match snapshot.usage {
            Some(usage) if snapshot.info.kind() == Kind::Committed => Ok(usage),
            _ => proxy.usage(&place.namespace, key_of(&place.namespace, snapshot.id, key)).await,
        }
    }

    pub(super) async fn commit_at(&self, proxy: &Proxy, place: &Place, commit: Commit) -> Result<()> {
        let (at, asked) = (place.clone(), commit.clone());
        let id = self.store.read(move |db| commit::check(db, &at, &asked)).await?.snapshot.id;
        let _turn = self.committing.take(id).await;
        let (at, asked) = (place.clone(), commit.clone());
        self.store.read(move |db| commit::check(db, &at, &asked)).await?;
        let (key, name) = (key_of(&place.namespace, id, &commit.key), key_of(&place.namespace, id, &commit.name));
        proxy.commit(&place.namespace, key, name.clone(), inherited(&commit.labels)).await?;
        // it can be asked for later, too
        let usage = proxy.usage(&place.namespace, name).await.ok();
        let _pass = self.gate.enter().await?;
        self.record_commit(place, commit, id, usage).await
    }

    async fn row(&self, place: &Place, key: &str) -> Result<Snapshot> {
        let (at, wanted) = (place.clone(), key.to_owned());
        self.store.read(move |db| existing(db, &at, &wanted)).await
    }

    /// Has a proxy remove snapshots whose rows are gone, by namespace, number and key. Nothing waits for that.
    pub(super) fn remove_at(&self, proxy: &Proxy, removed: Vec<(String, i64, String)>) {
        let keys = removed.into_iter().map(|(namespace, number, key)| {
            let key = key_of(&namespace, number, &key);
            (namespace, key)
        });
        let (proxy, has_left, keys) = (proxy.clone(), self.has_left.clone(), keys.collect());
        tokio::spawn(async move { proxy.remove_all(keys, &has_left).await });
    }

    /// Has a proxy remove what it has of ours without a row, in all namespaces.
    pub(super) async fn cleanup_at(&self, proxy: &Proxy) -> Result<()> {
        let all = self.store.read(namespaces::list).await?;
        for namespace in all {
            let ours = proxy.ours(&namespace.name).await?;
            // what is being made has its row before
            let unknown = move |db: &Meta<'_>| {
                let mut unknown = Vec::new();
                for (key, parent, number) in ours {
                    if !store::snapshots::exists(db, number)? {
                        unknown.push((key, parent));
                    }
                }
                Ok(unknown)
            };
            proxy.remove_in_order(&namespace.name, self.store.read(unknown).await?).await?;
            proxy.cleanup(&namespace.name).await?;
        }
        Ok(())
    }

    /// Refuses a snapshotter that there is none of.
    pub(crate) fn check_name(&self, name: &str) -> Result<()> {
        if self.proxies.contains_key(name) { Ok(()) } else { super::Snapshotter::parse(name).map(drop) }
    }

    /// The proxies.
    pub(crate) fn proxies(&self) -> impl Iterator<Item = &Proxy> {
        self.proxies.values()
    }
}
