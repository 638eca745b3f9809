//! Frames that no client sends: how our shim answers them.

use anyhow::{Result, ensure};
use shim_tests::refusals::frames;
use shim_tests::stand::Stand;
use shim_tests::ttrpc::Code;

pub(crate) async fn a_length_beyond_the_limit_is_named(stand: Stand) -> Result<()> {
    let refusals = frames::of_lengths(&stand).await?;
    for (refused, length) in refusals.iter().zip(["4194305", "5242880"]) {
        ensure!(refused.message.contains(length), "{refused:?}");
    }
    Ok(())
}

pub(crate) async fn garbage_is_answered_with_a_short_message_and_its_own_code(stand: Stand) -> Result<()> {
    for refused in frames::of_garbage(&stand).await? {
        let codes: &[Code] = match refused.what {
            "no request" => &[Code::InvalidArgument, Code::Unimplemented],
            "no message" => &[Code::InvalidArgument],
            _ => &[Code::Unimplemented],
        };
        ensure!(codes.contains(&refused.code) && refused.message.len() < 500, "{refused:?}");
    }
    Ok(())
}

pub(crate) async fn an_invalid_stream_id_is_reported(stand: Stand) -> Result<()> {
    for refused in frames::of_streams(&stand).await? {
        ensure!(refused.what != "even" || refused.message.contains("odd"), "{refused:?}");
    }
    Ok(())
}
