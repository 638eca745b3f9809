//! The body of a request, as far as one client may make this process wait for it, and hold it.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use tokio::time::Sleep;
use tonic::Status;

/// What one connection has sent of requests that are not yet complete.
#[derive(Debug, Clone, Default)]
pub(super) struct Unfinished(Arc<AtomicUsize>);

/// A body that counts itself, and comes to an end in time.
pub(super) struct Metered {
    body: Incoming,
    all: Unfinished,
    own: usize,
    late: Pin<Box<Sleep>>,
}

impl Metered {
    pub(super) fn new(body: Incoming, all: Unfinished) -> Self {
        Self { body, all, own: 0, late: Box::pin(tokio::time::sleep(COMPLETE)) }
    }
}

impl Body for Metered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) else {
            ready!(this.late.as_mut().poll(cx));
            return Poll::Ready(Some(Err(Status::deadline_exceeded(format!("a request that was not complete after {COMPLETE:?}")))));
        };
        let frame = frame.map(|frame| frame.map_err(|error| Status::unavailable(error.to_string())));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            this.own += data.len();
            let all = this.all.0.fetch_add(data.len(), Ordering::Relaxed) + data.len();
            if all > UNFINISHED_BYTES {
                let sentence = format!("incomplete requests of {all} bytes over one connection, but {UNFINISHED_BYTES} are the most");
                return Poll::Ready(Some(Err(Status::resource_exhausted(sentence))));
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        self.all.0.fetch_sub(self.own, Ordering::Relaxed);
    }
}

/// For a request to arrive.
const COMPLETE: Duration = Duration::from_secs(30);
/// Of one connection: a longest request, and another that begins.
const UNFINISHED_BYTES: usize = 32 << 20;
