//! Which references are being written.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::lock;
use crate::error::{Error, Result};
use crate::timestamp;

/// References with a writer.
#[derive(Debug, Clone, Default)]
pub(super) struct References {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    held: Mutex<HashMap<String, Instant>>,
    released: Notify,
}

/// A reference that has no other writer.
#[derive(Debug)]
pub(super) struct Held {
    name: String,
    references: References,
}

impl References {
    /// Takes a reference, after a moment if another writer is about to release it.
    ///
    /// Errors: [`Error::Held`].
    pub(super) async fn take(&self, name: &str) -> Result<Held> {
        let waiting = async {
            loop {
                let released = self.inner.released.notified();
                let mut released = std::pin::pin!(released);
                released.as_mut().enable();
                if let Some(held) = self.try_take(name) {
                    return held;
                }
                released.await;
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(held) => Ok(held),
            Err(_elapsed) => {
                let age = lock(&self.inner.held).get(name).map(Instant::elapsed).unwrap_or_default();
                let since = timestamp::to_nanos(&timestamp::now()).saturating_sub(i64::try_from(age.as_nanos()).unwrap_or(i64::MAX));
                Err(Error::Held { reference: name.to_owned(), age, since: timestamp::from_nanos(since).to_string() })
            }
        }
    }

    /// Whether it has a writer.
    #[cfg(test)]
    pub(super) fn is_taken(&self, name: &str) -> bool {
        lock(&self.inner.held).contains_key(name)
    }

    /// The same at once.
    pub(super) fn try_take(&self, name: &str) -> Option<Held> {
        let mut held = lock(&self.inner.held);
        if held.contains_key(name) {
            return None;
        }
        held.insert(name.to_owned(), Instant::now());
        Some(Held { name: name.to_owned(), references: self.clone() })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        lock(&self.references.inner.held).remove(&self.name);
        self.references.inner.released.notify_waiters();
    }
}

/// As long as containerd retries.
const PATIENCE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_reference_has_one_writer_and_the_next_waits_for_a_moment() {
        let references = References::default();
        let first = references.take("n/r").await.expect("free");
        references.take("n/other").await.expect("another one");
        let refused = references.take("n/r").await.expect_err("taken");
        assert_eq!(refused.code(), tonic::Code::Unavailable);
        assert!(refused.to_string().starts_with("ref n/r locked for "), "{refused}");
        let release = async {
            tokio::time::sleep(PATIENCE / 2).await;
            drop(first);
        };
        assert!(tokio::join!(references.take("n/r"), release).0.is_ok());
    }
}
