//! Tells the program which build it is: its version and, where `X_REVISION` says so, the commit.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=X_REVISION");
    let version = env::var("CARGO_PKG_VERSION").expect("cargo sets it");
    let build = match env::var("X_REVISION") {
        Ok(revision) if !revision.is_empty() => format!("{version}+{revision}"),
        _ => version,
    };
    println!("cargo::rustc-env=X_BUILD={build}");
}
