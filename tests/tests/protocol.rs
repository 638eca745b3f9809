//! The shim without a daemon: its commands, its socket, its events, and whatever else can be done to it. Needs root.
//!
//! `X_SHIM` names the shim's binary, `X_RUNTIME_TYPE` its runtime type; see `shim_tests::suite`.

#[path = "protocol/answers.rs"]
mod answers;
#[path = "protocol/bad_input.rs"]
mod bad_input;
#[path = "protocol/bootstrap.rs"]
mod bootstrap;
#[path = "protocol/deaths.rs"]
mod deaths;
#[path = "protocol/events.rs"]
mod events;
#[path = "protocol/floods.rs"]
mod floods;
#[path = "protocol/frames.rs"]
mod frames;
#[path = "protocol/logging.rs"]
mod logging;
#[path = "protocol/retries.rs"]
mod retries;
#[path = "protocol/shutdown.rs"]
mod shutdown;
#[path = "protocol/streams.rs"]
mod streams;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use shim_tests::direct::{self, Case};
use shim_tests::direct_cases;

fn main() -> ExitCode {
    let programs = Path::new(env!("CARGO_BIN_EXE_instant-runtime")).parent().expect("a file is in a folder");
    let cases = [
        answer_cases(),
        bad_input_cases(),
        event_cases(),
        shutdown_cases(),
        bootstrap_cases(),
        death_cases(),
        retry_cases(),
        stream_cases(),
    ]
    .concat();
    direct::main(&cases, programs)
}

/// Why a case is about our shim alone.
const BOUNDS: &str = "no other shim bounds what clients cost";
const WORKER: &str = "no other shim has a worker";

const INSTANT: &str = "the stock shim wants a cgroup that the instant runtime does not make";

fn answer_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(direct_cases![answers: every_call_in_every_state_answers_as_the_stock_shim_does]);
    cases.extend(
        direct_cases![answers: both_names_of_the_service_give_the_same_answers]
            .map(|case| case.ours_only("the stock shim of 1.6 serves one name")),
    );
    cases.extend(direct_cases![answers: ready_made_answers_are_those_of_the_worker].map(|case| case.ours_only(WORKER)));
    cases
}

fn bad_input_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(direct_cases![bad_input:
        a_bundle_that_cannot_be_run_is_refused_with_a_sentence,
        a_request_that_cannot_be_carried_out_is_refused_with_a_sentence,
        a_text_that_is_no_id_is_refused_everywhere,
        an_exec_that_cannot_be_is_refused_and_leaves_nothing,
        requests_of_a_client_that_has_gone_are_carried_out,
    ]);
    cases.extend(
        direct_cases![bad_input:
            garbage_on_the_control_socket_harms_nobody,
            texts_of_megabytes_are_refused_and_not_repeated,
            too_many_added_processes_are_refused_until_one_is_deleted,
        ]
        .map(|case| case.ours_only(WORKER)),
    );
    cases.extend(direct_cases![frames:
        a_frame_that_is_cut_off_harms_nobody,
        a_length_beyond_the_limit_is_refused_and_the_connection_goes_on,
        garbage_is_answered_and_the_connection_goes_on,
        stream_ids_and_frame_types_that_make_no_sense_are_answered,
        a_client_of_one_byte_at_a_time_is_served_beside_the_others,
    ]);
    cases.extend(direct_cases![floods: four_gibibytes_of_nothing_delay_nobody, three_hundred_connections_are_served_or_closed_at_once]);
    cases.extend(
        direct_cases![floods:
            a_million_small_requests_are_answered_each_and_cost_no_memory,
            a_hundred_thousand_abandoned_waits_are_cheap_and_answered_each,
            a_client_that_never_reads_its_answers_costs_a_bounded_amount,
        ]
        .map(|case| case.alone().ours_only(BOUNDS).within(Duration::from_secs(120))),
    );
    cases
        .extend(direct_cases![floods: a_flood_beside_a_stopped_worker_keeps_nobody_from_a_ready_answer].map(|case| case.ours_only(WORKER)));
    cases
}

