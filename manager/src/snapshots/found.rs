//! Snapshots that a client was about to make, or has looked for, and that are there already: the lease of its call holds them from then on, or a
//! collection could remove them before the client builds on them.

use containerd_client::services::v1::snapshots::{Info, Kind};

use super::Snapshots;
use crate::content::hold;
use crate::error::{Error, Result};
use crate::store::snapshots::{Place, kind_of};
use crate::store::{self, Meta, Resource, resources};

impl Snapshots {
    /// Looks at a snapshot. If it is committed, the lease holds it from then on: ctr skips a layer whose snapshot it sees, and puts the next one on it.
    pub(crate) async fn find(&self, place: &Place, key: &str, lease: Option<&str>) -> Result<Info> {
        let found = self.stat(place, key).await?;
        if found.kind() != Kind::Committed {
            return Ok(found);
        }
        match self.hold_found(place, key, lease).await {
            Ok(true) => Ok(found),
            // it has gone meanwhile
            Ok(false) => self.stat(place, key).await,
            // a lease that is not there holds nothing, and who only looks is answered also when nothing can be written
            Err(Error::NotFound(_) | Error::Retired) => Ok(found),
            Err(error) if error.is_full() => Ok(found),
            Err(error) => Err(error),
        }
    }

    /// Has a lease hold a snapshot; false if that is gone meanwhile.
    pub(super) async fn hold_found(&self, place: &Place, key: &str, lease: Option<&str>) -> Result<bool> {
        let Some(lease) = lease else { return Ok(true) };
        let found = Resource { kind: kind_of(&place.snapshotter), id: key.to_owned() };
        let (at, by, held) = (place.clone(), lease.to_owned(), found.clone());
        if self.store.read(move |db| Ok(resources::list(db, &at.namespace, &by)?.contains(&held))).await? {
            return Ok(true);
        }
        let _pass = self.gate.enter().await?;
        let (at, by) = (place.clone(), lease.to_owned());
        let write = move |db: &mut Meta<'_>| {
            let is_there = store::snapshots::get(db, &at, &found.id)?.is_some();
            hold(db, &at.namespace, Some(by.as_str()).filter(|_| is_there), &found.kind, &found.id)?;
            Ok(is_there)
        };
        self.store.write(write).await
    }
}
