//! Upgrades of our shim to another build, and workers that crash, hang or cannot start. Needs root.
//!
//! `X_SHIM_FAULTY` names a shim built with the feature `fault-injection`.

#[path = "upgrade/bad_builds.rs"]
mod bad_builds;
#[path = "upgrade/bad_workers.rs"]
mod bad_workers;
#[path = "upgrade/crashes.rs"]
mod crashes;
#[path = "upgrade/full_disk.rs"]
mod full_disk;
#[path = "upgrade/hibernation.rs"]
mod hibernation;
#[path = "upgrade/keeper.rs"]
mod keeper;
#[path = "upgrade/outputs.rs"]
mod outputs;
#[path = "upgrade/steps.rs"]
mod steps;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use shim_tests::builds;
use shim_tests::cases;
use shim_tests::context::Context;
use shim_tests::runner::{self, Scope};
use shim_tests::suite::Shim;

fn main() -> ExitCode {
    let programs = Path::new(env!("CARGO_BIN_EXE_gated-runtime")).parent().expect("a file is in a folder");
    let long = Duration::from_secs(180);
    let cases = [
        cases![steps, Scope::Daemons => upgrades_and_downgrades_keep_every_container_and_call, a_new_binary_starts_a_container_in_the_shim_of_an_old_one].map_within(long),
        cases![bad_builds,
            Scope::Once =>
                a_worker_that_does_not_work_never_takes_over,
                a_new_worker_that_fails_is_rolled_back_to_the_previous_build,
                a_keeper_that_does_not_work_never_takes_over,
                an_executable_that_cannot_resume_executes_the_previous_one,
                a_keeper_short_of_descriptors_survives_an_upgrade_attempt,
                a_worker_that_fails_during_the_rehearsal_rolls_the_whole_upgrade_back,
                a_new_worker_that_gets_no_cpu_does_not_replace_the_keeper,
                a_rehearsal_that_cannot_be_killed_does_not_stop_the_keeper,
                a_program_that_is_no_shim_is_refused,
                an_upgrade_to_the_same_executable_changes_nothing,
                only_the_shims_that_are_named_are_upgraded,
                many_shims_are_upgraded_a_few_at_a_time,
        ]
        .map_within(long),
        cases![bad_workers,
            Scope::Daemons => what_containerd_needs_is_answered_while_no_worker_starts;
            Scope::Ends => a_stopped_worker_is_replaced, a_worker_that_cannot_be_killed_is_replaced;
            Scope::Once =>
                a_request_that_crashes_the_worker_is_answered_with_an_error_and_the_others_succeed,
                a_request_that_hangs_its_worker_is_answered_with_an_error_and_the_others_succeed,
                an_exit_that_crashes_the_worker_is_published_by_another_build,
                a_request_that_crashes_every_worker_leaves_no_zombie,
                a_container_whose_record_cannot_be_read_is_unavailable_and_keeps_its_id,
                a_slow_operation_is_not_taken_for_a_hang,
                a_shutdown_that_a_worker_was_too_slow_for_is_carried_out,
        ]
        .map_within(long),
        cases![crashes,
            Scope::Ends => a_crashed_worker_is_replaced_under_calls_in_progress, delete_works_while_no_worker_starts;
            Scope::Once => saved_state_does_not_grow_with_the_number_of_past_execs, a_worker_out_of_memory_is_replaced, a_state_that_cannot_be_saved_keeps_the_keeper_as_it_is,
                a_wait_for_a_container_that_delete_removed_is_answered, delete_reports_the_workers_record_without_a_journal,
        ]
        .map_within(long),
        cases![full_disk,
            Scope::Ends => a_full_disk_fails_only_calls_that_need_room, without_room_for_sockets_running_containers_continue;
            Scope::Once => a_create_on_a_disk_that_fills_up_is_completed_or_undone, a_pod_on_a_disk_that_fills_up_is_made_or_undone,
        ]
        .map_within(long),
        cases![keeper,
            Scope::Daemons => a_pod_whose_keeper_is_killed_exits_once_and_can_be_recreated;
            Scope::Ends => a_running_oci_runtime_ends_with_its_keeper, a_created_container_can_be_started_after_its_keeper_was_replaced;
            Scope::Once => a_performer_ends_with_its_keeper, an_idle_time_beyond_the_clock_never_elapses,
        ]
        .map_within(long),
        cases![outputs,
            Scope::Ends => a_delete_that_waits_for_output_is_answered_after_an_upgrade_and_no_byte_is_lost,
        ]
        .map_within(long),
        // other tests call every shim of the host
        cases![bad_workers, Scope::Once => an_idle_worker_is_not_pinged].into_iter().map(runner::Case::alone).collect(),
        cases![hibernation,
            Scope::Ends => a_request_an_exit_or_an_event_starts_a_hibernating_worker, containers_are_stopped_while_the_host_has_no_pids_for_a_worker;
            Scope::Once =>
                a_shim_with_a_hibernating_worker_is_upgraded_and_survives_its_daemon,
                a_worker_that_copies_outputs_does_not_hibernate,
                a_keeper_takes_an_inotify_instance_only_while_output_waits_for_its_reader,
        ]
        .map_within(long),
    ]
    .concat();
    runner::main_on(Shim::faulty, &cases, &[], programs)
}

/// Gives all cases a deadline.
trait MapWithin {
    fn map_within(self, deadline: Duration) -> Self;
}

impl MapWithin for Vec<runner::Case> {
    fn map_within(self, deadline: Duration) -> Self {
        self.into_iter().map(|case| case.within(deadline)).collect()
    }
}

/// A separate daemon whose shims are a build with the test identity `words`.
async fn on_build(cx: &Context, words: &str) -> Result<Context> {
    let binary = build(cx, "first", words)?;
    cx.with_own_shim(&Shim { binary: Some(binary), ..cx.shim().clone() }, &[]).await
}

/// A build in the test's folder.
fn build(cx: &Context, name: &str, words: &str) -> Result<std::path::PathBuf> {
    let shim = Shim::faulty()?.binary.expect("X_SHIM must name our own shim");
    builds::make(&shim, &cx.folder().join(name), words)
}
