//! The transport: frames that no client sends, and more connections than usual. No other connection and no container is affected.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use tokio::io::AsyncWriteExt as _;

use crate::clauses;
use crate::conformance::Case;
use crate::eventually::{SOON, a_second, eventually, within};
use crate::refusals::frames::{self, answers, spoken, state_of};
use crate::stand::Stand;
use crate::task::{Task, wait};
use crate::ttrpc::{CallError, Frame, Wire};
use crate::witness::Witness;

pub(super) fn cases() -> Vec<Case> {
    clauses![wire:
        "W1" => frames_split_anywhere_are_reassembled;
        "W2" => a_truncated_frame_affects_no_other_connection;
        "W3" => a_slow_client_does_not_delay_the_others;
        "W4" => answers_are_sent_when_they_are_ready;
        "W5" => an_oversized_frame_is_refused_and_the_connection_stays_usable;
        "W6" => garbage_is_answered_and_the_connection_stays_usable;
        "W7" => invalid_stream_ids_and_frame_types_are_answered;
        "W8" => three_hundred_connections_are_served_or_closed_at_once;
    ]
}

/// The boundaries of writes are not those of frames.
async fn frames_split_anywhere_are_reassembled(stand: Stand) -> Result<()> {
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
        let frame = incoming.receive().await?.context("the shim closed the connection")?;
        ensure!(frame.answer().is_ok(), "{:?}", frame.answer());
    }
    drop(sender.await??);
    witness.dismiss().await
}

async fn a_truncated_frame_affects_no_other_connection(stand: Stand) -> Result<()> {
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

async fn a_slow_client_does_not_delay_the_others(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let mut wire = Wire::connect(witness.socket()).await?;
    let frame = Frame::request(1, spoken(&witness), "State", &state_of("witness")).encode();
    let slow = tokio::spawn(async move {
        for byte in frame {
            wire.send(&[byte]).await?;
            tokio::time::sleep(Duration::from_millis(10)).await; // the slowness is under test
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

/// A Wait on the same connection delays no other call.
async fn answers_are_sent_when_they_are_ready(stand: Stand) -> Result<()> {
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

async fn an_oversized_frame_is_refused_and_the_connection_stays_usable(stand: Stand) -> Result<()> {
    frames::of_lengths(&stand).await.map(drop)
}

async fn garbage_is_answered_and_the_connection_stays_usable(stand: Stand) -> Result<()> {
    frames::of_garbage(&stand).await.map(drop)
}

async fn invalid_stream_ids_and_frame_types_are_answered(stand: Stand) -> Result<()> {
    frames::of_streams(&stand).await.map(drop)
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
        // earlier connections are not affected
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
