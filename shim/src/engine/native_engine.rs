//! The native engine, as the shim uses it: what is recorded of a container, and what a performer's report means.
//!
//! Owns neither plans nor their performance: those are `x_engine`'s (`native/`, `docs/engine.md`).
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use x_engine::perform::{Failure, Report, Step};
use x_engine::{Refused, control, plan};

use super::{EngineError, Verb};
use crate::chain::chain;
use crate::handover::Exited;

/// A container that the native engine has made, or is about to make. Recorded with it, as text: its encoding in base64.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NativeEngine(Box<plan::Container>);

impl NativeEngine {
    pub(crate) fn new(container: plan::Container) -> Self {
        Self(Box::new(container))
    }

    pub(crate) fn container(&self) -> &plan::Container {
        &self.0
    }

    /// One that was restored, with this init. criu makes a time namespace for it, so that its clocks go on: further processes join that too.
    pub(crate) fn blocking_restored(container: plan::Container, init: u32) -> Self {
        let clocks = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/time")).ok();
        let added = if clocks("self") == clocks(&init.to_string()) { 0 } else { nix::libc::CLONE_NEWTIME as u64 };
        Self::new(plan::Container { namespaces: container.namespaces | added, ..container })
    }

    /// As performers take it.
    pub(crate) fn encoded(&self) -> Vec<u8> {
        encode(self.container())
    }

    /// Without what only further processes need.
    pub(crate) fn for_cleanup(&self) -> Self {
        let hooks = if self.0.hooks.poststop.is_empty() { plan::Hooks::default() } else { self.0.hooks.clone() };
        Self::new(plan::Container { filter: None, hooks, ..self.container().clone() })
    }

    /// A folder of its cgroup, if one exists.
    pub(crate) fn blocking_cgroup_folder(&self) -> Option<PathBuf> {
        self.0.cgroup.folders.iter().map(plan::Folder::absolute).find(|folder| folder.exists())
    }

    /// Whether a process is in its cgroup.
    pub(crate) fn blocking_has_processes(&self) -> bool {
        !control::pids(&self.0.cgroup).is_empty()
    }
}

/// The pid that a performer has reported; absent if it was killed before it could.
///
/// Errors: what it has failed at. Then it has left nothing behind.
pub(crate) fn reported_pid(verb: Verb, exited: &Exited) -> Result<Option<u32>, EngineError> {
    match Report::parse(&exited.output) {
        Some(Report::Born { pid }) => Ok(Some(pid)),
        Some(Report::Failed(failure)) => Err(complaint(verb, &failure)),
        None => Ok(None),
    }
}

/// The pid of the process that holds the namespaces of a pod.
///
/// Errors: why there is none, in words.
pub(crate) fn reported_pid_of_holder(exited: &Exited) -> Result<u32, String> {
    match Report::parse(&exited.output) {
        Some(Report::Born { pid }) => Ok(pid),
        Some(Report::Failed(failure)) => Err(failure.to_string()),
        None => Err(format!("the performer of its plan was killed before it could report (status {})", exited.status)),
    }
}

fn complaint(verb: Verb, failure: &Failure) -> EngineError {
    let message = failure.to_string();
    match failure.step {
        Step::Taken => EngineError::Exists { verb, message },
        Step::RootMount => EngineError::Rootfs { message },
        Step::Gone => EngineError::NotRunning { verb, message },
        _ => EngineError::Failed { verb, message },
    }
}

/// Why there is no plan.
pub(crate) fn refused(verb: Verb, refused: &Refused) -> EngineError {
    let message = chain(refused);
    match refused {
        Refused::Unsupported { .. } => EngineError::Unsupported { verb, message },
        Refused::Invalid { .. } | Refused::Json { .. } => EngineError::Failed { verb, message },
    }
}

/// Encodes a plan for a performer.
pub(crate) fn encode(plan: &impl minicbor::Encode<()>) -> Vec<u8> {
    minicbor::to_vec(plan).expect("a Vec takes every byte")
}

impl Serialize for NativeEngine {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(self.encoded()))
    }
}

impl<'de> Deserialize<'de> for NativeEngine {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD.decode(text).map_err(de::Error::custom)?;
        minicbor::decode(&bytes).map(Self::new).map_err(de::Error::custom)
    }
}
