//! Queries all shims of this host at the same time.
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Error;
use crate::control;
use crate::handover::{POD_KEY, Snapshot};
use crate::invocation::Query;
use crate::run_dir::RunDir;

/// How long a keeper may take for its snapshot, which takes well under a millisecond.
const PATIENCE: Duration = Duration::from_millis(500);

/// The number of keepers queried at once.
const AT_ONCE: usize = 32;

/// The result at one control socket.
#[derive(Debug)]
pub(crate) struct Shim {
    pub(crate) control: PathBuf,
    pub(crate) found: Found,
}

#[derive(Debug)]
pub(crate) enum Found {
    Alive(Box<Snapshot>),
    /// A process listens, but does not answer, or not in a way that can be decoded.
    Silent(control::Error),
    /// A stale socket of a dead keeper.
    Dead,
}

/// Queries every keeper of this host. Those of other namespaces than the query's are left out; the dead and the silent, whose
/// namespace is unknown, are left out if the query names one.
pub(crate) fn survey(query: &Query) -> Result<Vec<Shim>, Error> {
    let controls = RunDir::from_environment().list_controls()?;
    let mut shims = Vec::with_capacity(controls.len());
    for some in controls.chunks(AT_ONCE) {
        thread::scope(|scope| {
            let asked: Vec<_> = some.iter().map(|control| scope.spawn(move || ask(control.clone()))).collect();
            // `ask` does not panic; a thread that did would have no result.
            shims.extend(asked.into_iter().filter_map(|thread| thread.join().ok()));
        });
    }
    shims.retain(|shim| match (&query.namespace, &shim.found) {
        (Some(namespace), Found::Alive(snapshot)) => snapshot.namespace == *namespace,
        (Some(_), Found::Silent(_)) => true,
        (Some(_), Found::Dead) => false,
        (None, _) => true,
    });
    shims.sort_by_key(|shim| match &shim.found {
        Found::Alive(snapshot) => (0, snapshot.namespace.clone(), snapshot.group.clone()),
        Found::Silent(_) => (1, String::new(), String::new()),
        Found::Dead => (2, String::new(), String::new()),
    });
    Ok(shims)
}

fn ask(control: PathBuf) -> Shim {
    let found = match control::describe(&control, Instant::now() + PATIENCE) {
        Ok(snapshot) => Found::Alive(Box::new(snapshot)),
        Err(error) if error.is_gone() => Found::Dead,
        Err(error) => Found::Silent(error),
    };
    Shim { control, found }
}

/// The memory of a process in KiB: its own pages and its share of pages in common with others.
pub(crate) fn pss_kib(pid: u32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix("kB")?.trim().parse().ok())
}

/// Keeper and worker as JSON.
pub(crate) fn processes_json(snapshot: &Snapshot) -> (Value, Value) {
    let keeper = json!({
        "pid": snapshot.keeper_pid,
        "build": snapshot.keeper_build,
        "uptime_seconds": snapshot.uptime_seconds,
        "pss_kib": pss_kib(snapshot.keeper_pid),
    });
    let worker =
        snapshot.worker_pid.map_or(Value::Null, |pid| json!({ "pid": pid, "build": snapshot.worker_build, "pss_kib": pss_kib(pid) }));
    (keeper, worker)
}

/// A container as the worker saved it, as far as it can be decoded: the worker may have another version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Container {
    pub(crate) id: String,
    /// `created`, `running`, `paused`, `exited` … or `?`.
    pub(crate) state: String,
    pub(crate) pid: Option<u64>,
    pub(crate) execs: usize,
}

impl Container {
    /// The containers of a shim.
    pub(crate) fn all(snapshot: &Snapshot) -> impl Iterator<Item = Self> {
        let mut execs: BTreeMap<&str, usize> = BTreeMap::new();
        for id in snapshot.state.iter().filter_map(|(key, _)| Some(key.split_once('/')?.0)) {
            *execs.entry(id).or_default() += 1;
        }
        let containers = snapshot.state.iter().filter(|(key, _)| !key.contains('/') && key != POD_KEY);
        containers.map(move |(id, value)| Self { execs: execs.get(id.as_str()).copied().unwrap_or(0), ..Self::read(id, value) })
    }

