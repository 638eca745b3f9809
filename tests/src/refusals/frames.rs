//! Frames that no client sends: each is answered, and its connection stays usable.

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;

use super::Refusal;
use crate::stand::Stand;
use crate::ttrpc::{CallError, Code, DATA, Frame, MAX_PAYLOAD_BYTES, REQUEST, RESPONSE, Wire, header};
use crate::witness::Witness;

/// Frames longer than a frame may be; one that is exactly so long is taken.
pub async fn of_lengths(stand: &Stand) -> Result<Vec<Refusal>> {
    let witness = Witness::start(stand).await?;
    let mut refusals = Vec::new();
    let mut wire = Wire::connect(witness.socket()).await?;
    // exactly the limit is accepted: mostly an unknown field
    let mut longest = Frame::request(1, spoken(&witness), "State", &state_of("witness"));
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
        let refused = Refusal::of("too long", wire.answer(stream).await?)?;
        ensure!(refused.code == Code::ResourceExhausted, "{refused:?}");
        refusals.push(refused);
    }
    answers(&mut wire, spoken(&witness), 7).await?;
    witness.dismiss().await?;
    Ok(refusals)
}

/// Frames that are no requests, and invalid services, methods and timeouts.
pub async fn of_garbage(stand: &Stand) -> Result<Vec<Refusal>> {
    let witness = Witness::start(stand).await?;
    let mut refusals = Vec::new();
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
        refusals.push(Refusal::of("no request", wire.answer(stream).await?)?);
    }
    // a Request of something that is no message
    for method in ["State", "Create", "Start", "Delete", "Kill", "Exec", "Wait", "Update", "Stats", "Shutdown"] {
        let stream = next();
        wire.send(&Frame::request_of_bytes(stream, spoken(&witness), method, vec![0xff; 7], None).encode()).await?;
        refusals.push(Refusal::of("no message", wire.answer(stream).await?)?);
    }
    let long = "S".repeat(100_000);
    for (service, method) in [
        (spoken(&witness), "Fly"),
        (spoken(&witness), "state"),
        (spoken(&witness), ""),
        ("containerd.task.v4.Task", "State"),
        ("", "State"),
        ("", ""),
        (spoken(&witness), "State\0"),
        (&long, &long),
    ] {
        let stream = next();
        wire.send(&Frame::request_of_bytes(stream, service, method, vec![], None).encode()).await?;
        let refused = Refusal::of("no method", wire.answer(stream).await?)?;
        ensure!(refused.code == Code::Unimplemented, "{service}/{method}: {refused:?}");
        refusals.push(refused);
    }
    // time that is over, or never was
    for timeout in [i64::MIN, -1, 1, i64::MAX] {
        let request = containerd_shim_protos::ttrpc::Request {
            service: spoken(&witness).to_owned(),
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
    answers(&mut wire, spoken(&witness), next()).await?;
    witness.dismiss().await?;
    Ok(refusals)
}

/// Stream ids that are even, or not above the last one, and frames that are no requests.
pub async fn of_streams(stand: &Stand) -> Result<Vec<Refusal>> {
    let witness = Witness::start(stand).await?;
    let mut refusals = Vec::new();
    let state = state_of("witness");
    // even, nought
    for stream in [0, 2, u32::MAX - 1] {
        let mut wire = Wire::connect(witness.socket()).await?;
        let refused = Refusal::of("even", wire.call(stream, spoken(&witness), "State", &state).await?)?;
        ensure!(refused.code == Code::InvalidArgument, "{stream}: {refused:?}");
        refusals.push(refused);
        answers(&mut wire, spoken(&witness), 1).await?;
    }
    // used before, or lower than one that was
    let mut wire = Wire::connect(witness.socket()).await?;
    answers(&mut wire, spoken(&witness), 101).await?;
    for stream in [101, 99, 1] {
        let refused = Refusal::of("used", wire.call(stream, spoken(&witness), "State", &state).await?)?;
        ensure!(refused.code == Code::InvalidArgument && !refused.message.is_empty(), "{stream}: {refused:?}");
        refusals.push(refused);
    }
    answers(&mut wire, spoken(&witness), 103).await?;
    answers(&mut wire, spoken(&witness), u32::MAX).await?;
    // no request
    for kind in [0, RESPONSE, DATA, 4, 0xff] {
        let mut wire = Wire::connect(witness.socket()).await?;
        wire.send(&Frame { kind, ..Frame::request(1, spoken(&witness), "State", &state) }.encode()).await?;
        wire.send(&Frame::request(3, spoken(&witness), "State", &state).encode()).await?;
        let mut refused = false;
        loop {
            let frame = wire.receive().await?.with_context(|| format!("the shim closed the connection after a frame of type {kind}"))?;
            match (frame.stream, frame.answer()) {
                (1, Err(_)) if !refused => refused = true,
                (3, Ok(_)) => break,
                (stream, answer) => anyhow::bail!("type {kind}: on stream {stream}: {answer:?}"),
            }
        }
    }
    witness.dismiss().await?;
    Ok(refusals)
}

/// The request for the state of a container.
pub fn state_of(id: &str) -> api::StateRequest {
    api::StateRequest { id: id.to_owned(), ..Default::default() }
}

/// The service that the witness's shim speaks.
pub fn spoken(witness: &Witness) -> &'static str {
    witness.container.task.service_name()
}

/// The answer to a valid request.
pub async fn answers(wire: &mut Wire, service: &str, stream: u32) -> Result<()> {
    let answer = wire.call(stream, service, "State", &state_of("witness")).await?;
    ensure!(answer.is_ok(), "a valid request afterwards: {answer:?}");
    Ok(())
}
