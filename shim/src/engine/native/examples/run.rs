//! Makes a container of a bundle, runs it, and removes it: `run BUNDLE ID`.
//!
//! Plays the part of the shim's keeper, in the foreground.
use std::path::Path;
use std::process::ExitCode;

use x_engine::Host;
use x_engine::plan::Request;

#[path = "../tests/support/keeper.rs"]
mod keeper;

fn main() -> ExitCode {
    match run() {
        Ok(status) => ExitCode::from(status as u8),
        Err(error) => {
            eprintln!("run: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<i32, String> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [bundle, id] = &arguments[..] else { return Err("usage: run BUNDLE ID".to_owned()) };
    let bundle = Path::new(bundle).canonicalize().map_err(|error| error.to_string())?;
    keeper::become_keeper().map_err(|error| error.to_string())?;
    let host = Host::read().map_err(|error| error.to_string())?;
    let streams = keeper::Streams::inherited().map_err(|error| error.to_string())?;
    let made = keeper::create(&keeper::planned(&Request::new(id, &bundle), &host)?, streams)?;
    made.start()?;
    let status = keeper::wait(made.init).map_err(|error| error.to_string())?;
    made.delete()?;
    Ok(status)
}
