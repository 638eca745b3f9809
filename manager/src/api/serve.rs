//! Connections of clients.

use std::future::{Future as _, poll_fn};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use log::{debug, warn};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::route::route;
use crate::manager::Manager;
use crate::settings::Limits;

/// Serves everyone who connects, until `stop` turns true; then calls in flight have a while to end.
pub(crate) async fn serve(listener: UnixListener, manager: Arc<Manager>, limits: Limits, mut stop: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, _peer)) => match Arc::clone(&places).try_acquire_owned() {
                    Ok(place) => {
                        let connection = connection(socket, Arc::clone(&manager), stop.clone());
                        connections.spawn(async move {
                            connection.await;
                            drop(place);
                        });
                    }
                    Err(_full) => warn!(connections = limits.connections; "a client is turned away, too many are connected"),
                },
                Err(error) => {
                    // without a free descriptor nothing can be accepted; others have to end first
                    warn!(error:%; "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            },
            Some(_ended) = connections.join_next() => {}
            () = stopped(&mut stop) => break,
        }
    }
    drop(listener);
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN, all).await.is_err() {
        debug!("calls in flight were cut off");
    }
}

async fn connection(socket: UnixStream, manager: Arc<Manager>, mut stop: watch::Receiver<bool>) {
    let (leave, leaving) = watch::channel(false);
    let service = service_fn(move |request| route(Arc::clone(&manager), leaving.clone(), request));
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(socket), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            // a client must have heard that this connection ends before a call is refused, or it asks again on this one
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
        debug!(error:%; "a connection ended");
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // without a sender nobody can say that it goes on
    let _ = stop.wait_for(|stop| *stop).await;
}

/// The most calls of one connection that are under way: clients leave a Wait open for each container. Further ones wait.
const MAX_STREAMS: u32 = 16384;
/// The longest headers of a call.
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Calls in flight may take that long to end.
const DRAIN: Duration = Duration::from_secs(2);
/// After a failed accept.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
