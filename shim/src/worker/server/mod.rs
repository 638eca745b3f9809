//! The wire: ttrpc messages, containerd's task services and its sandbox service, and the shim's own control service.
//!
//! Owns the translation between messages and the types of [`super::container`]. The keeper owns the connections.
//!
//! **Invariant:** no wire type leaves this folder and [`super::events`].
mod answer;
mod call;
mod sandbox;

pub(super) use answer::{ready, ready_pids, response};
pub(super) use call::{Call, Inbound};
pub(super) use sandbox::{PodCall, ready_of_pod};

/// The names of the task service: v2 up to containerd 1.7, v3 from 2.0 on. They differ in nothing else.
const TASK_SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// The name of the sandbox service.
const SANDBOX_SERVICE: &str = "containerd.runtime.sandbox.v1.Sandbox";
