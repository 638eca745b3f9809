//! What keeper and worker say to each other.
//!
//! Owns the format of the messages on the socketpair between a keeper and the life of a worker, and nothing of their meaning.
//! `docs/handover.md` describes it for people.
//!
//! ```text
//!  keeper                                              worker
//!    │ ◀─────────────── Hello {versions, build} ─────────┤   first, within a deadline
//!    ├─ Try*, Tried ────────────────────────────────────▶│   only beside a worker that serves: can it take over?
//!    │ ◀──────────────────────────── Fit {refusal} ──────┤
//!    ├─ Welcome, State*, Request*, Exit*, CaughtUp ─────▶│   in this order: what is known, what is unanswered, what happened
//!    ├─ Request | Exit ─────────────────────────────────▶│   as they come
//!    │ ◀──── Operation {cause, step, op} ────────────────┤   what cannot be done twice
//!    ├───── Done {cause, step, outcome} ────────────────▶│   the same answer whenever it is asked again
//!    │ ◀──── Commit {…} ─────────────────────────────────┤   all of it or nothing; ends causes
//!    ├─ Ping ───────────────────────────────────────────▶│   only while something is unanswered
//!    │ ◀───────────────────────────────────────── Pong ──┤
//! ```
//!
//! A **cause** is what made the worker act: a client's request or the exit of a process. The keeper numbers causes and keeps each
//! of them, with the outcomes of its operations, until a commit ends it. A worker that dies is followed by one that is given
//! the open causes again, runs the same code, and is told the outcomes that are known already.
//!
//! **Invariant:** a message is applied whole or not at all; a torn one at the end of a dead worker's stream is dropped.
mod codec;
mod control;
mod message;
mod version;

pub(crate) use codec::{Malformed, Reader, Writer};
pub(crate) use control::*;
pub(crate) use message::*;
pub(crate) use version::Versions;

/// The longest message either side accepts, in bytes: a ttrpc message (4 MiB) and what surrounds it.
pub(crate) const MAX_MESSAGE_BYTES: usize = 6 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_on_a_socket_make_keeper_or_worker_panic_and_what_is_read_can_be_written_and_read_again() {
        let exit = ProcessExit { key: "c1".to_owned(), pid: 7, status: 3, at_nanos: 5 };
        let commit = Commit {
            state: vec![("c1".to_owned(), Some(vec![1, 2]))],
            events: vec![vec![3]],
            answers: vec![(4, vec![5])],
            ends: vec![6],
            releases: vec!["c1".to_owned()],
            ..Commit::default()
        };
        let corpus = [
            ToWorker::Exit { cause: 9, exit }.encode(),
            ToKeeper::Commit(commit).encode(),
            ControlRequest::Reserve { id: "c1".to_owned() }.encode(),
        ];
        // without the length that frames a message
        let corpus = corpus.map(|message| message[4..].to_vec());
        crate::fuzz::each(&corpus, |bytes| {
            if let Ok(message) = ToWorker::decode(bytes) {
                assert_eq!(ToWorker::decode(&message.encode()[4..]), Ok(message));
            }
            if let Ok(message) = ToKeeper::decode(bytes) {
                assert_eq!(ToKeeper::decode(&message.encode()[4..]), Ok(message));
            }
            let _ = ControlRequest::decode(bytes);
            let _ = ControlReply::decode(bytes);
        });
    }
}
