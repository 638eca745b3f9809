//! What a man in the middle does to a good shim, one fault at a time, and which case claims to see it.
//!
//! The program `man-in-the-middle` stands where the shim does. It runs the real one and passes everything on, but for its fault. It reads
//! its orders from the files beside it: `real`, the path of the shim, and `fault`, one of the names here.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::child::Verdict;
use super::clauses::Level;
use super::run::Results;

/// One fault, its name, what it is, and the case that has to fail.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// What the man in the middle is told.
    pub name: &'static str,
    /// For people.
    pub text: &'static str,
    /// The case that claims to see it.
    pub case: &'static str,
}

const fn fault(name: &'static str, text: &'static str, case: &'static str) -> Fault {
    Fault { name, text, case }
}

/// All of them.
pub const ALL: &[Fault] = &[
    fault("drop-exit", "the exit event of init is not passed on", "events.a_life_is_told_once_and_in_order"),
    fault("double-exit", "exit events are told twice", "lifecycle.the_exit_code_is_the_same_wherever_it_is_told"),
    fault("late-start", "the start event comes after the next one", "events.a_life_is_told_once_and_in_order"),
    fault("late-exec-started", "exec-started comes after the next event", "events.each_exec_is_told_as_added_started_and_exited"),
    fault("wrong-event-pid", "exec-started names another pid", "events.events_name_the_namespace_and_the_process"),
    fault("wrong-namespace", "events bear another namespace", "events.events_name_the_namespace_and_the_process"),
    fault("drop-paused", "the paused event is not passed on", "events.pause_and_resume_are_told"),
    fault("drop-oom", "the event of the end of memory is not passed on", "resources.the_end_of_memory_is_told_before_the_exit"),
    fault("give-events-up", "an event that is refused is not told again", "events.an_event_that_is_refused_for_a_while_is_told_later"),
    fault("wait-137", "Wait says 137 whatever it was", "lifecycle.the_exit_code_is_the_same_wherever_it_is_told"),
    fault("delete-137", "the command delete says 137 whatever it was", "deaths.an_exit_code_outlives_the_shim"),
    fault("delete-nothing", "the command delete does nothing", "deaths.delete_kills_what_a_dead_shim_has_left"),
    fault("wrong-exit-time", "State says another time of the end", "lifecycle.the_exit_code_is_the_same_wherever_it_is_told"),
    fault("wrong-task-pid", "Connect names another pid", "lifecycle.create_start_and_connect_agree_on_pids"),
    fault("wrong-code", "NotFound becomes Unknown", "calls.nobody"),
    fault("wrong-refusal", "FailedPrecondition becomes Unknown", "calls.codes_when_running"),
    fault("internal", "Unimplemented becomes Internal", "calls.what_is_unknown_is_not_implemented"),
    fault("silent-stats", "Stats is accepted and never answered", "resources.statistics_are_of_the_hosts_kind"),
    fault("no-stats-at-the-end", "Stats is refused once init has ended", "resources.statistics_are_there_until_delete"),
    fault("no-pids-at-the-end", "Pids is empty once init has ended", "lifecycle.pids_name_init_until_delete"),
    fault("no-v3", "the service of v3 is not there", "calls.the_task_service_of_v3_is_served"),
    fault("lost-byte", "the last byte of stdout is lost", "stdio.every_byte_before_the_end_arrives"),
    fault("late-end", "stdout is closed fifteen seconds late", "stdio.stdout_and_stderr_are_kept_apart_and_end"),
    fault("no-close-io", "CloseIO is answered and not done", "stdio.stdin_arrives_and_ends_with_close_io"),
    fault("no-resize", "ResizePty is answered and not done", "terminals.a_terminal_has_the_size_that_was_asked_for"),
    fault("no-pause", "Pause is answered and not done", "resources.a_paused_container_stands_still_and_goes_on"),
    fault("no-update", "Update is answered and not done", "resources.an_update_changes_the_limit"),
    fault("kill-init-only", "Kill forgets that it was for all", "lifecycle.kill_all_reaches_every_process"),
    fault("kill-wrong-process", "Kill of an exec reaches init", "execs.an_exec_is_killed_alone"),
    fault("stay", "Shutdown is answered and not done", "lifetime.a_shim_leaves_when_it_is_told_to"),
    fault("leave-early", "Shutdown ends the shim, containers or not", "lifetime.a_shim_stays_while_a_container_is_left"),
    fault("leak", "a descriptor is lost with each Create", "lifetime.nothing_grows"),
    fault("open-socket", "the socket is for everybody", "security.sockets_are_for_root_alone"),
    fault("no-address", "the file address is not there", "bootstrap.the_address_is_left_in_the_bundle"),
    fault("no-group", "each start has an address of its own", "bootstrap.a_second_start_in_a_group_answers_the_living_shims_address"),
    fault("hang-up-on-garbage", "what is no request ends the connection", "wire.garbage_is_answered_and_the_connection_goes_on"),
    fault(
        "hang-up-on-length",
        "a frame that is too long ends the connection",
        "wire.a_length_beyond_the_limit_is_refused_and_the_connection_goes_on",
    ),
    fault("in-order", "a connection's next request waits for the answer to the one before", "wire.answers_come_as_they_are_ready"),
];

