//! One stream that a client has opened, as a transfer uses it: messages of any type, or bytes in both directions.
//!
//! **Invariant:** one message of it is here at a time, as long as a client of these streams sends at most, which counts in the budget of requests
//! until the next one is received.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use containerd_client::to_any;
use containerd_client::types::transfer::{Data, WindowUpdate};
use hyper::body::Bytes;
use prost_types::Any;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::call::Call;
use crate::error::{Error, Result};

/// This end of a stream that a client has opened.
pub(crate) struct Stream {
    incoming: Incoming,
    outgoing: mpsc::Sender<Result<Any, Status>>,
}

/// Messages of a client.
type Incoming = Pin<Box<dyn tokio_stream::Stream<Item = Result<Any>> + Send + Sync>>;

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").finish_non_exhaustive()
    }
}

/// What a client sends, read when it is asked for.
struct Messages {
    requests: Streaming<Any>,
    call: Call,
    /// Whether there is one that has not been answered.
    is_held: bool,
    has_ended: bool,
}

impl tokio_stream::Stream for Messages {
    type Item = Result<Any>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.has_ended {
            return Poll::Ready(None);
        }
        if std::mem::take(&mut this.is_held) {
            this.call.answered();
        }
        let message = match std::task::ready!(Pin::new(&mut this.requests).poll_next(cx)) {
            None => None,
            Some(Ok(message)) => Some(bounded(message)),
            Some(Err(status)) => Some(Err(gone(status))),
        };
        this.is_held = true;
        this.has_ended = !matches!(message, Some(Ok(_)));
        Poll::Ready(message)
    }
}

fn closed() -> Error {
    Error::Remote { code: tonic::Code::Cancelled, message: "the client has closed its stream".to_owned() }
}

fn bounded(message: Any) -> Result<Any> {
    let length = message.value.len();
    if length > MESSAGE_BYTES {
        return Err(Error::Exhausted(format!("a message of {length} bytes in a stream; the most is {MESSAGE_BYTES}")));
    }
    Ok(message)
}

pub(super) fn gone(status: Status) -> Error {
    Error::Remote { code: status.code(), message: format!("the client's stream has ended: {}", status.message()) }
}

/// A message, if it is one of that type.
pub(super) fn decode<M: prost::Message + prost::Name + Default>(any: &Any) -> Option<M> {
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    (name == M::full_name()).then(|| M::decode(any.value.as_slice()).ok()).flatten()
}

impl Stream {
    /// The stream of a call, and what is sent in it.
    pub(super) fn of(requests: Streaming<Any>, call: Call) -> (Self, ReceiverStream<Result<Any, Status>>) {
        let (outgoing, answers) = mpsc::channel(MESSAGES);
        let incoming = Box::pin(Messages { requests, call, is_held: false, has_ended: false });
        (Self { incoming, outgoing }, ReceiverStream::new(answers))
    }

    /// Sends a message if there is room for it.
    pub(super) fn offer(&self, message: Result<Any, Status>) {
        // the client may have left
        let _ = self.outgoing.try_send(message);
    }

    /// Passes on what comes from either side, until the other process closes the stream, or the client is gone.
    pub(super) async fn relay(self, requests: mpsc::Sender<Any>, mut answers: Streaming<Any>, mut passed_over: usize) {
        let Self { mut incoming, outgoing } = self;
        let forth = async move {
            let requests = requests;
            while let Some(message) = incoming.next().await {
                let Ok(message) = message else { return };
                if passed_over > 0 {
                    passed_over -= 1;
                } else if requests.send(message).await.is_err() {
                    return;
                }
            }
            // the client has sent everything, and may go on reading
            drop(requests);
            std::future::pending::<()>().await;
        };
        let back = async move {
            loop {
                let message = answers.message().await.transpose();
                let Some(message) = message else { return };
                let is_last = message.is_err();
                if outgoing.send(message).await.is_err() || is_last {
                    return;
                }
            }
        };
        tokio::select! {
            () = forth => {}
            () = back => {}
        }
    }

    /// The next message; none when the client has sent everything.
    pub(super) async fn receive(&mut self) -> Result<Option<Any>> {
        let next = tokio::time::timeout(IDLE, self.incoming.next()).await;
        let next = next.map_err(|_elapsed| Error::Exhausted(format!("nothing came in the client's stream for {IDLE:?}")))?;
        next.transpose()
    }

