//! The lease of a transfer: it holds everything until an image's row does.
//!
//! ```text
//! made ──▶ held by a transfer ──another process takes over──▶ marked, so that it does not end ──▶ owned by the transfer that goes on there
//!                 └──────────────────────────── removed ◀────────────────────────────────────────────────┘
//! ```

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use containerd_client::services::v1::Lease as Record;
use log::{debug, info};

use super::Transfers;
use crate::content::{self, Digest};
use crate::error::{Error, Result};
use crate::name::Namespace;
use crate::store::{Meta, Wanted, leases, namespaces};
use crate::{host, timestamp};

/// Where a transfer works, and what holds what it makes.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) namespace: Namespace,
    /// The client's, if it has one.
    pub(crate) lease: Option<String>,
    /// What this transfer has made when it began, in another process.
    pub(crate) begun: Option<String>,
}

/// Leases that transfers of this process have made.
#[derive(Debug, Default)]
pub(super) struct Leases(Mutex<BTreeSet<(Namespace, String)>>);

/// A lease for as long as this is held: the client's, or one of its own, which is removed then, whatever happens.
#[derive(Debug)]
pub(crate) struct Lease {
    transfers: Arc<Transfers>,
    namespace: Namespace,
    id: String,
    is_own: bool,
}

impl Transfers {
    /// The client's lease, or a new one.
    pub(crate) async fn lease(self: &Arc<Self>, place: &Place) -> Result<Lease> {
        let namespace = place.namespace.clone();
        if let Some(id) = &place.lease {
            return Ok(Lease { transfers: Arc::clone(self), namespace, id: id.clone(), is_own: false });
        }
        if let Some(id) = &place.begun
            && let Some(lease) = self.go_on(&namespace, id).await?
        {
            return Ok(lease);
        }
        let id = format!("transfer-{}", host::kernel_id("uuid")?);
        let mut until = timestamp::now();
        until.seconds += LONGEST_SECONDS;
        let labels = [(EXPIRE.to_owned(), until.to_string()), (TRANSFER.to_owned(), "1".to_owned())].into();
        let record = Record { id: id.clone(), created_at: Some(timestamp::now()), labels };
        let place = namespace.clone();
        let pass = self.gate.enter().await?;
        // before it is written: if the caller leaves meanwhile, it is removed
        let lease = Lease::own(self, namespace, id);
        self.store
            .write(move |db| {
                namespaces::ensure(db, place.as_str())?;
                leases::put(db, place.as_str(), &record.id, &record)?;
                leases::note_expiry(db, place.as_str(), &record)
            })
            .await?;
        drop(pass);
        Ok(lease)
    }
}

impl Transfers {
    /// The lease of a transfer that another process has begun, if it is there.
    async fn go_on(self: &Arc<Self>, namespace: &Namespace, id: &str) -> Result<Option<Lease>> {
        let (place, own) = (namespace.clone(), id.to_owned());
        let _pass = self.gate.enter().await?;
        let found = self.store.read(move |db| leases::get(db, place.as_str(), &own)).await?;
        let found = found.filter(|lease| lease.labels.contains_key(TRANSFER));
        Ok(found.map(|lease| Lease::own(self, namespace.clone(), lease.id)))
    }

    /// Marks leases of transfers which go on in the process that takes over. Nothing else changes the store meanwhile.
    pub(crate) async fn keep_leases(&self) -> Result<()> {
        let kept: Vec<_> = self.leases.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
        // also if there are none: changes whose callers have left without waiting for them are done before this one
        let mark = |db: &mut Meta<'_>| {
            for (namespace, id) in kept {
                if let Some(mut lease) = leases::get(db, namespace.as_str(), &id)? {
                    lease.labels.insert(TRANSFER.to_owned(), GOES_ON.to_owned());
                    leases::put(db, namespace.as_str(), &id, &lease)?;
                }
            }
            Ok(())
        };
        self.store.write(mark).await
    }

    /// Removes leases of transfers that another process has begun, and that have ended with it. Before the first one of this process. `takes_over`
    /// when that process runs, and its transfers go on here.
    pub(crate) async fn end_interrupted(&self, takes_over: bool) -> Result<()> {
        let _pass = self.gate.enter().await?;
        let remove = move |db: &mut Meta<'_>| {
            let wanted = [Wanted { key: TRANSFER.to_owned(), value: None }];
            let mut removed = 0;
            for namespace in namespaces::list(db)? {
                for lease in leases::page(db, &namespace.name, "", Some(&wanted), usize::MAX)? {
                    if takes_over && lease.labels.get(TRANSFER).is_some_and(|value| value == GOES_ON) {
                        continue;
                    }
                    removed += usize::from(leases::remove(db, &namespace.name, &lease.id)?);
                }
            }
            Ok(removed)
        };
        let removed = self.store.remove(remove).await?;
        if removed > 0 {
            info!(transfers = removed; "transfers were interrupted; what is left of them is collected");
        }
        Ok(())
    }
}

