//! Events: from its subscription on, a subscriber receives every event that its filters accept, in the order of publication.
//!
//! ```text
//! shims ──Forward──▶┐                                        ┌── filters, on another thread ───┐
//! services ─publish─▶ exchange ─▶ a bounded queue per client ─┤                                 ├─▶ its stream
//! clients ──Publish─▶┘                                        └── no filters ───────────────────┘
//! ```
//! A full queue, a costly filter and the end of this process end a stream with an error, after its queue is delivered. Across an upgrade the
//! streams of the old process end, and the new one queues events for their clients until they subscribe again.
//!
//! **Invariant:** publishing waits for no subscriber and evaluates no filter.

mod fields;
mod sandbox;
mod sieve;

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use containerd_client::types::Envelope;
use log::warn;
use prost::{Message, Name};
use prost_types::{Any, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_stream::Stream;

pub(crate) use sandbox::{SandboxCreate, SandboxExit, SandboxStart};

use crate::error::{Error, Result};
use crate::filter::Filter;
use crate::name::Namespace;
use crate::pools::Pool;
use crate::settings::Limits;
use crate::timestamp;

/// All subscribers.
#[derive(Debug)]
pub(crate) struct Exchange {
    subscribers: Mutex<Vec<Subscriber>>,
    /// Subscriptions of clients whose streams the previous process has ended.
    awaited: Mutex<Vec<(Client, Subscription)>>,
    limits: Limits,
    published: AtomicU64,
    is_retired: AtomicBool,
    /// Evaluates filters.
    filters: Pool,
}

#[derive(Debug)]
struct Subscriber {
    /// None for this process itself.
    client: Option<Client>,
    queue: mpsc::UnboundedSender<Item>,
    /// Bytes in the queues, up to the client.
    waiting: Arc<AtomicUsize>,
}

/// Identifies a client that subscribes again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Client {
    /// Its process; 0 if that is not known.
    pub(crate) pid: i32,
    /// Its filters.
    pub(crate) filters: Vec<String>,
}

#[derive(Debug)]
enum Item {
    Event(Arc<Envelope>, usize),
    /// Why the stream ends.
    Last(Error),
}

impl Exchange {
    /// One without subscribers.
    pub(crate) fn new(limits: Limits, filters: Pool) -> Self {
        Self {
            subscribers: Mutex::default(),
            awaited: Mutex::default(),
            limits,
            published: AtomicU64::new(0),
            is_retired: AtomicBool::new(false),
            filters,
        }
    }

    fn subscribers(&self) -> MutexGuard<'_, Vec<Subscriber>> {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn awaited(&self) -> MutexGuard<'_, Vec<(Client, Subscription)>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes an event of this daemon, with the current time.
    pub(crate) fn publish(&self, namespace: &Namespace, topic: &str, event: &impl Name) {
        let event = Any { type_url: full_name(event), value: event.encode_to_vec() };
        self.forward(Envelope {
            timestamp: Some(timestamp::now()),
            namespace: namespace.to_string(),
            topic: topic.to_owned(),
            event: Some(event),
        });
    }

    /// Publishes an event of a shim or a client.
    pub(crate) fn forward(&self, envelope: Envelope) {
        self.published.fetch_add(1, Ordering::Relaxed);
        let bytes = envelope.encoded_len() + OVERHEAD_BYTES;
        let envelope = Arc::new(envelope);
        self.subscribers().retain(|subscriber| {
            let waiting = subscriber.waiting.fetch_add(bytes, Ordering::Relaxed) + bytes;
            // a subscriber with an empty queue is not slow, however long the event
            if waiting > self.limits.event_queue_bytes && waiting > bytes {
                warn!(waiting; "a subscriber reads too slowly and is dropped");
                let sentence = "too many events were waiting to be read; those after them are lost".to_owned();
                let _it_may_be_gone = subscriber.queue.send(Item::Last(Error::Exhausted(sentence)));
                return false;
            }
            subscriber.queue.send(Item::Event(Arc::clone(&envelope), bytes)).is_ok()
        });
    }

    /// How many events were published.
    pub(crate) fn published(&self) -> u64 {
        self.published.load(Ordering::Relaxed)
    }

    /// How many clients are subscribed.
    pub(crate) fn count(&self) -> usize {
        self.clients().len()
    }

