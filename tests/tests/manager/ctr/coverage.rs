//! What clients have and no row tests, with its reason; everything else that they list in their help must be in a row.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use shim_tests::suite::Suite;

/// Groups of subcommands.
const GROUPS: &[&str] = &[
    "plugins",
    "containers",
    "content",
    "events",
    "images",
    "leases",
    "namespaces",
    "pprof",
    "snapshots",
    "tasks",
    "oci",
    "sandboxes",
    "shim",
];

/// Group, its subcommands, and why no row tests them.
const OTHERS: &[(&str, &[&str], &str)] = &[
    (
        "pprof",
        &["block", "goroutines", "heap", "profile", "threadcreate", "trace"],
        "profiles of Go's runtime, from containerd's debug socket; x-manager is no Go program: its metrics are in operations.md, and `perf` works on it",
    ),
    (
        "containers",
        &["checkpoint", "restore"],
        "an image that holds a checkpoint: x-manager writes checkpoints to folders alone (`image_path`), and says so; \
         without `--task`, `containers checkpoint` works",
    ),
    ("oci", &["spec"], "prints a specification, without a daemon"),
    ("shim", &["delete", "exec", "start", "state", "shutdown", "pprof"], "talks to a shim, past the daemon"),
];

/// Why a row is not tested with a version.
///
/// Errors: there is no reason.
pub(super) fn why_not(row: &str, suite: Suite) -> Result<&'static str> {
    Ok(match (row, suite) {
        // it expects the digest from before
        ("content edit", Suite::Bookworm) => "fails, as with containerd",
        ("images import, tag, push, export, pull by the daemon", Suite::Bookworm) => "does all by itself",
        ("run --rootfs --sandbox", Suite::Bookworm) => "no such option",
        _ => {
            let first = row.split(',').next().unwrap_or_default();
            let output = Command::new(suite.program("ctr")).args(first.split(' ')).arg("--help").output()?;
            let text = [output.stdout, output.stderr].concat();
            ensure!(String::from_utf8_lossy(&text).contains("No help topic"), "ctr {} has {first}", suite.version());
            "no such command"
        }
    })
}

/// Checks that each subcommand of each version is in a row, or has its reason.
pub(super) fn is_complete(rows: &[&str]) -> Result<()> {
    let mut missing = Vec::new();
    for suite in Suite::ALL {
        for group in GROUPS {
            let output = Command::new(suite.program("ctr")).args([*group, "--help"]).output()?;
            let help = String::from_utf8_lossy(&output.stdout);
            // a group that it lacks is answered otherwise, and one without subcommands has no such heading
            let Some((_, commands)) = help.split_once("COMMANDS:\n") else { continue };
            for line in commands.lines().take_while(|line| !line.is_empty()) {
                let names: Vec<_> = names(line).context("an empty line")?;
                if !names.contains(&"help") && !is_named(group, &names, rows) {
                    missing.push(format!("{group} {}, {}", names[0], suite.version()));
                }
            }
        }
    }
    ensure!(missing.is_empty(), "neither in a row nor with a reason: {missing:#?}");
    Ok(())
}

/// The names of a subcommand in a line of the help: `   list, ls   what it does`.
fn names(line: &str) -> Option<Vec<&str>> {
    let words = line.trim().split("  ").next()?;
    Some(words.split(", ").collect())
}

fn is_named(group: &str, names: &[&str], rows: &[&str]) -> bool {
    let in_row = rows.iter().any(|row| {
        let words: Vec<_> = row.split([' ', ',', ';']).collect();
        words.contains(&group) && names.iter().any(|name| words.contains(name))
    });
    in_row || OTHERS.iter().any(|(other, known, _)| *other == group && names.iter().any(|name| known.contains(name)))
}

/// The part of the document that lists them.
pub(super) fn append_others(document: &mut String) {
    document.push_str("\n## What no row tests\n\nThe test fails when a client's help lists a subcommand that is neither above nor here.\n\n| | why |\n| --- | --- |\n");
    for (group, commands, reason) in OTHERS {
        document.push_str(&format!("| `{group} {}` | {reason} |\n", commands.join(", ")));
    }
}
