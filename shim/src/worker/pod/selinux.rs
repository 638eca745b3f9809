//! SELinux labels of a pod, where SELinux is active: those of the host's policy for containers, with what the client asks for in place of their parts.
use std::fs;
use std::path::Path;

/// What a client asks for; the policy's where it is absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Asked<'a> {
    pub(super) user: Option<&'a str>,
    pub(super) role: Option<&'a str>,
    pub(super) kind: Option<&'a str>,
    pub(super) level: Option<&'a str>,
}

/// The label of a process of the pod. Absent if nothing is asked for, as where the host has no SELinux.
///
/// Errors: why there is no such label.
pub(super) fn blocking_label_of_process(asked: Asked<'_>) -> Result<Option<String>, String> {
    if asked == Asked::default() || !blocking_is_active() {
        return Ok(None);
    }
    let label = blocking_contexts().and_then(|contexts| label(&contexts, "process", asked));
    label.map(Some).ok_or_else(|| "the policy of the host has no label for containers (contexts/lxc_contexts)".to_owned())
}

/// The label of a file system for the containers of the pod.
pub(super) fn blocking_label_of_files(level: Option<&str>) -> Option<String> {
    // As the levels of processes: what is of another level cannot be used. The other parts are those of files.
    blocking_contexts().filter(|_| blocking_is_active()).and_then(|contexts| label(&contexts, "file", Asked { level, ..Asked::default() }))
}

fn blocking_is_active() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

fn blocking_contexts() -> Option<String> {
    let settings = fs::read_to_string("/etc/selinux/config").unwrap_or_default();
    let policy = settings.lines().find_map(|line| line.trim().strip_prefix("SELINUXTYPE=")).unwrap_or("targeted").trim();
    fs::read_to_string(Path::new("/etc/selinux").join(policy).join("contexts/lxc_contexts")).ok()
}

/// Of a line like `file = "system_u:object_r:container_file_t:s0"`, with what is asked for in place of its own.
fn label(contexts: &str, of: &str, asked: Asked<'_>) -> Option<String> {
    let value = contexts.lines().find_map(|line| line.trim().strip_prefix(of)?.trim_start().strip_prefix('='))?;
    let label = value.trim().trim_matches('"');
    let mut parts = label.splitn(4, ':');
    let (user, role, kind) = (parts.next()?, parts.next()?, parts.next()?);
    let level = asked.level.or_else(|| parts.next()).filter(|level| !level.is_empty())?;
    Some(format!("{}:{}:{}:{level}", asked.user.unwrap_or(user), asked.role.unwrap_or(role), asked.kind.unwrap_or(kind)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXTS: &str = "process = \"system_u:system_r:container_t:s0\"\nfile = \"system_u:object_r:container_file_t:s0\"\n";

    #[test]
    fn a_label_is_the_policys_with_what_is_asked_for() {
        let level = Asked { level: Some("s0:c1,c2"), ..Asked::default() };
        let all = Asked { user: Some("u"), role: Some("r"), kind: Some("t"), ..level };
        for (of, asked, expected) in [
            ("file", level, Some("system_u:object_r:container_file_t:s0:c1,c2")),
            ("file", Asked::default(), Some("system_u:object_r:container_file_t:s0")),
            ("process", level, Some("system_u:system_r:container_t:s0:c1,c2")),
            ("process", Asked { kind: Some("spc_t"), ..Asked::default() }, Some("system_u:system_r:spc_t:s0")),
            ("process", all, Some("u:r:t:s0:c1,c2")),
            ("other", all, None),
        ] {
            assert_eq!(label(CONTEXTS, of, asked).as_deref(), expected, "{of} {asked:?}");
        }
        assert_eq!(label("file = \"x\"", "file", all), None);
    }

    #[test]
    fn a_pod_that_asks_for_no_label_gets_none() {
        assert_eq!(blocking_label_of_process(Asked::default()), Ok(None));
    }
}
