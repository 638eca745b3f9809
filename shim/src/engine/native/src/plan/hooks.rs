//! Plans hooks: programs that receive a container's state at the steps of its life.
use std::time::Duration;

use minicbor::{Decode, Encode};
use oci_spec::runtime::{Hook as SpecHook, Hooks as SpecHooks, Spec};
use serde_json::json;

use super::make::{Request, absolute_path};
use crate::Refused;

/// The hooks of a container, each kind in order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Hooks {
    /// On the host, when the container's mounts are made: those called `prestart`, then those called `createRuntime`.
    #[n(0)]
    pub on_host: Vec<Hook>,
    /// In the container's namespaces, the host's files still in sight.
    #[n(1)]
    pub create_container: Vec<Hook>,
    /// In the container, right before its program, with what is allowed to it.
    #[n(2)]
    pub start_container: Vec<Hook>,
    /// On the host, when the program runs.
    #[n(3)]
    pub poststart: Vec<Hook>,
    /// On the host, when the container is deleted.
    #[n(4)]
    pub poststop: Vec<Hook>,
    #[n(5)]
    pub state: State,
}

/// A hook.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Hook {
    #[n(0)]
    pub path: String,
    /// Its own name first, as execve(2) takes them.
    #[n(1)]
    pub args: Vec<String>,
    /// Without, nothing is inherited from the shim.
    #[n(2)]
    pub env: Vec<String>,
    /// Afterwards it is killed.
    #[n(3)]
    pub timeout_seconds: Option<u32>,
}

/// What hooks read, but for what changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct State {
    #[n(0)]
    pub version: String,
    #[n(1)]
    pub id: String,
    #[n(2)]
    pub bundle: String,
    /// Sorted.
    #[n(3)]
    pub annotations: Vec<(String, String)>,
}

impl State {
    /// The state as JSON. `pid` of init on the host, 0 once it has exited.
    #[must_use]
    pub fn json(&self, status: &str, pid: u32) -> String {
        self.value(status, pid).to_string()
    }

    /// What an agent that decides about system calls receives with the descriptor of a filter: the state of process `pid` and of its container, whose
    /// init is `init`.
    #[must_use]
    pub fn process_json(&self, status: &str, pid: u32, init: u32, metadata: &str) -> String {
        let mut state = json!({ "ociVersion": self.version, "fds": ["seccompFd"], "pid": pid, "state": self.value(status, init) });
        if !metadata.is_empty() {
            state["metadata"] = json!(metadata);
        }
        state.to_string()
    }

    fn value(&self, status: &str, pid: u32) -> serde_json::Value {
        let annotations: serde_json::Map<_, _> = self.annotations.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        let mut state =
            json!({ "ociVersion": self.version, "id": self.id, "status": status, "bundle": self.bundle, "annotations": annotations });
        if pid != 0 {
            state["pid"] = json!(pid);
        }
        state
    }
}

impl Hook {
    /// How long it may take.
    #[must_use]
    pub fn timeout(&self) -> Option<Duration> {
        self.timeout_seconds.map(|seconds| Duration::from_secs(seconds.into()))
    }
}

/// Plans the hooks of a configuration.
pub(super) fn plan(spec: &Spec, request: &Request<'_>) -> Result<Hooks, Refused> {
    let mut annotations: Vec<(String, String)> =
        spec.annotations().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
    annotations.sort();
    let state =
        State { version: spec.version().clone(), id: request.id.to_owned(), bundle: request.bundle.display().to_string(), annotations };
    let none = SpecHooks::default();
    let hooks = spec.hooks().as_ref().unwrap_or(&none);
    #[allow(deprecated, reason = "clients still use it")]
    let prestart = all(hooks.prestart().as_deref(), "hooks.prestart")?;
    Ok(Hooks {
        on_host: [prestart, all(hooks.create_runtime().as_deref(), "hooks.createRuntime")?].concat(),
        create_container: all(hooks.create_container().as_deref(), "hooks.createContainer")?,
        start_container: all(hooks.start_container().as_deref(), "hooks.startContainer")?,
        poststart: all(hooks.poststart().as_deref(), "hooks.poststart")?,
        poststop: all(hooks.poststop().as_deref(), "hooks.poststop")?,
        state,
    })
}

fn all(hooks: Option<&[SpecHook]>, field: &str) -> Result<Vec<Hook>, Refused> {
    let hooks = hooks.unwrap_or_default().iter().enumerate();
    hooks.map(|(index, hook)| one(hook, &format!("{field}[{index}]"))).collect()
}

fn one(hook: &SpecHook, field: &str) -> Result<Hook, Refused> {
    let path = absolute_path(hook.path(), &format!("{field}.path"))?;
    let args = hook.args().clone().filter(|args| !args.is_empty()).unwrap_or_else(|| vec![path.clone()]);
    let env = hook.env().clone().unwrap_or_default();
    if args.iter().chain(&env).any(|text| text.contains('\0')) {
        return Err(Refused::invalid(field, "contains a NUL byte"));
    }
    let timeout_seconds = match hook.timeout() {
        None => None,
        Some(seconds @ 1..) => Some(u32::try_from(seconds).unwrap_or(u32::MAX)),
        Some(seconds) => return Err(Refused::invalid(format!("{field}.timeout"), format!("{seconds} is not above 0"))),
    };
    Ok(Hook { path, args, env, timeout_seconds })
}
