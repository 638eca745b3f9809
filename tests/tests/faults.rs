//! The worker crashes before, in the middle of and after every message between keeper and worker, and at random moments; it is stopped
//! and upgraded. Clients, events and runtime calls are the same as without crashes. The main proof of this shim. The keeper of a pod is killed at every message
//! too: nothing of the pod is left then. Needs root.
//!
//! `X_SHIM_FAULTY` names a shim built with the feature `fault-injection`; `X_CAMPAIGN` is the number of runs with random
//! crashes, `X_SEED` their seed; with `X_PLAN` scenarios run that often with one plan instead of all; with `X_FAULTS_ALL` every scenario runs with runc and the native engine.

#[path = "faults/campaign.rs"]
mod campaign;
#[path = "faults/killed_keeper.rs"]
mod killed_keeper;
#[path = "faults/killed_under_containerd.rs"]
mod killed_under_containerd;
#[path = "faults/lane.rs"]
mod lane;
#[path = "faults/run.rs"]
mod run;
#[path = "faults/sandbox.rs"]
mod sandbox;
#[path = "faults/scenarios.rs"]
mod scenarios;
#[path = "faults/sweep.rs"]
mod sweep;
#[path = "faults/tally.rs"]
mod tally;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use shim_tests::runner::{self, Case, Scope};
use shim_tests::sandbox::{CONTAINER, POD};
use shim_tests::suite::Shim;

use killed_keeper::Deletes;

fn main() -> ExitCode {
    let programs = Path::new(env!("CARGO_BIN_EXE_gated-runtime")).parent().expect("a file is in a folder");
    let within = std::env::var("X_CAMPAIGN_WITHIN").ok().and_then(|text| text.parse().ok()).unwrap_or(600);
    let cases: Vec<_> = cases().into_iter().map(|case| case.within(Duration::from_secs(within))).collect();
    runner::main_on(Shim::faulty, &cases, &[], programs)
}

/// One for each scenario. Each runs with one engine, the native one where engines differ most, and scenarios that add little are skipped, unless
/// `X_FAULTS_ALL` is set.
fn cases() -> Vec<Case> {
    use scenarios as s;
    let all = std::env::var_os("X_FAULTS_ALL").is_some();
    let (native, runc) = if all { (Scope::Ends, Scope::Ends) } else { (Scope::Once, Scope::Oldest) };
    let mut cases = vec![
        Case::new("every_message::life", native, |cx| Box::pin(sweep::every_message(cx, &s::LIFE))),
        Case::new("every_message::short", runc, |cx| Box::pin(sweep::every_message(cx, &s::SHORT))),
        Case::new("every_message::terminal", native, |cx| Box::pin(sweep::every_message(cx, &s::TERMINAL))),
        Case::new("every_message::failing_create", native, |cx| Box::pin(sweep::every_message(cx, &s::FAILING_CREATE))),
        Case::new("every_message::failing_start", native, |cx| Box::pin(sweep::every_message(cx, &s::FAILING_START))),
        Case::new("every_message::sandbox", Scope::Once, |cx| {
            Box::pin(async move { sweep::every_message(cx.with_own_sandboxes().await?, &sandbox::SANDBOX).await })
        }),
        Case::new("every_message::upgrade", runc, |cx| Box::pin(sweep::every_message(cx, &s::UPGRADE))),
        Case::new("killed_keeper::the_deletes_of_a_pod_and_its_containers_leave_nothing", Scope::Once, |cx| {
            Box::pin(killed_keeper::every_message(cx, Deletes::Each, CONTAINER, 14))
        }),
        Case::new("killed_keeper::the_delete_of_a_pod_with_a_holder_leaves_nothing", Scope::Once, |cx| {
            Box::pin(killed_keeper::every_message(cx, Deletes::PodAlone, POD, 14))
        }),
        Case::new("killed_keeper::a_pod_of_containerds_is_shut_down_and_leaves_nothing", Scope::Once, |cx| {
            Box::pin(killed_under_containerd::every_message(cx, 9))
        }),
        Case::new("campaign::random_crashes_are_not_noticed", Scope::Ends, |cx| Box::pin(campaign::random_crashes(cx))),
    ];
    if all {
        cases.extend([
            Case::new("every_message::pod", Scope::Ends, |cx| Box::pin(sweep::every_message(cx, &s::POD))),
            Case::new("every_message::pause", Scope::Ends, |cx| Box::pin(sweep::every_message(cx, &s::PAUSE))),
            Case::new("every_message::file", Scope::Ends, |cx| Box::pin(sweep::every_message(cx, &s::FILE))),
            Case::new("every_message::kill_all", Scope::Ends, |cx| Box::pin(sweep::every_message(cx, &s::KILL_ALL))),
            Case::new("every_message::shared_pids", Scope::Ends, |cx| Box::pin(sweep::every_message(cx, &s::SHARED_PIDS))),
            Case::new("every_message::logger", Scope::Ends, |cx| Box::pin(sweep::every_message(cx, &s::LOGGER))),
            Case::new("every_message::checkpoint", Scope::Once, |cx| Box::pin(sweep::every_message(cx, &s::CHECKPOINT))),
            Case::new("every_message::restore", Scope::Once, |cx| Box::pin(sweep::every_message(cx, &s::RESTORE))),
            Case::new("every_message::shared_sandbox", Scope::Newest, |cx| {
                Box::pin(async move { sweep::every_message(cx.with_own_sandboxes().await?, &sandbox::SHARED_SANDBOX).await })
            }),
            Case::new("killed_keeper::the_deletes_of_a_pod_with_a_holder_and_its_containers_leave_nothing", Scope::Once, |cx| {
                Box::pin(killed_keeper::every_message(cx, Deletes::Each, POD, 14))
            }),
            Case::new("killed_keeper::the_delete_of_a_pod_leaves_nothing", Scope::Once, |cx| {
                Box::pin(killed_keeper::every_message(cx, Deletes::PodAlone, CONTAINER, 14))
            }),
            Case::new("every_message::signals", Scope::Ends, |cx| Box::pin(sweep::every_message(cx, &s::SIGNALS))),
            Case::new("every_message::command", Scope::Ends, |cx| Box::pin(sweep::every_message(cx, &s::COMMAND))),
            Case::new("every_message::rest", Scope::Oldest, |cx| {
                Box::pin(async move {
                    let cx = cx.with_own_shim(cx.shim(), &[("X_SHIM_IDLE_SECONDS", "5")]).await?;
                    sweep::every_message(cx, &s::REST).await
                })
            }),
        ]);
    }
    cases
}
