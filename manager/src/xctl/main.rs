//! `xctl`: containers for people, on x-manager or containerd; docs/xctl.md shows its use.
//!
//! It is a client and nothing else: all state is the daemon's, the shims', and files of output. It can end at any time.
//!
//! **Invariant:** a container that was started detached needs no `xctl`, and no daemon, for its output to arrive.

use std::process::ExitCode;

mod attach;
mod cli;
mod client;
mod containers;
mod content;
mod copy;
mod create;
mod error;
mod events;
mod examples;
mod exec;
mod export;
mod follow;
#[path = "../gc_labels.rs"]
mod gc_labels;
mod image;
mod images;
mod import;
mod inspect;
mod keys;
mod logs;
mod open_in;
mod output;
mod parse;
mod processes;
mod progress;
mod prune;
mod ps;
mod references;
mod remove;
mod run;
mod spec;
mod start;
mod stats;
mod stdio;
mod stop;
mod sys;
mod tasks;
mod temporary_mount;
mod terminal;
mod transfer;
mod upgrade;
mod users;
mod why;

fn main() -> ExitCode {
    let line = cli::parse();
    // The status of a container's process is the status of `run`, so failures of xctl itself have one that few programs use.
    let is_of_process = line.command.has_status_of_process();
    let failed = if is_of_process { EXIT_FAILED_BEFORE_PROCESS } else { EXIT_FAILED };
    let executor = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(executor) => executor,
        Err(error) => {
            eprintln!("xctl: cannot start: {error}");
            return ExitCode::from(failed);
        }
    };
    let status = match executor.block_on(cli::run(line)) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("xctl: {}", error.chain());
            if let Some(hint) = error.hint() {
                eprintln!("  {hint}");
            }
            error.status_of_program().filter(|_| is_of_process).unwrap_or(failed)
        }
    };
    // a thread may be blocked in a read of standard input: it is not waited for
    executor.shutdown_background();
    ExitCode::from(status)
}

/// A failure; 2 is one of the command line.
const EXIT_FAILED: u8 = 1;
/// A failure of `run`, `exec`, `attach` and `start --attach` themselves.
const EXIT_FAILED_BEFORE_PROCESS: u8 = 125;
