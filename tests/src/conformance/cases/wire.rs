//! The transport: frames that no client sends, and more connections than usual. Neither a connection nor a container suffers.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use tokio::io::AsyncWriteExt as _;

use crate::clauses;
use crate::conformance::Case;
use crate::eventually::{SOON, a_second, eventually, within};
use crate::stand::Stand;
use crate::task::{Task, wait};
use crate::ttrpc::{CallError, Code, DATA, Frame, MAX_PAYLOAD_BYTES, REQUEST, RESPONSE, Wire, header, refusal};
use crate::witness::Witness;

pub(super) fn cases() -> Vec<Case> {
    clauses![wire:
        "W1" => frames_cut_anywhere_are_put_together;
        "W2" => a_frame_that_is_cut_off_harms_nobody;
        "W3" => a_slow_client_is_served_beside_the_others;
        "W4" => answers_come_as_they_are_ready;
        "W5" => a_length_beyond_the_limit_is_refused_and_the_connection_goes_on;
        "W6" => garbage_is_answered_and_the_connection_goes_on;
        "W7" => stream_ids_and_frame_types_that_make_no_sense_are_answered;
        "W8" => three_hundred_connections_are_served_or_closed_at_once;
    ]
}

fn state_of(id: &str) -> api::StateRequest {
    api::StateRequest { id: id.to_owned(), ..Default::default() }
}

/// The service that the witness's shim speaks.
fn spoken(witness: &Witness) -> &'static str {
    witness.container.task.service_name()
}

/// The answer to a request that nothing is wrong with.
async fn answers(wire: &mut Wire, service: &str, stream: u32) -> Result<()> {
    let answer = wire.call(stream, service, "State", &state_of("witness")).await?;
    ensure!(answer.is_ok(), "a good request afterwards: {answer:?}");
    Ok(())
}

/// Where one write ends says nothing about where a frame does.
async fn frames_cut_anywhere_are_put_together(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let wire = Wire::connect(witness.socket()).await?;
    let (mut bytes, mut stream, total) = (Vec::new(), 1, 300_u32);
    for number in 0..total {
        // of lengths that fit no buffer
        let mut request = state_of("witness");
        request.special_fields.mut_unknown_fields().add_length_delimited(99, vec![b'x'; (number * number) as usize]);
        bytes.extend(Frame::request(stream, spoken(&witness), "State", &request).encode());
        stream += 2;
    }
    let (mut incoming, mut writer) = wire.split();
    let sender = tokio::spawn(async move {
        let (mut seed, mut rest) = (0x9e37_79b9_7f4a_7c15_u64, bytes.as_slice());
        while !rest.is_empty() {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let (part, others) = rest.split_at(rest.len().min(1 + (seed % 50_000) as usize));
            within("send", SOON, writer.write_all(part)).await??;
            rest = others;
        }
        anyhow::Ok(writer)
    });
    for _ in 0..total {
        let frame = incoming.receive().await?.context("hung up")?;
        ensure!(frame.answer().is_ok(), "{:?}", frame.answer());
    }
    drop(sender.await??);
    witness.dismiss().await
}

async fn a_frame_that_is_cut_off_harms_nobody(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let whole = Frame::request(1, spoken(&witness), "State", &state_of("witness")).encode();
    for length in 0..whole.len() {
        let mut wire = Wire::connect(witness.socket()).await?;
        wire.send(&whole[..length]).await?;
    }
    // and one that will never be whole, with the connection open
    let mut held = Vec::new();
    for length in [1, 9, 10, 11, whole.len() - 1] {
        let mut wire = Wire::connect(witness.socket()).await?;
        wire.send(&whole[..length]).await?;
        held.push(wire);
    }
    witness.is_untouched().await?;
    drop(held);
    witness.dismiss().await
}

async fn a_slow_client_is_served_beside_the_others(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let mut wire = Wire::connect(witness.socket()).await?;
    let frame = Frame::request(1, spoken(&witness), "State", &state_of("witness")).encode();
    let slow = tokio::spawn(async move {
        for byte in frame {
            wire.send(&[byte]).await?;
            tokio::time::sleep(Duration::from_millis(10)).await; // the slowness is what is tested
        }
        wire.answer(1).await
    });
    let mut rounds = 0;
    while !slow.is_finished() {
        witness.is_untouched().await?;
        rounds += 1;
    }
    ensure!(slow.await??.is_ok() && rounds > 0, "{rounds} rounds");
    witness.dismiss().await
}

