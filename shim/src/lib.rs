//! `containerd-shim-x-v2`: see docs/architecture.md for the picture. A library only for the sake of `fuzz/`.
use std::process::ExitCode;

mod bootstrap;
mod capture;
mod cgroup;
mod chain;
mod commands;
mod control;
mod descendants;
mod engine;
mod executable;
mod flag;
mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod handover;
mod helper;
mod inbox;
mod invocation;
mod journal;
mod journal_body;
mod keeper;
mod logging;
mod mountinfo;
mod options;
mod pod_folder;
mod processes;
mod rootfs;
mod run_dir;
mod saved;
mod settings;
mod stdio_uri;
mod sys;
mod systemd;
mod test_identity;
mod whole_file;
mod worker;

use invocation::Invocation;

/// The command line is invalid.
const EXIT_USAGE: u8 = 2;

/// The entry point of the program.
pub fn main() -> ExitCode {
    let invocation = match Invocation::parse(std::env::args_os().skip(1)) {
        Ok(invocation) => invocation,
        Err(error) => {
            let help = if error.is_of_a_value() { "" } else { invocation::HELP };
            eprintln!("containerd-shim-x-v2: {error}\n\n{help}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match invocation {
        Invocation::Start(flags) => ended(&format!("start {}", flags.id), bootstrap::start(&flags)),
        Invocation::Delete(flags) => ended(&format!("delete {}", flags.id), bootstrap::delete(&flags)),
        Invocation::Info => ended("info", bootstrap::info()),
        Invocation::Version => ended("version", commands::version()),
        Invocation::Help => ended("help", commands::help()),
        Invocation::Keeper { settings, program, unprotected } => inherited(|| {
            name_process()?;
            let (clients, control, mount) =
                (sys::inherited::take_socket(3)?, sys::inherited::take_socket(4)?, sys::inherited::take(5).ok());
            let forked = keeper::fork();
            logging::install(Some(&settings.bundle), settings.log_level);
            let worker = match forked {
                Ok(keeper::Forked::Worker(link)) => {
                    drop((clients, control, mount));
                    return Ok(worker::run(settings, link));
                }
                Ok(keeper::Forked::Keeper(worker)) => Some(worker),
                Err(error) => {
                    log::warn!(error:%; "cannot fork a worker, will execute one");
                    None
                }
            };
            // Never closed: see `executable::Protected`.
            std::mem::forget(mount);
            if let Some(error) = unprotected {
                executable::warn_of_unprotected(&error);
            }
            Ok(keeper::run(settings, program, clients, control, worker))
        }),
        Invocation::Resume { settings, state, before } => inherited(|| {
            name_process()?;
            logging::install(Some(&settings.bundle), settings.log_level);
            let (state, before) = (sys::inherited::take(state)?, before.map(sys::inherited::take).transpose()?);
            Ok(keeper::resume(settings, state, before))
        }),
        Invocation::Rehearse(settings) => {
            inherited(|| Ok(keeper::rehearse(settings, sys::inherited::take_socket(3)?, sys::inherited::take(4)?)))
        }
        Invocation::Worker(settings) => inherited(|| {
            name_process()?;
            logging::install(Some(&settings.bundle), settings.log_level);
            Ok(worker::run(settings, sys::inherited::take_socket(3)?))
        }),
        Invocation::Upgrade(order) => match commands::upgrade(&order) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => ended("upgrade", Err(error)),
        },
        Invocation::Ps(query) => ended("ps", commands::ps(&query)),
        Invocation::Inspect { id, query } => ended(&format!("inspect {id}"), commands::inspect(&id, &query)),
    }
}

/// Names a process that was executed through a descriptor: older kernels name it after the descriptor's number.
fn name_process() -> std::io::Result<()> {
    Ok(nix::sys::prctl::set_name(c"containerd-shim")?)
}

/// Runs a mode that needs descriptors of the parent process.
fn inherited(run: impl FnOnce() -> std::io::Result<ExitCode>) -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("containerd-shim-x-v2: this command is run by other commands of this program, with sockets: {error}");
        ExitCode::from(EXIT_USAGE)
    })
}

/// Prints why a command failed, with all sources: containerd shows this to its client.
fn ended<E: std::error::Error>(command: &str, result: Result<(), E>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let mut sentence = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        sentence = format!("{sentence}: {error}");
        cause = error.source();
    }
    eprintln!("containerd-shim-x-v2: {command}: {sentence}");
    ExitCode::FAILURE
}
