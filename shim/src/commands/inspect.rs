//! `inspect`: everything that shim and journal have about a container.
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::survey::{Found, phase_of, processes_json, survey};
use super::upgrade::report_json;
use super::{Error, print_json, table};
use crate::handover::{POD_KEY, Snapshot, is_of};
use crate::invocation::Query;
use crate::journal;

/// Shows a container. With a bundle in the query, its journal alone: for a dead shim.
pub(crate) fn inspect(id: &str, query: &Query) -> Result<(), Error> {
    let all = match &query.bundle {
        Some(bundle) => from_journal(id, bundle)?,
        None => from_keeper(id, query)?,
    };
    if query.json {
        return print_json(&all);
    }
    Ok(io::stdout().lock().write_all(to_text(&all).as_bytes())?)
}

/// Logs the same for each container of a shim, without its journal: the keeper calls this, and must not wait for a disk.
pub(crate) fn log_snapshot(snapshot: &Snapshot, control: &Path) {
    let containers = snapshot.state.iter().map(|(key, _)| key).filter(|key| !key.contains('/'));
    let mut ids: Vec<&str> = containers.chain(&snapshot.reservations).map(String::as_str).collect();
    ids.dedup();
    if ids.is_empty() {
        // the shim's own part
        ids.push("");
    }
    for id in ids {
        for line in to_text(&to_json(id, control, snapshot)).lines().filter(|line| !line.is_empty()) {
            log::info!(container:% = id; "{line}");
        }
    }
}

fn from_keeper(id: &str, query: &Query) -> Result<Value, Error> {
    let mut silent = 0;
    let mut snapshots = Vec::new();
    for shim in survey(query)? {
        match shim.found {
            Found::Alive(snapshot) if knows(&snapshot, id) => snapshots.push((shim.control, snapshot)),
            Found::Silent(_) => silent += 1,
            Found::Alive(_) | Found::Dead => {}
        }
    }
    match snapshots.as_slice() {
        [] => Err(Error::NoContainer { id: id.to_owned(), namespace: query.namespace.clone(), silent }),
        [(control, snapshot)] => {
            let mut all = to_json(id, control, snapshot);
            let bundle = all["state"]["bundle"].as_str().map(PathBuf::from);
            all["journal"] = bundle.map_or(Value::Null, |bundle| journal_json(&bundle.join(journal::FILE_NAME)));
            Ok(all)
        }
        several => {
            let namespaces: Vec<&str> = several.iter().map(|(_, snapshot)| snapshot.namespace.as_str()).collect();
            Err(Error::Ambiguous { id: id.to_owned(), namespaces: namespaces.join(", ") })
        }
    }
}

fn from_journal(id: &str, bundle: &Path) -> Result<Value, Error> {
    let path = bundle.join(journal::FILE_NAME);
    journal::read(&path).map_err(|source| Error::Journal { path: path.clone(), source })?;
    Ok(json!({ "id": id, "bundle": bundle.to_string_lossy(), "journal": journal_json(&path) }))
}

fn knows(snapshot: &Snapshot, id: &str) -> bool {
    let is_pod = |key: &str, value: &[u8]| key == POD_KEY && read(value)["id"] == id;
    snapshot.state.iter().any(|(key, value)| key == id || is_pod(key, value)) || snapshot.reservations.iter().any(|reserved| reserved == id)
}