    fn read(id: &str, value: &[u8]) -> Self {
        let value: Value = serde_json::from_slice(value).unwrap_or_default();
        let init = value.get("init").unwrap_or(&Value::Null);
        Self { id: id.to_owned(), state: phase_of(init), pid: init.get("pid").and_then(Value::as_u64), execs: 0 }
    }
}

/// The pod that a shim is, as the worker saved it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) id: String,
    /// Its name and namespace in Kubernetes.
    pub(crate) name: String,
    pub(crate) namespace: String,
    /// `created`, `ready`, `notready` or `?`.
    pub(crate) state: String,
    /// Of the process whose namespaces its containers join.
    pub(crate) pid: Option<u64>,
}

impl Pod {
    /// The pod of a shim, if it is one.
    pub(crate) fn of(snapshot: &Snapshot) -> Option<Self> {
        let (_, value) = snapshot.state.iter().find(|(key, _)| key == POD_KEY)?;
        let value: Value = serde_json::from_slice(value).unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
        let config = &value["config"];
        Some(Self {
            id: text(&value["id"]),
            name: text(&config["name"]),
            namespace: text(&config["namespace"]),
            state: phase_of(&value),
            pid: value["phase"]["ready"]["pid"].as_u64(),
        })
    }
}

/// The phase of a process: a string, or an object with that string as its only key.
pub(crate) fn phase_of(process: &Value) -> String {
    match process.get("phase") {
        Some(Value::String(phase)) => phase.clone(),
        Some(Value::Object(phase)) => phase.keys().next().cloned().unwrap_or_else(|| "?".to_owned()),
        _ => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_fields_of_a_container_are_read() {
        let read = |value: &str| Container::read("c1", value.as_bytes());
        let is = |state: &str, pid| Container { id: "c1".into(), state: state.into(), pid, execs: 0 };
        assert_eq!(read(r#"{"init": {"phase": "running", "pid": 7}}"#), is("running", Some(7)));
        assert_eq!(read(r#"{"init": {"phase": {"exited": {"status": 3}}, "pid": 7}}"#), is("exited", Some(7)));
        for odd in ["", "[]", "{}", r#"{"init": 3}"#, r#"{"init": {"phase": {}, "pid": -1}}"#, "\u{0}"] {
            assert_eq!(read(odd), is("?", None), "{odd}");
        }
    }

    #[test]
    fn a_pod_is_no_container() {
        let record =
            br#"{"id": "p1", "phase": {"ready": {"pid": 7, "since_nanos": 1}}, "config": {"name": "web", "namespace": "default"}}"#;
        let state = vec![(POD_KEY.to_owned(), record.to_vec()), ("c1".to_owned(), Vec::new())];
        let snapshot = Snapshot { state, ..Snapshot::default() };
        let pod = Pod::of(&snapshot).expect("it is one");
        assert_eq!((pod.id.as_str(), pod.name.as_str(), pod.state.as_str(), pod.pid), ("p1", "web", "ready", Some(7)));
        assert_eq!(Container::all(&snapshot).map(|container| container.id).collect::<Vec<_>>(), ["c1"]);
        assert_eq!(Pod::of(&Snapshot::default()), None);
        let odd = Snapshot { state: vec![(POD_KEY.to_owned(), b"[]".to_vec())], ..Snapshot::default() };
        assert_eq!(Pod::of(&odd).map(|pod| pod.state).as_deref(), Some("?"));
    }

    #[test]
    fn added_processes_are_counted_with_their_container() {
        let keys = ["c1", "c1-x", "c1-x/e1", "c1/e1", "c1/e2"];
        let snapshot = Snapshot { state: keys.map(|key| (key.to_owned(), Vec::new())).to_vec(), ..Snapshot::default() };
        let counts: Vec<_> = Container::all(&snapshot).map(|container| (container.id, container.execs)).collect();
        assert_eq!(counts, [("c1".to_owned(), 2), ("c1-x".to_owned(), 1)]);
    }

    #[test]
    fn memory_of_this_process_is_known_and_of_none_is_not() {
        assert!(pss_kib(std::process::id()).is_some_and(|kib| kib > 0));
        assert_eq!(pss_kib(0), None);
    }
}
