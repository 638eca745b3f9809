//! `containerd-shim-x-v2`: everything is in the library, so that the fuzz targets reach it.
use std::process::ExitCode;

fn main() -> ExitCode {
    containerd_shim_x::main()
}
