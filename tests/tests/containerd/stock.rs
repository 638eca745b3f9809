//! What the stock shim does otherwise than these tests demand, each seen in a run with `X_STOCK_ALL=1`.

use shim_tests::runner::Known;

/// Parts of names of tests, and what the stock shim does.
pub(crate) const KNOWN: &[Known] = &[
    ("containerd-1.7::runc::lifecycle::refusals_have", "a second start of an exec ends the shim"),
    ("containerd-1.7::crun::lifecycle::refusals_have", "a second start of an exec ends the shim"),
    ("containerd-2.1::runc::lifecycle::refusals_have", "a second start of an exec ends the shim"),
    ("containerd-2.1::crun::lifecycle::refusals_have", "a second start of an exec ends the shim"),
    ("containerd-2.1::runc::lifecycle::events_come_in_order_and_once", "now and then it leaves before the delete event is out"),
    ("containerd-2.1::crun::lifecycle::events_come_in_order_and_once", "now and then it leaves before the delete event is out"),
    ("lifecycle::a_runtime_that_shouts_blocks_nothing", "more than 64 KiB on stderr hang it"),
    ("lifecycle::one_containers_slow_create_delays_no_other", "a lock is held across create"),
    ("stdio::a_reader_that_comes_late_gets_everything", "create waits for a reader"),
    ("stdio::fifos_that_nobody_ever_opens_wedge_nothing", "create waits for a reader"),
    ("stdio::a_gigabyte_is_not_buffered_for_a_slow_reader", "create waits for a reader"),
    ("stdio::a_reader_that_leaves_breaks_no_pipe", "what was not read at the exit is lost"),
    ("containerd-1.6::runc::stdio::a_file_gets_both_streams", "the second stream's lines are lost"),
    ("containerd-2.1::crun::checkpoint::a_container_goes_on", "delete fails, as crun has already removed its state"),
    ("containerd-1.6::runc::crash::a_daemon_killed_during_create", "the id is neither there nor free"),
    ("containerd-1.6::runc::crash::a_daemon_killed_after_create", "the id is neither there nor free"),
    ("containerd-1.7::crun::crash::an_exit_while_the_daemon_is", "the exit code is lost"),
    ("containerd-2.1::crun::crash::an_exit_while_the_daemon_is", "the exit code is lost"),
];
