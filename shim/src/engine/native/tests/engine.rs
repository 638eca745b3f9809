//! Containers on this machine's kernel.
//!
//! ```text
//!  engine (tests, threads) ──unshare(pid, mount)──▶ engine as keeper (one thread) ──▶ performers, inits, processes
//!                    ◀────────── a line of JSON each way ──────────▶
//! ```
//! A keeper and everything that it starts die with the test that it was started for. Cgroups are in a folder of the test, and are removed with it.
use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

#[path = "support/added.rs"]
mod added;
#[path = "engine/adversaries.rs"]
mod adversaries;
#[path = "engine/agents.rs"]
mod agents;
#[path = "engine/beside.rs"]
mod beside;
#[path = "engine/bundle.rs"]
mod bundle;
#[path = "engine/checkpoints.rs"]
mod checkpoints;
#[path = "engine/clocks.rs"]
mod clocks;
#[path = "engine/corners.rs"]
mod corners;
#[path = "engine/differences.rs"]
mod differences;
#[path = "engine/entries.rs"]
mod entries;
#[path = "engine/execs.rs"]
mod execs;
#[path = "engine/failures.rs"]
mod failures;
#[path = "engine/freezes.rs"]
mod freezes;
#[path = "engine/hooks.rs"]
mod hooks;
#[path = "engine/idmaps.rs"]
mod idmaps;
#[path = "engine/images.rs"]
mod images;
#[path = "engine/inits.rs"]
mod inits;
#[path = "support/keeper.rs"]
mod keeper;
#[path = "engine/keyrings.rs"]
mod keyrings;
#[path = "engine/labels.rs"]
mod labels;
#[path = "engine/mounts.rs"]
mod mounts;
#[path = "engine/nesting.rs"]
mod nesting;
#[path = "engine/networks.rs"]
mod networks;
#[path = "engine/races.rs"]
mod races;
#[path = "engine/reports.rs"]
mod reports;
#[path = "engine/resources.rs"]
mod resources;
#[path = "engine/roots.rs"]
mod roots;
#[path = "engine/scheduling.rs"]
mod scheduling;
#[path = "engine/server.rs"]
mod server;
#[path = "engine/stage.rs"]
mod stage;
#[path = "engine/users.rs"]
mod users;
#[path = "engine/v2.rs"]
mod v2;
#[path = "engine/verbs.rs"]
mod verbs;

/// Those that look at files of cgroup v1. Where a host has v2 alone, `v2` and `nesting` look at its own.
const OF_V1: &[&str] = &[
    "hooks::hooks_on_the_host_see_the_mounts_and_the_limits",
    "inits::every_cgroup_is_joined_and_removed",
    "inits::a_cgroup_namespace_begins_at_the_container",
    "inits::limits_are_written",
    "inits::a_limit_that_the_kernel_refuses_fails_the_creation",
    "inits::limits_are_changed_or_none_is",
    "reports::execs_go_on_however_often_a_container_is_frozen",
    "reports::nested_cgroups_that_are_frozen_hinder_no_deletion",
    "freezes::what_cannot_be_frozen_is_thawed_again",
    "resources::a_limit_without_its_controller_is_refused",
    "users::cgroups_are_joined_and_shown",
];

type Case = (&'static str, fn());

/// A table of functions, each named by itself.
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        pub(crate) const CASES: &[crate::Case] = &[$((concat!(module_path!(), "::", stringify!($name)), $name)),*];
    };
}
pub(crate) use cases;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == adversaries::HOLD) {
        // In a container, as its program: see the test.
        std::thread::sleep(std::time::Duration::from_secs(1000));
    }
    if std::env::var_os(stage::KEEPER).is_some() {
        return server::serve();
    }
    let arguments = Arguments::from_args();
    let missing = stage::missing().or_else(stage::show_cgroups_to_crun);
    if let Some(missing) = &missing {
        eprintln!("skipped: {missing}");
    }
    let cases = [
        inits::CASES,
        execs::CASES,
        hooks::CASES,
        users::CASES,
        clocks::CASES,
        idmaps::CASES,
        mounts::CASES,
        entries::CASES,
        roots::CASES,
        v2::CASES,
        adversaries::CASES,
        differences::CASES,
        corners::CASES,
        failures::CASES,
        freezes::CASES,
        keyrings::CASES,
        nesting::CASES,
        races::CASES,
        reports::CASES,
        resources::CASES,
        labels::CASES,
        scheduling::CASES,
        agents::CASES,
        networks::CASES,
        checkpoints::CASES,
        images::CASES,
    ]
    .concat();
    let trials = cases.into_iter().map(|(name, run)| {
        let name = name.trim_start_matches("engine::");
        Trial::test(name, move || {
            run();
            Ok(())
        })
        .with_ignored_flag(missing.is_some() || (stage::is_v2_alone() && OF_V1.contains(&name)))
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
