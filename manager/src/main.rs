//! `x-manager`: see docs/manager.md for the picture.

use std::process::ExitCode;

mod api;
mod daemon;
mod error;
mod events;
mod filter;
mod forward;
mod guarded;
mod invocation;
mod logging;
mod manager;
mod name;
mod settings;
mod sockets;
mod store;
mod sys;
mod tasks;
mod timestamp;
mod wire;

use invocation::Invocation;

/// The command line makes no sense.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let invocation = match Invocation::parse(std::env::args_os().skip(1)) {
        Ok(invocation) => invocation,
        Err(error) => {
            eprintln!("x-manager: {error}\n\n{}", invocation::HELP);
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let ended = match invocation {
        Invocation::Serve(settings) => daemon::run(settings),
        Invocation::Version => {
            println!("x-manager {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Invocation::Help => {
            print!("{}", invocation::HELP);
            Ok(())
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("x-manager: {}", error.chain());
            ExitCode::FAILURE
        }
    }
}
