//! The gRPC API: containerd's services on a unix socket.
//!
//! ```text
//! socket ─▶ connection (serve) ─▶ method by path (route) ─▶ service ─▶ store, tasks, events
//! ```
//! Messages are those of the `containerd-client` crate. **Invariant:** a service checks what it is given before it changes anything.

mod asking;
mod authority;
mod body;
mod call;
mod calls;
mod containers;
mod content;
mod contents;
mod diff;
mod events;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod health;
mod images;
mod introspection;
mod leases;
mod mask;
mod mounts;
mod namespaces;
mod route;
mod sandbox_controller;
mod sandboxes;
mod search;
mod serve;
mod snapshots;
mod stream;
mod streaming;
mod tasks;
mod transfer;
pub(crate) mod uncopied;
mod version;

pub(crate) use calls::{BOUNDS, Calls, Cost};
pub(crate) use containers::Containers;
pub(crate) use content::ContentService;
pub(crate) use diff::DiffService;
pub(crate) use events::Events;
pub(crate) use health::Health;
pub(crate) use images::Images;
pub(crate) use introspection::Introspection;
pub(crate) use leases::Leases;
pub(crate) use mounts::MountService;
pub(crate) use namespaces::Namespaces;
pub(crate) use route::Services;
pub(crate) use sandbox_controller::SandboxController;
pub(crate) use sandboxes::Sandboxes;
pub(crate) use search::Filters;
pub(crate) use serve::{Course, LAST_CALLS, serve};
pub(crate) use snapshots::SnapshotService;
pub(crate) use streaming::Streams;
pub(crate) use tasks::TaskService;
pub(crate) use transfer::TransferService;
pub(crate) use version::Version;
