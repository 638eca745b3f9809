//! One wrapper per system call that neither `std` nor `nix` gives safely.
//!
//! **Invariant:** `unsafe` lives here only; every function here has a safe signature and gives an `io::Result`.
pub(crate) mod core_scheduling;
pub(crate) mod descriptors;
pub(crate) mod exec;
pub(crate) mod fork;
pub(crate) mod inherited;
pub(crate) mod memory;
pub(crate) mod mount;
pub(crate) mod process;
pub(crate) mod ready;
pub(crate) mod signals;
pub(crate) mod socket;
pub(crate) mod spawn;
pub(crate) mod terminal;
