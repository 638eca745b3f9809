//! Fuzz targets: every parser of outside bytes, with a property that holds for any bytes: no panic, and the one its function documents.
//!
//! The targets in `fuzz/` drive these by coverage; the tests replay `fuzz/corpus` and mutations of it, the same in every run.
//! `X_FUZZ_ROUNDS` sets the number of inputs for each; `X_SEED` selects them.
use std::path::Path;

use containerd_shim_protos::protobuf::Message as _;
use containerd_shim_protos::ttrpc;
use protobuf::well_known_types::any::Any;

use crate::bootstrap::dialect::Question;
use crate::frame::{Header, RequestView, response_code};
use crate::handover::{ControlReply, ControlRequest, ToKeeper, ToWorker};
use crate::invocation::Flags;
use crate::journal;
use crate::journal_body::JournalBody;
use crate::options::{CheckpointOptions, RuntimeOptions};
use crate::stdio_uri::StdioUri;
use crate::worker::spec::Spec;

/// A frame of ttrpc, as the relay reads it: the result equals the full parser's.
pub fn frame(bytes: &[u8]) {
    let _ = Header::parse(bytes);
    let _ = response_code(bytes);
    if let (Some(view), Ok(full)) = (RequestView::parse(bytes), ttrpc::Request::parse_from_bytes(bytes)) {
        assert_eq!((view.service, view.method), (full.service.as_bytes(), full.method.as_bytes()), "{bytes:?}");
        assert_eq!(view.payload, full.payload, "{bytes:?}");
    }
}

/// Standard input of `start`: any input gets an answer.
pub fn bootstrap(bytes: &[u8]) {
    let flags = Flags { id: "c1".into(), namespace: "n1".into(), ..Flags::default() };
    let question = Question::parse(bytes, &flags);
    assert!(!question.dialect.answer("unix:///a").is_empty());
    if let Some(options) = &question.options {
        let _ = RuntimeOptions::blocking_read(Some(options));
    }
}

/// The options of a runtime, of a checkpoint and of a pod, and stdio URIs.
pub fn options(bytes: &[u8]) {
    const TYPES: [&str; 5] = [
        "containerd.runc.v1.Options",
        "runtimeoptions.v1.Options",
        "containerd.runc.v1.CheckpointOptions",
        "containerd.linux.runc.CreateOptions",
        "containerd.linux.runc.CheckpointOptions",
    ];
    for name in TYPES {
        let any = Any { type_url: name.to_owned(), value: bytes.to_vec(), ..Default::default() };
        let _ = RuntimeOptions::blocking_read(Some(&any));
        let _ = CheckpointOptions::read(Some(&any));
    }
    let _ = x_proto::pod::PodConfig::parse_from_bytes(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = StdioUri::parse("stdout", text);
        let _ = StdioUri::parse_stdin(text);
    }
}

/// The `config.json` of a bundle.
pub fn config(bytes: &[u8]) {
    let _ = Spec::parse(bytes, Path::new("/b"));
}

/// The journal of a container.
pub fn journal(bytes: &[u8]) {
    let Ok(found) = journal::parse(bytes) else { return };
    if let Some(body) = found.body {
        assert!(body.len() <= journal::MAX_BODY_BYTES, "{}", body.len());
        let _ = JournalBody::decode(&body);
    }
}

/// Messages between keeper, worker and commands: a decoded message can be encoded and decoded again.
pub fn handover(bytes: &[u8]) {
    if let Ok(message) = ToWorker::decode(bytes) {
        assert_eq!(ToWorker::decode(&message.encode()[4..]).ok(), Some(message));
    }
    if let Ok(message) = ToKeeper::decode(bytes) {
        assert_eq!(ToKeeper::decode(&message.encode()[4..]).ok(), Some(message));
    }
    let _ = ControlRequest::decode(bytes);
    let _ = ControlReply::decode(bytes);
}

#[cfg(test)]
mod tests {
    use scratch::corpus::{corpus, each};

    /// Of each corpus.
    const ROUNDS: u64 = 20_000;

    #[test]
    fn no_bytes_make_the_relay_panic_and_what_it_finds_is_what_the_full_parser_finds() {
        each(&corpus("frame"), ROUNDS, super::frame);
    }

    #[test]
    fn no_bytes_on_standard_input_make_start_panic() {
        each(&corpus("bootstrap"), ROUNDS, super::bootstrap);
    }

    #[test]
    fn no_bytes_in_options_make_their_reader_panic() {
        each(&corpus("options"), ROUNDS, super::options);
    }

    #[test]
    fn no_bytes_in_a_configuration_make_its_reader_panic() {
        each(&corpus("config"), ROUNDS, super::config);
    }

    #[test]
    fn no_bytes_in_a_journal_make_its_reader_panic() {
        each(&corpus("journal"), ROUNDS, super::journal);
    }

    #[test]
    fn no_bytes_on_a_socket_make_keeper_or_worker_panic_and_what_is_read_can_be_written_and_read_again() {
        each(&corpus("handover"), ROUNDS, super::handover);
    }
}
