//! What becomes of streams of answers when this process retires.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio_stream::Stream;
use tonic::Status;

use crate::gate::Gate;

/// A stream that ends with an error when the gate retires, after what is there already.
pub(super) struct UntilRetired<S> {
    stream: Pin<Box<S>>,
    retired: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl<S> UntilRetired<S> {
    pub(super) fn new(stream: S, gate: Gate) -> Self {
        let retired = Box::pin(async move { gate.retired().await });
        Self { stream: Box::pin(stream), retired: Some(retired) }
    }
}

impl<A, S: Stream<Item = Result<A, Status>>> Stream for UntilRetired<S> {
    type Item = Result<A, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(retired) = &mut this.retired else { return Poll::Ready(None) };
        if let Poll::Ready(item) = this.stream.as_mut().poll_next(cx) {
            return Poll::Ready(item);
        }
        ready!(retired.as_mut().poll(cx));
        this.retired = None;
        Poll::Ready(Some(Err(Status::unavailable("this x-manager has ended; subscribe again"))))
    }
}
