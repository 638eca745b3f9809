//! The shim without a daemon: its commands, its socket, its events, and whatever else can be done to it. Needs root.
//!
//! `X_SHIM` names the shim's binary, `X_RUNTIME_TYPE` its runtime type; see `shim_tests::suite`.

#[path = "protocol/bad_input.rs"]
mod bad_input;

use std::path::Path;
use std::process::ExitCode;

use shim_tests::direct::{self, Case};
use shim_tests::direct_cases;

fn main() -> ExitCode {
    let programs = Path::new(env!("CARGO_BIN_EXE_instant-runtime")).parent().expect("a file is in a folder");
    direct::main(&cases(), programs)
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(direct_cases![bad_input:
        a_bundle_that_cannot_be_run_is_refused_with_a_sentence,
    ]);
    cases
}
