//! `ps`: the shims of this host.
use std::io::{self, Write};

use serde_json::{Value, json};

use super::survey::{Container, Found, Pod, Shim, processes_json, pss_kib, survey};
use super::upgrade::{report_json, why};
use super::{Error, print_json, table};
use crate::handover::Snapshot;
use crate::invocation::Query;

/// Lists shims and their containers.
pub(crate) fn ps(query: &Query) -> Result<(), Error> {
    let shims = survey(query)?;
    if query.json {
        return print_json(&json!({ "shims": shims.iter().map(to_json).collect::<Vec<_>>() }));
    }
    Ok(io::stdout().lock().write_all(table::lay_out(&to_rows(&shims)).as_bytes())?)
}

fn containers(snapshot: &Snapshot) -> Vec<Container> {
    let reserved = snapshot.reservations.iter().filter(|id| !snapshot.state.iter().any(|(known, _)| known == *id));
    let awaited = reserved.map(|id| Container { id: id.clone(), state: "awaited".to_owned(), pid: None, execs: 0 });
    Container::all(snapshot).chain(awaited).collect()
}

fn to_json(shim: &Shim) -> Value {
    let control = shim.control.to_string_lossy();
    match &shim.found {
        Found::Alive(snapshot) => {
            let (keeper, worker) = processes_json(snapshot);
            let containers = containers(snapshot)
                .into_iter()
                .map(|container| json!({ "id": container.id, "state": container.state, "pid": container.pid, "execs": container.execs }));
            json!({
                "status": "alive",
                "control": control,
                "namespace": snapshot.namespace,
                "group": snapshot.group,
                "keeper": keeper,
                "worker": worker,
                "worker_generation": snapshot.generations,
                "worker_asleep": snapshot.asleep,
                "upgrade": snapshot.upgrade.as_ref().map(report_json),
                "remark": remark_on(snapshot),
                "pod": Pod::of(snapshot).map(|pod| json!({
                    "id": pod.id, "name": pod.name, "namespace": pod.namespace, "state": pod.state, "pid": pod.pid,
                })),
                "containers": containers.collect::<Vec<_>>(),
            })
        }
        Found::Silent(error) => json!({ "status": "silent", "control": control, "error": error.to_string() }),
        Found::Dead => json!({ "status": "dead", "control": control }),
    }
}

