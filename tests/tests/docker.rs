//! Docker 26 on top of containerd, with the shim on trial as its runtime.

fn main() {}
