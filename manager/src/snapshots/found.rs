//! Snapshots that a client was about to make, and that are there already: the lease of its call holds them from then on, or a collection could
//! remove them before the client builds on them.

use super::Snapshots;
use crate::content::hold;
use crate::error::Result;
use crate::store::snapshots::{Place, kind_of};
use crate::store::{self, Meta, Resource, resources};

impl Snapshots {
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
