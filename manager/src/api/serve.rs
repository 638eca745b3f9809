//! Connections of clients.

use std::future::{Future as _, poll_fn};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use log::{debug, warn};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;

use super::authority::Mended;
use super::body::{Budget, Metered, Unfinished};
use super::call::{Client, Peer};
use super::route::{Services, counted};
use crate::error::chain;
use crate::settings::Limits;

/// Whether this process serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Course {
    /// It serves.
    Serves,
    /// It stops, and no other process serves.
    Stops,
    /// It exits, and another process serves already.
    Yields,
}

/// Serves everyone who connects, for as long as the `course` is to; then calls in flight have a while to end.
///
/// A connection that was accepted before another process took over has its first call answered before it gets GOAWAY: a client that is still
/// connecting, as gRPC's own is until it has received the server's settings, would take that for a failure to connect.
pub(crate) async fn serve(listener: UnixListener, services: Arc<Services>, limits: Limits, mut course: watch::Receiver<Course>) {
    let gate = services.gate.clone();
    let (places, budget) = (Arc::new(Semaphore::new(limits.connections)), Budget::default());
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            _ends = end(&mut course) => break,
            // from now on connections are for the next process, also those by which this one passes something on
            () = gate.retired() => break,
            Some(_ended) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((socket, _peer)) => match Arc::clone(&places).try_acquire_owned() {
                    Ok(place) => {
                        let connection = connection(socket, Arc::clone(&services), budget.clone(), course.clone());
                        connections.spawn(async move {
                            connection.await;
                            drop(place);
                        });
                    }
                    Err(_full) => warn!(connections = limits.connections; "a client is turned away, too many are connected"),
                },
                Err(error) => {
                    // out of descriptors: wait for other connections to close
                    warn!(error:%; "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            },
        }
    }
    drop(listener);
    end(&mut course).await;
    let mut all = std::pin::pin!(async { while connections.join_next().await.is_some() {} });
    let in_time = tokio::time::timeout(LAST_CALLS, all.as_mut()).await.is_ok();
    if !in_time {
        let is_succeeded = *course.borrow() == Course::Yields;
        if is_succeeded {
            let _ = tokio::time::timeout(LAST_STREAMS, gate.streamed()).await;
            // for their last answers
            let _ = tokio::time::timeout(LAST_ANSWERS, all).await;
        }
        debug!("calls in flight were cut off");
    }
}

async fn connection(socket: UnixStream, services: Arc<Services>, budget: Budget, mut course: watch::Receiver<Course>) {
    let (leave, leaving) = watch::channel(false);
    let begun = Arc::new(Notify::new());
    let first = Arc::clone(&begun);
    let unfinished = Unfinished::default();
    let (_alive, client) = watch::channel(());
    let client = Client(client);
    let peer = Peer(socket.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or_default());
    let service = service_fn(move |request: http::Request<Incoming>| {
        first.notify_one();
        let mut request = request.map(|body| Metered::new(body, budget.clone(), unfinished.clone()));
        let share = request.body().share();
        request.extensions_mut().insert(share);
        request.extensions_mut().insert(peer);
        request.extensions_mut().insert(client.clone());
        counted(Arc::clone(&services), leaving.clone(), request)
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADER_BYTES)
        .initial_stream_window_size(UNREAD_BYTES)
        .initial_connection_window_size(MAX_UNREAD_BYTES)
        .serve_connection(TokioIo::new(Mended::new(socket)), service);
    let mut connection = std::pin::pin!(connection);
    let ends = async {
        if end(&mut course).await == Course::Yields {
            // a client that sends nothing is no longer connecting
            let _ = tokio::time::timeout(FIRST_CALL, begun.notified()).await;
        }
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = ends => {
            connection.as_mut().graceful_shutdown();
            // the client must have received GOAWAY before a call is refused, or it retries on this connection
            match poll_fn(|cx| Poll::Ready(connection.as_mut().poll(cx))).await {
                Poll::Ready(ended) => ended,
                Poll::Pending => {
                    leave.send_replace(true);
                    connection.await
                }
            }
        }
    };
    if let Err(error) = ended {
        debug!(error = chain(&error); "a connection ended");
    }
}

/// Waits until this process is to end.
async fn end(course: &mut watch::Receiver<Course>) -> Course {
    // without a sender the process stops
    course.wait_for(|course| *course != Course::Serves).await.map_or(Course::Stops, |course| *course)
}

/// The most calls of one connection that are under way: clients leave a Wait open for each container. Further ones wait.
const MAX_STREAMS: u32 = 16384;
/// The longest headers of a call.
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// What a client may send of a request before it is read: content is written in messages of a MiB.
const UNREAD_BYTES: u32 = 1 << 20;
/// The same of all requests of a connection: as much as of incomplete ones. h2 ends a connection with more small frames unread than it allows
/// for: half of this, less 256 bytes for each. As all calls may begin at once, there is room for more than one frame of each.
const MAX_UNREAD_BYTES: u32 = 32 << 20;
const _: () = assert!(MAX_UNREAD_BYTES >= 2 * 256 * MAX_STREAMS);
/// Calls in flight may take that long to end when this process does.
pub(crate) const LAST_CALLS: Duration = Duration::from_secs(15);
/// The same for streams that go on through this process when another serves: a client that writes or reads content would not begin again.
const LAST_STREAMS: Duration = Duration::from_secs(60 * 60);
/// For a client to read what was answered last.
const LAST_ANSWERS: Duration = Duration::from_secs(10);
/// For the first call of a connection, once another process serves.
const FIRST_CALL: Duration = Duration::from_secs(3);
/// After a failed accept.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
