//! Periodic upkeep: expired leases are removed, and free disk space and memory are returned.
//!
//! **Invariant:** nothing waits for any of it.

use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};

use crate::api::Calls;
use crate::error::Result;
use crate::gate::Gate;
use crate::store::{Store, images, leases};
use crate::sys::memory;
use crate::timestamp;

/// Does it until this process retires.
pub(crate) async fn run(store: Store, gate: Gate, all_calls: Arc<Calls>) {
    let (mut calls, mut rounds) = (0, 0);
    loop {
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = gate.retired() => return,
        }
        if let Err(error) = round(&store, &gate).await {
            warn!(error = error.chain(); "cannot tidy up the metadata store");
        }
        let now = all_calls.count();
        if now != std::mem::replace(&mut calls, now) {
            rounds = AFTERWARDS;
        }
        if rounds > 0 {
            rounds -= 1;
            memory::give_back();
        }
    }
}

async fn round(store: &Store, gate: &Gate) -> Result<()> {
    let now = timestamp::to_nanos(&timestamp::now());
    let has_expired = store.read(move |db| leases::have_expired(db, now)).await?;
    // what changes the store does not do so while another process takes over
    let Ok(_pass) = gate.enter().await else { return Ok(()) };
    if store.read(move |db| images::have_expired(db, now)).await? {
        // the collector removes them
        store.changed_like_a_removal();
    }
    if has_expired {
        let leases = store.remove(move |db| leases::remove_expired(db, now)).await?;
        info!(leases; "leases have expired");
    }
    store.shrink().await
}

/// Rounds in which memory is given back after the last call has begun: answers are read after calls have ended.
const AFTERWARDS: u32 = 6;
/// Between two rounds.
const INTERVAL: Duration = Duration::from_secs(5);
