//! Request bodies, with bounds on the time to receive one and on the memory of all.
//!
//! ```text
//! length of the message ─▶ refused, if too long ─▶ share of the budget, waited for ─▶ the message ─▶ handler ─▶ answer: the share goes back
//! ```
//! A request that is a stream of messages does so for each of them, until it is answered; between two it holds nothing, and may take as long
//! as it likes.
//!
//! **Invariant:** a request takes its whole share at once, before it is read: those that wait for theirs hold nothing that another waits for.

use std::fmt::Display;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tonic::Status;

/// The memory budget of all requests: short requests do not wait behind long ones.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    short: Arc<Semaphore>,
    long: Arc<Semaphore>,
}

impl Default for Budget {
    fn default() -> Self {
        Self { short: Arc::new(Semaphore::new(SHORT_BUDGET_BYTES)), long: Arc::new(Semaphore::new(LONG_BUDGET_BYTES)) }
    }
}

impl Budget {
    /// Where a request of that length takes its share.
    fn of(&self, bytes: usize) -> Arc<Semaphore> {
        Arc::clone(if bytes <= SHORT_BYTES { &self.short } else { &self.long })
    }

    /// Whether no request holds any of it.
    #[cfg(any(test, fuzzing))]
    pub(super) fn is_free(&self) -> bool {
        (self.short.available_permits(), self.long.available_permits()) == (SHORT_BUDGET_BYTES, LONG_BUDGET_BYTES)
    }
}

/// What one request holds of it, once its length is known, for as long as there is a copy of this.
#[derive(Debug, Clone, Default)]
pub(super) struct Share {
    permit: Arc<Mutex<Option<OwnedSemaphorePermit>>>,
}

impl Share {
    fn permit(&self) -> MutexGuard<'_, Option<OwnedSemaphorePermit>> {
        self.permit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back what the message of a stream holds: it has been answered.
    pub(super) fn release(&self) {
        drop(self.permit().take());
    }
}

/// The announced bytes of a connection's incomplete requests.
#[derive(Debug, Clone, Default)]
pub(super) struct Unfinished(Arc<AtomicUsize>);

type Acquiring = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>;

/// A body of one message, or of many, each bounded in size and time.
pub(super) struct Metered<B = Incoming> {
    body: B,
    is_stream: bool,
    budget: Budget,
    share: Share,
    all: Unfinished,
    /// The received part of the message's prefix: compression flag and length.
    head: Vec<u8>,
    /// Of head and message, once that is known.
    announced: usize,
    received: usize,
    /// Bytes received while the message waited for its share.
    waiting: Option<(Acquiring, Frame<Bytes>)>,
    late: Pin<Box<Sleep>>,
}

impl<B> Metered<B> {
    pub(super) fn new(body: B, budget: Budget, all: Unfinished) -> Self {
        let late = Box::pin(tokio::time::sleep(COMPLETE));
        let share = Share::default();
        Self { body, is_stream: false, budget, share, all, head: Vec::new(), announced: 0, received: 0, waiting: None, late }
    }

    /// Lets it have many messages.
    pub(super) fn allow_many(&mut self) {
        self.is_stream = true;
    }

    /// Its share of the budget: kept until the request is answered.
    pub(super) fn share(&self) -> Share {
        self.share.clone()
    }

    /// Counts what has come.
    ///
    /// Errors: it is too much.
    fn count(&mut self, data: &[u8]) -> Result<(), Status> {
        self.received += data.len();
        if self.announced == 0 {
            self.head.extend(&data[..data.len().min(HEAD_BYTES - self.head.len())]);
            let [_is_compressed, a, b, c, d] = self.head[..] else { return Ok(()) };
            let length = u32::from_be_bytes([a, b, c, d]) as usize;
            if length > MESSAGE_BYTES {
                let sentence = format!("received message larger than max ({length} vs. {MESSAGE_BYTES})");
                return Err(Status::resource_exhausted(sentence));
            }
            self.announced = HEAD_BYTES + length;
            let all = self.all.0.fetch_add(self.announced, Ordering::Relaxed) + self.announced;
            if all > UNFINISHED_BYTES {
                let sentence = format!("incomplete requests of {all} bytes over one connection; the maximum is {UNFINISHED_BYTES}");
                return Err(Status::resource_exhausted(sentence));
            }
        }
        if self.received > self.announced {
            return Err(Status::invalid_argument("a request is one message, and something comes after it"));
        }
        Ok(())
    }

