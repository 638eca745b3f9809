//! Lists with filters.
//!
//! ```text
//! store: a page ─▶ another thread: the filters, within a time ─▶ answer, within its bound
//!          ▲──────────────── the next page ◀─┘
//! ```
//! **Invariant:** filters are evaluated neither by the store's thread, for which exits of tasks wait, nor by the executor's.
//!
//! Objects that exist throughout are listed once; those created or deleted meanwhile may be listed or not.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;

use super::body::MESSAGE_BYTES;
use crate::error::{Error, Result};
use crate::filter::{Fields, Filter};
use crate::name::Namespace;
use crate::pools::Pool;
use crate::store::{Meta, Store, Wanted};

/// Reads objects of a namespace that follow an id and have one of the labels, up to about this many bytes.
type Page<M> = Arc<dyn Fn(&Meta<'_>, &str, &str, Option<&[Wanted]>, usize) -> Result<Vec<M>> + Send + Sync>;

/// A list in progress.
pub(super) struct Search<M> {
    store: Store,
    filters: Filters,
    namespace: Namespace,
    filter: Filter,
    /// Those that can match have one of these labels.
    wanted: Option<Arc<[Wanted]>>,
    page: Page<M>,
    id: fn(&M) -> &String,
    /// The last one that was looked at.
    after: String,
    /// The time left for filters.
    left: Duration,
}

impl<M: Message + Fields + 'static> Search<M> {
    /// One from the first object on.
    ///
    /// Errors: the filters are invalid.
    pub(super) fn new(
        store: &Store,
        filters: &Filters,
        namespace: Namespace,
        conditions: &[String],
        page: impl Fn(&Meta<'_>, &str, &str, Option<&[Wanted]>, usize) -> Result<Vec<M>> + Send + Sync + 'static,
        id: fn(&M) -> &String,
    ) -> Result<Self> {
        let filter = Filter::parse(conditions)?;
        let wanted = filter.wanted_labels().map(Into::into);
        Ok(Self {
            store: store.clone(),
            filters: filters.clone(),
            namespace,
            filter,
            wanted,
            page: Arc::new(page),
            id,
            after: String::new(),
            left: FILTERING,
        })
    }

    /// Everything in one answer.
    ///
    /// Errors: [`Error::Exhausted`] when it is too long for one.
    pub(super) async fn all(mut self) -> Result<Vec<M>> {
        let (mut all, mut bytes) = (Vec::new(), 0);
        while let Some(found) = self.next().await? {
            bytes += found.iter().map(Message::encoded_len).sum::<usize>();
            if bytes > MESSAGE_BYTES {
                return Err(Error::Exhausted(format!("the list is longer than {MESSAGE_BYTES} bytes")));
            }
            all.extend(found);
        }
        Ok(all)
    }

    /// Page by page, as fast as they are read; none is empty.
    ///
    /// Errors: what went wrong before the first.
    pub(super) async fn pages(mut self) -> Result<impl Stream<Item = Result<Vec<M>>>> {
        let mut next = self.next().await?;
        let (send, found) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Some(page) = next {
                if !page.is_empty() && send.send(Ok(page)).await.is_err() {
                    return;
                }
                next = match self.next().await {
                    Ok(next) => next,
                    Err(error) => {
                        // the client may have disconnected
                        let _ = send.send(Err(error)).await;
                        return;
                    }
                };
            }
        });
        Ok(ReceiverStream::new(found))
    }

    /// One after the other, as fast as they are read.
    ///
    /// Errors: what went wrong before the first.
    pub(super) async fn each(mut self) -> Result<impl Stream<Item = Result<M>>> {
        let mut next = self.next().await?;
        let (send, found) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Some(page) = next {
                for object in page {
                    if send.send(Ok(object)).await.is_err() {
                        return;
                    }
                }
                next = match self.next().await {
                    Ok(next) => next,
                    Err(error) => {
                        // the client may have disconnected
                        let _ = send.send(Err(error)).await;
                        return;
                    }
                };
            }
        });
        Ok(ReceiverStream::new(found))
    }

    /// The matching objects of the next page; none after the last page.
    async fn next(&mut self) -> Result<Option<Vec<M>>> {
        let (page, namespace, after, wanted) = (Arc::clone(&self.page), self.namespace.clone(), self.after.clone(), self.wanted.clone());
        let found = self.store.read(move |db| page(db, namespace.as_str(), &after, wanted.as_deref(), PAGE_BYTES)).await?;
        let Some(last) = found.last() else { return Ok(None) };
        self.after = (self.id)(last).clone();
        let (kept, left) = self.filters.within(&self.filter, found, self.left).await?;
        self.left = left;
        Ok(Some(kept))
    }
}

