//! What the daemon does with snapshots of proxies: the same as with its own, but for the files.
//!
//! A proxy may have a layer by itself, fetched in its own way: it answers AlreadyExists to a Prepare for it, and the layer gets a row, with the
//! proxy's own name of it. The client finds that row, and neither fetches nor unpacks the layer.

use containerd_client::services::v1::snapshots::Kind;
use containerd_client::types::Mount;
use log::{debug, warn};

use super::commit::{self, Commit};
use super::prepare::{self, New};
use super::proxy::{Proxy, inherited, key_of};
use super::{Snapshots, existing, parent};
use crate::content::hold;
use crate::error::{Error, Object, Result};
use crate::store::snapshots::{Place, Snapshot, Usage, kind_of};
use crate::store::{self, Meta, Resource, namespaces, resources};

impl Snapshots {
    /// The proxy that serves a snapshotter, if one does.
    pub(super) fn proxy(&self, snapshotter: &str) -> Option<&Proxy> {
        self.proxies.get(snapshotter)
    }

    /// Whether another process serves a snapshotter.
    pub(crate) fn has_proxy(&self, snapshotter: &str) -> bool {
        self.proxies.contains_key(snapshotter)
    }

    /// Whether a proxy has a snapshot by itself.
    pub(crate) async fn is_had_by_proxy(&self, place: &Place, key: &str) -> Result<bool> {
        let (at, key) = (place.clone(), key.to_owned());
        let had = self.store.read(move |db| match store::snapshots::get(db, &at, &key)? {
            Some(snapshot) => Ok(store::proxied::name(db, snapshot.id)?.is_some()),
            None => Ok(false),
        });
        had.await
    }

    pub(super) async fn prepare_at(&self, proxy: &Proxy, place: &Place, new: New) -> Result<Vec<Mount>> {
        let (at, asked) = (place.clone(), new.clone());
        let insert = move |db: &mut Meta<'_>| {
            let chain = prepare::check(db, &at, &asked)?;
            namespaces::ensure(db, &at.namespace)?;
            let id = store::snapshots::insert(db, &at, &asked.key, chain.first().copied(), asked.kind, &asked.labels)?;
            hold(db, &at.namespace, asked.lease.as_deref(), &kind_of(&at.snapshotter), &asked.key)?;
            let above = if asked.parent.is_empty() {
                String::new()
            } else {
                name_of(db, &at.namespace, parent(db, &at, &asked.parent)?.id, &asked.parent)?
            };
            Ok((id, above))
        };
        let inserted = {
            let _pass = self.gate.enter().await?;
            self.store.write(insert).await
        };
        if let Err(Error::AlreadyExists(Object::TargetSnapshot(target))) = &inserted {
            // if it is gone again, the client finds that out, and repeats
            self.hold_found(place, target, new.lease.as_deref()).await?;
        }
        let (id, above) = inserted?;
        let key = key_of(&place.namespace, id, &new.key);
        let made = proxy.make(&place.namespace, key, above.clone(), new.kind == Kind::View, inherited(&new.labels)).await;
        if let Err(error) = &made {
            let (at, key, lease) = (place.clone(), new.key.clone(), new.lease.clone());
            let pass = self.gate.enter().await?;
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
                drop(pass);
                return Err(self.adopt(proxy, place, new, &above, error).await?);
            }
        }
        made
    }

    /// Gives a row to a layer that a proxy has by itself. Returns what tells the client that it is there.
    ///
    /// Errors: the client names no layer, or the proxy has none of that name on that parent.
    async fn adopt(&self, proxy: &Proxy, place: &Place, new: New, above: &str, answer: &Error) -> Result<Error> {
        let of_it = |why: &str| Error::Precondition(format!("{}; {why}", answer.chain()));
        let target = new.target().ok_or_else(|| of_it("and its client asked for no layer"))?.to_owned();
        // it is not removed meanwhile, as one that no row has any more
        let _turn = proxy.turn().await;
        let found = proxy.find(&place.namespace, &target, above).await?;
        let name = found.ok_or_else(|| of_it("but it lists no such snapshot that is committed"))?;
        let at = place.clone();
        let insert = move |db: &mut Meta<'_>| {
            // another client may have been first
            if store::snapshots::get(db, &at, &target)?.is_none() {
                let above = if new.parent.is_empty() { None } else { Some(parent(db, &at, &new.parent)?.id) };
                let id = store::snapshots::insert(db, &at, &target, above, Kind::Committed, &inherited(&new.labels))?;
                store::proxied::put(db, id, &at, &name)?;
            }
            hold(db, &at.namespace, new.lease.as_deref(), &kind_of(&at.snapshotter), &target)?;
            Ok(target)
        };
        let _pass = self.gate.enter().await?;
        let target = self.store.write(insert).await?;
        debug!(snapshotter = place.snapshotter, snapshot = target; "a proxy has a layer by itself");
        Ok(Error::AlreadyExists(Object::TargetSnapshot(target)))
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
            _ => {
                let (namespace, id, of) = (place.namespace.clone(), snapshot.id, key.to_owned());
                let name = self.store.read(move |db| name_of(db, &namespace, id, &of)).await?;
                proxy.usage(&place.namespace, name).await
            }
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
        let (this, proxy) = (self.clone(), proxy.clone());
        tokio::spawn(async move {
            let name = proxy.plugin.name.clone();
            let left = this.store.read(move |db| store::proxied::left(db, &name)).await;
            // without it they are asked for under names that the proxy does not have, and a later collection finds them
            let left = left.unwrap_or_default();
            let is_own = |(_, number, _): &(String, i64, String)| left.iter().all(|left| left.number != *number);
            let keys = removed.into_iter().filter(is_own).map(|(namespace, number, key)| {
                let key = key_of(&namespace, number, &key);
                (namespace, key)
            });
            // children first: what is on the proxy's own layers is ours
            proxy.remove_all(keys.collect(), &this.has_left).await;
            if !left.is_empty()
                && let Err(error) = this.remove_left(&proxy).await
            {
                this.has_left.store(true, std::sync::atomic::Ordering::Relaxed);
                warn!(snapshotter = proxy.plugin.name.as_str(), error = error.chain(); "cannot remove layers of a proxy; a later collection tries again");
            }
        });
    }

    /// Has a proxy remove its own layers whose rows are gone.
    async fn remove_left(&self, proxy: &Proxy) -> Result<()> {
        let _turn = proxy.turn().await;
        let of = proxy.plugin.name.clone();
        let left = self.store.read(move |db| store::proxied::left(db, &of)).await?;
        for left in left {
            let place = Place { namespace: left.namespace.clone(), snapshotter: proxy.plugin.name.clone() };
            let name = left.name.clone();
            // it may have got another row
            if !self.store.read(move |db| store::proxied::is_used(db, &place, &name)).await? {
                proxy.remove(&left.namespace, &left.name).await?;
            }
            let _pass = self.gate.enter().await?;
            self.store.write(move |db| store::proxied::forget(db, left.number)).await?;
        }
        Ok(())
    }

    /// Has a proxy remove what it has of ours without a row, in all namespaces.
    pub(super) async fn cleanup_at(&self, proxy: &Proxy) -> Result<()> {
        self.remove_left(proxy).await?;
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

/// What a proxy calls a snapshot: made of its number and key, or a name of its own.
fn name_of(db: &Meta<'_>, namespace: &str, number: i64, key: &str) -> Result<String> {
    Ok(store::proxied::name(db, number)?.unwrap_or_else(|| key_of(namespace, number, key)))
}
