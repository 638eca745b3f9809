//! The shim under stock containerd 1.6, 1.7 and 2.1, with runc and crun. Needs root.
//!
//! `X_SHIM` names the shim's binary, `X_RUNTIME_TYPE` its runtime type; see `shim_tests::suite`.

#[path = "containerd/attributes.rs"]
mod attributes;
#[path = "containerd/checkpoint.rs"]
mod checkpoint;
#[path = "containerd/churn.rs"]
mod churn;
#[path = "containerd/crash.rs"]
mod crash;
#[path = "containerd/ctr.rs"]
mod ctr;
#[path = "containerd/execs.rs"]
mod execs;
#[path = "containerd/kinds.rs"]
mod kinds;
#[path = "containerd/lifecycle.rs"]
mod lifecycle;
#[path = "containerd/outputs.rs"]
mod outputs;
#[path = "containerd/resources.rs"]
mod resources;
#[path = "containerd/stdio.rs"]
mod stdio;
#[path = "containerd/stock.rs"]
mod stock;
#[path = "containerd/versions.rs"]
mod versions;
#[path = "containerd/worker.rs"]
mod worker;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use shim_tests::cases;
use shim_tests::runner::{self, Case, Scope};

fn main() -> ExitCode {
    let programs = Path::new(env!("CARGO_BIN_EXE_gated-runtime")).parent().expect("a file is in a folder");
    let cases = [lifecycle_cases(), exec_cases(), stdio_cases(), kind_cases(), crash_cases()].concat();
    runner::main(&cases, stock::KNOWN, programs)
}

fn lifecycle_cases() -> Vec<Case> {
    cases![lifecycle,
        Scope::Full =>
            the_exit_code_is_the_same_in_wait_state_delete_and_event,
            events_come_in_order_and_once,
            a_signal_is_reported_as_128_plus_its_number,
            delete_works_in_created_and_stopped_and_is_refused_in_between,
            refusals_have_the_code_that_clients_act_on,
            many_wait_before_and_after_the_exit,
            a_wait_on_a_created_container_ends_with_its_exit,
            the_longest_id_works,
            an_id_is_free_again_after_delete,
            options_of_an_unknown_type_are_refused,
            options_that_cri_sends_to_other_runtimes_are_accepted,
            a_group_shares_one_shim_until_its_last_container_is_deleted,
            sockets_are_for_root_alone,
            a_killed_created_container_ends_with_137,
            a_missing_program_is_named_and_leaves_nothing,
            a_missing_root_file_system_is_refused,
            two_root_file_system_mounts_are_stacked_and_both_unmounted,
            the_runtimes_own_message_reaches_the_client,
            a_runtime_that_prints_a_megabyte_blocks_nothing,
            one_containers_slow_create_delays_no_other;
        Scope::Daemons =>
            no_options_mean_a_runtime_from_path,
            ctr_finds_the_shim_by_the_containers_id,
            a_wrapper_of_the_runtime_finds_init_pid, what_ctr_asks_for_is_taken, what_ctr_asks_for_reaches_the_runtime,
    ]
}

fn exec_cases() -> Vec<Case> {
    cases![execs,
        Scope::Full =>
            an_exec_has_its_own_output_and_exit_code,
            an_exec_with_a_terminal_has_one,
            an_exec_id_is_free_again_after_delete,
            an_exec_is_killed_alone,
            a_killed_exec_takes_its_descendants_and_nothing_else,
            a_killed_exec_takes_descendants_that_never_stop_forking,
            what_an_exec_has_left_behind_outlives_its_deletion,
            execs_end_before_init_does,
            pids_name_every_process_and_its_exec,
            an_exec_may_begin_before_init,
            an_exec_gets_its_user_folder_and_environment,
            an_exec_of_a_missing_program_fails_and_can_be_deleted,
            no_open_file_but_stdio_reaches_a_container;
        Scope::Once =>
            events_of_two_hundred_short_execs_are_published_in_order,
    ]
}

fn stdio_cases() -> Vec<Case> {
    cases![stdio,
        Scope::Full =>
            stdin_reaches_the_container_and_ends_with_close_io,
            a_terminal_has_the_requested_size,
            stdout_and_stderr_are_kept_apart,
            a_late_reader_gets_everything,
            fifos_that_no_client_ever_opens_block_nothing,
            a_file_gets_both_streams,
            a_logger_gets_everything_and_knows_the_container,
            an_unknown_scheme_is_refused,
            a_container_without_stdio_runs,
            close_io_is_harmless_before_start_twice_and_after_exit,
            a_terminals_last_output_is_not_cut,
            a_reader_that_disconnects_breaks_no_pipe;
        Scope::Daemons =>
            a_logger_that_a_label_names_never_runs_unless_it_is_listed;
        Scope::Once =>
            a_logger_that_is_not_listed_never_runs,
            a_megabyte_of_stdin_arrives,
            a_slow_reader_gets_every_byte_around_a_megabyte,
            a_grandchild_that_holds_the_pipe_delays_no_wait,
            a_container_does_not_get_its_log_file_itself,
            a_logger_that_crashes_before_it_is_ready_blocks_nothing,
            a_logger_that_crashes_later_does_not_stop_the_container,
            a_logger_of_the_second_kind_is_ready_with_a_byte_and_not_without,
            output_spills_without_a_reader_if_configured,
            a_slow_reader_is_waited_for_and_nothing_is_buffered,
    ]
}

