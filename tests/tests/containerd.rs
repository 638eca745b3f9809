//! The shim under stock containerd 1.6, 1.7 and 2.1, with runc and crun. Needs root.
//!
//! `X_SHIM` names the shim's binary, `X_RUNTIME_TYPE` its runtime type; see `shim_tests::suite`.

#[path = "containerd/lifecycle.rs"]
mod lifecycle;

use std::path::Path;
use std::process::ExitCode;

use shim_tests::cases;
use shim_tests::runner::{self, Scope};

fn main() -> ExitCode {
    let programs = Path::new(env!("CARGO_BIN_EXE_gated-runtime")).parent().expect("a file is in a folder");
    let cases = cases![lifecycle,
        Scope::Full =>
            the_exit_code_is_the_same_in_wait_state_delete_and_event,
            events_come_in_order_and_once,
    ];
    runner::main(&cases, programs)
}
