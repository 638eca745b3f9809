//! `containerd-shim-x-v2`: see docs/architecture.md for the picture.
mod frame;
mod handover;
mod journal;
mod journal_body;
mod keeper;
mod settings;
mod sys;
mod cgroup;
mod engine;
mod logging;
mod options;
mod rootfs;
mod stdio_uri;

fn main() {}
