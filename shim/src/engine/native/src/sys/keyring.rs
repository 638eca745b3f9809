//! The session keyring.
#![allow(unsafe_code)]
use std::io;

use super::{c_string, check};

/// Joins the session keyring `name`, which is made if there is none, and lets processes of the same user find it.
///
/// ENOSYS means a kernel without keyrings.
pub(crate) fn join_session_keyring(name: &str) -> io::Result<()> {
    let name = c_string(name.as_bytes())?;
    // SAFETY: a valid string for the time of the call.
    let keyring = check(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name.as_ptr()) })?;
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_keyctl, SETPERM, keyring, POSSESSOR_ALL | USER_VIEW_READ_SEARCH_LINK) })?;
    Ok(())
}

const JOIN_SESSION_KEYRING: libc::c_int = 1;
const SETPERM: libc::c_int = 5;
const POSSESSOR_ALL: u32 = 0x3f00_0000;
/// What the kernel gives by default (view, read, link), and search: a later join by name needs it.
const USER_VIEW_READ_SEARCH_LINK: u32 = 0x001b_0000;
