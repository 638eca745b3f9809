//! `containerd-shim-x-v2`: see docs/architecture.md for the picture.
mod handover;
mod journal;
mod journal_body;
mod settings;

fn main() {}
