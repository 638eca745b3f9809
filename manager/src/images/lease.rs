//! The lease of a transfer: it holds everything until an image's row does.

use std::sync::Arc;

use containerd_client::services::v1::Lease as Record;
use log::{debug, info};

use super::Transfers;
use crate::content::{self, Digest};
use crate::error::Result;
use crate::name::Namespace;
use crate::store::{Meta, Wanted, leases, namespaces};
use crate::{host, timestamp};

/// Where a transfer works, and what holds what it makes.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) namespace: Namespace,
    /// The client's, if it has one.
    pub(crate) lease: Option<String>,
}

/// A lease for as long as this is held: the client's, or one of its own, which is removed then, whatever happens.
#[derive(Debug)]
pub(super) struct Lease {
    transfers: Arc<Transfers>,
    namespace: Namespace,
    id: String,
    is_own: bool,
}

impl Transfers {
    /// The client's lease, or a new one.
    pub(super) async fn lease(self: &Arc<Self>, place: &Place) -> Result<Lease> {
        let namespace = place.namespace.clone();
        if let Some(id) = &place.lease {
            return Ok(Lease { transfers: Arc::clone(self), namespace, id: id.clone(), is_own: false });
        }
        let id = format!("transfer-{}", host::kernel_id("uuid")?);
        let mut until = timestamp::now();
        until.seconds += LONGEST_SECONDS;
        let labels = [(EXPIRE.to_owned(), until.to_string()), (TRANSFER.to_owned(), "1".to_owned())].into();
        let record = Record { id: id.clone(), created_at: Some(timestamp::now()), labels };
        let place = namespace.clone();
        let pass = self.gate.enter().await?;
        // before it is written: if the caller leaves meanwhile, it is removed
        let lease = Lease { transfers: Arc::clone(self), namespace, id, is_own: true };
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
    /// Removes leases of transfers that another process has begun, and that have ended with it. Before the first one of this process.
    pub(crate) async fn end_interrupted(&self) -> Result<()> {
        let _pass = self.gate.enter().await?;
        let remove = |db: &mut Meta<'_>| {
            let wanted = [Wanted { key: TRANSFER.to_owned(), value: None }];
            let mut removed = 0;
            for namespace in namespaces::list(db)? {
                for lease in leases::page(db, &namespace.name, "", Some(&wanted), usize::MAX)? {
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
    pub(super) async fn end(mut self) -> Result<()> {
        if !self.is_own {
            return Ok(());
        }
        let (namespace, id) = (self.namespace.clone(), self.id.clone());
        let _pass = self.transfers.gate.enter().await?;
        self.transfers.store.remove(move |db| leases::remove(db, namespace.as_str(), &id)).await?;
        // not before: if the caller leaves while this waits, dropping it removes it
        self.is_own = false;
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.is_own {
            return;
        }
        let (transfers, namespace, id) = (Arc::clone(&self.transfers), self.namespace.clone(), std::mem::take(&mut self.id));
        tokio::spawn(async move {
            // it expires otherwise
            let Ok(_pass) = transfers.gate.enter().await else { return };
            let removed = transfers.store.remove(move |db| leases::remove(db, namespace.as_str(), &id)).await;
            if let Err(error) = removed {
                debug!(error = error.chain(); "cannot remove the lease of a transfer, which expires");
            }
        });
    }
}

const EXPIRE: &str = "containerd.io/gc.expire";
/// On leases of transfers.
const TRANSFER: &str = "x-manager/transfer";
/// If this process is killed, and no other is started.
const LONGEST_SECONDS: i64 = 24 * 3600;
