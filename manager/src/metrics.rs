//! Metrics over HTTP, in the text format of Prometheus. Every path gives the same answer.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use log::{debug, warn};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tonic::Code;

use crate::api::{BOUNDS, Calls, Cost};
use crate::error::{IoContext as _, Result};
use crate::events::Exchange;
use crate::gate::Gate;
use crate::gc::{Collector, Totals};
use crate::pools::{Pool, Pools};
use crate::restart::Restarter;
use crate::sockets::{self, MetricsListener};
use crate::store::{Kind, Load, Store};
use crate::tasks::Tasks;

/// What is measured.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) store: Store,
    pub(crate) events: Arc<Exchange>,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) calls: Arc<Calls>,
    pub(crate) restarter: Arc<Restarter>,
    pub(crate) collector: Arc<Collector>,
    pub(crate) pools: Pools,
    /// Retires with this process.
    pub(crate) gate: Gate,
}

/// The listening socket.
#[derive(Debug)]
pub(crate) enum Listener {
    /// An address and port.
    Tcp(TcpListener),
    /// A unix socket.
    Unix(UnixListener),
}

impl Listener {
    /// A second handle on a socket, for the executor.
    pub(crate) fn of(listener: &MetricsListener) -> Result<Self> {
        match listener {
            MetricsListener::Tcp(listener) => {
                let listener = listener.try_clone().and_then(TcpListener::from_std);
                listener.map(Self::Tcp).on("serve metrics at", std::path::Path::new("a port"))
            }
            MetricsListener::Unix(listener) => sockets::accepting(listener).map(Self::Unix),
        }
    }

    async fn accept(&self) -> io::Result<Box<dyn Socket>> {
        match self {
            Self::Tcp(listener) => listener.accept().await.map(|(socket, _)| Box::new(socket) as Box<dyn Socket>),
            Self::Unix(listener) => listener.accept().await.map(|(socket, _)| Box::new(socket) as Box<dyn Socket>),
        }
    }
}

trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

