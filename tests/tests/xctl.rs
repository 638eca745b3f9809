//! `xctl` on stock containerd 2.1 with the shim under test; with `X_DAEMON` on x-manager in its place. Needs root.
//!
//! `X_XCTL` names the binary.

#[path = "xctl/foreground.rs"]
mod foreground;
#[path = "xctl/harness.rs"]
mod harness;
#[path = "xctl/images.rs"]
mod images;
#[path = "xctl/lifecycle.rs"]
mod lifecycle;
#[path = "xctl/terminals.rs"]
mod terminals;
#[path = "xctl/upkeep.rs"]
mod upkeep;

use std::path::Path;
use std::process::ExitCode;

use shim_tests::cases;
use shim_tests::runner::{self, Case, Scope};
use shim_tests::suite;

fn main() -> ExitCode {
    if let Err(error) = suite::xctl() {
        eprintln!("cannot run: {error:#}");
        return ExitCode::from(2);
    }
    let programs = Path::new(env!("CARGO_BIN_EXE_gated-runtime")).parent().expect("a file is in a folder");
    let cases = [foreground_cases(), lifecycle_cases(), terminal_cases(), image_cases(), upkeep_cases()].concat();
    runner::main(&cases, &[], programs)
}

fn foreground_cases() -> Vec<Case> {
    cases![foreground,
        Scope::Once =>
            run_prints_and_exits_like_the_program,
            input_reaches_the_program_and_ends,
            options_reach_the_container,
            users_are_those_of_the_container,
            signals_are_passed_on,
            a_wait_outlasts_a_crash_of_the_daemon,
            a_program_that_is_missing_leaves_nothing,
            mistakes_are_refused_with_what_to_do,
            completions_and_manual_pages_are_made,
    ]
}

fn lifecycle_cases() -> Vec<Case> {
    cases![lifecycle,
        Scope::Once =>
            a_detached_container_writes_its_log_without_a_daemon,
            a_log_that_is_cut_goes_on_at_its_start,
            a_container_is_listed_inspected_started_again_and_removed,
            stop_is_a_signal_and_then_a_kill,
            exec_runs_beside_the_program,
            processes_and_usage_are_shown,
            events_are_printed_as_they_happen,
            the_daemon_restarts_a_container_until_it_is_stopped,
    ]
}

fn terminal_cases() -> Vec<Case> {
    cases![terminals,
        Scope::Once =>
            a_terminal_is_passed_through_resized_and_restored,
            keys_detach_and_attach_shows_it_again,
            a_detached_terminal_can_be_attached_to_and_logged,
    ]
}

fn image_cases() -> Vec<Case> {
    cases![images,
        Scope::Once =>
            an_image_decides_what_the_command_line_does_not,
            a_container_of_an_image_is_restarted_by_the_daemon,
            a_damaged_archive_is_refused_and_leaves_nothing,
            an_image_is_pushed_and_pulled,
            images_are_imported_listed_named_exported_and_removed,
            why_names_what_keeps_a_blob_and_a_snapshot,
    ]
}

fn upkeep_cases() -> Vec<Case> {
    cases![upkeep,
        Scope::Once =>
            files_are_copied_in_and_out_and_no_link_leads_to_the_host,
            prune_removes_what_has_exited_and_nothing_else,
            an_upgrade_is_the_managers,
    ]
}
