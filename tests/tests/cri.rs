//! Pods: stock containerd with its CRI plugin, and the shim under test as a runtime handler, configured as docs/kubernetes.md says, with pause
//! containers and with the shim in their place. Needs root, and CNI plugins for the latter.
//!
//! `X_SHIM` names the shim's binary, `X_RUNTIME_TYPE` its runtime type; see `shim_tests::suite`. `X_SHIM_FAULTY` names a shim for upgrades.

#[path = "cri/churn.rs"]
mod churn;
#[path = "cri/ends.rs"]
mod ends;
#[path = "cri/half.rs"]
mod half;
#[path = "cri/namespaces.rs"]
mod namespaces;
#[path = "cri/places.rs"]
mod places;
#[path = "cri/pods.rs"]
mod pods;
#[path = "cri/sandboxes.rs"]
mod sandboxes;
#[path = "cri/upgrades.rs"]
mod upgrades;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use shim_tests::cases;
use shim_tests::cri::Sandboxer;
use shim_tests::runner::{self, Case, Scope};

fn main() -> ExitCode {
    let programs = Path::new(env!("CARGO_BIN_EXE_gated-runtime")).parent().expect("a file is in a folder");
    let cases = [pause_cases(), keeper_cases(), shared_cases(), direct_cases()].concat();
    let cases: Vec<_> = cases.into_iter().map(|case| case.within(Duration::from_secs(180))).collect();
    runner::main(&cases, &[], programs)
}

/// Lists cases that are told what holds the namespaces of their pods: `cases_with![prefix, Sandboxer::Pause, module, Scope::Full => a, b; …]`.
macro_rules! cases_with {
    ($prefix:literal, $sandboxer:expr, $module:ident, $($scope:expr => $($name:ident),+ $(,)?);+ $(;)?) => {
        vec![$($(Case::new(
            concat!($prefix, "::", stringify!($name)),
            $scope,
            |cx| Box::pin($module::$name(cx, $sandboxer)),
        )),+),+]
    };
}

/// With pause containers.
fn pause_cases() -> Vec<Case> {
    cases_with!["pods", Sandboxer::Pause, pods,
        Scope::Full =>
            a_container_of_a_pod_runs_and_reports_exec_stats_and_logs,
            exit_codes_and_reasons_reach_the_kubelet,
            all_containers_of_a_pod_share_one_shim,
            a_pod_outlives_containerd,
            a_probe_that_takes_too_long_is_answered_and_leaves_no_descendant,
            what_a_probe_has_left_behind_outlives_it,
            an_exit_while_containerd_is_down_is_known_afterwards;
        Scope::Daemons =>
            the_cgroup_driver_of_the_readme_is_asked_for,
            a_probe_whose_output_a_child_holds_ends_with_the_drain_time_out;
    ]
}

/// The same without: the keeper is the pod.
fn keeper_cases() -> Vec<Case> {
    cases_with!["keepers", Sandboxer::Shim, pods,
        Scope::Newest =>
            a_container_of_a_pod_runs_and_reports_exec_stats_and_logs,
            exit_codes_and_reasons_reach_the_kubelet,
            a_pod_outlives_containerd;
        Scope::Once =>
            all_containers_of_a_pod_share_one_shim,
            a_probe_that_takes_too_long_is_answered_and_leaves_no_descendant,
            what_a_probe_has_left_behind_outlives_it,
            an_exit_while_containerd_is_down_is_known_afterwards,
            the_cgroup_driver_of_the_readme_is_asked_for,
            a_probe_whose_output_a_child_holds_ends_with_the_drain_time_out;
    ]
}

/// Both, where a pause container shows what is expected.
fn shared_cases() -> Vec<Case> {
    let pause = cases_with!["namespaces_with_pause", Sandboxer::Pause, namespaces,
        Scope::Once =>
            containers_of_a_pod_share_its_network_ipc_and_host_name,
            a_pod_with_one_pid_namespace_reaps_orphans,
            a_pod_shares_the_pids_and_the_ipc_of_the_host,
            a_container_joins_the_pids_of_another,
            a_pod_has_a_user_namespace;
    ];
    let keepers = cases_with!["namespaces", Sandboxer::Shim, namespaces,
        Scope::Newest =>
            containers_of_a_pod_share_its_network_ipc_and_host_name;
        Scope::Once =>
            a_pod_with_one_pid_namespace_reaps_orphans,
            a_pod_shares_the_pids_and_the_ipc_of_the_host,
            a_container_joins_the_pids_of_another,
            a_pod_has_a_user_namespace;
    ];
    [pause, keepers].concat()
}

/// Of the shim as the pod alone.
fn direct_cases() -> Vec<Case> {
    [
        cases![namespaces, Scope::Once =>
            a_pod_is_one_process_besides_its_containers,
            a_shared_pid_namespace_is_refused_in_a_pod_without_one,
            the_process_that_holds_a_pid_namespace_shows_its_containers_nothing,
            a_pod_on_the_hosts_network_is_for_later_versions,
        ],
        cases![places, Scope::Once =>
            what_a_keeper_starts_is_in_the_namespaces_of_the_host,
            a_stopped_pod_leaves_its_network_to_containerd,
            a_pod_has_the_statistics_of_its_cgroup_before_its_first_container,
        ],
        cases![ends,
            Scope::Newest => a_killed_keeper_ends_its_pod_once;
            Scope::Once =>
                a_killed_worker_is_not_noticed,
                a_killed_holder_ends_the_readiness_of_its_pod,
                a_keeper_killed_while_containerd_is_down_leaves_nothing,
                a_pod_is_stopped_and_removed_twice,
                a_pod_is_removed_without_being_stopped,
                no_container_is_made_in_a_pod_that_has_ended,
                the_delete_command_ends_a_pod_whose_bundle_has_no_configuration,
        ],
        cases![half, Scope::Once =>
            a_pod_that_cannot_be_started_leaves_nothing,
            a_pod_whose_network_fails_leaves_nothing,
            containerd_killed_while_it_makes_pods_leaves_nothing,
        ],
        cases![upgrades, Scope::Once => pods_are_upgraded_downgraded_and_rolled_back, a_hibernating_worker_is_not_woken_by_the_status_of_its_pod],
        cases![sandboxes, Scope::Once =>
            a_pod_on_the_hosts_network_runs_containers,
            a_sandbox_that_is_never_started_is_shut_down,
        ],
        cases![churn, Scope::Once => many_pods_are_made_and_removed_at_once],
    ]
    .concat()
}