    /// Bytes of events queued for filters or subscribers.
    pub(crate) fn waiting(&self) -> usize {
        self.subscribers().iter().map(|subscriber| subscriber.waiting.load(Ordering::Relaxed)).sum()
    }

    /// The clients that are subscribed.
    pub(crate) fn clients(&self) -> Vec<Client> {
        let subscribers = self.subscribers();
        subscribers.iter().filter(|subscriber| !subscriber.queue.is_closed()).filter_map(|subscriber| subscriber.client.clone()).collect()
    }

    /// Subscribes a client from now on; one that lost its stream in an upgrade continues where that ended.
    ///
    /// Errors: [`Error::Invalid`] for invalid filters, [`Error::Exhausted`] when too many are subscribed.
    pub(crate) fn subscribe(&self, client: Client) -> Result<Subscription> {
        let filter = Filter::parse(&client.filters)?;
        {
            let mut awaited = self.awaited();
            if let Some(index) = awaited.iter().position(|(waits_for, _)| *waits_for == client) {
                return Ok(awaited.remove(index).1);
            }
        }
        if self.is_retired.load(Ordering::Relaxed) {
            return Err(Error::Unsubscribed);
        }
        self.subscribers().retain(|subscriber| !subscriber.queue.is_closed());
        if self.count() >= self.limits.subscribers {
            return Err(Error::Exhausted(format!("{} clients are subscribed to events, the maximum", self.limits.subscribers)));
        }
        Ok(self.begin(filter, Some(client)))
    }

    /// Subscribes this process itself.
    pub(crate) fn overhear(&self) -> Subscription {
        self.begin(Filter::default(), None)
    }

    /// Queues events for clients whose streams the previous process ends, until they subscribe again: half a minute at most.
    pub(crate) fn expect(self: &Arc<Self>, clients: Vec<Client>) {
        for client in clients {
            // filters that this process does not support are refused when their client subscribes again
            if let Ok(filter) = Filter::parse(&client.filters) {
                let subscription = self.begin(filter, Some(client.clone()));
                self.awaited().push((client, subscription));
            }
        }
        let exchange = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(EXPECTED).await;
            exchange.awaited().clear();
        });
    }

    /// Ends all streams of clients, after what is in their queues.
    pub(crate) fn retire(&self) {
        self.is_retired.store(true, Ordering::Relaxed);
        self.subscribers().retain(|subscriber| {
            subscriber.client.is_none() || {
                let _it_may_be_gone = subscriber.queue.send(Item::Last(Error::Unsubscribed));
                false
            }
        });
    }

    fn begin(&self, filter: Filter, client: Option<Client>) -> Subscription {
        let (queue, mut items) = mpsc::unbounded_channel();
        let waiting = Arc::default();
        self.subscribers().push(Subscriber { client, queue, waiting: Arc::clone(&waiting) });
        if !filter.is_for_everything() {
            let (accepted, rest) = mpsc::unbounded_channel();
            let all = std::mem::replace(&mut items, rest);
            tokio::spawn(sieve::run(all, accepted, filter, Arc::clone(&waiting), self.filters.clone()));
        }
        Subscription { items, waiting }
    }
}

/// The receiving end of a subscription. Its last item may be the reason why it ended.
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
            Item::Last(reason) => Some(Err(reason.into())),
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
        return Err(Error::Exhausted(format!("an event of {} bytes; the maximum is {EVENT_BYTES}", envelope.encoded_len())));
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