/// A Wait on the same connection holds nothing up.
async fn answers_come_as_they_are_ready(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let mut wire = Wire::connect(witness.socket()).await?;
    wire.send(&Frame::request(1, spoken(&witness), "Wait", &wait("witness", "")).encode()).await?;
    for stream in [3, 5, 7] {
        answers(&mut wire, spoken(&witness), stream).await?;
    }
    witness.dismiss().await?;
    let waited = wire.answer(1).await?.context("the Wait")?;
    let waited: api::WaitResponse = protobuf::Message::parse_from_bytes(&waited)?;
    ensure!(waited.exit_status == 137, "{waited}");
    Ok(())
}

async fn a_length_beyond_the_limit_is_refused_and_the_connection_goes_on(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let mut wire = Wire::connect(witness.socket()).await?;
    // exactly the limit is taken: mostly of a field that nobody knows
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
        let (code, message) = refusal(wire.answer(stream).await?)?;
        ensure!(code == Code::ResourceExhausted, "{code:?} {message}");
    }
    answers(&mut wire, spoken(&witness), 7).await?;
    witness.dismiss().await
}

async fn garbage_is_answered_and_the_connection_goes_on(stand: Stand) -> Result<()> {
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
        ensure!(code != Code::Ok, "{message}");
    }
    // a Request of something that is no message
    for method in ["State", "Create", "Start", "Delete", "Kill", "Exec", "Wait", "Update", "Stats", "Shutdown"] {
        let stream = next();
        wire.send(&Frame::request_of_bytes(stream, spoken(&witness), method, vec![0xff; 7], None).encode()).await?;
        let (code, message) = refusal(wire.answer(stream).await?)?;
        ensure!(code != Code::Ok, "{method}: {message}");
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
        let (code, message) = refusal(wire.answer(stream).await?)?;
        ensure!(code == Code::Unimplemented, "{service}/{method}: {code:?} {message}");
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
    witness.dismiss().await
}

async fn stream_ids_and_frame_types_that_make_no_sense_are_answered(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let state = state_of("witness");
    // even, nought
    for stream in [0, 2, u32::MAX - 1] {
        let mut wire = Wire::connect(witness.socket()).await?;
        let (code, message) = refusal(wire.call(stream, spoken(&witness), "State", &state).await?)?;
        ensure!(code == Code::InvalidArgument, "{stream}: {code:?} {message}");
        answers(&mut wire, spoken(&witness), 1).await?;
    }
    // used before, or lower than one that was
    let mut wire = Wire::connect(witness.socket()).await?;
    answers(&mut wire, spoken(&witness), 101).await?;
    for stream in [101, 99, 1] {
        let (code, message) = refusal(wire.call(stream, spoken(&witness), "State", &state).await?)?;
        ensure!(code == Code::InvalidArgument && !message.is_empty(), "{stream}: {code:?} {message}");
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

async fn three_hundred_connections_are_served_or_closed_at_once(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    for _round in 0..2 {
        let mut wires = Vec::new();
        for _ in 0..300 {
            wires.push(Wire::connect(witness.socket()).await?);
        }
        let (mut served, mut closed) = (0, 0);
        for wire in &mut wires {
            // one that was closed may break the pipe
            let answer = match wire.send(&Frame::request(1, spoken(&witness), "State", &state_of("witness")).encode()).await {
                Ok(()) => wire.answer(1).await?,
                Err(_) => Err(CallError::Closed),
            };
            match answer {
                Ok(_) => served += 1,
                Err(CallError::Closed) => closed += 1,
                Err(error) => return Err(error.into()),
            }
        }
        ensure!(served >= 200 && served + closed == 300, "{served} served, {closed} closed");
        // whoever was connected before is none the worse for it
        let second = a_second();
        witness.container.task.state_within("witness", "", second).await?;
        drop(wires);
        eventually("there is room again", SOON, async || {
            let task = Task::connect(witness.socket()).await?;
            Ok(task.state_within("witness", "", second).await?)
        })
        .await?;
    }
    witness.dismiss().await
}