/// Where the filters of lists are evaluated.
#[derive(Debug, Clone)]
pub(crate) struct Filters {
    pool: Pool,
}

impl Filters {
    /// On the threads of a pool.
    pub(crate) fn new(pool: Pool) -> Self {
        Self { pool }
    }

    /// The objects that match the filter.
    ///
    /// Errors: [`Error::Exhausted`] when evaluating takes too long.
    pub(super) async fn matching<M: Fields + Send + 'static>(&self, filter: &Filter, objects: Vec<M>) -> Result<Vec<M>> {
        self.within(filter, objects, FILTERING).await.map(|(kept, _left)| kept)
    }

    async fn within<M: Fields + Send + 'static>(&self, filter: &Filter, objects: Vec<M>, left: Duration) -> Result<(Vec<M>, Duration)> {
        if filter.is_for_everything() {
            return Ok((objects, left));
        }
        let filter = filter.clone();
        self.pool.run(move || keep(objects, &filter, left)).await?
    }
}

/// The matching objects, and the time left.
fn keep<M: Fields>(mut found: Vec<M>, filter: &Filter, left: Duration) -> Result<(Vec<M>, Duration)> {
    let begin = Instant::now();
    found.retain(|object| begin.elapsed() <= left && filter.accepts(object));
    match left.checked_sub(begin.elapsed()) {
        Some(left) => Ok((found, left)),
        None => Err(Error::Exhausted(format!("evaluating the filters took longer than {FILTERING:?}"))),
    }
}

