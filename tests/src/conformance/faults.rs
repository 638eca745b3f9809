//! Faults that are injected into a working shim, one at a time, and the cases that must detect each.
//!
//! The program `man-in-the-middle` takes the place of the shim. It runs the real one and forwards everything, except for its fault. It is
//! configured by the files beside it: `real`, the path of the shim, and `fault`, one of the names here.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use super::child::Verdict;
use super::clauses::Level;
use super::run::Results;
use crate::programs;

/// One fault: its name, its behaviour, and the cases that must detect it.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// The name in the file `fault`.
    pub name: &'static str,
    /// A description for readers.
    pub text: &'static str,
    /// The cases that have to fail, each with the text that its failure has to contain.
    pub seen: &'static [(&'static str, &'static str)],
    /// Why nearly every case detects it.
    pub broad: Option<&'static str>,
}

const fn fault(name: &'static str, text: &'static str, seen: &'static [(&'static str, &'static str)]) -> Fault {
    Fault { name, text, seen, broad: None }
}

impl Fault {
    const fn broad(mut self, why: &'static str) -> Self {
        self.broad = Some(why);
        self
    }

    /// Whether a case must detect it.
    pub fn is_claimed_by(&self, case: &str) -> bool {
        self.seen.iter().any(|(name, _)| *name == case)
    }

    /// The cases that must detect it, in Markdown.
    fn seen_by(&self) -> String {
        names(self.seen.iter().map(|(case, _)| *case))
    }

    /// Checks that a case that must detect the fault failed with the expected message.
    ///
    /// Errors: the result that it had instead.
    pub fn check(&self, case: &str, verdict: &Verdict) -> Result<()> {
        let (_, words) = self.seen.iter().find(|(name, _)| *name == case).context("the case is not among those that must detect it")?;
        match verdict {
            Verdict::Failed(why) if why.contains(words) => Ok(()),
            Verdict::Failed(why) => bail!("{case} fails, but not with {words:?}: {why}"),
            other => bail!("{case} results in {other:?}, though {}", self.text),
        }
    }
}

/// At most this many other cases may detect a fault unless it is [`Fault::broad`]: a fault that breaks everything proves nothing about one case.
pub const MOST_OTHERS: usize = 8;

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
        &[("crashes.delete_kills_what_a_dead_shim_left_behind", "its init is dead")],
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
    fault("wrong-code", "NotFound becomes Unknown", &[("calls.missing", "NotFound expected, Refused(Unknown) found")]),
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
        &[("bootstrap.a_second_start_in_a_group_answers_the_living_shims_address", "bundle.start_shim().await?")],
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
];

/// Installs `man-in-the-middle` with this fault for the shim `real` in `folder`, and returns its path.
pub fn install(folder: &Path, program: &Path, real: &Path, fault: &str) -> Result<PathBuf> {
    fs::create_dir_all(folder)?;
    let place = folder.join("man-in-the-middle");
    programs::copy(program, &place)?;
    fs::write(folder.join("real"), real.to_str().context("a path in UTF-8")?)?;
    fs::write(folder.join("fault"), fault)?;
    Ok(place)
}

/// Cases that cannot run through `man-in-the-middle`, because it needs the files beside it.
pub const NOT_THROUGH_PROXY: &[&str] = &["lifetime.a_removed_binary_affects_no_running_container"];

/// Which cases detected which fault.
#[derive(Debug, Default)]
pub struct Table(Vec<Row>);

#[derive(Debug)]
struct Row {
    fault: Fault,
    /// Why cases that must detect it did not.
    missed: Vec<String>,
    others: Vec<String>,
}

impl Table {
    /// Adds a run with a fault, and returns a line about it.
    pub fn add(&mut self, fault: &Fault, results: &Results) -> String {
        let (mut missed, mut others) = (Vec::new(), Vec::new());
        for outcome in results.outcomes.iter().filter(|outcome| !NOT_THROUGH_PROXY.contains(&outcome.case.as_str())) {
            if fault.is_claimed_by(&outcome.case) {
                missed.extend(fault.check(&outcome.case, &outcome.verdict).err().map(|error| format!("{error:#}")));
            } else if matches!(outcome.verdict, Verdict::Failed(_)) && outcome.level() != Level::May {
                others.push(outcome.case.clone());
            }
        }
        let row = Row { fault: *fault, missed, others };
        let line =
            format!("{}: {}, also by {} other cases", fault.name, row.wrong().unwrap_or_else(|| "detected".to_owned()), row.others.len());
        self.0.push(row);
        line
    }

    /// Whether each fault was detected by the cases that must, and by few others.
    pub fn is_complete(&self) -> bool {
        self.0.iter().all(|row| row.wrong().is_none())
    }

    /// A row for each fault.
    pub fn markdown(&self) -> String {
        let mut text = "| fault | behaviour | detected by | also by |\n| --- | --- | --- | --- |\n".to_owned();
        for row in &self.0 {
            let seen = if row.missed.is_empty() { row.fault.seen_by() } else { "**not detected by every case that must**".to_owned() };
            let others = match row.fault.broad {
                Some(why) if row.others.len() > MOST_OTHERS => format!("{} others: {why}", row.others.len()),
                _ => names(row.others.iter().map(String::as_str)),
            };
            let _cannot_fail = writeln!(text, "| {} | {} | {seen} | {others} |", row.fault.name, row.fault.text);
        }
        text
    }
}

impl Row {
    fn wrong(&self) -> Option<String> {
        let too_many = self.others.len() > MOST_OTHERS && self.fault.broad.is_none();
        match (self.missed.first(), too_many) {
            (Some(missed), _) => Some(format!("NOT DETECTED: {missed}")),
            (None, true) => Some(format!("detected by TOO MANY cases: {}", self.others.join(", "))),
            (None, false) => None,
        }
    }
}

fn names<'a>(cases: impl Iterator<Item = &'a str>) -> String {
    cases.map(|case| format!("`{case}`")).collect::<Vec<_>>().join(", ")
}

/// Checks that the table in a document lists [`ALL`] faults, none of them detected by too many cases.
pub fn check_document(document: &str) -> Result<()> {
    let rows: Vec<Vec<&str>> = document
        .lines()
        .filter(|line| line.starts_with("| "))
        .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .collect();
    for fault in ALL {
        let row = rows.iter().find(|row| row[0] == fault.name).with_context(|| format!("{} is not in the document", fault.name))?;
        ensure!(row[1..3] == [fault.text, &fault.seen_by()], "{} differs in the document: {row:?}", fault.name);
        let others = row.get(3).map_or(0, |others| others.matches('`').count() / 2);
        ensure!(others <= MOST_OTHERS, "{} is detected by {others} other cases", fault.name);
    }
    // two lines are the table's head
    ensure!(rows.len() == ALL.len() + 2, "the document has {} faults, there are {}", rows.len() - 2, ALL.len());
    Ok(())
}