fn to_json(id: &str, control: &Path, snapshot: &Snapshot) -> Value {
    let (keeper, worker) = processes_json(snapshot);
    let pod = snapshot.state.iter().find(|(key, _)| key == POD_KEY).map_or(Value::Null, |(_, value)| read(value));
    // The pod's own id names no container.
    let state = if pod["id"] == id { Some(pod.clone()) } else { None };
    let found = || snapshot.state.iter().find(|(key, _)| key == id).map(|(_, value)| read(value));
    let state = found().or(state).unwrap_or(Value::Null);
    let execs = snapshot.state.iter().filter_map(|(key, value)| Some((key.strip_prefix(id)?.strip_prefix('/')?, value)));
    let execs: serde_json::Map<String, Value> = execs.map(|(exec, value)| (exec.to_owned(), read(value)["process"].clone())).collect();
    let processes = snapshot.processes.iter().filter(|process| is_of(&process.key, id));
    let streams = snapshot.streams.iter().filter(|stream| is_of(&stream.key, id));
    let waiters = snapshot.waiters.iter().filter(|(key, _)| is_of(key, id));
    json!({
        "id": id,
        "namespace": snapshot.namespace,
        "group": snapshot.group,
        "control": control.to_string_lossy(),
        "keeper": keeper,
        "worker": worker,
        "worker_generation": snapshot.generations,
        "reserved": snapshot.reservations.iter().any(|reserved| reserved == id),
        "pod": pod["id"],
        "state": state,
        "execs": execs,
        "processes": processes.map(|process| json!({ "key": process.key, "pid": process.pid, "role": process.role })).collect::<Vec<_>>(),
        "streams": streams.map(|stream| json!({
            "key": stream.key,
            "stream": stream.stream,
            "target": stream.target,
            "bytes": stream.bytes,
            "waiting_bytes": stream.waiting_bytes,
            "spilled_bytes": stream.spilled_bytes,
        })).collect::<Vec<_>>(),
        "waiters": waiters.map(|(key, count)| json!({ "key": key, "count": count })).collect::<Vec<_>>(),
        // Only the worker decodes which container a request names: these are all of the shim's.
        "shim": {
            "requests": snapshot.requests.iter().map(|request| json!({
                "cause": request.cause,
                "method": request.method,
                "age_seconds": request.age_nanos as f64 / 1e9,
                "operations": request.operations,
                "operations_done": request.operations_done,
            })).collect::<Vec<_>>(),
            "events_queued": snapshot.events_queued,
            "events_sent": snapshot.events_sent,
            "connections": snapshot.connections,
            "processes_started": snapshot.processes_started,
            "exits_seen": snapshot.exits_seen,
            "worker_version": snapshot.worker_version,
            "worker_path": snapshot.worker_path,
            "previous_build": snapshot.previous_build,
            "fruitless": snapshot.fruitless,
            "last_end": snapshot.last_end,
            "withheld": snapshot.withheld,
            "upgrade": snapshot.upgrade.as_ref().map(report_json),
        },
    })
}

/// Decodes an entry of the state. Unknown values are shown as they are.
fn read(value: &[u8]) -> Value {
    serde_json::from_slice(value).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(value).into_owned()))
}

fn journal_json(path: &Path) -> Value {
    let shown = path.to_string_lossy();
    match journal::read(path) {
        Ok(contents) => json!({
            "path": shown,
            "exit": contents.exit.map(|exit| json!({ "pid": exit.pid, "status": exit.status, "at_nanos": exit.at_nanos })),
            "body": contents.body.map(|body| serde_json::from_slice(&body).unwrap_or(Value::Null)),
        }),
        Err(error) => json!({ "path": shown, "error": error.to_string() }),
    }
}

/// The same for a terminal.
fn to_text(all: &Value) -> String {
    let mut text = String::new();
    let shim = &all["shim"];
    if shim.is_object() {
        let mut rows = vec![
            vec!["container".into(), show(&all["id"])],
            vec!["namespace".into(), show(&all["namespace"])],
            vec!["group".into(), show(&all["group"])],
            vec!["keeper".into(), process_line(&all["keeper"])],
            vec!["worker".into(), format!("{} (generation {})", process_line(&all["worker"]), show(&all["worker_generation"]))],
            vec!["events".into(), format!("{} queued, {} sent", show(&shim["events_queued"]), show(&shim["events_sent"]))],
            vec!["connections".into(), show(&shim["connections"])],
            vec!["program".into(), show(&shim["worker_path"])],
        ];
        for (name, field) in [("program before", "previous_build"), ("last end", "last_end")] {
            if shim[field].as_str().is_some_and(|text| !text.is_empty()) {
                rows.push(vec![name.into(), show(&shim[field])]);
            }
        }
        for part in ["worker", "keeper"] {
            let result = &shim["upgrade"][part];
            if result.is_object() {
                let why = result["why"].as_str().map(|why| format!(": {why}")).unwrap_or_default();
                rows.push(vec![format!("upgrade of {part}"), format!("{}{why}", show(&result["result"]))]);
            }
        }
        for exit in shim["withheld"].as_array().into_iter().flatten() {
            rows.push(vec!["withheld".into(), format!("{}, which crashes every worker", show(exit))]);
        }
        for (name, field) in [("bundle", "bundle"), ("root", "rootfs")] {
            rows.push(vec![name.into(), show(&all["state"][field])]);
        }
        text.push_str(&table::lay_out(&rows));
        text.push_str(&section("processes", &["PROCESS", "PHASE", "PID", "EXIT", "STDIN", "STDOUT", "STDERR"], processes(all)));
        text.push_str(&listed(&all["processes"], "children of the keeper", &["key", "pid", "role"]));
        text.push_str(&listed(&all["streams"], "streams", &["key", "stream", "bytes", "waiting_bytes", "spilled_bytes", "target"]));
        text.push_str(&listed(&all["waiters"], "waiters", &["key", "count"]));
        let fields = ["cause", "method", "age_seconds", "operations", "operations_done"];
        text.push_str(&listed(&shim["requests"], "open requests of the shim", &fields));
    }
    text.push_str(&journal_text(&all["journal"]));
    text
}