/// For a client to subscribe again after an upgrade; the previous process lets it read its queue for half of that.
const EXPECTED: Duration = Duration::from_secs(30);
/// The overhead of a queued event.
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

    fn client(filters: &[&str]) -> Client {
        Client { pid: 7, filters: filters.iter().map(|filter| (*filter).to_owned()).collect() }
    }

    fn new() -> Arc<Exchange> {
        Arc::new(Exchange::new(Limits::default(), Pool::new("test", 1)))
    }

    /// The container ids of this many exits.
    async fn received(subscription: &mut Subscription, count: usize) -> Vec<String> {
        let mut received = Vec::new();
        while received.len() < count {
            let envelope = subscription.next().await.expect("more events").expect("an event");
            received.push(TaskExit::decode(&*envelope.event.expect("an event").value).expect("an exit").container_id);
        }
        received
    }

    #[tokio::test]
    async fn each_subscriber_hears_what_its_filter_accepts_in_order_and_then_why_it_ends() {
        let exchange = new();
        let mut all = exchange.subscribe(client(&[])).expect("a place");
        let filters = ["topic==\"/tasks/exit\",event.container_id~=\"[bd]\"", "namespace==other"];
        let mut some = exchange.subscribe(client(&filters)).expect("a place");
        for id in ["a", "b", "c", "d"] {
            exit(&exchange, id);
        }
        exchange.retire();
        assert_eq!(received(&mut all, 4).await, ["a", "b", "c", "d"]);
        assert_eq!(received(&mut some, 2).await, ["b", "d"]);
        for mut subscription in [all, some] {
            let last = subscription.next().await.and_then(Result::err).map(|status| status.code());
            assert_eq!((last, subscription.next().await.is_none()), (Some(tonic::Code::Unavailable), true));
        }
        assert_eq!(exchange.subscribe(client(&[])).map(drop).expect_err("it has ended").code(), tonic::Code::Unavailable);
    }

    #[tokio::test]
    async fn a_client_that_subscribes_again_after_an_upgrade_has_missed_nothing() {
        let (old, new) = (new(), new());
        let filters = ["event.container_id!=x"];
        let mut before = old.subscribe(client(&filters)).expect("a place");
        exit(&old, "a");
        new.expect(old.clients());
        exit(&new, "b");
        exit(&new, "x");
        old.retire();
        assert_eq!(received(&mut before, 1).await, ["a"]);
        assert!(before.next().await.expect("a reason").is_err());
        let mut other = new.subscribe(client(&[])).expect("a place");
        let mut after = new.subscribe(client(&filters)).expect("a place");
        let mut third = new.subscribe(client(&filters)).expect("a place");
        exit(&new, "c");
        assert_eq!(received(&mut after, 2).await, ["b", "c"]);
        assert_eq!(
            (received(&mut other, 1).await, received(&mut third, 1).await),
            (vec!["c".to_owned()], vec!["c".to_owned()]),
            "from then on"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_kept_for_clients_that_do_not_come_back_goes() {
        let exchange = new();
        exchange.expect(vec![client(&[])]);
        exit(&exchange, "a");
        assert_eq!((exchange.count(), exchange.waiting() > 0), (1, true));
        tokio::time::sleep(EXPECTED * 2).await;
        exit(&exchange, "b");
        assert_eq!((exchange.count(), exchange.waiting()), (0, 0));
    }

    #[tokio::test]
    async fn a_filter_that_costs_too_much_ends_its_subscription_and_no_other() {
        let exchange = new();
        let costly: Vec<_> = (0..16).map(|number| format!("event.id~=/(x?){{50}}y{number}/")).collect();
        let mut costly = exchange.subscribe(Client { pid: 7, filters: costly }).expect("a place");
        let mut cheap = exchange.subscribe(client(&["event.container_id==c"])).expect("a place");
        let namespace = Namespace::parse("ns").expect("a name");
        for _event in 0..50 {
            let event = TaskExit { container_id: "c".to_owned(), id: "x".repeat(4000), ..TaskExit::default() };
            exchange.publish(&namespace, "/tasks/exit", &event);
        }
        let status = costly.next().await.expect("a reason").expect_err("too costly");
        assert!(status.code() == tonic::Code::ResourceExhausted && status.message().contains("filters"), "{status:?}");
        assert_eq!(received(&mut cheap, 50).await.len(), 50);
        exit(&exchange, "c");
        assert_eq!(exchange.count(), 1);
    }

    #[tokio::test]
    async fn a_subscriber_that_never_reads_is_dropped_with_an_error_and_costs_no_more() {
        let exchange = new();
        let mut slow = exchange.subscribe(client(&[])).expect("a place");
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
        let exchange = new();
        let mut held: Vec<_> = (0..Limits::default().subscribers).map(|_| exchange.subscribe(client(&[])).expect("a place")).collect();
        assert!(exchange.subscribe(client(&[])).is_err());
        held.pop();
        assert!(exchange.subscribe(client(&[])).is_ok());
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