/// What is read of the store at once, while its other callers wait.
const PAGE_BYTES: usize = 256 << 10;
/// For the filters of one list.
const FILTERING: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use containerd_client::services::v1::Container;
    use prost_types::Any;

    use super::*;
    use crate::settings::Settings;
    use crate::store::{containers, execs, namespaces};

    async fn filled(name: &str, count: usize, label: &str) -> (scratch::Folder, Store) {
        let folder = scratch::Folder::new(name);
        let settings = Settings { root: folder.join("root"), state: folder.join("state"), ..Settings::default() };
        let store = Store::open(&settings.store_files()).expect("a new store");
        let label = label.to_owned();
        let fill = move |db: &mut Meta<'_>| {
            namespaces::ensure(db, "n")?;
            for number in 0..count {
                let labels = HashMap::from([("long".to_owned(), label.clone())]);
                let container = Container { id: format!("c{number:04}"), labels, spec: Some(Any::default()), ..Container::default() };
                containers::put(db, "n", &container.id, &container)?;
            }
            Ok(())
        };
        store.write(fill).await.expect("room");
        (folder, store)
    }

    fn search(store: &Store, filters: &[String]) -> Search<Container> {
        let namespace = Namespace::parse("n").expect("a name");
        Search::new(store, &Filters::new(Pool::new("test", 2)), namespace, filters, containers::page, |container| &container.id)
            .expect("filters")
    }

    #[tokio::test]
    async fn all_pages_list_everything_once_and_an_oversized_answer_is_reported() {
        let (_folder, store) = filled("pages", 5000, &"x".repeat(4000)).await;
        let error = search(&store, &[]).all().await.expect_err("20 MB").to_string();
        assert!(error.contains("the list is longer than"), "{error}");
        let found = search(&store, &["id~=/^c.[05]00$/".to_owned()]).all().await.expect("a list");
        let ids: Vec<_> = found.iter().map(|container| container.id.as_str()).collect();
        assert_eq!(ids, ["c0000", "c0500", "c1000", "c1500", "c2000", "c2500", "c3000", "c3500", "c4000", "c4500"]);
        let mut each = std::pin::pin!(search(&store, &[]).each().await.expect("a list"));
        let mut count = 0;
        while let Some(container) = tokio_stream::StreamExt::next(&mut each).await {
            assert_eq!(container.expect("an object").id, format!("c{count:04}"));
            count += 1;
        }
        assert_eq!(count, 5000);
    }

    #[tokio::test]
    async fn labels_that_a_filter_wants_narrow_what_is_read_and_change_nothing_else() {
        let (_folder, store) = filled("labels", 0, "").await;
        let labels = |number: usize| {
            let mut labels = HashMap::new();
            labels.extend((number.is_multiple_of(2)).then(|| ("env".to_owned(), "prod".to_owned())));
            labels.extend((number.is_multiple_of(3)).then(|| ("a.b/c".to_owned(), number.to_string())));
            labels
        };
        let all: Vec<_> =
            (0..60).map(|number| Container { id: format!("c{number:02}"), labels: labels(number), ..Container::default() }).collect();
        let put = all.clone();
        let written = store.write(move |db| put.iter().try_for_each(|container| containers::put(db, "n", &container.id, container)));
        written.await.expect("room");
        let equal = |count: usize| (0..count).map(|number| format!("labels.\"a.b/c\"=={number}")).collect::<Vec<_>>();
        let (few, many, same) = (equal(8), equal(256), vec!["labels.env"; 256]);
        let [few, many] = [&few, &many].map(|filters| filters.iter().map(String::as_str).collect::<Vec<_>>());
        // each with how many are read
        for (filters, read) in [
            (&["labels.env==prod"][..], 30),
            (&["labels.env==dev"], 0),
            (&["labels.\"a.b/c\""], 20),
            (&["labels.\"a.b/c\"==6,id~=^c"], 1),
            (&["id~=5$,labels.env", "labels.\"a.b/c\"==9"], 31),
            (&["labels.env!=prod"], 60),
            (&["labels.env==prod", "id==c01"], 60),
            (&few, 3),
            (&same, 30),
            (&many, 60),
            (&[], 60),
        ] {
            let filter = Filter::parse(filters).expect("filters");
            let expected: Vec<_> = all.iter().filter(|container| filter.accepts(*container)).cloned().collect();
            let filters: Vec<_> = filters.iter().map(|filter| (*filter).to_owned()).collect();
            assert_eq!(search(&store, &filters).all().await.expect("a list"), expected, "{filters:?}");
            let wanted = filter.wanted_labels();
            let page = store.read(move |db| containers::page(db, "n", "", wanted.as_deref(), usize::MAX)).await.expect("a page");
            assert_eq!(page.len(), read, "{filters:?}");
        }
        let gone = store.remove(|db| Ok(containers::remove(db, "n", "c06")? && containers::get(db, "n", "c06")?.is_none()));
        assert!(gone.await.expect("removed"));
        let again = Container { id: "c06".to_owned(), ..Container::default() };
        store.write(move |db| containers::put(db, "n", "c06", &again)).await.expect("room");
        let found = store.read(|db| containers::get(db, "n", "c06")).await.expect("read").expect("it is there");
        assert!(found.labels.is_empty(), "labels go with their object: {:?}", found.labels);
    }

    #[tokio::test]
    async fn expensive_filters_delay_neither_the_store_nor_other_clients_and_are_cancelled() {
        let (_folder, store) = filled("slow", 1000, &"x".repeat(4000)).await;
        let slow: Vec<_> = (0..16).map(|number| format!("labels.long~=/(x?){{50}}y{number}/")).collect();
        let searching = tokio::spawn(search(&store, &slow).all());
        let (mut longest, mut count) = (Duration::ZERO, 0);
        while !searching.is_finished() {
            let begin = Instant::now();
            store.note(|db| execs::add(db, "n", "c", "e")).await.expect("room");
            longest = longest.max(begin.elapsed());
            count += 1;
        }
        println!("{count} notes meanwhile, the longest took {longest:?}");
        let error = searching.await.expect("no panic").expect_err("too slow");
        assert_eq!(error.code(), tonic::Code::ResourceExhausted, "{}", error.chain());
        // one that the filters delay takes as long as they may; a disk that stalls delays one or another, too
        assert!(count > 10, "{count} notes in {FILTERING:?}, the longest took {longest:?}");
    }
}
