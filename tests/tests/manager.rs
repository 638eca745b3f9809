//! x-manager: containerd's API with its own clients and raw requests, and SIGKILL at random instants. Needs root.
//!
//! `X_DAEMON` names the binary. The tests of `containerd.rs` and `docker.rs` run on it too, when `X_DAEMON` is set for them.

#[path = "manager/ahead.rs"]
mod ahead;
#[path = "manager/api.rs"]
mod api;
#[path = "manager/archives.rs"]
mod archives;
#[path = "manager/bad_input.rs"]
mod bad_input;
#[path = "manager/content.rs"]
mod content;
#[path = "manager/content_proxies.rs"]
mod content_proxies;
#[path = "manager/ctr.rs"]
mod ctr;
#[path = "manager/damage.rs"]
mod damage;
#[path = "manager/image_kills.rs"]
mod image_kills;
#[path = "manager/image_rows.rs"]
mod image_rows;
#[path = "manager/images.rs"]
mod images;
#[path = "manager/judges.rs"]
mod judges;
#[path = "manager/kills.rs"]
mod kills;
#[path = "manager/layers.rs"]
mod layers;
#[path = "manager/pod.rs"]
mod pod;
#[path = "manager/power.rs"]
mod power;
#[path = "manager/power_vm.rs"]
mod power_vm;
#[path = "manager/proxies.rs"]
mod proxies;
#[path = "manager/restart.rs"]
mod restart;
#[path = "manager/sandboxes.rs"]
mod sandboxes;
#[path = "manager/shims.rs"]
mod shims;
#[path = "manager/transfer.rs"]
mod transfer;
#[path = "manager/upgrades.rs"]
mod upgrades;
#[path = "manager/verifiers.rs"]
mod verifiers;

use std::path::Path;
use std::process::ExitCode;

use shim_tests::cases;
use shim_tests::runner::{self, Case, Scope};
use shim_tests::suite;

fn main() -> ExitCode {
    if let Err(error) = suite::use_manager() {
        eprintln!("cannot run: {error:#}");
        return ExitCode::from(2);
    }
    let programs = Path::new(env!("CARGO_BIN_EXE_gated-runtime")).parent().expect("a file is in a folder");
    let cases = [
        api_cases(),
        content_cases(),
        image_cases(),
        layer_cases(),
        transfer_cases(),
        archive_cases(),
        ahead_cases(),
        proxy_cases(),
        content_proxy_cases(),
        ctr_cases(),
        judge_cases(),
        bad_input_cases(),
        restart_cases(),
        shim_cases(),
        sandbox_cases(),
        kill_cases(),
        image_row_cases(),
        upgrade_cases(),
        verifier_cases(),
        power_cases(),
    ]
    .concat();
    runner::main(&cases, &[], programs)
}

fn api_cases() -> Vec<Case> {
    cases![api,
        Scope::Once =>
            namespaces_are_kept_apart,
            a_namespace_is_deleted_only_when_it_is_empty,
            labelling_a_namespace_creates_it,
            a_container_is_updated_by_its_field_mask,
            filters_select_containers_leases_plugins_and_events,
            leases_hold_resources,
            invalid_requests_are_refused_with_a_code,
            a_name_that_could_be_a_path_is_refused_everywhere,
            labels_are_bounded_in_total_and_a_long_update_drops_no_label,
            requests_that_are_never_finished_are_refused_before_they_cost_much,
            an_event_is_published_from_the_command_line,
            what_is_not_served_is_unimplemented,
            a_subscriber_that_never_reads_is_dropped_and_delays_no_other,
            the_server_reports_that_it_is_healthy,
            health_is_reported_by_each_method,
            a_burst_of_calls_over_one_connection_is_answered,
            a_list_that_is_too_long_for_an_answer_is_refused_and_can_be_streamed,
            a_call_whose_client_disconnects_is_completed,
    ]
}

fn content_proxy_cases() -> Vec<Case> {
    cases![content_proxies,
        Scope::Once =>
            an_image_whose_content_is_at_stock_containerd_is_used_like_any_other,
            content_of_a_proxy_that_is_gone_is_one_clear_error_and_nothing_is_lost,
            content_that_a_proxy_has_by_itself_is_not_fetched,
            what_was_acknowledged_outlives_a_kill_and_what_was_not_is_deleted_at_the_proxy,
            an_upgrade_while_content_is_written_to_a_proxy_is_noticed_by_no_client,
    ]
}

fn proxy_cases() -> Vec<Case> {
    cases![proxies,
        Scope::Once =>
            a_snapshotter_of_another_process_is_used_like_ones_own,
            layers_that_a_proxy_has_by_itself_are_neither_fetched_nor_unpacked,
            a_transfer_unpacks_with_a_snapshotter_of_another_process,
            a_proxy_that_is_gone_is_one_clear_error_and_blocks_nothing_else,
    ]
}

