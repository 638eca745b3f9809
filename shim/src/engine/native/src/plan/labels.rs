//! Plans what the kernel's security modules hold a process and its mounts to: a profile of AppArmor, labels of SELinux.
//!
//! **Invariant:** where a module is not active, what needs it is refused: a container without its confinement is never made in silence.
use super::{Mount, Source};
use crate::{Host, Refused};

/// A profile of AppArmor; an empty name is none.
pub(super) fn profile(name: Option<&str>, field: &str, host: &Host) -> Result<Option<String>, Refused> {
    let field = format!("{field}.apparmorProfile");
    checked(name, &field, host.has_apparmor, "unable to apply apparmor profile: AppArmor is not enabled on this host")
}

/// A label of SELinux; an empty one is none.
pub(super) fn label(label: Option<&str>, field: &str, host: &Host) -> Result<Option<String>, Refused> {
    checked(label, field, host.has_selinux, "selinux label is specified in config, but selinux is disabled or not supported")
}

fn checked(text: Option<&str>, field: &str, is_active: bool, why_not: &str) -> Result<Option<String>, Refused> {
    match text {
        None | Some("") => Ok(None),
        Some(_) if !is_active => Err(Refused::invalid(field, why_not)),
        Some(text) if text.contains(['\0', '\n']) => Err(Refused::invalid(field, "contains a line break or a NUL byte")),
        Some(text) => Ok(Some(text.to_owned())),
    }
}

/// Gives every new file system the label, but for those whose files have labels of their own, and for message queues: these get it once they are mounted.
pub(super) fn label_mounts(mounts: &mut [Mount], label: Option<&str>) {
    let Some(label) = label else { return };
    for mount in mounts {
        if let Source::New { kind, parameters, .. } = &mut mount.source
            && !matches!(kind.as_str(), "proc" | "sysfs" | "cgroup" | "cgroup2" | "mqueue")
        {
            parameters.push(("context".to_owned(), Some(label.to_owned())));
        }
    }
}