impl Lease {
    fn own(transfers: &Arc<Transfers>, namespace: Namespace, id: String) -> Self {
        transfers.leases.0.lock().unwrap_or_else(PoisonError::into_inner).insert((namespace.clone(), id.clone()));
        Self { transfers: Arc::clone(transfers), namespace, id, is_own: true }
    }

    /// Its id, if it is of this transfer.
    pub(crate) fn own_id(&self) -> Option<&str> {
        self.is_own.then_some(&*self.id)
    }

    /// Leaves it to the transfer that goes on in another process.
    pub(crate) fn leave(mut self) {
        self.is_own = false;
    }

    /// Its id.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Holds an image that is there, with all that its labels lead to: it may lose its name meanwhile.
    pub(super) async fn hold(&self, root: &Digest) -> Result<()> {
        let (namespace, id, root) = (self.namespace.clone(), self.id.clone(), root.to_string());
        let _pass = self.transfers.gate.enter().await?;
        self.transfers.store.write(move |db| content::hold(db, namespace.as_str(), Some(&id), "content", &root)).await
    }

    /// Removes it, if it is of this transfer: what it has held is collected, unless something else leads there.
    pub(crate) async fn end(mut self) -> Result<()> {
        if !self.is_own {
            return Ok(());
        }
        let (namespace, id) = (self.namespace.clone(), self.id.clone());
        let _pass = match self.transfers.gate.enter().await {
            Err(Error::Retired) if self.transfers.gate.is_succeeded() => {
                if let Err(error) = self.transfers.successor.end_lease(&namespace, &id).await {
                    debug!(error = error.chain(); "cannot remove the lease of a transfer, which expires");
                }
                self.is_own = false;
                return Ok(());
            }
            pass => pass?,
        };
        self.transfers.store.remove(move |db| leases::remove(db, namespace.as_str(), &id)).await?;
        // not before: if the caller leaves while this waits, dropping it removes it
        self.is_own = false;
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.transfers.leases.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&(self.namespace.clone(), self.id.clone()));
        if !self.is_own {
            return;
        }
        let (transfers, namespace, id) = (Arc::clone(&self.transfers), self.namespace.clone(), std::mem::take(&mut self.id));
        tokio::spawn(async move {
            let removed = match transfers.gate.enter().await {
                Ok(_pass) => transfers.store.remove(move |db| leases::remove(db, namespace.as_str(), &id)).await.map(drop),
                Err(_retired) if transfers.gate.is_succeeded() => transfers.successor.end_lease(&namespace, &id).await,
                // it expires, or the next process removes it
                Err(_retired) => return,
            };
            if let Err(error) = removed {
                debug!(error = error.chain(); "cannot remove the lease of a transfer, which expires");
            }
        });
    }
}

/// The label with the time from which on the collector takes something for garbage that nothing else leads to.
pub(super) const EXPIRE: &str = "containerd.io/gc.expire";
/// On leases of transfers.
const TRANSFER: &str = "x-manager/transfer";
/// The label's value once another process has the transfer.
const GOES_ON: &str = "goes on";
/// If this process is killed, and no other is started.
const LONGEST_SECONDS: i64 = 24 * 3600;

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::layers::testing::is_root;
    use crate::settings::Settings;

    #[tokio::test]
    async fn a_process_that_takes_over_finds_changes_done_whose_callers_have_left() {
        if !is_root() {
            return;
        }
        let folder = scratch::Folder::new("left-changes");
        let settings = Settings { root: folder.join("root"), state: folder.join("state"), ..Settings::default() };
        let parts = crate::parts::Parts::open(&settings).await.expect("a store");
        let (begun, begins) = mpsc::channel();
        let (end, ends) = mpsc::channel::<()>();
        let store = parts.store.clone();
        let caller = tokio::spawn(async move {
            let slow = move |db: &mut Meta<'_>| {
                begun.send(()).expect("the test waits");
                ends.recv().expect("the test ends it");
                namespaces::ensure(db, "late")
            };
            store.write(slow).await
        });
        tokio::task::spawn_blocking(move || begins.recv()).await.expect("no panic").expect("it runs");
        caller.abort();
        let mut kept = std::pin::pin!(parts.transfers.keep_leases());
        assert!(tokio::time::timeout(Duration::from_millis(20), kept.as_mut()).await.is_err(), "it waits for the change");
        end.send(()).expect("it runs");
        kept.await.expect("room");
        let found = parts.store.read(namespaces::list).await.expect("read");
        assert!(found.iter().any(|namespace| namespace.name == "late"), "{found:?}");
    }
}
