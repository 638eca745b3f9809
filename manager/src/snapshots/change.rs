//! Changes of labels.

use std::collections::HashMap;

use containerd_client::services::v1::snapshots::Info;

use super::{Snapshots, existing};
use crate::error::Result;
use crate::name;
use crate::store::snapshots::Place;
use crate::store::{self, Meta};

/// A change of a snapshot's labels.
pub(crate) type Change = Box<dyn FnOnce(&mut HashMap<String, String>) + Send>;

impl Snapshots {
    /// Changes the labels of a snapshot, and returns what clients see of it then.
    pub(crate) async fn relabel(&self, place: &Place, key: &str, change: Change) -> Result<Info> {
        let (place, key) = (place.clone(), key.to_owned());
        let write = move |db: &mut Meta<'_>| {
            let mut labels = existing(db, &place, &key)?.info.labels;
            change(&mut labels);
            name::labels(&labels)?;
            store::snapshots::update(db, &place, &key, &labels)?;
            Ok(existing(db, &place, &key)?.info)
        };
        self.store.write(write).await
    }
}
