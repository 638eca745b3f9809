//! Events: whoever subscribes hears everything from then on, in the order in which this daemon came to know it.
//!
//! ```text
//! shims ──Forward──▶┐
//! services ─publish─▶ exchange ─▶ a bounded queue per subscriber ─▶ its stream
//! clients ──Publish─▶┘                    │ full: dropped, and told so
//! ```
//! **Invariant:** publishing waits for nobody.

mod fields;

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use containerd_client::types::Envelope;
use log::warn;
use prost::{Message, Name};
use prost_types::{Any, Timestamp};
use tokio::sync::mpsc;
use tokio_stream::Stream;

use crate::error::{Error, Result};
use crate::filter::Filter;
use crate::name::Namespace;
use crate::settings::Limits;
use crate::timestamp;

/// Everybody who listens.
#[derive(Debug)]
pub(crate) struct Exchange {
    subscribers: Mutex<Vec<Subscriber>>,
    limits: Limits,
    published: AtomicU64,
}

#[derive(Debug)]
struct Subscriber {
    /// This process itself.
    is_own: bool,
    filter: Filter,
    queue: mpsc::UnboundedSender<Item>,
    /// Bytes in the queue.
    waiting: Arc<AtomicUsize>,
}

#[derive(Debug)]
enum Item {
    Event(Arc<Envelope>, usize),
    TooSlow,
}

impl Exchange {
    /// Nobody listens yet.
    pub(crate) fn new(limits: Limits) -> Self {
        Self { subscribers: Mutex::default(), limits, published: AtomicU64::new(0) }
    }

    fn subscribers(&self) -> MutexGuard<'_, Vec<Subscriber>> {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells everybody of something that happened now.
    pub(crate) fn publish(&self, namespace: &Namespace, topic: &str, event: &impl Name) {
        let event = Any { type_url: full_name(event), value: event.encode_to_vec() };
        self.forward(Envelope {
            timestamp: Some(timestamp::now()),
            namespace: namespace.to_string(),
            topic: topic.to_owned(),
            event: Some(event),
        });
    }

    /// Tells everybody what somebody else has put into an envelope.
    pub(crate) fn forward(&self, envelope: Envelope) {
        self.published.fetch_add(1, Ordering::Relaxed);
        let bytes = envelope.encoded_len() + OVERHEAD_BYTES;
        let envelope = Arc::new(envelope);
        self.subscribers().retain(|subscriber| {
            if !subscriber.filter.accepts(&*envelope) {
                return !subscriber.queue.is_closed();
            }
            let waiting = subscriber.waiting.fetch_add(bytes, Ordering::Relaxed) + bytes;
            // one that has read everything is not slow, however long the event
            if waiting > self.limits.event_queue_bytes && waiting > bytes {
                warn!(waiting; "a subscriber reads too slowly and is dropped");
                let _it_may_be_gone = subscriber.queue.send(Item::TooSlow);
                return false;
            }
            subscriber.queue.send(Item::Event(Arc::clone(&envelope), bytes)).is_ok()
        });
    }

    /// How many events there were.
    pub(crate) fn published(&self) -> u64 {
        self.published.load(Ordering::Relaxed)
    }

    /// How many clients listen.
    pub(crate) fn count(&self) -> usize {
        self.subscribers().iter().filter(|subscriber| !subscriber.is_own).count()
    }

    /// Listens from now on, for a client.
    ///
    /// Errors: [`Error::Exhausted`] when too many do.
    pub(crate) fn subscribe(&self, filter: Filter) -> Result<Subscription> {
        self.subscribers().retain(|subscriber| !subscriber.queue.is_closed());
        if self.count() >= self.limits.subscribers {
            return Err(Error::Exhausted(format!("{} clients are subscribed to events, which is the most", self.limits.subscribers)));
        }
        Ok(self.listen(filter, false))
    }

    /// Listens from now on, for this process itself.
    pub(crate) fn overhear(&self, filter: Filter) -> Subscription {
        self.listen(filter, true)
    }

    fn listen(&self, filter: Filter, is_own: bool) -> Subscription {
        let (queue, items) = mpsc::unbounded_channel();
        let waiting = Arc::default();
        self.subscribers().push(Subscriber { is_own, filter, queue, waiting: Arc::clone(&waiting) });
        Subscription { items, waiting }
    }
}

/// One listener's end. When it was dropped for being slow, its last item says so.
#[derive(Debug)]
pub(crate) struct Subscription {
    items: mpsc::UnboundedReceiver<Item>,
    waiting: Arc<AtomicUsize>,
}

impl Stream for Subscription {
    type Item = Result<Envelope, tonic::Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.items.poll_recv(cx).map(|item| match item? {
            Item::Event(envelope, bytes) => {
                self.waiting.fetch_sub(bytes, Ordering::Relaxed);
                Some(Ok(Arc::unwrap_or_clone(envelope)))
            }
            Item::TooSlow => {
                let sentence = "too many events were waiting to be read; those after them are lost".to_owned();
                Some(Err(Error::Exhausted(sentence).into()))
            }
        })
    }
}

