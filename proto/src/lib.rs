//! Messages of containerd's shim protocol that no crate on the registry gives.
//!
//! Written from the facts of the protocol (field names, numbers and types); everything else comes from `containerd-shim-protos`.
//! The bindings are small enough to be handwritten: see [`runtime_options`], [`linux_runc`] and [`pod`].
pub mod linux_runc;
pub mod pod;
pub mod runtime_options;
