//! Every fault, what it does, and the words with which the cases that must detect it fail.

use super::{Fault, fault};

/// All of them.
pub const ALL: &[Fault] = &[
    fault(
        "drop-exit",
        "the exit event of init is not forwarded",
        &[
            ("events.lifecycle_events_are_published_once_and_in_order", "[\"create\", \"start\", \"delete\"]"),
            ("events.inits_exit_is_published_while_execs_start", "\"delete\"]"),
        ],
    ),
    fault("double-exit", "exit events are published twice", &[("lifecycle.the_exit_code_is_the_same_in_every_answer", "events: [exit")]),
    fault(
        "late-start",
        "the start event comes after the next one",
        &[("events.lifecycle_events_are_published_once_and_in_order", "[\"create\", \"exit\", \"start\"")],
    ),
    fault(
        "late-exec-started",
        "exec-started comes after the next event",
        &[("events.each_exec_is_published_as_added_started_and_exited", "exit(e")],
    ),
    fault(
        "drop-create",
        "the create event is not forwarded",
        &[("events.create_and_delete_of_an_unstarted_container_are_published", "[\"exit\", \"delete\"]")],
    ),
    fault(
        "first-owner",
        "the exit of a process is attributed to the first one that had its pid",
        &[("execs.an_exit_is_attributed_to_the_current_owner_of_the_pid", "exit c1/first")],
    ),
    fault(
        "wrong-event-pid",
        "exec-started names another pid",
        &[("events.events_name_the_namespace_and_the_process", "exec-started c1/e")],
    ),
    fault("wrong-namespace", "events name another namespace", &[("events.events_name_the_namespace_and_the_process", "elsewhere")]),
    fault("drop-paused", "the paused event is not forwarded", &[("events.pause_and_resume_are_published", "\"start\", \"resumed\"")]),
    fault(
        "drop-oom",
        "the OOM event is not forwarded",
        &[("resources.an_oom_kill_is_published_before_the_exit", "[\"create\", \"start\", \"exit\", \"delete\"]")],
    ),
    fault(
        "give-events-up",
        "an event that is refused is not sent again",
        &[("events.an_event_refused_for_a_while_is_published_later", "\"start\", \"e")],
    ),
    fault(
        "events-first",
        "an answer waits until the daemon has taken the last event",
        &[("events.a_daemon_that_is_slow_to_take_events_delays_no_call", "though events wait")],
    ),
    fault("wait-137", "Wait always answers 137", &[("lifecycle.the_exit_code_is_the_same_in_every_answer", "137 vs 0")])
        .broad("every case waits for an exit"),
    fault(
        "bare-signal",
        "Wait answers 15 for a process killed by SIGTERM",
        &[("lifecycle.a_signal_is_reported_as_128_plus_its_number", "of an exec")],
    ),
    fault("killed-execs-end-well", "Wait answers 0 for an exec that was killed", &[("execs.execs_end_with_their_container", "0 vs 137")]),
    fault("delete-137", "the command delete always answers 137", &[("crashes.an_exit_code_outlives_the_shim", "exit_status: 137")]),
    fault(
        "delete-nothing",
        "the command delete does nothing",
        &[
            ("crashes.delete_kills_what_a_dead_shim_left_behind", "its init is dead"),
            ("sandboxes.delete_ends_a_sandbox_that_was_not_started", "the shim has exited"),
            ("pods.delete_ends_the_containers_of_a_dead_shims_sandbox", "its init is dead"),
        ],
    ),
    fault(
        "delete-no-member",
        "the command delete does nothing to members of a group",
        &[("crashes.delete_ends_every_container_of_a_killed_shims_pod", "its init is dead")],
    ),
    fault(
        "delete-the-shim",
        "the command delete ends the shim",
        &[("crashes.delete_after_a_deletion_affects_no_other_container", "the connection has ended")],
    ),
    fault(
        "delete-for-ever",
        "after the command delete an id cannot be used again",
        &[("crashes.the_same_id_works_again_after_the_shim_was_killed", "this name is used up")],
    ),
    fault(
        "late-unmount",
        "the command delete unmounts the root file system a second late",
        &[("crashes.delete_unmounts_the_root_file_system", "it is still mounted")],
    ),
    fault(
        "ghost",
        "the socket of a killed shim accepts connections",
        &[("crashes.a_dead_shim_accepts_no_connection", "a connection is accepted")],
    ),
    fault("wrong-exit-time", "State reports another exit time", &[("lifecycle.the_exit_code_is_the_same_in_every_answer", "State: ")]),
    fault(
        "early-running",
        "State reports a created container as running",
        &[("lifecycle.state_reports_phase_pid_bundle_and_stdio", "phase 1 expected")],
    ),
    fault(
        "wrong-exec-pid",
        "State of an exec reports another pid",
        &[("execs.an_exec_has_its_own_output_and_exit_code", "State reports another pid")],
    ),
    fault("wrong-task-pid", "Connect names another pid", &[("lifecycle.create_start_and_connect_agree_on_pids", "task_pid")]),
    fault(
        "wrong-code",
        "NotFound becomes Unknown",
        &[
            ("calls.missing", "NotFound expected, Refused(Unknown) found"),
            ("sandboxes.a_sandbox_that_was_never_created_is_not_found", "Start of s1: Unknown"),
        ],
    ),
    fault(
        "wrong-refusal",
        "FailedPrecondition becomes Unknown",
        &[("calls.codes_when_running", "precondition expected, Refused(Unknown) found")],
    ),
    fault("internal", "Unimplemented becomes Internal", &[("calls.unknown_services_and_methods_are_unimplemented", "Internal")]),
    fault(
        "create-never-fails",
        "a Create that fails is answered with success",
        &[
            ("calls.a_second_container_of_an_id_is_refused", "it was accepted"),
            ("lifecycle.a_failed_create_leaves_nothing_and_reports_the_reason", "it was accepted"),
            ("requests.a_bundle_that_cannot_be_run_is_refused", "it was accepted"),
            ("slow.a_repeated_create_makes_one_container", "not the one that was made"),
        ],
    ),
    fault(
        "exec-never-fails",
        "an Exec or a Start that fails is answered with success",
        &[
            ("execs.an_exec_of_a_missing_program_fails_and_can_be_deleted", "it was accepted"),
            ("requests.an_exec_that_cannot_run_is_refused_and_leaves_nothing", "it was accepted"),
        ],
    ),
    fault(
        "silent-stats",
        "Stats is accepted and never answered",
        &[("resources.statistics_match_the_hosts_cgroup_version", "no answer in time")],
    ),
    fault(
        "no-stats-at-the-end",
        "Stats is refused once init has exited",
        &[("resources.statistics_are_reported_until_delete", "after the exit")],
    ),
    fault("no-pids-at-the-end", "Pids is empty once init has exited", &[("lifecycle.pids_name_init_until_delete", "[]")]),
    fault(
        "no-kill-before-start",
        "Kill of a created container is refused",
        &[("lifecycle.a_created_container_can_be_killed", "FailedPrecondition")],
    ),
    fault(
        "no-kill-when-paused",
        "Kill of a paused container is refused",
        &[("resources.a_container_killed_while_paused_ends", "FailedPrecondition")],
    ),
    fault(
        "no-wait-before-start",
        "Wait for a created container is refused",
        &[("lifecycle.a_wait_on_a_created_container_ends_with_its_exit", "FailedPrecondition")],
    ),
    fault("no-kill-for-all", "Kill with `all` is refused", &[("lifecycle.kill_all_ends_every_process", "Unimplemented")]),
    fault("one-life", "an id is not free after Delete", &[("lifecycle.an_id_is_free_again_after_delete", "AlreadyExists")]),
    fault("one-exec", "an exec's id is not free after Delete", &[("execs.an_exec_id_is_free_again_after_delete", "AlreadyExists")]),
    fault("short-ids", "an id of more than 64 characters is refused", &[("lifecycle.the_longest_id_works", "InvalidArgument")]),
    fault("no-v2", "the v2 service is not served", &[("calls.the_task_service_of_v2_is_served", "Unimplemented")])
        .broad("the cases use it"),
    fault("no-v3", "the v3 service is not served", &[("calls.the_task_service_of_v3_is_served", "Unimplemented")]),
    fault(
        "lost-byte",
        "the last byte of stdout is lost",
        &[("stdio.every_byte_before_the_end_arrives", "0 of 1 bytes"), ("terminals.a_terminals_last_output_is_not_cut", "line 4999\\r")],
    ),
    fault("late-end", "stdout is closed fifteen seconds late", &[("stdio.stdout_and_stderr_are_kept_apart_and_end", "still open")]),
    fault(
        "impatient",
        "output is dropped when the reader is slow",
        &[
            ("stdio.a_shim_waits_for_a_slow_reader_in_bounded_memory", "the writer "),
            ("stdio.a_reader_that_pauses_gets_everything_of_a_deleted_exec", "of 108894 bytes"),
        ],
    ),
    fault(
        "quiet-is-the-end",
        "stdout of an exec is closed after half a second without output",
        &[("stdio.output_written_by_a_descendant_while_delete_waits_arrives", "\"now\\n\"")],
    ),
    fault("no-close-io", "CloseIO is answered without effect", &[("stdio.stdin_arrives_and_ends_with_close_io", "no answer in time")]),
    fault("close-io-once", "a second CloseIO is refused", &[("stdio.close_io_is_harmless_at_any_time", "a second time")]),
    fault("no-resize", "ResizePty is answered without effect", &[("terminals.a_terminal_has_the_requested_size", "\"42 111\"")]),
    fault("no-exec-terminal", "an exec gets no terminal", &[("terminals.an_exec_with_a_terminal_has_one", "State does not report it")]),
    fault("exec-as-root", "an exec runs as root", &[("execs.an_exec_gets_its_user_folder_and_environment", "\"0\\n")]),
    fault(
        "no-masks",
        "masked paths of the spec are not masked",
        &[("security.masked_paths_are_masked_for_init_and_execs", "an exec reports")],
    ),
    fault(
        "written-program",
        "the OCI runtime's executable is modified",
        &[("security.a_container_cannot_write_to_a_host_program", "was written to")],
    ),
    fault(
        "no-pause",
        "Pause is answered without effect",
        &[("resources.a_paused_container_is_frozen_and_resumes", "State does not report it as paused")],
    ),
    fault("no-update", "Update is answered without effect", &[("resources.an_update_changes_the_limit", "67108864")]),
    fault("late-cgroup", "a container's cgroups are removed a second late", &[("resources.cgroups_are_gone_after_delete", "is left")]),
    fault("kill-init-only", "Kill ignores `all`", &[("lifecycle.a_signal_for_all_reaches_every_process", "no answer in time")]),
    fault("kill-wrong-process", "Kill of an exec reaches init", &[("execs.an_exec_is_killed_alone", "another process was killed")]),
    fault(
        "survivor",
        "a process of a container outlives it",
        &[("lifecycle.a_container_in_the_hosts_pid_namespace_leaves_no_survivor", "no process of it is left")],
    ),
    fault("busy-with-kill", "while a Kill is in progress no Wait is answered", &[("slow.a_slow_kill_delays_no_exit", "Unavailable")]),
    fault(
        "one-create-at-a-time",
        "while a Create is in progress State is not answered",
        &[("slow.a_slow_create_delays_no_sibling", "no answer in time")],
    ),
    fault("starts-first", "while a Start is in progress State is not answered", &[("slow.hundreds_of_execs_delay_no_state", "times only")]),
    fault(
        "stay",
        "Shutdown is answered without effect",
        &[
            ("lifetime.a_shim_exits_on_shutdown", "the shim has exited"),
            ("lifetime.a_group_deleted_concurrently_leaves_nothing", "the shim has exited"),
        ],
    )
    .broad("every case ends with a Shutdown"),
    fault(
        "leave-early",
        "the shim exits on Shutdown even if it has containers",
        &[
            ("lifetime.a_shim_stays_while_it_has_a_container", "the connection has ended"),
            ("lifetime.concurrent_delete_and_shutdown_are_answered", "the connection has ended"),
        ],
    ),
    fault(
        "forget-execs",
        "an exec is forgotten when the connection that added it closes",
        &[("lifetime.a_new_connection_finds_everything_unchanged", "NotFound")],
    ),
    fault("leak", "each Create leaks a descriptor", &[("lifetime.nothing_grows", "its descriptors are closed")]),
    fault(
        "leak-to-container",
        "a container gets a descriptor of a foreign file",
        &[("security.a_container_has_three_descriptors", "/etc/passwd")],
    ),
    fault("open-socket", "every user can connect to the socket", &[("security.sockets_are_for_root_alone", "mode 666")]),
    fault(
        "chatty-debug",
        "start -debug writes to standard error",
        &[("bootstrap.start_answers_an_address_that_can_be_dialled", "start prints")],
    ),
    fault("no-options", "start fails because of options", &[("bootstrap.options_on_standard_input_are_taken", "no options are taken")]),
    fault(
        "wrong-protocol",
        "the answer to BootstrapParams names another protocol",
        &[("bootstrap.bootstrap_params_are_answered_in_kind", "\"grpc\"")],
    ),
    fault(
        "no-address",
        "the file `address` is not written",
        &[("bootstrap.start_writes_the_address_into_the_bundle", "no file called address")],
    ),
    fault(
        "no-group",
        "each start has an address of its own",
        &[
            ("bootstrap.a_second_start_in_a_group_answers_the_living_shims_address", "bundle.start_shim().await?"),
            ("pods.start_of_a_container_answers_its_sandboxs_shim", "another shim"),
        ],
    ),
    fault(
        "whole-frames-only",
        "a frame that arrives in pieces ends the connection",
        &[
            ("wire.frames_split_anywhere_are_reassembled", "the shim closed the connection"),
            ("wire.a_slow_client_does_not_delay_the_others", "Broken pipe"),
        ],
    ),
    fault(
        "half-frame-blocks",
        "half a frame blocks all other requests",
        &[("wire.a_truncated_frame_affects_no_other_connection", "state of the witness")],
    ),
    fault(
        "hang-up-on-garbage",
        "a frame that is no request ends the connection",
        &[("wire.garbage_is_answered_and_the_connection_stays_usable", "the connection has ended")],
    ),
    fault(
        "hang-up-on-length",
        "a frame that is too long ends the connection",
        &[("wire.an_oversized_frame_is_refused_and_the_connection_stays_usable", "the connection has ended")],
    ),
    fault(
        "in-order",
        "a connection's next request waits for the answer to the one before",
        &[("wire.answers_are_sent_when_they_are_ready", "receive a frame")],
    ),
    fault(
        "two-processes",
        "SandboxStatus names another process than StartSandbox",
        &[("sandboxes.a_started_sandbox_is_ready_and_names_its_process", "name two processes")],
    ),
    fault(
        "always-ready",
        "SandboxStatus reports every sandbox as ready",
        &[("sandboxes.a_sandbox_is_not_ready_before_its_start_and_after_its_stop", "before Start: SANDBOX_READY")],
    ),
    fault("other-platform", "Platform names another system", &[("sandboxes.the_platform_is_the_hosts", "windows")]),
    fault(
        "hasty-wait",
        "WaitSandbox is answered immediately",
        &[("sandboxes.no_wait_is_answered_while_the_sandbox_is_ready", "it is answered before Stop")],
    ),
    fault(
        "endless-wait",
        "WaitSandbox is never answered",
        &[
            ("sandboxes.a_stop_answers_every_wait", "a Wait from before Stop"),
            ("pods.a_pod_whose_process_is_killed_is_not_ready", "no answer in time"),
        ],
    ),
    fault("stop-once", "a second StopSandbox is refused", &[("sandboxes.a_stop_can_be_repeated", "the second Stop")]),
    fault(
        "lost-shutdown",
        "the connection is closed before ShutdownSandbox is answered",
        &[("sandboxes.a_shutdown_is_answered_and_the_shim_exits", "the answer to ShutdownSandbox")],
    ),
    fault(
        "no-shutdown",
        "ShutdownSandbox is answered without effect",
        &[
            ("sandboxes.a_shutdown_is_answered_and_the_shim_exits", "the shim has exited"),
            ("pods.a_shutdown_ends_containers_that_are_left", "not within"),
        ],
    )
    .broad("every case of a sandbox ends with it"),
    fault(
        "sandbox-never-fails",
        "a CreateSandbox or StartSandbox that fails is answered with success",
        &[("sandboxes.a_sandbox_without_its_network_is_refused", "it was accepted")],
    ),
    fault(
        "forget-sandboxes",
        "a sandbox is forgotten when the connection that created it closes",
        &[("sandboxes.a_new_connection_finds_the_sandbox", "NotFound")],
    ),
    fault("no-ping", "PingSandbox is not served", &[("sandboxes.a_sandbox_that_is_ready_answers_pings", "Unimplemented")]),
    fault(
        "unreadable-info",
        "the entry `info` of a SandboxStatus is no JSON",
        &[("sandboxes.a_verbose_status_can_be_read", "the entry `info` is not JSON")],
    ),
    fault(
        "no-pod-cgroup",
        "the cgroup of a pod is not made",
        &[("sandboxes.the_pods_cgroup_exists_from_the_start_on", "there is no cgroup")],
    )
    .broad("the containers of such a pod leave the cgroup above theirs behind"),
    fault(
        "hosts-network",
        "every sandbox is in the host's network",
        &[("pods.containers_are_in_the_network_of_their_sandbox", "is in another network")],
    ),
    fault(
        "no-host-network",
        "a sandbox without a network namespace of its own is refused",
        &[("pods.a_pod_on_the_hosts_network_is_in_it", "Create without a network namespace")],
    ),
    fault(
        "other-hostname",
        "a sandbox has another host name",
        &[("pods.containers_share_shared_memory_and_host_name", "the host name is \"elsewhere")],
    ),
    fault(
        "no-dns",
        "the name servers of a pod are ignored",
        &[("pods.containers_get_the_files_of_their_pod", "no \"nameserver 192.0.2.53\"")],
    ),
    fault(
        "no-shared-pids",
        "the containers of a pod never share process ids",
        &[("pods.containers_can_share_process_ids", "has the host's process ids")],
    ),
];
