//! Known deviations of the stock shim from these tests, each seen in a run with `X_STOCK_ALL=1`.

use shim_tests::runner::Known;

const ALL: &[&str] = &["1.6", "1.7", "2.1"];
const OLD: &[&str] = &["1.6"];
const NEW: &[&str] = &["1.7", "2.1"];

const fn known(versions: &'static [&'static str], test: &'static str, instead: &'static str) -> Known {
    Known { versions, test, instead }
}

/// The tests that a run on the stock shim skips.
pub(crate) const KNOWN: &[Known] = &[
    known(NEW, "lifecycle::refusals_have_the_code_that_clients_act_on", "a second start of an exec ends the shim"),
    known(&["2.1"], "lifecycle::events_come_in_order_and_once", "now and then it leaves before the delete event is out"),
    known(ALL, "lifecycle::a_runtime_that_prints_a_megabyte_blocks_nothing", "more than 64 KiB on stderr hang it"),
    known(ALL, "lifecycle::one_containers_slow_create_delays_no_other", "a lock is held across create"),
    known(ALL, "stdio::a_late_reader_gets_everything", "create waits for a reader"),
    known(ALL, "stdio::fifos_that_no_client_ever_opens_block_nothing", "create waits for a reader"),
    known(ALL, "stdio::a_slow_reader_is_waited_for_and_nothing_is_buffered", "create waits for a reader"),
    known(ALL, "stdio::a_reader_that_disconnects_breaks_no_pipe", "what was not read at the exit is lost"),
    known(OLD, "stdio::a_file_gets_both_streams", "the second stream's lines are lost"),
    known(
        &["2.1"],
        "outputs::a_delete_that_waits_for_output_delays_no_other_call_and_ends",
        "State and Wait of an exec are answered after its Delete",
    ),
    known(&["2.1"], "checkpoint::a_container_is_restored_from_its_checkpoint", "delete fails where crun has removed its state already"),
    known(OLD, "crash::a_daemon_killed_during_create_leaves_a_whole_container_or_none", "the id is neither there nor free"),
    known(OLD, "crash::a_daemon_killed_after_create_was_done_leaves_a_whole_container_or_none", "the id is neither there nor free"),
    known(
        &["2.1"],
        "versions::containers_outlive_a_downgrade_and_an_upgrade_of_their_daemon",
        "an older daemon ends them: it does not speak the third version",
    ),
    known(NEW, "crash::an_exit_while_the_daemon_is_down_is_published_afterwards", "the exit code is lost"),
    known(NEW, "crash::an_exit_while_the_daemon_is_upgraded_is_published_afterwards", "the exit code is lost"),
];
