//! Periodic upkeep: expired leases are removed, and free disk space and memory are returned.
//!
//! **Invariant:** nothing waits for any of it.

use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};

use crate::error::Result;
use crate::manager::Manager;
use crate::store::leases;
use crate::sys::memory;
use crate::timestamp;

/// Does it until this process retires.
pub(crate) async fn run(manager: Arc<Manager>) {
    let (mut calls, mut rounds) = (0, 0);
    loop {
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = manager.gate.retired() => return,
        }
        if let Err(error) = round(&manager).await {
            warn!(error = error.chain(); "cannot tidy up the metadata store");
        }
        let now = manager.calls.count();
        if now != std::mem::replace(&mut calls, now) {
            rounds = AFTERWARDS;
        }
        if rounds > 0 {
            rounds -= 1;
            memory::give_back();
        }
    }
}

async fn round(manager: &Manager) -> Result<()> {
    let now = timestamp::to_nanos(&timestamp::now());
    let has_expired = manager.store.read(move |db| leases::have_expired(db, now)).await?;
    // what changes the store does not do so while another process takes over
    let Ok(_pass) = manager.gate.enter().await else { return Ok(()) };
    if has_expired {
        let leases = manager.store.remove(move |db| leases::remove_expired(db, now)).await?;
        info!(leases; "leases have expired");
    }
    manager.store.shrink().await
}

/// Rounds in which memory is given back after the last call has begun: answers are read after calls have ended.
const AFTERWARDS: u32 = 6;
/// Between two rounds.
const INTERVAL: Duration = Duration::from_secs(5);