fn process_line(process: &Value) -> String {
    if process.is_null() {
        return "none".to_owned();
    }
    format!("{}, {}, {} KiB", show(&process["pid"]), show(&process["build"]), show(&process["pss_kib"]))
}

/// Init and the execs, from the worker's entries.
fn processes(all: &Value) -> Vec<Vec<String>> {
    let row = |name: String, process: &Value| {
        let phase = phase_of(process);
        let exit = process["phase"].get("exited").map_or_else(|| "-".to_owned(), |exit| show(&exit["status"]));
        let mut row = vec![name, phase, show(&process["pid"]), exit];
        row.extend(["stdin", "stdout", "stderr"].map(|stream| match &process["stdio"][stream] {
            Value::String(target) if target.is_empty() => "-".to_owned(),
            target => show(target),
        }));
        row
    };
    let init = all["state"].get("init").map(|init| row("init".to_owned(), init));
    let execs = all["execs"].as_object().into_iter().flatten().map(|(id, exec)| row(id.clone(), exec));
    init.into_iter().chain(execs).collect()
}

fn listed(list: &Value, title: &str, fields: &[&str]) -> String {
    let rows = list.as_array().into_iter().flatten().map(|item| fields.iter().map(|field| show(&item[*field])).collect());
    let titles: Vec<String> = fields.iter().map(|field| field.to_uppercase().replace('_', " ")).collect();
    section(title, &titles.iter().map(String::as_str).collect::<Vec<_>>(), rows.collect())
}

fn section(title: &str, titles: &[&str], rows: Vec<Vec<String>>) -> String {
    if rows.is_empty() {
        return format!("\n{title}: none\n");
    }
    let rows: Vec<Vec<String>> = [titles.iter().map(|title| (*title).to_owned()).collect()].into_iter().chain(rows).collect();
    format!("\n{title}:\n{}", table::lay_out(&rows))
}

fn journal_text(journal: &Value) -> String {
    if journal.is_null() {
        return "\njournal: none\n".to_owned();
    }
    let mut rows = vec![vec!["path".to_owned(), show(&journal["path"])]];
    rows.push(vec!["exit".to_owned(), show(&journal["exit"])]);
    if let Some(error) = journal.get("error") {
        rows.push(vec!["error".to_owned(), show(error)]);
    }
    for (name, value) in journal["body"].as_object().into_iter().flatten() {
        rows.push(vec![name.clone(), show(value)]);
    }
    format!("\njournal:\n{}", table::lay_out(&rows))
}

fn show(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => format!("{:.3}", number.as_f64().unwrap_or(0.0)),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::{ProcessSnapshot, RequestSnapshot, StreamSnapshot};

    #[test]
    fn only_what_is_the_containers_is_shown_of_a_pod() {
        let process = |key: &str| ProcessSnapshot { key: key.into(), pid: 1, role: "claimed".into() };
        let snapshot = Snapshot {
            state: vec![
                ("c1".into(), br#"{"init": {"phase": "running"}}"#.to_vec()),
                ("c1/e1".into(), br#"{"version": 1, "process": {"phase": "created"}}"#.to_vec()),
            ],
            processes: ["c1", "c1/e1", "c10", "c2"].map(process).to_vec(),
            streams: vec![StreamSnapshot { key: "c1".into(), stream: "stdout".into(), bytes: 5, ..StreamSnapshot::default() }],
            waiters: vec![("c1".into(), 2), ("c2".into(), 1)],
            requests: vec![RequestSnapshot { method: "Exec".into(), age_nanos: 1_500_000_000, ..RequestSnapshot::default() }],
            ..Snapshot::default()
        };
        let all = to_json("c1", Path::new("/c"), &snapshot);
        assert_eq!(all["processes"].as_array().map(Vec::len), Some(2));
        assert_eq!(all["waiters"], json!([{ "key": "c1", "count": 2 }]));
        let text = to_text(&all);
        for cells in ["init     running", "e1       created", "1.500", "journal: none", "c1   2"] {
            assert!(text.contains(cells), "{cells} is not in\n{text}");
        }
    }

    #[test]
    fn unknown_arguments_have_no_effect() {
        for state in ["", "7", "[]", r#"{"init": 1, "bundle": 3}"#, r#"{"init": {"phase": 9, "stdio": []}}"#, r#"{"process": 2}"#] {
            let state = ["c1", "c1/e1"].map(|key| (key.to_owned(), state.as_bytes().to_vec())).to_vec();
            let snapshot = Snapshot { state, ..Snapshot::default() };
            assert!(!to_text(&to_json("c1", Path::new("/c"), &snapshot)).is_empty());
        }
    }
}
