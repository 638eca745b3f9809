//! `containerd-shim-x-v2`: see docs/architecture.md for the picture.
mod cgroup;
mod engine;
mod handover;
mod journal;
mod logging;
mod options;
mod rootfs;
mod settings;
mod stdio_uri;

fn main() {}