fn kind_cases() -> Vec<Case> {
    [
        cases![outputs,
            Scope::Once =>
                every_byte_arrives_from_every_holder_of_the_output_to_every_reader,
                a_delete_that_waits_for_output_delays_no_other_call_and_ends,
                a_delete_that_waits_for_output_outlives_the_worker,
        ],
        // four shims, one after the other
        cases![outputs, Scope::Once => ours_loses_no_output_that_a_stock_shim_delivers]
            .into_iter()
            .map(|case| case.within(Duration::from_secs(400)))
            .collect(),
        cases![kinds,
            Scope::Full =>
                a_private_pid_namespace_begins_with_init,
                a_container_in_the_hosts_pid_namespace_leaves_no_survivor,
                a_container_joins_anothers_pid_namespace_and_leaves_no_survivor,
                root_in_a_user_namespace_is_unprivileged_outside,
                hooks_run_in_order,
                hooks_follow_the_start_of_a_program_that_exits_at_once,
                a_failing_hook_fails_the_start_and_leaves_nothing;
            Scope::Daemons =>
                a_shim_whose_binary_is_replaced_keeps_its_containers,
        ],
        cases![resources,
            Scope::Full =>
                an_oom_kill_is_published_before_the_exit,
                a_container_killed_while_paused_ends,
                a_container_frozen_by_others_dies_of_sigkill,
                an_exec_of_a_frozen_container_dies_of_sigkill_and_the_rest_stays_frozen,
                statistics_are_reported_until_delete,
                a_paused_container_is_frozen_and_resumes,
                kill_all_reaches_every_process,
                an_update_changes_the_limit,
                an_oom_kill_of_an_exec_is_published_too,
                cgroups_are_gone_after_delete,
        ],
        cases![attributes,
            Scope::Full =>
                init_and_exec_inherit_the_same_as_under_the_stock_shim,
                init_and_exec_without_stdio_inherit_the_same,
                init_and_exec_with_a_terminal_inherit_the_same;
            Scope::Once =>
                the_environment_of_the_runtime_holds_no_secret_of_the_daemon,
        ],
    ]
    .concat()
}

fn crash_cases() -> Vec<Case> {
    [
        cases![crash,
            Scope::Full =>
                a_container_keeps_running_while_the_daemon_is_down,
                an_exit_while_the_daemon_is_down_is_published_afterwards,
                an_exit_while_the_daemon_is_upgraded_is_published_afterwards,
                an_exec_survives_the_daemon,
                a_created_container_survives_the_daemon,
                a_paused_container_survives_the_daemon,
                a_daemon_killed_during_create_leaves_a_whole_container_or_none,
                a_daemon_killed_after_create_was_done_leaves_a_whole_container_or_none,
                a_daemon_killed_during_start_loses_no_exit,
                a_daemon_killed_during_exec_loses_no_container,
                a_daemon_killed_during_delete_leaves_nothing,
                a_group_survives_the_daemon,
                output_continues_without_a_gap_over_a_restart,
        ],
        cases![worker,
            Scope::Full =>
                a_killed_worker_is_not_noticed_by_a_running_container,
                a_killed_worker_is_not_noticed_by_a_pending_wait,
                a_killed_worker_is_not_noticed_by_a_create_in_flight,
                a_killed_worker_is_not_noticed_by_an_exec_in_flight,
                a_killed_worker_is_not_noticed_by_a_delete_in_flight,
                a_worker_killed_with_the_daemon_down_loses_no_exit;
            Scope::Once =>
                a_killed_worker_costs_no_line_of_output;
            Scope::Daemons =>
                a_stopped_worker_leaves_the_daemon_able_to_load,
                an_exit_with_the_daemon_down_and_the_worker_hibernating_is_published,
                a_killed_keeper_ends_its_containers_with_true_exit_codes,
                a_killed_keeper_ends_each_member_of_its_group_with_its_true_exit_code,
        ],
        cases![versions,
            Scope::Once =>
                containers_outlive_a_downgrade_and_an_upgrade_of_their_daemon;
            Scope::Daemons =>
                a_shim_whose_binary_has_moved_is_found_by_a_link,
                a_container_whose_shim_binary_is_missing_keeps_running_and_keeps_its_id,
        ]
        .into_iter()
        .map(|case| case.within(Duration::from_secs(120)))
        .collect(),
        cases![ctr,
            Scope::Daemons =>
                ctr_imports_an_image_and_runs_it,
                ctr_execs_and_kills,
        ],
        cases![checkpoint,
            Scope::Full =>
                a_container_is_restored_from_its_checkpoint,
                a_checkpoint_without_exit_disturbs_nothing;
            Scope::Once =>
                a_checkpoint_is_restored_by_another_runtime,
                a_restored_container_is_one_like_any_other,
        ],
        cases![churn,
            Scope::Once =>
                no_resource_grows_over_many_containers,
        ]
        .into_iter()
        .map(|case| case.alone().within(churn::deadline()))
        .collect(),
    ]
    .concat()
}
