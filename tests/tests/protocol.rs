//! The shim without a daemon: its commands, its socket, its events, and whatever else can be done to it. Needs root.
//!
//! `X_SHIM` names the shim's binary, `X_RUNTIME_TYPE` its runtime type; see `shim_tests::suite`.

#[path = "protocol/answers.rs"]
mod answers;
#[path = "protocol/bad_input.rs"]
mod bad_input;
#[path = "protocol/events.rs"]
mod events;
#[path = "protocol/floods.rs"]
mod floods;
#[path = "protocol/frames.rs"]
mod frames;
#[path = "protocol/shutdown.rs"]
mod shutdown;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use shim_tests::direct::{self, Case};
use shim_tests::direct_cases;

fn main() -> ExitCode {
    let programs = Path::new(env!("CARGO_BIN_EXE_instant-runtime")).parent().expect("a file is in a folder");
    let cases = [answer_cases(), bad_input_cases(), event_cases(), shutdown_cases()].concat();
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