    /// Counts what has come of a stream. Returns the length of the messages that begin with it.
    ///
    /// Errors: it is too much.
    fn count_many(&mut self, mut data: &[u8]) -> Result<usize, Status> {
        let mut begun = 0;
        while !data.is_empty() {
            if self.announced > 0 && self.received == self.announced {
                self.all.0.fetch_sub(self.announced, Ordering::Relaxed);
                (self.announced, self.received) = (0, 0);
                self.head.clear();
            }
            let was_known = self.announced > 0;
            // up to the end of the prefix, or of the message
            let wanted = if was_known { self.announced - self.received } else { HEAD_BYTES - self.head.len() };
            let (part, rest) = data.split_at(wanted.min(data.len()));
            self.count(part)?;
            if !was_known {
                begun += self.announced;
            }
            data = rest;
        }
        Ok(begun)
    }

    /// Whether a message of a stream has begun and not ended.
    fn is_within(&self) -> bool {
        self.received < self.announced || !self.head.is_empty() && self.announced == 0
    }

    /// Takes the share, or begins to wait for it with what has come.
    fn take(&mut self, frame: Frame<Bytes>) -> Option<Frame<Bytes>> {
        let (budget, bytes) = (self.budget.of(self.announced), u32::try_from(self.announced).unwrap_or(u32::MAX));
        match Arc::clone(&budget).try_acquire_many_owned(bytes) {
            Ok(permit) => {
                self.hold(permit);
                Some(frame)
            }
            Err(_full) => {
                self.waiting = Some((Box::pin(budget.acquire_many_owned(bytes)), frame));
                None
            }
        }
    }

    fn hold(&self, permit: OwnedSemaphorePermit) {
        *self.share.permit() = Some(permit);
    }

    /// The same for the messages of a stream that begin with a frame, in place of the share of those before.
    fn take_many(&mut self, bytes: usize, frame: Frame<Bytes>) -> Option<Frame<Bytes>> {
        // while it waits it holds nothing
        self.share.release();
        let budget = self.budget.of(bytes);
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        match Arc::clone(&budget).try_acquire_many_owned(permits) {
            Ok(permit) => {
                self.hold(permit);
                Some(frame)
            }
            Err(_full) => {
                self.late.as_mut().reset(Instant::now() + COMPLETE);
                self.waiting = Some((Box::pin(budget.acquire_many_owned(permits)), frame));
                None
            }
        }
    }
}