fn content_cases() -> Vec<Case> {
    cases![content,
        Scope::Once =>
            content_is_written_in_lock_step_and_read_in_parts,
            a_reference_has_one_writer_and_the_next_goes_on_where_it_stopped,
            content_that_is_there_is_not_written_again,
            a_commit_of_something_else_is_refused_and_not_resumed,
            content_of_another_namespace_is_given_for_its_digest,
            isolated_content_is_written_by_each_namespace,
            content_and_ingests_are_listed_labelled_and_removed,
            a_digest_that_is_none_is_refused_wherever_it_is_read,
            a_write_that_a_crash_has_cut_off_is_resumed,
            content_that_was_acknowledged_survives_kills_at_any_instant,
            content_that_finds_no_room_leaves_nothing,
            a_write_and_a_read_go_on_over_upgrades,
    ]
}

fn layer_cases() -> Vec<Case> {
    cases![layers,
        Scope::Once =>
            layers_are_unpacked_as_clients_do_and_read_again_as_a_diff,
            a_snapshot_stays_as_long_as_a_lease_or_a_child_needs_it,
            a_crash_while_a_layer_is_applied_leaves_a_snapshot_that_can_be_removed,
            a_layer_that_finds_no_room_leaves_nothing,
    ]
}

fn transfer_cases() -> Vec<Case> {
    cases![transfer,
        Scope::Once =>
            streams_are_opened_under_a_name_and_taken_once,
            an_image_that_ten_clients_pull_is_fetched_once,
            a_registry_that_is_slow_holds_up_no_other,
            a_layer_that_waits_for_its_turn_has_no_file_open,
            a_pull_that_is_cancelled_leaves_nothing,
            an_image_that_is_wrong_is_refused_with_its_reason_and_leaves_nothing,
            odd_images_are_pulled_as_far_as_they_can_be,
            of_an_index_what_is_here_is_exported_and_pushed,
            a_registry_asks_the_client_for_its_secret,
            layers_with_the_same_contents_keep_their_own_blobs,
    ]
}

fn archive_cases() -> Vec<Case> {
    cases![archives,
        Scope::Once =>
            archives_of_docker_and_of_tools_are_imported,
            an_archive_that_is_wrong_is_refused_and_leaves_nothing,
            an_import_that_was_made_before_writes_nothing,
    ]
}

fn ahead_cases() -> Vec<Case> {
    cases![ahead,
        Scope::Once =>
            a_pull_by_ctr_is_unpacked_while_it_downloads,
            a_fetch_alone_is_not_unpacked,
            a_pull_that_is_killed_leaves_nothing_and_can_be_repeated,
            a_pull_whose_lease_is_deleted_says_so_and_can_be_repeated,
    ]
}

fn image_cases() -> Vec<Case> {
    cases![images,
        Scope::Once =>
            an_image_is_created_updated_listed_and_deleted,
            an_image_is_refused_with_a_reason,
            content_stays_as_long_as_something_leads_to_it,
            a_lease_holds_what_its_calls_create_until_it_ends,
            an_image_that_expires_is_deleted_and_published,
            an_ingest_goes_with_its_lease,
    ]
}

fn ctr_cases() -> Vec<Case> {
    cases![ctr, Scope::Once => every_subcommand_does_what_it_does_with_containerd]
        .into_iter()
        .map(|case| case.within(std::time::Duration::from_secs(240)))
        .collect()
}

fn judge_cases() -> Vec<Case> {
    cases![judges,
        Scope::Once =>
            umoci_and_containerd_unpack_the_same_tree_of_legal_layers,
            what_skopeo_copies_to_a_registry_and_back_comes_back_byte_by_byte,
    ]
}

fn bad_input_cases() -> Vec<Case> {
    let cases = cases![bad_input,
        Scope::Once =>
            a_broken_layer_is_refused_with_one_sentence_and_leaves_nothing,
            a_layer_of_a_hundred_thousand_entries_in_one_folder_is_unpacked_and_removed,
            labels_longer_than_any_client_needs_are_refused,
            labels_that_lead_in_circles_or_nowhere_stop_no_collection,
            a_snapshot_that_cannot_be_removed_stops_no_collection,
            the_collection_after_a_start_removes_what_has_expired_and_nothing_in_use,
            three_hundred_images_are_looked_up_at_once,
    ];
    cases.into_iter().map(|case| case.within(std::time::Duration::from_secs(180))).collect()
}

fn restart_cases() -> Vec<Case> {
    cases![restart,
        Scope::Daemons =>
            an_exit_while_the_daemon_was_down_is_published_once,
            a_creation_that_was_cut_off_before_its_shim_made_anything_leaves_nothing;
        Scope::Once =>
            an_unresponsive_shim_delays_no_other_call,
            a_start_with_too_few_descriptors_ends_no_container,
            a_task_whose_shim_is_unreachable_reports_the_reason,
            a_task_whose_shim_is_given_up_by_an_operator_reports_its_exit,
            a_crashed_shims_container_is_not_reported_exited_until_delete_succeeds,
            start_and_delete_of_a_dead_shims_container_do_not_overlap,
            the_exit_of_a_dead_shims_task_is_kept_until_it_is_deleted,
            sockets_are_for_root_and_one_daemon,
            a_store_of_a_newer_version_is_refused,
            a_full_disk_refuses_and_loses_nothing,
    ]
}