/// Answers until this process retires.
pub(crate) async fn serve(listener: Listener, sources: Sources) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let started = SystemTime::now();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = sources.gate.retired() => return,
        };
        match accepted {
            Ok(mut socket) => {
                let page = page(&sources, started);
                tokio::spawn(async move {
                    if let Ok(Err(error)) = tokio::time::timeout(SLOWEST, answer(&mut *socket, &page)).await {
                        debug!(error:%; "cannot answer a metrics request");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                warn!(error:%; "cannot accept a connection for metrics");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

async fn answer(socket: &mut dyn Socket, page: &str) -> io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        let mut part = [0; 512];
        let count = socket.read(&mut part).await?;
        request.extend_from_slice(&part[..count]);
        if count == 0 || request.len() > REQUEST_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    let head = if request.starts_with(b"GET ") {
        format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{page}",
            page.len()
        )
    } else {
        "HTTP/1.1 405 Method Not Allowed\r\nAllow: GET\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned()
    };
    socket.write_all(head.as_bytes()).await?;
    socket.shutdown().await
}

fn page(sources: &Sources, started: SystemTime) -> String {
    let mut page = String::new();
    let mut add = |name: &str, kind: &str, help: &str, values: &[(String, f64)]| {
        // writing to a string does not fail
        let _ = write!(page, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for (labels, value) in values {
            let _ = writeln!(page, "{name}{labels} {value}");
        }
    };
    let one = |value: f64| [(String::new(), value)];
    let version = [(format!("{{version=\"{}\"}}", env!("CARGO_PKG_VERSION")), 1.0)];
    add("x_manager_info", "gauge", "The running version.", &version);
    for (kind, name, help) in
        [(Kind::Task, "x_manager_tasks", "Tasks by phase."), (Kind::Sandbox, "x_manager_sandboxes", "Sandboxes by phase.")]
    {
        let counts = sources.tasks.counts(kind).into_iter();
        let counts: Vec<_> = counts.map(|(phase, count)| (format!("{{phase=\"{phase}\"}}"), count as f64)).collect();
        add(name, "gauge", help, &counts);
    }
    add("x_manager_subscribers", "gauge", "Clients subscribed to events.", &one(sources.events.count() as f64));
    add("x_manager_events_total", "counter", "Events published.", &one(sources.events.published() as f64));
    let restarts = sources.restarter.started.load(std::sync::atomic::Ordering::Relaxed);
    add("x_manager_restarts_total", "counter", "Containers started by the restart monitor.", &one(restarts as f64));
    let costs = sources.calls.costs();
    let by_code = costs.iter().flat_map(|(method, cost)| {
        cost.codes.iter().map(move |(code, count)| (format!("{{method=\"{method}\",code=\"{:?}\"}}", Code::from(*code)), *count as f64))
    });
    add("x_manager_calls_total", "counter", "Answered calls of clients, by method and code.", &by_code.collect::<Vec<_>>());
    add("x_manager_calls_under_way", "gauge", "Calls of clients in progress.", &one(sources.calls.under_way() as f64));
    let waiting = sources.events.waiting();
    add("x_manager_event_queue_bytes", "gauge", "Bytes of events queued for subscribers.", &one(waiting as f64));
    let loads = sources.store.loads();
    let of = |value: fn(&Load) -> f64| loads.each_ref().map(|(kind, load)| (format!("{{kind=\"{kind}\"}}"), value(load)));
    add("x_manager_store_jobs_total", "counter", "Completed jobs of the metadata store.", &of(|load| load.count as f64));
    add(
        "x_manager_store_seconds_total",
        "counter",
        "Total duration of the jobs of the metadata store.",
        &of(|load| load.took.as_secs_f64()),
    );
    add("x_manager_store_queue", "gauge", "Jobs queued for the metadata store.", &of(|load| load.waiting as f64));
    let sizes = sources.store.sizes().into_iter().map(|(file, bytes)| (format!("{{file=\"{file}\"}}"), bytes as f64));
    add("x_manager_store_bytes", "gauge", "Size of the files of the metadata store.", &sizes.collect::<Vec<_>>());
    let of_pools =
        |value: fn(&Pool) -> usize| sources.pools.all().map(|pool| (format!("{{pool=\"{}\"}}", pool.name()), value(pool) as f64));
    add("x_manager_pool_busy", "gauge", "Threads that work, by pool.", &of_pools(Pool::busy));
    add("x_manager_pool_queue", "gauge", "Jobs that wait for a thread, by pool.", &of_pools(Pool::waiting));
    collections(&mut add, &sources.collector.totals());
    let since = started.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    add("process_start_time_seconds", "gauge", "When this process began to serve, in seconds since 1970.", &one(since));
    if let Some((virtual_bytes, resident_bytes)) = memory() {
        add("process_virtual_memory_bytes", "gauge", "Address space.", &one(virtual_bytes));
        add("process_resident_memory_bytes", "gauge", "Resident memory.", &one(resident_bytes));
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        // one is that of the folder itself
        add("process_open_fds", "gauge", "Open descriptors.", &one(open.count().saturating_sub(1) as f64));
    }
    latencies(&mut page, &costs);
    page
}

fn collections(add: &mut impl FnMut(&str, &str, &str, &[(String, f64)]), totals: &Totals) {
    let by = |name: &str, value: u64| (format!("{{kind=\"{name}\"}}"), value as f64);
    let one = |value: f64| [(String::new(), value)];
    let outcome = |name: &str, value: u64| (format!("{{outcome=\"{name}\"}}"), value as f64);
    let outcomes = [outcome("success", totals.collections), outcome("failure", totals.failed)];
    add("x_manager_gc_collections_total", "counter", "Garbage collections.", &outcomes);
    let took = totals.took.as_secs_f64();
    add("x_manager_gc_seconds_total", "counter", "Duration of garbage collections, without the removal of files.", &one(took));
    let removed = [by("content", totals.content), by("image", totals.images), by("snapshot", totals.snapshots)];
    add("x_manager_gc_removed_total", "counter", "Objects that were removed because nothing led to them, by kind.", &removed);
    let help = "Bytes of removed blobs, and of committed snapshots that nothing led to.";
    add("x_manager_gc_freed_bytes_total", "counter", help, &one(totals.freed_bytes as f64));
}

fn latencies(page: &mut String, costs: &BTreeMap<String, Cost>) {
    const NAME: &str = "x_manager_call_seconds";
    // writing to a string does not fail
    let _ = writeln!(page, "# HELP {NAME} Duration of calls; of streams, until they began.\n# TYPE {NAME} histogram");
    for (method, cost) in costs {
        for (bound, count) in BOUNDS.iter().zip(cost.within) {
            let _ = writeln!(page, "{NAME}_bucket{{method=\"{method}\",le=\"{bound}\"}} {count}");
        }
        let _ = writeln!(page, "{NAME}_bucket{{method=\"{method}\",le=\"+Inf\"}} {}", cost.count);
        let _ = writeln!(page, "{NAME}_sum{{method=\"{method}\"}} {}", cost.took.as_secs_f64());
        let _ = writeln!(page, "{NAME}_count{{method=\"{method}\"}} {}", cost.count);
    }
}

fn memory() -> Option<(f64, f64)> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let bytes = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix(" kB")?.parse::<f64>().ok().map(|kib| kib * 1024.0)
    };
    Some((bytes("VmSize:")?, bytes("VmRSS:")?))
}

/// The most connections at a time; further ones wait.
const MAX_CONNECTIONS: usize = 8;
/// The longest head of a request.
const REQUEST_BYTES: usize = 16 << 10;
/// To ask and to take the answer.
const SLOWEST: Duration = Duration::from_secs(5);
/// After a failed accept.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
