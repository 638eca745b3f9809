//! Frames that no client sends: each is answered or ignored, and neither its connection nor a container of the same shim suffers.

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use shim_tests::stand::Stand;
use shim_tests::task::{V2, V3};
use shim_tests::ttrpc::{CallError, Code, DATA, Frame, MAX_PAYLOAD_BYTES, REQUEST, RESPONSE, Wire, header, refusal};
use shim_tests::witness::Witness;

pub(crate) fn state_of(id: &str) -> api::StateRequest {
    api::StateRequest { id: id.to_owned(), ..Default::default() }
}

/// The answer to a request that nothing is wrong with.
pub(crate) async fn answers(wire: &mut Wire, stream: u32) -> Result<()> {
    let answer = wire.call(stream, V2, "State", &state_of("witness")).await?;
    ensure!(answer.is_ok(), "a good request afterwards: {answer:?}");
    Ok(())
}

pub(crate) async fn a_length_beyond_the_limit_is_refused_and_the_connection_goes_on(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let mut wire = Wire::connect(witness.socket()).await?;
    // exactly the limit is taken: mostly of a field that nobody knows
    let mut longest = Frame::request(1, V2, "State", &state_of("witness"));
    let rest = MAX_PAYLOAD_BYTES - longest.payload.len() - 6;
    longest.payload.extend([0xfa, 0x01]);
    let mut length = rest as u32;
    while length >= 0x80 {
        longest.payload.push(length as u8 | 0x80);
        length >>= 7;
    }
    longest.payload.push(length as u8);
    longest.payload.resize(MAX_PAYLOAD_BYTES, 0);
    wire.send(&longest.encode()).await?;
    let answer = wire.answer(1).await?;
    ensure!(answer.is_ok(), "{answer:?}");
    for (stream, length) in [(3, MAX_PAYLOAD_BYTES + 1), (5, 5 << 20)] {
        wire.send(&header(length as u32, stream, REQUEST)).await?;
        wire.send(&vec![0x5a; length]).await?;
        let (code, message) = refusal(wire.answer(stream).await?)?;
        ensure!(code == Code::ResourceExhausted && message.contains(&length.to_string()), "{code:?} {message}");
    }
    answers(&mut wire, 7).await?;
    witness.dismiss().await
}

pub(crate) async fn garbage_is_answered_and_the_connection_goes_on(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let mut wire = Wire::connect(witness.socket()).await?;
    let mut stream = 1;
    let mut next = || {
        stream += 2;
        stream
    };
    // no Request at all
    for payload in [vec![], vec![0xff; 7], vec![0], vec![0x0a, 0xff], vec![0x0a, 0x7f, b'x'], vec![b'x'; 1 << 20]] {
        let stream = next();
        wire.send(&Frame { stream, kind: REQUEST, payload }.encode()).await?;
        let (code, message) = refusal(wire.answer(stream).await?)?;
        ensure!([Code::InvalidArgument, Code::Unimplemented].contains(&code), "{code:?} {message}");
        ensure!(message.len() < 500, "{} bytes of sentence", message.len());
    }
    // a Request of something that is no message
    for method in ["State", "Create", "Start", "Delete", "Kill", "Exec", "Wait", "Update", "Stats", "Shutdown"] {
        let stream = next();
        wire.send(&Frame::request_of_bytes(stream, V2, method, vec![0xff; 7], None).encode()).await?;
        let (code, message) = refusal(wire.answer(stream).await?)?;
        ensure!(code == Code::InvalidArgument, "{method}: {code:?} {message}");
    }
    let long = "S".repeat(100_000);
    for (service, method) in [
        (V2, "Fly"),
        (V3, "state"),
        (V2, ""),
        ("containerd.task.v4.Task", "State"),
        ("", "State"),
        ("", ""),
        (V2, "State\0"),
        (&long, &long),
    ] {
        let stream = next();
        wire.send(&Frame::request_of_bytes(stream, service, method, vec![], None).encode()).await?;
        let (code, message) = refusal(wire.answer(stream).await?)?;
        ensure!(code == Code::Unimplemented, "{service}/{method}: {code:?} {message}");
        ensure!(message.len() < 500, "{} bytes of sentence", message.len());
    }
    // time that is over, or never was
    for timeout in [i64::MIN, -1, 1, i64::MAX] {
        let request = containerd_shim_protos::ttrpc::Request {
            service: V2.to_owned(),
            method: "State".to_owned(),
            payload: protobuf::Message::write_to_bytes(&state_of("witness"))?,
            timeout_nano: timeout,
            ..Default::default()
        };
        let stream = next();
        wire.send(&Frame { stream, kind: REQUEST, payload: protobuf::Message::write_to_bytes(&request)? }.encode()).await?;
        match wire.answer(stream).await? {
            Ok(_) => {}
            Err(CallError::Refused { code: Code::DeadlineExceeded, .. }) if timeout == 1 => {}
            Err(error) => anyhow::bail!("timeout {timeout}: {error}"),
        }
    }
    answers(&mut wire, next()).await?;
    witness.dismiss().await
}

pub(crate) async fn stream_ids_and_frame_types_that_make_no_sense_are_answered(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let state = state_of("witness");
    // even, nought
    for stream in [0, 2, u32::MAX - 1] {
        let mut wire = Wire::connect(witness.socket()).await?;
        let (code, message) = refusal(wire.call(stream, V2, "State", &state).await?)?;
        ensure!(code == Code::InvalidArgument && message.contains("odd"), "{stream}: {code:?} {message}");
        answers(&mut wire, 1).await?;
    }
    // used before, or lower than one that was
    let mut wire = Wire::connect(witness.socket()).await?;
    answers(&mut wire, 101).await?;
    for stream in [101, 99, 1] {
        let (code, message) = refusal(wire.call(stream, V2, "State", &state).await?)?;
        ensure!(code == Code::InvalidArgument && !message.is_empty(), "{stream}: {code:?} {message}");
    }
    answers(&mut wire, 103).await?;
    answers(&mut wire, u32::MAX).await?;
    // no request
    for kind in [0, RESPONSE, DATA, 4, 0xff] {
        let mut wire = Wire::connect(witness.socket()).await?;
        wire.send(&Frame { kind, ..Frame::request(1, V2, "State", &state) }.encode()).await?;
        wire.send(&Frame::request(3, V2, "State", &state).encode()).await?;
        let mut refused = false;
        loop {
            let frame = wire.receive().await?.with_context(|| format!("hung up upon a frame of type {kind}"))?;
            match (frame.stream, frame.answer()) {
                (1, Err(_)) if !refused => refused = true,
                (3, Ok(_)) => break,
                (stream, answer) => anyhow::bail!("type {kind}: on stream {stream}: {answer:?}"),
            }
        }
    }
    witness.dismiss().await
}