fn event_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(direct_cases![events:
        the_end_of_init_is_told_though_execs_are_under_way,
    ]);
    cases.extend(
        direct_cases![events:
            every_event_arrives_once_and_in_order_however_it_is_refused,
            an_event_under_way_when_containerd_dies_comes_again_at_its_place,
            an_event_without_an_acknowledgement_holds_back_the_next_ones,
            an_event_that_is_refused_for_good_holds_nothing_back,
        ]
        .map(|case| case.ours_only("the stock shim gives events up")),
    );
    cases.extend(
        direct_cases![events:
            two_thousand_short_execs_are_told_as_added_started_and_exited_each,
            processes_that_end_together_are_told_with_init_last,
            exits_are_told_while_the_runtime_is_busy_with_a_signal,
        ]
        .map(|case| case.ours_only(INSTANT)),
    );
    cases
}

fn shutdown_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(direct_cases![shutdown: an_exec_with_stdin_left_open_keeps_no_shim]);
    cases.extend(
        direct_cases![shutdown:
            a_shim_leaves_with_its_last_container_and_not_before,
            delete_and_shutdown_at_once_leave_nothing_a_hundred_times,
            a_group_that_is_deleted_all_at_once_leaves_nothing,
            a_shim_that_leaves_tells_its_last_events_first,
        ]
        .map(|case| case.ours_only(INSTANT)),
    );
    cases
}

fn bootstrap_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(direct_cases![bootstrap:
        whatever_stands_on_standard_input_the_answer_can_be_dialled,
        a_second_start_in_a_group_answers_the_living_shims_address,
        two_starts_of_a_group_at_once_make_one_shim,
        sockets_are_private_and_none_is_abstract,
        a_container_has_three_descriptors_and_none_is_a_file_of_the_host,
    ]);
    cases.extend(
        direct_cases![bootstrap:
            a_daemon_of_2_3_is_answered_in_its_own_words_and_served,
            a_socket_folder_fits_to_the_last_byte_and_not_beyond,
            a_place_that_was_promised_keeps_the_shim,
            no_secret_of_the_daemon_reaches_the_runtime,
            what_is_no_socket_is_not_replaced,
        ]
        .map(|case| case.ours_only("the stock shim of 1.6 is not meant to")),
    );
    cases.extend(
        direct_cases![logging:
            a_log_that_nobody_reads_blocks_nothing_and_says_what_it_dropped,
            the_log_tells_of_each_change_in_containerds_format,
        ]
        .map(|case| case.ours_only("the stock shim waits for a reader of its log")),
    );
    cases
}

fn death_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(direct_cases![deaths:
        delete_kills_what_a_dead_shim_has_left,
        the_same_id_works_again_after_the_shim_was_killed,
    ]);
    cases.extend(
        direct_cases![deaths:
            an_exit_code_outlives_the_shim_and_delete_tells_it_each_time,
            an_end_that_nobody_has_seen_is_told_as_killed,
            delete_after_a_deletion_says_the_same_and_harms_nobody,
            delete_beside_a_stopped_shim_kills_the_container_in_time,
            an_exit_is_recorded_on_a_full_disk,
        ]
        .map(|case| case.ours_only("no other shim keeps a journal")),
    );
    cases.extend(
        direct_cases![deaths:
            what_containerd_asks_at_its_start_is_answered_without_a_worker,
            a_worker_that_dies_all_the_time_keeps_nobody_from_an_answer,
            delete_beside_a_stopped_worker_kills_the_container_in_time,
        ]
        .map(|case| case.ours_only(WORKER)),
    );
    cases
}

fn retry_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(
        direct_cases![retries: a_start_that_takes_long_holds_up_nothing_else].map(|case| case.ours_only("a lock is held across start")),
    );
    cases.extend(
        direct_cases![retries:
            a_delete_that_was_given_up_is_answered_to_whoever_asks_again,
            a_root_file_system_in_use_fails_delete_until_it_is_free,
            a_create_that_is_asked_for_again_makes_one_container,
            delete_ends_a_create_that_is_under_way,
            a_request_whose_time_is_over_is_not_carried_out,
        ]
        .map(|case| case.ours_only("the stock shim is known not to")),
    );
    cases
}

fn stream_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(direct_cases![streams:
        every_byte_before_the_end_arrives,
        grandchildren_that_hold_the_output_cost_nothing_lasting,
        close_io_after_a_start_that_failed_is_harmless,
    ]);
    cases.extend(
        direct_cases![streams:
            a_full_disk_does_not_stop_a_container_for_good,
            a_slow_logger_holds_up_its_own_container_only_and_gets_everything,
            a_logger_that_is_never_ready_is_ended_by_delete,
        ]
        .map(|case| case.ours_only("the stock shim is known not to")),
    );
    cases
}
