//! Plans the namespaces that the containers of a pod share.
//!
//! They are made by the process that is to hold them: the containers' parent itself, or a process that does nothing else (a holder) where there is a pid
//! or a user namespace, which a process cannot enter and leave again.
use std::collections::{BTreeMap, HashMap};

use minicbor::{Decode, Encode};
use oci_spec::runtime::LinuxSeccomp;

use super::{Filter, Kind, VERSION, sysctl};
use crate::{Refused, seccomp};

/// The namespaces of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Pod {
    #[n(0)]
    pub version: u16,
    /// The path of its network namespace; the host's without.
    #[n(1)]
    pub network: Option<String>,
    /// Its user namespace is the owner of its network namespace.
    #[n(2)]
    pub user: bool,
    /// As the next two: it has one of its own.
    #[n(3)]
    pub pid: bool,
    #[n(4)]
    pub ipc: bool,
    #[n(5)]
    pub uts: bool,
    #[n(6)]
    pub hostname: Option<String>,
    /// Paths below `/proc/sys`, with values.
    #[n(7)]
    pub sysctls: Vec<(String, String)>,
    /// Of a holder.
    #[n(8)]
    pub filter: Option<Filter>,
    /// The SELinux label of a holder. A performer of an earlier build leaves it out.
    #[n(9)]
    pub label: Option<String>,
}

impl Pod {
    /// Whether only a process of its own can hold its namespaces.
    #[must_use]
    pub fn needs_holder(&self) -> bool {
        self.user || self.pid
    }
}

/// Completes a plan: its settings, and the filter of a holder.
///
/// Errors: a setting that is none, or that would change the host.
pub fn pod(pod: Pod, sysctls: &BTreeMap<String, String>) -> Result<Pod, Refused> {
    let has = |kind: Kind| match kind {
        Kind::Network => pod.network.is_some(),
        Kind::Ipc => pod.ipc,
        Kind::Uts => pod.uts,
        Kind::User => pod.user,
        _ => false,
    };
    let wanted: HashMap<String, String> = sysctls.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    let sysctls = sysctl::plan(Some(&wanted), has)?;
    let filter = pod.needs_holder().then(filter).transpose()?;
    Ok(Pod { version: VERSION, sysctls, filter, ..pod })
}

/// A holder makes few calls. No profile that a client can name is narrower.
fn filter() -> Result<Filter, Refused> {
    let profile = serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{ "names": CALLS, "action": "SCMP_ACT_ALLOW" }],
    });
    let profile: LinuxSeccomp = serde_json::from_value(profile).map_err(|source| Refused::Json { source })?;
    seccomp::compile_cached(&profile, None)
}

/// The last two: what is between its filter and its rest.
const CALLS: [&str; 8] = ["ppoll", "rt_sigreturn", "restart_syscall", "exit", "exit_group", "close_range", "read", "write"];

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(own: Pod, name: &str) -> Result<Pod, Refused> {
        pod(own, &BTreeMap::from([(name.to_owned(), "1".to_owned())]))
    }

    #[test]
    fn a_setting_of_a_namespace_that_the_pod_does_not_have_is_refused() {
        let own = || Pod { network: Some("/run/netns/x".to_owned()), ..Pod::default() };
        let planned_one = planned(own(), "net.ipv4.ip_forward").expect("of its own");
        assert_eq!(planned_one.sysctls, [("net/ipv4/ip_forward".to_owned(), "1".to_owned())]);
        for (pod, name) in [
            (own(), "kernel.shmmax"),
            (Pod::default(), "net.ipv4.ip_forward"),
            (own(), "vm.swappiness"),
            (Pod { uts: true, ..own() }, "kernel.hostname"),
            (own(), "net/../kernel/core_pattern"),
        ] {
            assert!(matches!(planned(pod, name), Err(Refused::Invalid { .. })), "{name}");
        }
    }

    #[test]
    fn a_holder_has_a_filter_and_the_parent_of_containers_has_none() {
        for (own, has_filter) in [
            (Pod::default(), false),
            (Pod { ipc: true, uts: true, ..Pod::default() }, false),
            (Pod { pid: true, ..Pod::default() }, true),
            (Pod { user: true, ..Pod::default() }, true),
        ] {
            assert_eq!(pod(own, &BTreeMap::new()).expect("planned").filter.is_some(), has_filter);
        }
    }
}
