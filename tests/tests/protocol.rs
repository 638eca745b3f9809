//! What our shim promises beyond the protocol, driven without a daemon: limits, error messages, crashes of the worker. Needs root. The
//! requirements on every shim are in the conformance suite.
//!
//! `X_SHIM` names the shim's binary; see `shim_tests::suite`.

#[path = "protocol/answers.rs"]
mod answers;
#[path = "protocol/bad_input.rs"]
mod bad_input;
#[path = "protocol/bootstrap.rs"]
mod bootstrap;
#[path = "protocol/checkpoints.rs"]
mod checkpoints;
#[path = "protocol/crashes.rs"]
mod crashes;
#[path = "protocol/events.rs"]
mod events;
#[path = "protocol/execs.rs"]
mod execs;
#[path = "protocol/floods.rs"]
mod floods;
#[path = "protocol/frames.rs"]
mod frames;
#[path = "protocol/logging.rs"]
mod logging;
#[path = "protocol/options.rs"]
mod options;
#[path = "protocol/retries.rs"]
mod retries;
#[path = "protocol/roots.rs"]
mod roots;
#[path = "protocol/runtimes.rs"]
mod runtimes;
#[path = "protocol/sandboxes.rs"]
mod sandboxes;
#[path = "protocol/shutdown.rs"]
mod shutdown;
#[path = "protocol/specification.rs"]
mod specification;
#[path = "protocol/streams.rs"]
mod streams;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use shim_tests::direct;
use shim_tests::direct_cases;

