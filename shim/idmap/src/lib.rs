//! Id-mapped mounts: user namespaces made for their maps, and mounts that carry one. The shim maps root file systems so, x-manager layers.

mod sys;

pub use sys::{blocking_user_namespace, mount_mapped};
