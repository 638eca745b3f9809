//! Progress of a transfer, as clients show it: containerd's names of what happens, and parts by the names of their ingests.
//!
//! Work never waits for a client that reads slowly: what has not been read yet is replaced by what is newer of the same part.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::document::Descriptor;

/// Something that happened.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Event {
    /// What: a sentence, or one of the words of [`word`].
    pub(crate) event: String,
    /// The part that it is about; empty for all of the transfer.
    pub(crate) name: String,
    pub(crate) parents: Vec<String>,
    /// Bytes of the part, if it has any.
    pub(crate) progress: u64,
    pub(crate) total: u64,
    pub(crate) descriptor: Option<Descriptor>,
}

/// What happens to a part.
pub(super) mod word {
    pub(crate) const WAITING: &str = "waiting";
    pub(crate) const DOWNLOADING: &str = "downloading";
    pub(crate) const UPLOADING: &str = "uploading";
    pub(crate) const IMPORTING: &str = "importing";
    pub(crate) const EXPORTING: &str = "exporting";
    pub(crate) const COMPLETE: &str = "complete";
    pub(crate) const EXISTS: &str = "already exists";
    pub(crate) const EXTRACTING: &str = "extracting";
    pub(crate) const EXTRACTED: &str = "extracted";
    pub(crate) const SAVED: &str = "saved";
}

/// Where a transfer reports; cheap to clone. Without a reader it does nothing.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress(Option<Arc<Shared>>);

/// The other end. Once it is dropped, nothing is kept.
#[derive(Debug)]
pub(crate) struct Reader(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Event>,
    /// Parents of parts that were reported.
    parents: HashMap<String, Vec<String>>,
    has_ended: bool,
    is_read: bool,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    /// One that is read.
    pub(crate) fn new() -> (Self, Reader) {
        let shared = Arc::new(Shared::default());
        shared.queue().is_read = true;
        (Self(Some(Arc::clone(&shared))), Reader(shared))
    }

    /// Reports a sentence about all of the transfer.
    pub(super) fn overall(&self, event: String) {
        self.report(Event { event, ..Event::default() });
    }

    /// Reports what happened to an image, by its name.
    pub(super) fn image(&self, event: &str, name: &str, target: &Descriptor) {
        let (event, name, descriptor) = (event.to_owned(), name.to_owned(), Some(target.clone()));
        self.report(Event { event, name, descriptor, ..Event::default() });
    }

    /// Reports how far something is that has no descriptor.
    pub(super) fn named(&self, event: &str, name: &str, progress: u64, total: u64) {
        let (event, name) = (event.to_owned(), name.to_owned());
        self.report(Event { event, name, progress, total, ..Event::default() });
    }

    /// Reports that a part is to come. Its parents are kept for what follows.
    pub(super) fn waits(&self, part: &Descriptor, parents: &[String]) {
        let Some(shared) = &self.0 else { return };
        let name = part.reference();
        if shared.queue().parents.insert(name, parents.to_vec()).is_none() {
            self.part(word::WAITING, part, 0);
        }
    }

    /// Reports how far a part is.
    pub(super) fn part(&self, event: &str, part: &Descriptor, progress: u64) {
        let Some(shared) = &self.0 else { return };
        let name = part.reference();
        let parents = shared.queue().parents.get(&name).cloned().unwrap_or_default();
        let (event, descriptor) = (event.to_owned(), Some(part.clone()));
        self.report(Event { event, name, parents, progress, total: part.size, descriptor });
    }

    fn report(&self, event: Event) {
        let Some(shared) = &self.0 else { return };
        let mut queue = shared.queue();
        if !queue.is_read {
            return;
        }
        let is_newer = |old: &Event| !event.name.is_empty() && old.name == event.name && old.event == event.event;
        match queue.events.iter().rposition(is_newer) {
            Some(place) => queue.events[place] = event,
            None if queue.events.len() >= MOST_EVENTS => return,
            None => queue.events.push_back(event),
        }
        drop(queue);
        shared.changed.notify_one();
    }

    /// Reports that there is no more.
    pub(crate) fn end(&self) {
        let Some(shared) = &self.0 else { return };
        shared.queue().has_ended = true;
        shared.changed.notify_one();
    }
}

impl Reader {
    /// What happened next; none at the end.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        loop {
            let changed = self.0.changed.notified();
            {
                let mut queue = self.0.queue();
                if let Some(event) = queue.events.pop_front() {
                    return Some(event);
                }
                if queue.has_ended {
                    return None;
                }
            }
            changed.await;
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        queue.is_read = false;
        queue.events.clear();
    }
}

/// That have not been read: some for each part of a large image.
const MOST_EVENTS: usize = 20_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::Digest;

    #[tokio::test]
    async fn a_slow_reader_gets_the_newest_of_each_part_and_every_word() {
        let (progress, mut reader) = Progress::new();
        let part = Descriptor::new("application/vnd.oci.image.layer.v1.tar", Digest::of_sha256(&[7; 32]), 100);
        progress.overall("Importing".to_owned());
        progress.waits(&part, &["i".to_owned()]);
        progress.waits(&part, &["i".to_owned()]);
        for bytes in 0..50 {
            progress.part(word::DOWNLOADING, &part, bytes);
        }
        progress.part(word::COMPLETE, &part, 100);
        progress.end();
        let mut words = Vec::new();
        while let Some(event) = reader.next().await {
            assert!(event.name.is_empty() || event.parents == ["i"], "{event:?}");
            words.push((event.event, event.progress));
        }
        let expected = [("Importing", 0), (word::WAITING, 0), (word::DOWNLOADING, 49), (word::COMPLETE, 100)];
        assert_eq!(words, expected.map(|(word, bytes)| (word.to_owned(), bytes)));
        drop(reader);
        progress.overall("there is no reader".to_owned());
        assert!(progress.0.expect("it was read").queue().events.is_empty());
    }
}
