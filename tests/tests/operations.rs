//! x-manager for operators: upgrades, restarts of containers, bad input, files and service managers. Needs root.
//!
//! `X_DAEMON` names the binary.

#[path = "operations/disk.rs"]
mod disk;
#[path = "operations/files.rs"]
mod files;
#[path = "operations/limits.rs"]
mod limits;
#[path = "operations/restart.rs"]
mod restart;
#[path = "operations/service.rs"]
mod service;
#[path = "operations/upgrade.rs"]
mod upgrade;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use shim_tests::cases;
use shim_tests::runner::{self, Case, Scope};
use shim_tests::suite;

fn main() -> ExitCode {
    if let Err(error) = suite::use_manager() {
        eprintln!("cannot run: {error:#}");
        return ExitCode::from(2);
    }
    let programs = Path::new(env!("CARGO_BIN_EXE_gated-runtime")).parent().expect("a file is in a folder");
    let cases = [upgrade_cases(), restart_cases(), service_cases(), file_cases(), limit_cases(), disk_cases()].concat();
    runner::main(&cases, &[], programs)
}

fn upgrade_cases() -> Vec<Case> {
    let cases = cases![upgrade,
        Scope::Daemons =>
            a_stock_client_that_waits_does_not_notice_an_upgrade,
            no_run_of_a_stock_client_fails_over_upgrades;
        Scope::Once =>
            a_process_that_still_answers_a_client_holds_no_shims,
            no_connection_is_refused_over_upgrades,
            an_exit_during_an_upgrade_is_published,
            an_upgrade_does_not_wait_for_a_slow_creation,
            a_creation_that_fails_after_an_upgrade_leaves_nothing,
            a_creation_whose_process_crashes_after_an_upgrade_can_be_repeated,
            a_deletion_that_an_upgrade_overtakes_is_answered,
            a_failed_successor_changes_nothing,
            a_successor_that_crashes_at_any_step_changes_nothing,
            a_hangup_signal_is_an_upgrade,
            an_event_stream_ends_with_an_error_after_its_events,
            a_client_that_subscribes_again_after_an_upgrade_has_missed_nothing,
            upgrades_may_follow_each_other_at_once,
            the_daemon_stops_while_a_successor_hangs,
    ];
    cases.into_iter().map(|case| case.within(Duration::from_secs(120))).collect()
}

fn restart_cases() -> Vec<Case> {
    let cases = cases![restart,
        Scope::Once =>
            a_container_is_started_again_after_it_was_killed,
            failures_are_counted_and_end_at_the_number_of_the_policy,
            an_explicitly_stopped_container_stays_stopped,
            a_container_labelled_stopped_is_stopped,
            a_starting_daemon_starts_containers_labelled_running,
            a_daemon_crash_during_a_restart_is_repaired,
            a_container_is_started_again_while_other_shims_do_not_answer,
    ];
    cases.into_iter().map(|case| case.within(Duration::from_secs(90))).collect()
}

fn service_cases() -> Vec<Case> {
    cases![service,
        Scope::Once =>
            the_service_manager_is_notified_of_readiness_and_main_pid,
            sockets_of_the_service_manager_are_served_and_kept,
            a_stop_lets_calls_end_and_containers_run,
            metrics_are_served_where_they_are_wanted,
    ]
}

fn file_cases() -> Vec<Case> {
    cases![files,
        Scope::Once =>
            a_typo_in_the_configuration_is_refused_with_its_line,
            the_store_and_its_lock_are_for_root_alone,
            a_hangup_while_it_starts_is_an_upgrade_when_it_has,
            the_default_configuration_can_be_used,
            a_store_of_a_newer_version_is_refused_and_left_alone,
            a_socket_or_store_in_use_is_refused,
            a_backup_of_a_busy_store_has_what_was_acknowledged,
            an_invalid_command_line_is_refused_in_one_line,
            config_check_finds_what_a_start_refuses,
            check_accepts_a_missing_store_and_reports_what_repairs_a_damaged_one,
            a_daemon_whose_terminal_is_closed_stops_and_does_not_upgrade,
    ]
}

fn limit_cases() -> Vec<Case> {
    cases![limits,
        Scope::Once =>
            a_full_disk_refuses_new_entries_and_loses_nothing,
            containers_can_be_deleted_on_a_disk_that_is_full_to_the_last_byte,
            a_store_that_was_large_becomes_small_again,
            memory_used_by_a_burst_of_calls_is_freed,
            a_lease_is_removed_when_its_expiry_label_has_passed,
            a_client_that_never_reads_its_events_is_dropped_with_an_error,
            a_costly_filter_ends_its_subscription_and_no_call_waits_for_it,
            an_authority_with_percent_signs_is_served,
            excess_clients_are_refused_and_the_others_served,
            ten_thousand_idle_connections_delay_no_call,
            the_limit_on_open_files_is_raised_for_the_daemon_alone,
    ]
}

fn disk_cases() -> Vec<Case> {
    cases![disk,
        Scope::Once =>
            task_calls_work_while_the_disk_of_the_store_is_frozen,
    ]
}