    /// Sends a message, as soon as the client has room for it.
    pub(super) async fn send(&self, message: Any) -> Result<()> {
        let sent = tokio::time::timeout(IDLE, self.outgoing.send(Ok(message))).await;
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(closed()),
            Err(_elapsed) => Err(Error::Exhausted(format!("the client has read nothing of its stream for {IDLE:?}"))),
        }
    }

    /// Receives all bytes of a stream of data, and grants the sender many at once, so that it never waits for more.
    pub(super) async fn receive_bytes(mut self, to: mpsc::Sender<Result<Bytes>>) {
        let mut granted = 0;
        loop {
            let next = self.next_bytes(&mut granted).await;
            let message = match next {
                Ok(None) => return,
                Ok(Some(bytes)) => Ok(bytes),
                Err(error) => Err(error),
            };
            let is_last = message.is_err();
            if to.send(message).await.is_err() || is_last {
                return;
            }
        }
    }

    async fn next_bytes(&mut self, granted: &mut i64) -> Result<Option<Bytes>> {
        loop {
            if *granted < i64::from(WINDOW_BYTES / 2) {
                // a client that has sent everything takes no more
                let _ = self.send(to_any(&WindowUpdate { update: WINDOW_BYTES })).await;
                *granted += i64::from(WINDOW_BYTES);
            }
            let Some(message) = self.receive().await? else { return Ok(None) };
            let Some(Data { data }) = decode(&message) else {
                let kind: String = message.type_url.chars().take(100).collect();
                return Err(Error::Invalid(format!("{kind:?} in a stream of data")));
            };
            *granted -= i64::try_from(data.len()).unwrap_or(i64::MAX);
            if !data.is_empty() {
                return Ok(Some(data.into()));
            }
        }
    }

    /// Sends all bytes as the client grants it.
    pub(super) async fn send_bytes(&mut self, mut from: mpsc::Receiver<Bytes>) -> Result<()> {
        let mut granted: i64 = 0;
        loop {
            let next = tokio::select! {
                next = from.recv() => next,
                // there may be nothing to send for a long time
                () = self.outgoing.closed() => return Err(closed()),
            };
            let Some(mut bytes) = next else { return Ok(()) };
            while !bytes.is_empty() {
                while granted <= 0 {
                    let Some(message) = self.receive().await? else {
                        return Err(Error::Invalid("the client has closed its stream before everything was sent".to_owned()));
                    };
                    let Some(WindowUpdate { update }) = decode(&message) else {
                        return Err(Error::Invalid("a stream that receives data sends updates of its window only".to_owned()));
                    };
                    granted = granted.saturating_add(i64::from(update.max(0)));
                }
                let most = usize::try_from(granted).unwrap_or(usize::MAX).min(DATA_BYTES);
                let part = bytes.split_to(most.min(bytes.len()));
                granted -= i64::try_from(part.len()).unwrap_or(i64::MAX);
                self.send(to_any(&Data { data: part.to_vec() })).await?;
            }
        }
    }
}

/// For the next message of a client: its source may be slow.
const IDLE: Duration = Duration::from_secs(1800);
/// On their way to a client.
const MESSAGES: usize = 8;
/// Clients send 32 KiB.
const MESSAGE_BYTES: usize = 256 << 10;
/// As much as containerd sends, and its clients expect.
pub(super) const DATA_BYTES: usize = 32 << 10;
/// What a sender may send before the next update. HTTP/2 bounds what is on its way.
const WINDOW_BYTES: i32 = 8 << 20;

/// A stream, and its client's ends.
#[cfg(test)]
pub(super) type Ends = (Stream, mpsc::Sender<Result<Any>>, mpsc::Receiver<Result<Any, Status>>);

/// Makes one.
#[cfg(test)]
pub(super) fn stream() -> Ends {
    let (client, incoming) = mpsc::channel(MESSAGES);
    let (outgoing, answers) = mpsc::channel(MESSAGES);
    (Stream { incoming: Box::pin(ReceiverStream::new(incoming)), outgoing }, client, answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_sender_is_granted_mibs_at_once_and_never_more_than_it_counts() {
        let (ours, client, mut answers) = stream();
        let (to, mut bytes) = mpsc::channel(1);
        let receiving = tokio::spawn(ours.receive_bytes(to));
        let mut granted: i64 = 0;
        let mut sent: i64 = 0;
        let data = Bytes::from(vec![7; DATA_BYTES]);
        while sent < 20 << 20 {
            while let Ok(update) = answers.try_recv() {
                let update: WindowUpdate = decode(&update.expect("no error")).expect("an update");
                granted += i64::from(update.update);
                assert!(granted < i64::from(i32::MAX));
            }
            if granted > 0 {
                client.send(Ok(to_any(&Data { data: data.to_vec() }))).await.expect("it receives");
                granted -= DATA_BYTES as i64;
                sent += DATA_BYTES as i64;
                assert_eq!(bytes.recv().await.expect("bytes").expect("no error").len(), DATA_BYTES);
            } else {
                tokio::task::yield_now().await;
            }
        }
        client.send(Ok(to_any(&WindowUpdate { update: 1 }))).await.expect("it receives");
        assert!(bytes.recv().await.expect("an error").is_err(), "no data");
        receiving.await.expect("no panic");
    }

    #[tokio::test]
    async fn no_more_is_sent_than_was_granted() {
        let (ours, client, mut answers) = stream();
        let (from, bytes) = mpsc::channel(1);
        let sending = tokio::spawn(async move {
            let mut ours = ours;
            ours.send_bytes(bytes).await
        });
        from.send(Bytes::from(vec![7; 100_000])).await.expect("it takes them");
        let (mut got, mut granted) = (0, 0);
        while got < 100_000 {
            client.send(Ok(to_any(&WindowUpdate { update: 30_000 }))).await.expect("it receives");
            granted += 30_000;
            while got < granted.min(100_000) {
                let data: Data = decode(&answers.recv().await.expect("data").expect("no error")).expect("data");
                got += data.data.len();
                assert!(got <= granted && data.data.len() <= DATA_BYTES);
            }
        }
        drop(from);
        sending.await.expect("no panic").expect("all is sent");
        assert!(answers.recv().await.is_none(), "it is closed");
    }

    #[tokio::test]
    async fn a_client_that_leaves_is_noticed_also_when_there_is_nothing_to_send() {
        let (mut ours, _client, answers) = stream();
        let (_from, bytes) = mpsc::channel(1);
        let sending = tokio::spawn(async move { ours.send_bytes(bytes).await });
        drop(answers);
        let ended = tokio::time::timeout(Duration::from_secs(20), sending).await.expect("it ends").expect("no panic");
        assert_eq!(ended.expect_err("it was not sent").code(), tonic::Code::Cancelled);
    }
}
