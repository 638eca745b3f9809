//! Filters of one subscription, evaluated on another thread than the serving one.
//!
//! **Invariant:** accepted events keep their order, and the reason for the end comes last.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use log::{error, warn};
use tokio::sync::mpsc;

use super::Item;
use crate::error::Error;
use crate::filter::{Allowance, Costly, Filter};
use crate::pools::Pool;

/// Forwards events that the filter accepts until the subscription or its client ends, or the filter exceeds its CPU time.
pub(super) async fn run(
    mut all: mpsc::UnboundedReceiver<Item>,
    accepted: mpsc::UnboundedSender<Item>,
    filter: Filter,
    waiting: Arc<AtomicUsize>,
    pool: Pool,
) {
    let (filter, mut allowance) = (Arc::new(filter), Allowance::of(AT_ONCE));
    loop {
        let mut items = Vec::new();
        tokio::select! {
            count = all.recv_many(&mut items, BATCH) => if count == 0 { return },
            () = accepted.closed() => return,
        }
        let (filter, waiting) = (Arc::clone(&filter), Arc::clone(&waiting));
        let evaluated = pool.run(move || blocking_keep(items, &filter, allowance, &waiting)).await;
        let (kept, left) = evaluated.unwrap_or_else(|reason| {
            error!(error = reason.chain(); "cannot evaluate filters");
            (vec![Item::Last(reason)], Err(Costly))
        });
        for item in kept {
            // without its client the next turn ends it
            let _ = accepted.send(item);
        }
        match left {
            Ok(left) => allowance = left,
            Err(Costly) => return,
        }
    }
}

fn blocking_keep(
    items: Vec<Item>,
    filter: &Filter,
    mut allowance: Allowance,
    waiting: &AtomicUsize,
) -> (Vec<Item>, Result<Allowance, Costly>) {
    let mut kept = Vec::new();
    for item in items {
        let Item::Event(envelope, bytes) = &item else {
            kept.push(item);
            continue;
        };
        allowance.add(EACH, AT_ONCE);
        match filter.accepts_within(&**envelope, &mut allowance) {
            Ok(true) => kept.push(item),
            Ok(false) => {
                waiting.fetch_sub(*bytes, Ordering::Relaxed);
            }
            Err(Costly) => {
                warn!("filters of a subscriber exceed their CPU time, it is dropped");
                let sentence = format!(
                    "the filters of this subscription take more than {AT_ONCE:?} of CPU time at once, or {EACH:?} per event on average; use fewer or shorter patterns"
                );
                kept.push(Item::Last(Error::Exhausted(sentence)));
                return (kept, Err(Costly));
            }
        }
    }
    (kept, Ok(allowance))
}

/// Events of one turn, during which other subscriptions wait.
const BATCH: usize = 64;
/// CPU time that filters may use at once.
const AT_ONCE: Duration = Duration::from_millis(100);
/// CPU time that each event adds, up to the same limit.
const EACH: Duration = Duration::from_millis(1);
