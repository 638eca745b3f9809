//! `containerd-shim-x-v2`: see docs/architecture.md for the picture.
mod cgroup;
mod engine;
mod frame;
mod handover;
mod journal;
mod journal_body;
mod keeper;
mod logging;
mod mountinfo;
mod options;
mod rootfs;
mod settings;
mod stdio_uri;
mod sys;
mod worker;

fn main() {}
