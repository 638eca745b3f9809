//! System calls that neither `std` nor `nix` gives safely.
//!
//! **Invariant:** `unsafe` is used here only; every function here has a safe signature.

pub(crate) mod children;
pub(crate) mod descriptors;
pub(crate) mod memory;
pub(crate) mod quota;
pub(crate) mod writeback;
