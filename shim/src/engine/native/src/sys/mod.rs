//! One wrapper per system call that `nix` does not give. The only `unsafe` code of the crate.
//!
//! Invariant: nothing here knows what a container is.
mod bpf;
mod holder;
mod keyring;
mod mount;
mod network;
mod privileges;
mod process;
mod scheduling;
mod socket;
mod terminal;

use std::io;

pub(crate) use bpf::attach_device_program;
pub(crate) use holder::{clear_command_line, ignore_children, owner_of_namespace, wait_for_ever};
pub(crate) use keyring::join_session_keyring;
pub(crate) use mount::{Attributes, FsContext, Tree, move_mount, open_tree, set_attributes, set_extended_attribute};
pub(crate) use network::loopback_up;
pub(crate) use privileges::{
    clear_ambient, drop_bounding, has_filter_flag, last_capability, load_filter, load_filter_with_listener, raise_ambient,
    set_capabilities, set_dumpable, set_groups, set_ids, set_keep_capabilities, set_no_new_privileges,
};
pub(crate) use process::{
    Born, ExitOnUnwind, Forked, clone_into, close_range, current_directory, duplicate, end_with_this_process, execute, exit_now,
    exit_on_signals, fetch, fork, fork_into, keep_open, may_execute, open_pidfd, pid_of, reset_signals, set_domain_name, set_mode,
    set_rlimit, signal, streams, wait_for_exit, write_before,
};
pub(crate) use scheduling::{SchedulerAttributes, set_affinity, set_io_priority, set_memory_policy, set_personality, set_scheduler};
pub(crate) use socket::{receive_descriptor, send_descriptor};
pub(crate) use terminal::{control, open_peer};

/// The result of a system call that returns −1 for an error.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A path without NUL bytes.
fn c_string(bytes: &[u8]) -> io::Result<std::ffi::CString> {
    std::ffi::CString::new(bytes).map_err(|_nul| io::Error::from_raw_os_error(libc::EINVAL))
}