fn to_rows(shims: &[Shim]) -> Vec<Vec<String>> {
    let titles = ["NAMESPACE", "GROUP", "KEEPER", "WORKER", "VERSION", "MEMORY", "CONTAINER", "STATE", "PID", "REMARK"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    for shim in shims {
        match &shim.found {
            Found::Alive(snapshot) => rows.extend(rows_of(snapshot)),
            Found::Silent(_) => rows.push(remark(shim, "keeper does not answer")),
            Found::Dead => rows.push(remark(shim, "keeper is dead, its socket is stale")),
        }
    }
    rows
}

/// A row per container, before them one for a pod; the first names the shim.
fn rows_of(snapshot: &Snapshot) -> Vec<Vec<String>> {
    let none = || "-".to_owned();
    let worker = snapshot.worker_pid;
    let parts = [Some(snapshot.keeper_pid), worker].map(|pid| pid.and_then(pss_kib));
    let memory = match parts {
        [None, _] => none(),
        [Some(keeper), worker] => format!("{} KiB", keeper + worker.unwrap_or(0)),
    };
    // They differ only after an upgrade of one part.
    let version = if worker.is_none() || snapshot.worker_build == snapshot.keeper_build {
        snapshot.keeper_build.clone()
    } else {
        format!("{} (worker {})", snapshot.keeper_build, snapshot.worker_build)
    };
    let shim = [
        snapshot.namespace.clone(),
        snapshot.group.clone(),
        snapshot.keeper_pid.to_string(),
        worker.map_or_else(|| if snapshot.asleep { "asleep".to_owned() } else { none() }, |pid| pid.to_string()),
        version,
        memory,
    ];
    let pod = Pod::of(snapshot).map(|pod| (format!("pod {}/{}", pod.namespace, pod.name), pod.state, pod.pid));
    let containers = containers(snapshot).into_iter().map(|container| (container.id, container.state, container.pid));
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (name, state, pid) in pod.into_iter().chain(containers) {
        let mut row = if rows.is_empty() { shim.to_vec() } else { vec![String::new(); shim.len()] };
        row.extend([name, state, pid.map_or_else(none, |pid| pid.to_string())]);
        rows.push(row);
    }
    if rows.is_empty() {
        rows.push(shim.into_iter().chain([none(), none(), none()]).collect());
    }
    rows[0].extend(remark_on(snapshot));
    rows
}

/// The condition that needs an operator's attention.
fn remark_on(snapshot: &Snapshot) -> Option<String> {
    let mut remarks: Vec<String> = snapshot.upgrade.as_ref().and_then(why).into_iter().collect();
    if snapshot.fruitless > 3 {
        remarks.push(format!("worker keeps crashing ({} in a row): {}", snapshot.fruitless, snapshot.last_end));
    }
    remarks.extend(snapshot.withheld.iter().map(|exit| format!("every worker crashes at the {exit}")));
    (!remarks.is_empty()).then(|| remarks.join("; "))
}

fn remark(shim: &Shim, remark: &str) -> Vec<String> {
    vec!["?".into(), "?".into(), "-".into(), "-".into(), "-".into(), "-".into(), format!("{remark}: {}", shim.control.display())]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        Snapshot {
            namespace: "n1".into(),
            group: "g1".into(),
            keeper_pid: 1,
            keeper_build: "0.1.0".into(),
            state: vec![
                ("c1".into(), br#"{"init": {"phase": "running", "pid": 42}}"#.to_vec()),
                ("c2".into(), br#"{"init": {"phase": {"exited": {"status": 3, "at_nanos": 1}}, "pid": 43}}"#.to_vec()),
            ],
            reservations: vec!["c2".into(), "c3".into()],
            ..Snapshot::default()
        }
    }

    #[test]
    fn a_pod_has_a_row_for_each_container_and_is_named_once() {
        let rows = rows_of(&snapshot());
        let tails: Vec<&[String]> = rows.iter().map(|row| &row[6..]).collect();
        assert_eq!(tails, [["c1", "running", "42"], ["c2", "exited", "43"], ["c3", "awaited", "-"]]);
        let heads: Vec<&[String]> = rows.iter().map(|row| &row[..4]).collect();
        assert_eq!(heads, [["n1", "g1", "1", "-"], ["", "", "", ""], ["", "", "", ""]]);
        assert_eq!(rows_of(&Snapshot::default())[0][6..], ["-", "-", "-"]);
    }

    #[test]
    fn a_pod_without_a_pause_process_has_the_first_row() {
        let mut snapshot = snapshot();
        let record = br#"{"id": "p1", "phase": {"ready": {"pid": 7}}, "config": {"name": "web", "namespace": "default"}}"#;
        snapshot.state.push(("@pod".into(), record.to_vec()));
        let rows = rows_of(&snapshot);
        assert_eq!(rows[0][6..], ["pod default/web", "ready", "7"]);
        assert_eq!((rows[0][0].as_str(), rows[1][0].as_str(), rows.len()), ("n1", "", 4));
    }

    #[test]
    fn dead_and_silent_keepers_are_listed() {
        let path = std::path::PathBuf::from("/run/x/ab.sock");
        let dead = Shim { control: path.clone(), found: Found::Dead };
        let silent = Shim { control: path.clone(), found: Found::Silent(crate::control::Error::Silent { path }) };
        assert_eq!(to_json(&dead), json!({ "status": "dead", "control": "/run/x/ab.sock" }));
        assert_eq!(to_json(&silent)["status"], "silent");
        let text = table::lay_out(&to_rows(&[dead, silent]));
        assert!(text.contains("stale: /run/x/ab.sock") && text.contains("does not answer: /run/x/ab.sock"), "{text}");
    }
}
