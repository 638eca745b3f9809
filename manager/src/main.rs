//! `x-manager`: see docs/manager.md for the picture.

use std::process::ExitCode;

mod api;
mod child;
mod chunks;
mod config;
mod content;
mod control;
mod daemon;
mod diff;
mod duration;
mod error;
mod events;
mod filter;
mod forward;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod gate;
mod gc;
mod gc_labels;
mod guarded;
mod host;
mod images;
mod invocation;
mod layers;
mod logging;
mod metrics;
mod mounts;
mod name;
mod notify;
mod parts;
mod pools;
mod preflight;
mod proxy;
mod publish;
mod restart;
mod settings;
mod snapshots;
mod sockets;
mod store;
mod successor;
mod sys;
mod tasks;
mod timestamp;
mod upgrade;
mod upkeep;
mod wire;

use error::{Error, Result};
use invocation::Invocation;

/// Invalid command line.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let invocation = match Invocation::parse(std::env::args_os()) {
        Ok(invocation) => invocation,
        Err(error) => {
            if std::env::args_os().any(|argument| argument == invocation::TAKE_OVER) {
                upgrade::report_failure(&error.to_string());
            }
            eprintln!("x-manager: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match run(invocation) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let user = nix::unistd::geteuid();
            let hint = if user.is_root() { String::new() } else { format!(" (run as user {user}; x-manager needs root)") };
            eprintln!("x-manager: {}{hint}", error.chain());
            ExitCode::FAILURE
        }
    }
}

fn run(invocation: Invocation) -> Result<()> {
    match invocation {
        Invocation::Serve(settings) => {
            if !nix::unistd::geteuid().is_root() {
                return Err(Error::Precondition("cannot serve".to_owned()));
            }
            preflight::check(&settings)?;
            daemon::run(&settings, false)?;
        }
        Invocation::TakeOver(settings) => {
            daemon::run(&settings, true).inspect_err(|error| upgrade::report_failure(&error.chain()))?;
        }
        Invocation::Upgrade(settings, program) => {
            let pid = control::upgrade(&settings.control_address(), program.as_deref())?;
            println!("process {pid} has taken over");
        }
        Invocation::Backup(settings, file) => {
            store::backup(&settings.store(), &file)?;
            println!("{} is a copy of {}", file.display(), settings.store().display());
        }
        Invocation::Publish(settings, event) => publish::publish(&settings.ttrpc_address(), &event.namespace, &event.topic)?,
        Invocation::Check(settings) if !settings.store().exists() => {
            println!("{} does not exist yet; the first start creates it", settings.store().display());
        }
        Invocation::Check(settings) => {
            let mut wrong = store::check(&settings.store())?;
            // twice: a daemon that runs may remove content meanwhile
            let files = || content::check(&settings.content(), store::sizes(&settings.store())?, settings.content_proxy.as_ref());
            if !files()?.is_empty() {
                wrong.extend(files()?);
            }
            if !wrong.is_empty() {
                return Err(Error::Precondition(format!("{} is not sound:\n  {}", settings.store().display(), wrong.join("\n  "))));
            }
            println!("{} is sound", settings.store().display());
        }
        Invocation::Verify(settings) => println!("{}", control::verify(&settings.control_address())?),
        Invocation::ConfigDefault => print!("{}", config::DEFAULT),
        Invocation::ConfigCheck(settings) => {
            preflight::check(&settings)?;
            println!("the configuration can be used; the API would be served at {}", settings.address.display())
        }
        Invocation::Print(text) => print!("{text}"),
    }
    Ok(())
}