impl<B> Body for Metered<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Display,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if let Some((mut acquiring, frame)) = this.waiting.take() {
                if let Poll::Ready(permit) = acquiring.as_mut().poll(cx) {
                    // the budget is never closed
                    permit.into_iter().for_each(|permit| this.hold(permit));
                    return Poll::Ready(Some(Ok(frame)));
                }
                this.waiting = Some((acquiring, frame));
                ready!(this.late.as_mut().poll(cx));
                let sentence = format!(
                    "no memory for a request of {} bytes within {COMPLETE:?}: the limit for all clients is reached",
                    this.announced
                );
                return Poll::Ready(Some(Err(Status::resource_exhausted(sentence))));
            }
            let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) else {
                if this.is_stream && !this.is_within() {
                    return Poll::Pending;
                }
                ready!(this.late.as_mut().poll(cx));
                return Poll::Ready(Some(Err(Status::deadline_exceeded(format!("the request was not complete after {COMPLETE:?}")))));
            };
            let frame = match frame {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Poll::Ready(Some(Err(Status::unavailable(error.to_string())))),
                None => return Poll::Ready(None),
            };
            if this.is_stream {
                // its reader was busy for so long; the client is not late
                if this.late.deadline() <= Instant::now() {
                    this.late.as_mut().reset(Instant::now() + COMPLETE);
                }
                let was_within = this.is_within();
                let begun = match frame.data_ref().map(|data| this.count_many(data)).transpose() {
                    Ok(begun) => begun.unwrap_or_default(),
                    Err(status) => return Poll::Ready(Some(Err(status))),
                };
                if !was_within || begun > 0 {
                    this.late.as_mut().reset(Instant::now() + COMPLETE);
                }
                // one whose beginning came with the end of another, which has been answered
                let is_unheld = this.is_within() && this.share.permit().is_none();
                let bytes = if is_unheld { begun.max(this.announced) } else { begun };
                let frame = if bytes == 0 { Some(frame) } else { this.take_many(bytes, frame) };
                match frame {
                    Some(frame) => return Poll::Ready(Some(Ok(frame))),
                    None => continue,
                }
            }
            if let Some(data) = frame.data_ref()
                && let Err(status) = this.count(data)
            {
                return Poll::Ready(Some(Err(status)));
            }
            if this.announced == 0 || this.share.permit().is_some() {
                return Poll::Ready(Some(Ok(frame)));
            }
            if let Some(frame) = this.take(frame) {
                return Poll::Ready(Some(Ok(frame)));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.waiting.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl<B> Drop for Metered<B> {
    fn drop(&mut self) {
        self.all.0.fetch_sub(self.announced, Ordering::Relaxed);
    }
}

/// The longest request, and the longest answer: as much as containerd and its clients take.
pub(super) const MESSAGE_BYTES: usize = crate::successor::MESSAGE_BYTES;
/// For a request to arrive.
const COMPLETE: Duration = Duration::from_secs(30);
/// Of one connection: a longest request, and another that begins.
const UNFINISHED_BYTES: usize = 32 << 20;
/// The longest request that is a short one.
const SHORT_BYTES: usize = 64 << 10;
/// Of all short requests that are not answered yet.
const SHORT_BUDGET_BYTES: usize = 32 << 20;
/// Of all others.
const LONG_BUDGET_BYTES: usize = 224 << 20;
/// What comes before a message.
const HEAD_BYTES: usize = 5;

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::convert::Infallible;
    use std::future::poll_fn;

    use tonic::Code;

    use super::*;

    /// What comes, and then nothing more.
    struct Chunks(VecDeque<Bytes>);

    impl Body for Chunks {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.0.pop_front().map_or(Poll::Pending, |bytes| Poll::Ready(Some(Ok(Frame::data(bytes)))))
        }
    }

    fn budget(bytes: usize) -> Budget {
        Budget { short: Arc::new(Semaphore::new(100)), long: Arc::new(Semaphore::new(bytes)) }
    }

    fn left(budget: &Budget) -> usize {
        budget.long.available_permits()
    }

    /// A request that announces a message of that length; of which, in two pieces, `message` comes.
    fn request(budget: &Budget, length: u32, message: &'static [u8]) -> Metered<Chunks> {
        let head = [&[0][..], &length.to_be_bytes()].concat();
        let rest = [&head[2..], message].concat();
        Metered::new(Chunks([head[..2].to_vec().into(), rest.into()].into()), budget.clone(), Unfinished::default())
    }

    async fn next(request: &mut Metered<Chunks>) -> Result<usize, Status> {
        let frame = poll_fn(|cx| Pin::new(&mut *request).poll_frame(cx)).await.expect("a frame")?;
        Ok(frame.data_ref().map_or(0, Bytes::len))
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_takes_its_share_at_once_and_keeps_it_until_it_is_answered() {
        let budget = budget(1_000_000);
        let mut first = request(&budget, 799_995, b"begins");
        assert_eq!((next(&mut first).await.expect("room"), left(&budget)), (2, 1_000_000));
        assert_eq!((next(&mut first).await.expect("room"), left(&budget)), (9, 200_000));
        let mut second = request(&budget, 799_995, b"");
        assert_eq!(next(&mut second).await.expect("no length yet"), 2);
        let answering = first.share();
        drop(first);
        assert_eq!(left(&budget), 200_000, "a request that is being answered is there");
        let gone = async {
            tokio::time::sleep(COMPLETE / 2).await;
            drop(answering);
        };
        assert_eq!(tokio::join!(next(&mut second), gone).0.expect("room"), 3);
        drop(second);
        assert_eq!(left(&budget), 1_000_000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_for_which_there_is_no_room_is_refused_in_time_and_holds_nothing() {
        let budget = budget(1_000_000);
        let mut first = request(&budget, 799_995, b"");
        let mut second = request(&budget, 799_995, b"");
        for (request, pieces) in [(&mut first, 2), (&mut second, 1)] {
            for _piece in 0..pieces {
                next(request).await.expect("room");
            }
        }
        let short = async {
            let mut short = request(&budget, 95, b"");
            (next(&mut short).await.expect("room"), next(&mut short).await.expect("room for it"), tokio::time::Instant::now())
        };
        let begin = tokio::time::Instant::now();
        let (refused, (.., got_through)) = tokio::join!(next(&mut second), short);
        assert_eq!((got_through, begin.elapsed() >= COMPLETE), (begin, true));
        let status = refused.expect_err("no room");
        assert!(status.code() == Code::ResourceExhausted && status.message().contains("no memory"), "{status:?}");
        assert_eq!(next(&mut first).await.expect_err("it does not go on").code(), Code::DeadlineExceeded);
        drop((first, second));
        assert_eq!(left(&budget), 1_000_000);
    }

    #[tokio::test(start_paused = true)]
    async fn each_message_of_a_stream_has_its_share_until_the_next_begins() {
        let budget = budget(1_000_000);
        let message = |length: usize| [&[0][..], &u32::try_from(length).expect("short").to_be_bytes(), &vec![7; length]].concat();
        let all = [message(100_000), message(0), message(70_000), message(80_000)].concat();
        for piece in [3, 64 << 10, all.len()] {
            let pieces = all.chunks(piece).map(Bytes::copy_from_slice).collect();
            let mut stream = Metered::new(Chunks(pieces), budget.clone(), Unfinished::default());
            stream.allow_many();
            let (mut read, mut most) = (0, 0);
            while read < all.len() {
                read += next(&mut stream).await.expect("room");
                most = most.max(1_000_000 - left(&budget));
            }
            let longest = if piece == all.len() { 250_020 } else { 150_010 };
            assert!((100_000..=longest).contains(&most), "{most}");
            let waits = poll_fn(|cx| Poll::Ready(Pin::new(&mut stream).poll_frame(cx).is_pending())).await;
            tokio::time::sleep(COMPLETE * 3).await;
            let still = poll_fn(|cx| Poll::Ready(Pin::new(&mut stream).poll_frame(cx).is_pending())).await;
            assert!(waits && still, "between messages there is no hurry");
            assert_eq!(stream.all.0.load(Ordering::Relaxed), stream.announced);
            stream.share().release();
            assert_eq!(left(&budget), 1_000_000, "what has been answered holds nothing");
            drop(stream);
        }
        let (first, rest) = ([message(9), message(500_000)[..100].to_vec()].concat(), message(500_000)[100..200_000].to_vec());
        let mut two = Metered::new(Chunks([first.into(), rest.into()].into()), budget.clone(), Unfinished::default());
        two.allow_many();
        next(&mut two).await.expect("room");
        two.share().release();
        next(&mut two).await.expect("room");
        assert_eq!(left(&budget), 499_995, "one that has begun has its share again");
        drop(two);
        let mut torn = Metered::new(Chunks([message(9)[..7].to_vec().into()].into()), budget.clone(), Unfinished::default());
        torn.allow_many();
        next(&mut torn).await.expect("room");
        assert_eq!(next(&mut torn).await.expect_err("it does not go on").code(), Code::DeadlineExceeded);
    }

    #[tokio::test]
    async fn what_is_too_long_is_refused_by_its_first_bytes() {
        let budget = Budget::default();
        let mut long = request(&budget, u32::MAX, b"");
        next(&mut long).await.expect("no length yet");
        let status = next(&mut long).await.expect_err("too long");
        assert!(status.code() == Code::ResourceExhausted && status.message().contains("larger than max"), "{status:?}");
        let mut two = request(&budget, 3, b"onetwo");
        next(&mut two).await.expect("no length yet");
        assert_eq!(next(&mut two).await.expect_err("two messages").code(), Code::InvalidArgument);
    }
}