fn main() -> ExitCode {
    let programs = Path::new(env!("CARGO_BIN_EXE_gated-runtime")).parent().expect("a file is in a folder");
    let mut cases = Vec::new();
    cases.extend(direct_cases![answers:
        ready_made_answers_are_those_of_the_worker,
        a_create_under_way_costs_a_siblings_state_no_fifty_milliseconds,
    ]);
    cases.extend(direct_cases![bad_input:
        errors_in_a_bundle_are_named,
        an_invalid_create_is_refused_with_a_message,
        an_invalid_id_is_refused_with_a_message,
        an_invalid_exec_is_refused_with_a_message,
        invalid_values_are_invalid_arguments,
        garbage_on_the_control_socket_has_no_effect,
        idle_control_connections_are_not_taken_for_a_dead_keeper,
        strings_of_megabytes_are_refused_and_not_repeated,
        too_many_execs_are_refused_until_one_is_deleted,
    ]);
    cases.extend(
        direct_cases![execs:
            a_signal_for_all_of_an_exec_reaches_its_descendants_and_no_other_process,
            execs_that_are_never_deleted_do_not_accumulate,
            failed_execs_that_are_never_deleted_do_not_accumulate,
            a_thousand_execs_with_fifos_leave_no_descriptor_and_no_file,
            an_exec_is_added_while_the_exit_of_init_waits_to_be_published,
            an_exec_whose_pid_is_not_reported_is_killed_and_reaped,
        ]
        .map(|case| case.within(Duration::from_secs(240))),
    );
    cases.extend(direct_cases![frames:
        a_length_beyond_the_limit_is_named,
        garbage_is_answered_with_a_short_message_and_its_own_code,
        an_invalid_stream_id_is_reported,
    ]);
    cases.extend(direct_cases![floods:
        a_four_gibibyte_frame_delays_no_other_client,
        ready_answers_are_given_during_a_flood_with_a_stopped_worker,
        every_request_of_a_flood_over_crashing_workers_is_answered_once,
        a_shim_without_free_descriptors_serves_its_clients_and_later_the_others,
        commands_work_on_a_shim_that_knows_a_lot,
    ]);
    cases.extend(
        direct_cases![floods:
            a_million_small_requests_are_each_answered_and_cost_no_memory,
            a_hundred_thousand_abandoned_waits_cost_little_memory_and_each_is_answered,
            a_client_that_never_reads_its_answers_costs_a_bounded_amount,
        ]
        .map(|case| case.alone().within(Duration::from_secs(120))),
    );
    cases.extend(direct_cases![events:
        every_event_arrives_once_and_in_order_however_it_is_refused,
        an_event_without_an_acknowledgement_holds_back_the_next_ones,
        a_permanently_refused_event_does_not_delay_the_next_ones,
        an_event_answered_with_garbage_is_sent_again,
        events_of_two_thousand_short_execs_are_published_in_order,
        simultaneous_exits_are_published_with_init_last,
    ]);
    cases.extend(direct_cases![runtimes:
        a_refused_create_leaves_the_container_of_another_daemon_alone,
        a_create_that_loses_a_race_for_its_id_leaves_the_winner_alone,
        delete_leaves_the_winner_of_a_race_alone_when_the_losers_keeper_was_killed,
        a_create_that_fails_in_unknown_words_leaves_a_container_of_another_bundle_alone,
        delete_removes_what_a_create_had_made_when_its_keeper_was_killed,
        what_a_killed_create_has_made_is_removed_by_the_next_worker,
        without_the_runtimes_program_every_call_is_refused_with_its_path_and_delete_works_once_it_is_back,
        delete_removes_a_container_whose_runtime_is_gone,
        a_runtime_that_was_moved_is_found_in_path,
        a_runtime_may_write_to_both_of_its_outputs,
        a_process_whose_start_fails_after_the_runtimes_success_is_killed,
        delete_has_the_keeper_drop_a_container_that_its_runtime_has_deleted,
        what_is_removed_without_a_worker_leaves_no_descriptors_of_its_execs,
        a_failed_restore_reports_the_message_of_criu,
        signal_zero_and_sizes_beyond_sixteen_bits_are_answered_as_the_stock_shim_does,
    ]);
    cases.extend(direct_cases![shutdown:
        a_shim_exits_with_its_last_container_and_not_before,
        no_stray_signal_ends_a_shim_or_its_worker,
        a_shim_exits_at_shutdown_once_no_container_runs_and_delete_knows_the_codes,
        a_shim_without_containers_and_clients_exits_without_shutdown,
    ]);
    cases.extend(direct_cases![bootstrap:
        sockets_are_private_and_none_is_abstract,
        a_container_has_three_descriptors_and_none_is_a_file_of_the_host,
        a_socket_folder_fits_to_the_last_byte_and_not_beyond,
        a_start_beside_an_exiting_shim_gets_a_new_one,
        a_start_whose_input_stays_open_does_not_keep_another_of_its_group_waiting,
        a_file_that_is_no_socket_is_not_replaced,
        the_runtime_is_one_that_works_on_this_host_unless_it_is_named,
    ]);
    cases.extend(direct_cases![logging:
        a_log_without_a_reader_blocks_nothing_and_reports_dropped_lines,
        the_log_records_each_change_in_containerds_format,
    ]);
    cases.extend(direct_cases![crashes:
        an_unobserved_exit_is_reported_as_killed,
        delete_ends_a_container_whose_bundle_was_removed,
        a_killed_keeper_ends_a_pod_of_the_newest_daemon_with_true_exit_codes,
        delete_after_a_deletion_repeats_its_answer,
        children_of_a_runtime_do_not_outlive_its_create,
        what_containerd_asks_at_its_start_is_answered_without_a_worker,
        a_crash_looping_worker_does_not_prevent_ready_answers,
        delete_beside_a_stopped_worker_kills_the_container_in_time,
        a_frozen_container_is_deleted,
        delete_removes_the_console_sockets_of_a_killed_keeper,
    ]);
    cases.extend(direct_cases![checkpoints:
        what_is_paused_or_resumed_during_a_checkpoint_stays_so,
        pipes_in_place_of_the_files_of_a_checkpoint_do_not_block,
    ]);
    cases.extend(direct_cases![options:
        older_options_of_a_checkpoint_put_image_and_log_where_they_belong,
    ]);
    cases.extend(direct_cases![retries:
        concurrent_deletes_of_one_container_return_the_same_answer,
        the_delete_of_a_deleted_exec_finds_nothing,
        delete_names_the_root_file_system_that_is_in_use,
        a_request_whose_deadline_has_passed_is_not_carried_out,
    ]);
    cases.extend(direct_cases![roots:
        the_host_does_not_see_the_root_of_a_native_container,
        a_hook_that_looks_for_the_root_on_the_host_finds_it,
        a_root_that_the_kernel_alone_cannot_mount_is_mounted_on_the_host,
        a_root_that_cannot_be_mounted_is_named_wherever_it_is,
        delete_removes_a_native_container_whose_root_the_host_never_saw,
        delete_removes_a_container_whose_keeper_was_killed_during_a_hook,
    ]);
    cases.extend(direct_cases![streams:
        what_a_full_disk_costs_is_counted_in_the_log,
        a_slow_logger_holds_up_its_own_container_only_and_gets_everything,
        a_logger_that_is_never_ready_is_ended_by_delete,
        the_command_delete_does_not_wait_for_an_output_and_its_reader_gets_all_of_it,
        a_keeper_killed_while_a_delete_waits_for_an_output_ends_the_output,
    ]);
    cases.extend(direct_cases![sandboxes:
        a_sandbox_outlives_workers_killed_between_all_its_calls,
        a_worker_killed_before_the_keeper_has_read_its_messages_leaves_no_cgroup,
        a_busy_cgroup_of_a_pod_is_removed_once_it_is_free_and_delays_no_other_call,
        delete_removes_the_cgroup_that_a_shutdown_has_not_removed,
        the_keeper_answers_for_a_stopped_worker,
        a_shutdown_can_be_repeated,
        a_shutdown_of_the_task_service_ends_a_sandbox_without_containers,
        an_invalid_pod_configuration_is_named,
        a_holder_is_confined_whatever_the_profile_of_its_pod,
        a_network_that_is_none_is_named,
        a_second_sandbox_in_a_shim_is_refused,
        a_container_does_not_get_the_process_ids_of_a_keeper,
        a_sandbox_that_is_never_started_expires,
        a_sandbox_that_is_never_started_does_not_expire_while_a_client_asks_about_it,
        a_request_that_has_half_arrived_when_its_sandbox_expires_is_answered,
    ]);
    cases.extend(direct_cases![specification:
        every_section_with_numbers_has_a_test,
        program_executions_are_those_of_the_specification,
        system_calls_are_those_of_the_specification,
        processes_threads_and_descriptors_are_those_of_the_specification,
    ]);
    cases.push(direct_cases![specification: memory_is_that_of_the_specification][0].alone());
    direct::main(&cases, programs)
}
