//! Plans kernel settings: only those of namespaces that the container does not share with the runtime.
use std::collections::HashMap;

use super::Kind;
use crate::Refused;

const OF_IPC: [&str; 11] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.msg_next_id",
    "kernel.sem",
    "kernel.sem_next_id",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_next_id",
    "kernel.shm_rmid_forced",
];

/// Paths below `/proc/sys` and values, sorted. `has`: whether the container has a namespace of a kind.
pub(super) fn plan(wanted: Option<&HashMap<String, String>>, has: impl Fn(Kind) -> bool) -> Result<Vec<(String, String)>, Refused> {
    let mut planned = Vec::new();
    for (key, value) in wanted.into_iter().flatten() {
        let field = format!("linux.sysctl.{key}");
        let parts = parts(key).ok_or_else(|| Refused::invalid(&field, "not the name of a setting"))?;
        let name = parts.join(".");
        let needed = match name.as_str() {
            name if OF_IPC.contains(&name) || name.starts_with("fs.mqueue.") => Kind::Ipc,
            name if name.starts_with("net.") => Kind::Network,
            name if name.starts_with("user.") => Kind::User,
            "kernel.domainname" => Kind::Uts,
            "kernel.hostname" => return Err(Refused::invalid(field, "set hostname instead")),
            _ => return Err(Refused::invalid(field, "is not a setting of a namespace")),
        };
        if !has(needed) {
            return Err(Refused::invalid(field, format!("needs a {needed:?} namespace of the container's own").to_lowercase()));
        }
        if value.contains('\0') {
            return Err(Refused::invalid(field, "contains a NUL byte"));
        }
        planned.push((parts.join("/"), value.clone()));
    }
    planned.sort();
    Ok(planned)
}

/// The folders and the file. The first separator decides: with `/` first, dots belong to names (`net/ipv4/conf/eth0.1/forwarding`), and in the other
/// form a `/` stands for such a dot.
fn parts(key: &str) -> Option<Vec<String>> {
    let separator = key.find(['.', '/']).map(|at| key.as_bytes()[at])?;
    let parts: Vec<String> = if separator == b'/' {
        key.split('/').map(str::to_owned).collect()
    } else {
        key.split('.').map(|part| part.replace('/', ".")).collect()
    };
    let is_valid = |part: &String| {
        !part.is_empty() && part != "." && part != ".." && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.:@".contains(&byte))
    };
    parts.iter().all(is_valid).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(key: &str, has: &[Kind]) -> Option<String> {
        let wanted = HashMap::from([(key.to_owned(), "1".to_owned())]);
        plan(Some(&wanted), |kind| has.contains(&kind)).ok().map(|planned| planned[0].0.clone())
    }

    #[test]
    fn only_settings_of_own_namespaces_are_accepted() {
        assert_eq!(planned("net.ipv4.ip_forward", &[Kind::Network]).as_deref(), Some("net/ipv4/ip_forward"));
        assert_eq!(planned("net.ipv4.ip_forward", &[Kind::Ipc]), None);
        assert_eq!(planned("kernel.shmmax", &[Kind::Ipc]).as_deref(), Some("kernel/shmmax"));
        assert_eq!(planned("fs.mqueue.msg_max", &[Kind::Ipc]).as_deref(), Some("fs/mqueue/msg_max"));
        assert_eq!(planned("kernel.domainname", &[Kind::Uts]).as_deref(), Some("kernel/domainname"));
        assert_eq!(planned("kernel.hostname", &[Kind::Uts]), None);
        assert_eq!(planned("user.max_user_namespaces", &[Kind::User]).as_deref(), Some("user/max_user_namespaces"));
        assert_eq!(planned("user.max_user_namespaces", &[Kind::Uts]), None);
        assert_eq!(planned("kernel.core_pattern", &[Kind::Ipc, Kind::Network, Kind::Uts]), None);
        assert_eq!(planned("vm.swappiness", &[Kind::Ipc]), None);
    }

    #[test]
    fn both_separators_lead_to_the_same_file() {
        assert_eq!(planned("net.ipv4.conf.eth0/1.forwarding", &[Kind::Network]).as_deref(), Some("net/ipv4/conf/eth0.1/forwarding"));
        assert_eq!(planned("net/ipv4/conf/eth0.1/forwarding", &[Kind::Network]).as_deref(), Some("net/ipv4/conf/eth0.1/forwarding"));
    }

    #[test]
    fn a_name_cannot_lead_elsewhere() {
        for key in ["net/../kernel/core_pattern", "net..x", "net.x\n", "net.+", "net/", "/net", "net.ipv4.//..", "net", "net.a b"] {
            assert_eq!(planned(key, &[Kind::Network]), None, "{key:?}");
        }
    }
}