/// Puts a man in the middle in front of the shim `real` into `folder`, and returns where it is to be found.
pub fn install(folder: &Path, program: &Path, real: &Path, fault: &str) -> Result<PathBuf> {
    fs::create_dir_all(folder)?;
    let place = folder.join("man-in-the-middle");
    fs::copy(program, &place).with_context(|| format!("copy {}", program.display()))?;
    fs::write(folder.join("real"), real.to_str().context("a path in UTF-8")?)?;
    fs::write(folder.join("fault"), fault)?;
    Ok(place)
}

/// Cases that say nothing through a man in the middle: he needs his files beside him.
pub const NOT_THROUGH_HIM: &[&str] = &["lifetime.a_binary_that_is_gone_is_not_missed"];

/// Which cases have seen which fault.
#[derive(Debug, Default)]
pub struct Table(Vec<(Fault, Vec<String>)>);

impl Table {
    /// Adds the run with a fault, and says what was seen.
    pub fn add(&mut self, fault: &Fault, results: &Results) -> String {
        let failed = results.outcomes.iter().filter(|outcome| matches!(outcome.verdict, Verdict::Failed(_)));
        let failed = failed.filter(|outcome| outcome.level() != Level::May && !NOT_THROUGH_HIM.contains(&outcome.case.as_str()));
        let failed: Vec<_> = failed.map(|outcome| outcome.case.clone()).collect();
        let said = format!(
            "{}: {} cases, {}",
            fault.name,
            failed.len(),
            if failed.iter().any(|case| case == fault.case) { "caught" } else { "NOT CAUGHT" }
        );
        self.0.push((*fault, failed));
        said
    }

    /// Whether each fault was seen by the case that claims to see it.
    pub fn is_complete(&self) -> bool {
        self.0.iter().all(|(fault, failed)| failed.iter().any(|case| case == fault.case))
    }

    /// A row for each fault.
    pub fn markdown(&self) -> String {
        let mut text = "| fault | what it is | seen by | and by |\n| --- | --- | --- | --- |\n".to_owned();
        for (fault, failed) in &self.0 {
            let seen = if failed.iter().any(|case| case == fault.case) { format!("`{}`", fault.case) } else { "**nobody**".to_owned() };
            let others: Vec<_> = failed.iter().filter(|case| *case != fault.case).map(|case| format!("`{case}`")).collect();
            let others = if others.len() > 8 { format!("{} others", others.len()) } else { others.join(", ") };
            let _cannot_fail = writeln!(text, "| {} | {} | {seen} | {others} |", fault.name, fault.text);
        }
        text
    }
}
