//! Requests that cannot be carried out: each gets one clear error, and a container of the same shim does not notice.

use anyhow::{Result, ensure};

use crate::clauses;
use crate::conformance::Case;
use crate::refusals::{Refusal, requests};
use crate::stand::Stand;

pub(super) fn cases() -> Vec<Case> {
    clauses![requests:
        "B1" => a_bundle_that_cannot_be_run_is_refused;
        "B2" => a_request_that_cannot_be_carried_out_is_refused;
        "B3" => an_invalid_id_is_refused;
        "B4" => an_exec_that_cannot_run_is_refused_and_leaves_nothing;
        "B5" => invalid_values_are_refused;
    ]
}

fn have_words(refusals: &[Refusal]) -> Result<()> {
    let silent = refusals.iter().find(|refused| refused.message.is_empty());
    ensure!(silent.is_none(), "no word: {silent:?}");
    Ok(())
}

async fn a_bundle_that_cannot_be_run_is_refused(stand: Stand) -> Result<()> {
    have_words(&requests::of_bundles(&stand).await?)
}

async fn a_request_that_cannot_be_carried_out_is_refused(stand: Stand) -> Result<()> {
    requests::of_creates(&stand).await.map(drop)
}

async fn an_invalid_id_is_refused(stand: Stand) -> Result<()> {
    requests::of_ids(&stand).await.map(drop)
}

async fn an_exec_that_cannot_run_is_refused_and_leaves_nothing(stand: Stand) -> Result<()> {
    have_words(&requests::of_execs(&stand).await?)
}

async fn invalid_values_are_refused(stand: Stand) -> Result<()> {
    have_words(&requests::of_values(&stand).await?)
}
