//! One ttrpc connection to a shim, for calls that each have one answer.
//!
//! ```text
//! waiting to be written ─▶ written ─▶ answered
//!          └───── its caller gave up: forgotten
//! ```
//! ttrpc's own client closes the connection, for all callers, when one of them gives up while its request is being written. A shim that does not
//! read for a moment makes that likely.
//!
//! **Invariant:** a frame that was begun is written to its end, whether or not its caller still waits. One that was not begun is dropped with its
//! caller, so that a shim which does not read costs no more than the calls that wait for it.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{Notify, oneshot};
use ttrpc::proto::{GenMessage, GenMessageError, MESSAGE_TYPE_RESPONSE, MessageHeader};

/// The calls of a connection; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Calls {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// There is something to write.
    added: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// By stream id, which is the order in which they are written.
    calls: BTreeMap<u32, Unanswered>,
    /// The stream id that was given last.
    last: Option<u32>,
    is_closed: bool,
}

#[derive(Debug)]
struct Unanswered {
    /// The encoded request, until it is being written.
    request: Option<Vec<u8>>,
    answer: oneshot::Sender<Result<Vec<u8>, NoAnswer>>,
}

/// Why a call has no answer.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// The shim sent an answer that cannot be used.
    Unusable(ttrpc::Error),
    /// The connection ended before any of the request was written.
    Unsent,
    /// The connection ended after that: the shim may have carried out the call.
    Interrupted,
}

impl Calls {
    /// Sends an encoded request and returns the encoded response. To give up, drop the future.
    pub(super) async fn call(&self, request: Vec<u8>) -> Result<Vec<u8>, NoAnswer> {
        let (answer, answered) = oneshot::channel();
        let _waiting = self.add(Unanswered { request: Some(request), answer }).ok_or(NoAnswer::Unsent)?;
        // the sender is dropped unused when the connection ends
        answered.await.unwrap_or(Err(NoAnswer::Interrupted))
    }

    /// Writes requests and reads answers until the connection ends, and returns whether there was an answer.
    pub(super) async fn run(&self, socket: UnixStream) -> bool {
        let mut has_answered = false;
        let (reader, writer) = socket.into_split();
        tokio::select! {
            // how it ended does not matter
            _ended = self.read(BufReader::new(reader), &mut has_answered) => {}
            _ended = self.write(writer) => {}
        }
        self.close();
        has_answered
    }

    async fn write(&self, mut writer: impl AsyncWrite + Unpin) -> io::Result<()> {
        loop {
            let frame = self.next();
            match frame {
                Some(frame) => writer.write_all(&frame).await?,
                None if self.state().is_closed => return Ok(()),
                None => self.shared.added.notified().await,
            }
        }
    }

    async fn read(&self, mut reader: impl AsyncRead + Unpin, has_answered: &mut bool) -> Result<(), ttrpc::Error> {
        loop {
            let (id, answer) = match GenMessage::read_from(&mut reader).await {
                Ok(message) if message.header.type_ == MESSAGE_TYPE_RESPONSE => (message.header.stream_id, Ok(message.payload)),
                // streams are never asked for
                Ok(_) => continue,
                Err(GenMessageError::ReturnError(header, error)) => (header.stream_id, Err(NoAnswer::Unusable(error))),
                Err(GenMessageError::InternalError(error)) => return Err(error),
            };
            *has_answered = true;
            let call = self.state().calls.remove(&id);
            if let Some(call) = call {
                // its caller may be giving up at this moment
                let _ = call.answer.send(answer);
            }
        }
    }

