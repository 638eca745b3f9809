//! `x-manager publish`: an event from the command line, for shims that publish by running the daemon's program.
//!
//! `-publish-binary` names the program; shims run it as containerd's own (`--address SOCKET publish --topic TOPIC --namespace NAMESPACE`), and write the
//! event, a `google.protobuf.Any`, to its standard input.

use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::ttrpc::{self, Request};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message as _, MessageField};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

use crate::error::{Error, IoContext as _, Result};

/// Sends the event on standard input to the daemon at `address`.
///
/// Errors: the daemon's answer, or why it cannot be reached.
pub(crate) fn publish(address: &Path, namespace: &str, topic: &str) -> Result<()> {
    let mut bytes = Vec::new();
    std::io::stdin().take(EVENT_BYTES + 1).read_to_end(&mut bytes).on("read", Path::new("standard input"))?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > EVENT_BYTES) {
        return Err(Error::Exhausted(format!("an event of more than {EVENT_BYTES} bytes")));
    }
    let event = Any::parse_from_bytes(&bytes).map_err(|error| Error::Invalid(format!("standard input is not an event: {error}")))?;
    let envelope = Envelope {
        timestamp: MessageField::some(Timestamp::now()),
        namespace: namespace.to_owned(),
        topic: topic.to_owned(),
        event: MessageField::some(event),
        ..Envelope::default()
    };
    let forward = ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
    let request = Request {
        service: "containerd.services.events.ttrpc.v1.Events".to_owned(),
        method: "Forward".to_owned(),
        payload: forward.write_to_bytes().map_err(|error| Error::Invalid(format!("the event cannot be sent: {error}")))?,
        timeout_nano: i64::try_from(ANSWER_TIMEOUT.as_nanos()).unwrap_or(i64::MAX),
        ..Request::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().on("start the executor for", address)?;
    runtime.block_on(async {
        let socket = tokio::net::UnixStream::connect(address).await.map_err(|why| Error::NoDaemon { address: address.to_owned(), why })?;
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, Client::new(Socket::new(socket)).request(request)).await;
        match answer {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(ttrpc::Error::RpcStatus(status))) => Err(Error::Remote { code: status.code.value().into(), message: status.message }),
            Ok(Err(error)) => Err(Error::Silent(error.to_string())),
            Err(_elapsed) => Err(Error::Silent(format!("not within {ANSWER_TIMEOUT:?}"))),
        }
    })
}

/// The longest event.
const EVENT_BYTES: u64 = 1 << 20;
/// For the daemon to answer; containerd's own shims wait as long.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