/// Checks what a client wants to publish.
pub(crate) fn validate(envelope: &Envelope) -> Result<()> {
    Namespace::parse(&envelope.namespace)?;
    let topic = envelope.topic.as_str();
    let parts = topic.strip_prefix('/').ok_or_else(|| Error::Invalid(format!("topic {topic:?} must start with '/'")))?;
    for part in parts.split('/') {
        crate::name::identifier(&format!("topic {topic:?}"), part)?;
    }
    if envelope.timestamp.is_none() {
        return Err(Error::Invalid("timestamp must be set on forwarded event".to_owned()));
    }
    if envelope.encoded_len() > EVENT_BYTES {
        return Err(Error::Exhausted(format!("an event of {} bytes, but {EVENT_BYTES} are the most", envelope.encoded_len())));
    }
    Ok(())
}

/// The envelope of something that a client publishes now.
pub(crate) fn envelope(namespace: &Namespace, topic: String, event: Option<Any>) -> Envelope {
    let timestamp: Timestamp = timestamp::now();
    Envelope { timestamp: Some(timestamp), namespace: namespace.to_string(), topic, event }
}

fn full_name<M: Name>(_message: &M) -> String {
    M::full_name()
}

/// What an event costs beside its own bytes.
const OVERHEAD_BYTES: usize = 128;
/// The longest event.
const EVENT_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use containerd_client::events::TaskExit;
    use tokio_stream::StreamExt as _;

    use super::*;

    fn exit(exchange: &Exchange, id: &str) {
        let namespace = Namespace::parse("ns").expect("a name");
        exchange.publish(&namespace, "/tasks/exit", &TaskExit { container_id: id.to_owned(), ..TaskExit::default() });
    }

    async fn heard(subscription: &mut Subscription) -> Vec<String> {
        let mut heard = Vec::new();
        while let Ok(Some(Ok(envelope))) = tokio::time::timeout(std::time::Duration::from_millis(1), subscription.next()).await {
            let event = envelope.event.expect("an event");
            heard.push(TaskExit::decode(&*event.value).expect("an exit").container_id);
        }
        heard
    }

    #[tokio::test]
    async fn each_subscriber_receives_what_its_filter_accepts_in_order() {
        let exchange = Exchange::new(Limits::default());
        let mut all = exchange.subscribe(Filter::default()).expect("a place");
        let some = Filter::parse(&["topic==\"/tasks/exit\",event.container_id==b", "namespace==other"]).expect("a filter");
        let mut some = exchange.subscribe(some).expect("a place");
        for id in ["a", "b", "c"] {
            exit(&exchange, id);
        }
        assert_eq!(heard(&mut all).await, ["a", "b", "c"]);
        assert_eq!(heard(&mut some).await, ["b"]);
    }

    #[tokio::test]
    async fn a_subscriber_that_never_reads_is_dropped_with_an_error_and_costs_no_more() {
        let exchange = Exchange::new(Limits::default());
        let mut slow = exchange.subscribe(Filter::default()).expect("a place");
        let long = "x".repeat(100_000);
        for _event in 0..100 {
            exit(&exchange, &long);
        }
        assert!(exchange.subscribers().is_empty());
        assert!(slow.waiting.load(Ordering::Relaxed) < Limits::default().event_queue_bytes + 200_000);
        let mut count = 0;
        let last = loop {
            match slow.next().await {
                Some(Ok(_)) => count += 1,
                last => break last,
            }
        };
        assert!((30..42).contains(&count), "{count}");
        assert_eq!(last.and_then(Result::err).map(|status| status.code()), Some(tonic::Code::ResourceExhausted));
        assert!(slow.next().await.is_none());
    }

    #[tokio::test]
    async fn the_number_of_subscribers_is_bounded_and_places_come_back() {
        let exchange = Exchange::new(Limits::default());
        let mut held: Vec<_> =
            (0..Limits::default().subscribers).map(|_| exchange.subscribe(Filter::default()).expect("a place")).collect();
        assert!(exchange.subscribe(Filter::default()).is_err());
        held.pop();
        assert!(exchange.subscribe(Filter::default()).is_ok());
    }

    #[test]
    fn what_clients_publish_is_checked() {
        let good = Envelope { timestamp: Some(timestamp::now()), namespace: "ns".into(), topic: "/a/b-c".into(), event: None };
        assert!(validate(&good).is_ok());
        for topic in ["", "a", "/", "/a/", "/a b", "//a"] {
            assert!(validate(&Envelope { topic: topic.into(), ..good.clone() }).is_err(), "{topic}");
        }
        assert!(validate(&Envelope { namespace: "a/b".into(), ..good.clone() }).is_err());
        assert!(validate(&Envelope { timestamp: None, ..good.clone() }).is_err());
        let event = Some(Any { type_url: String::new(), value: vec![0; 2 << 20] });
        assert!(validate(&Envelope { event, ..good }).is_err());
    }
}
