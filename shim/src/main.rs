//! `containerd-shim-x-v2`: everything is in the library, so that the fuzz targets reach it.
#![cfg_attr(target_env = "gnu", no_main)]

#[cfg(target_env = "gnu")]
#[path = "sys/entry.rs"]
mod entry;

#[cfg(not(target_env = "gnu"))]
fn main() -> std::process::ExitCode {
    containerd_shim_x::main()
}