fn shim_cases() -> Vec<Case> {
    let cases = cases![shims,
        Scope::Once =>
            a_shim_that_does_not_read_for_a_moment_keeps_its_container,
            a_shim_that_cannot_delete_its_task_keeps_it,
            of_two_clients_that_delete_a_task_at_once_one_gets_its_exit,
            an_image_path_among_the_options_of_a_container_restores_nothing,
            a_program_that_hangs_is_ended_with_what_it_has_started;
        Scope::Daemons => a_shim_whose_address_cannot_be_recorded_is_shut_down_at_once,
    ];
    cases.into_iter().map(|case| case.within(std::time::Duration::from_secs(120))).collect()
}

fn sandbox_cases() -> Vec<Case> {
    let cases = cases![sandboxes,
        Scope::Once =>
            a_record_of_a_sandbox_is_created_updated_listed_and_deleted,
            a_sandbox_is_refused_with_a_code,
            a_sandbox_lives_in_a_shim_and_its_containers_join_it,
            a_sandbox_of_another_shim_is_served,
            a_shim_without_sandboxes_leaves_nothing,
            a_sandbox_survives_a_crash_and_an_upgrade_of_the_daemon,
            the_end_of_a_killed_sandbox_is_published_once_and_kept,
            a_client_of_an_older_version_needs_no_create,
            a_crash_of_the_daemon_at_any_step_leaves_no_half_sandbox,
    ];
    cases.into_iter().map(|case| case.within(std::time::Duration::from_secs(120))).collect()
}

fn kill_cases() -> Vec<Case> {
    cases![kills, Scope::Daemons => random_kills_of_the_daemon_lose_nothing; Scope::Once => random_kills_of_the_daemon_and_of_workers_lose_no_sandbox]
        .into_iter()
        .map(|case| case.within(kills::deadline()))
        .collect()
}

fn image_row_cases() -> Vec<Case> {
    cases![image_rows,
        Scope::Once =>
            an_import_whose_lease_is_pruned_says_so_and_can_be_repeated,
            an_import_keeps_what_a_killed_one_has_left_without_labels,
            a_snapshot_that_a_retry_has_found_stays_when_the_first_attempts_lease_ends,
            a_snapshot_that_a_client_has_seen_stays_as_long_as_its_lease,
            an_image_that_is_removed_and_imported_again_at_once_is_whole,
            what_an_import_has_found_stays_when_the_image_that_had_it_is_removed,
            a_write_whose_lease_expires_meanwhile_is_refused_and_leaves_nothing,
            a_damaged_ingest_begins_again,
            a_write_goes_on_over_an_upgrade_also_if_another_namespace_has_the_content_by_then,
            an_import_that_finds_no_room_leaves_nothing_and_can_be_repeated;
        Scope::Daemons => upgrades_end_no_import,
    ]
    .into_iter()
    .chain(cases![damage, Scope::Once => a_damaged_store_is_refused_with_a_sentence_or_served_and_panics_nowhere])
    .collect()
}

fn upgrade_cases() -> Vec<Case> {
    cases![upgrades,
        Scope::Once =>
            upgrades_under_pulls_and_pushes_are_noticed_by_no_client,
            upgrades_under_imports_and_exports_are_noticed_by_no_client,
            an_upgrade_asks_again_for_credentials_and_takes_no_late_answer_for_those,
            a_fetch_goes_on_over_upgrades_where_it_was,
            an_apply_and_a_read_of_a_part_go_on_over_upgrades,
    ]
}

fn verifier_cases() -> Vec<Case> {
    cases![verifiers,
        Scope::Once =>
            a_pull_by_transfer_needs_the_consent_of_each_verifier,
            a_verifier_that_hangs_is_killed_and_refuses_a_pull,
    ]
}

fn power_cases() -> Vec<Case> {
    let cuts = cases![power, Scope::Once => an_acknowledged_image_survives_a_power_cut_at_any_moment];
    let kills = cases![image_kills, Scope::Once => images_survive_kills_at_any_moment];
    let machines = cases![power_vm, Scope::Once => an_acknowledged_image_survives_the_end_of_its_virtual_machine];
    let cuts = cuts.into_iter().map(|case| case.within(power::deadline()));
    let cuts = cuts.chain(machines.into_iter().map(|case| case.within(power_vm::deadline())));
    cuts.chain(kills.into_iter().map(|case| case.within(image_kills::deadline()))).collect()
}