    /// Whether the connection has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.state().is_closed
    }

    /// Takes a place; none when the connection has ended, or has no stream id left.
    fn add(&self, call: Unanswered) -> Option<Waiting> {
        let mut state = self.state();
        if state.is_closed {
            return None;
        }
        let Some(id) = state.last.map_or(Some(1), |last| last.checked_add(2)) else {
            drop(state);
            self.close();
            return None;
        };
        state.last = Some(id);
        state.calls.insert(id, call);
        drop(state);
        self.shared.added.notify_one();
        Some(Waiting { calls: self.clone(), id })
    }

    /// The next frame to write.
    fn next(&self) -> Option<Vec<u8>> {
        let mut state = self.state();
        let (id, request) = state.calls.iter_mut().find_map(|(id, call)| Some((*id, call.request.take()?)))?;
        let length = u32::try_from(request.len()).expect("its length was checked");
        let mut frame: Vec<u8> = MessageHeader::new_request(id, length).into();
        frame.extend_from_slice(&request);
        Some(frame)
    }

    fn close(&self) {
        let calls = {
            let mut state = self.state();
            state.is_closed = true;
            std::mem::take(&mut state.calls)
        };
        for call in calls.into_values() {
            let why = if call.request.is_some() { NoAnswer::Unsent } else { NoAnswer::Interrupted };
            // as above
            let _ = call.answer.send(Err(why));
        }
        self.shared.added.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A caller that waits.
struct Waiting {
    calls: Calls,
    id: u32,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.calls.state().calls.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncReadExt as _;
    use tokio::time::timeout;

    use super::*;

    const MOMENT: Duration = Duration::from_millis(50);

    fn connected() -> (Calls, UnixStream, tokio::task::JoinHandle<bool>) {
        let (ours, shims) = UnixStream::pair().expect("a pair");
        let calls = Calls::default();
        let running = calls.clone();
        (calls, shims, tokio::spawn(async move { running.run(ours).await }))
    }

    /// Reads a request and answers with its payload.
    async fn echo(shim: &mut UnixStream) -> u32 {
        let mut request = GenMessage::read_from(&mut *shim).await.expect("a whole frame");
        request.header.type_ = MESSAGE_TYPE_RESPONSE;
        request.write_to(&mut *shim).await.expect("written");
        request.header.stream_id
    }

    #[tokio::test]
    async fn a_call_that_is_given_up_while_it_is_written_tears_no_frame() {
        let (calls, mut shim, _running) = connected();
        // more than a socket takes at once: it is being written when its caller gives up
        assert!(timeout(MOMENT, calls.call(vec![1; 3 << 20])).await.is_err());
        assert!(timeout(MOMENT, calls.call(vec![2; 10])).await.is_err(), "it waits behind");
        let third = tokio::spawn({
            let calls = calls.clone();
            async move { calls.call(vec![3; 10]).await }
        });
        tokio::task::yield_now().await;
        assert_eq!(echo(&mut shim).await, 1);
        assert_eq!(echo(&mut shim).await, 5, "one that was given up before it was begun is not written");
        assert_eq!(third.await.expect("no panic").expect("an answer"), [3; 10]);
    }

    #[tokio::test]
    async fn what_waits_when_the_connection_ends_knows_whether_it_was_sent() {
        let (calls, mut shim, running) = connected();
        let call = |length| {
            let calls = calls.clone();
            tokio::spawn(async move { calls.call(vec![0; length]).await })
        };
        let (sent, unsent) = (call(3 << 20), call(10));
        shim.read_exact(&mut [0; 100]).await.expect("a part of the first");
        drop(shim);
        assert!(!running.await.expect("no panic"), "nothing was answered");
        assert!(matches!(sent.await.expect("no panic"), Err(NoAnswer::Interrupted)));
        assert!(matches!(unsent.await.expect("no panic"), Err(NoAnswer::Unsent)));
        assert!(matches!(calls.call(Vec::new()).await, Err(NoAnswer::Unsent)), "it has ended");
    }

    #[tokio::test]
    async fn callers_that_give_up_leave_nothing_behind() {
        let (calls, _shim, _running) = connected();
        for _call in 0..100 {
            assert!(timeout(Duration::from_millis(1), calls.call(vec![0; 10])).await.is_err());
        }
        assert!(calls.state().calls.is_empty());
    }
}
