//! The calls for a container of a pod.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::messages::{
    ContainerId, CreateRequest, ExecRequest, ExecResponse, Nothing, StatsResponse, StatusRequest, StatusResponse, StopRequest, method,
};
use super::{ContainerSpec, ContainerStatus, Cri, EXITED, IMAGE, NAMESPACE, Pod};
use crate::eventually::{SOON, eventually};

impl Cri {
    /// Creates a container in a pod, with a limit of memory in bytes, or none.
    pub async fn create(&self, pod: &Pod, name: &str, command: &[&str], memory_bytes: i64) -> Result<String> {
        self.create_of(pod, &ContainerSpec::new(name, command).memory(memory_bytes)).await
    }

    /// Creates a container in a pod.
    pub async fn create_of(&self, pod: &Pod, spec: &ContainerSpec) -> Result<String> {
        let config = Some(spec.config(IMAGE, &pod.config));
        let request = CreateRequest { pod: pod.id.clone(), config, sandbox_config: Some(pod.config.clone()) };
        Ok(self.call::<ContainerId>(method::CREATE, request).await?.id)
    }

    /// Starts a container.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        self.call::<Nothing>(method::START, ContainerId { id: id.to_owned() }).await.map(drop)
    }

    /// Creates and starts a container.
    pub async fn run(&self, pod: &Pod, name: &str, command: &[&str]) -> Result<String> {
        self.run_of(pod, &ContainerSpec::new(name, command)).await
    }

    /// Creates and starts a container.
    pub async fn run_of(&self, pod: &Pod, spec: &ContainerSpec) -> Result<String> {
        let id = self.create_of(pod, spec).await?;
        self.start_container(&id).await?;
        Ok(id)
    }

    /// The status of a container.
    pub async fn status(&self, id: &str) -> Result<ContainerStatus> {
        let answer: StatusResponse = self.call(method::STATUS, StatusRequest { id: id.to_owned(), verbose: false }).await?;
        answer.status.context("no status")
    }

    /// The pid of a container's init.
    pub async fn init_of(&self, id: &str) -> Result<i32> {
        let answer: StatusResponse = self.call(method::STATUS, StatusRequest { id: id.to_owned(), verbose: true }).await?;
        let info: Value = serde_json::from_str(answer.info.get("info").context("no verbose status")?)?;
        let pid = info["pid"].as_i64().filter(|pid| *pid > 0).with_context(|| format!("no pid in {info}"))?;
        Ok(i32::try_from(pid)?)
    }

    /// Waits for the end of a container.
    pub async fn ended(&self, id: &str) -> Result<ContainerStatus> {
        eventually("the container has ended", SOON * 2, async || {
            let status = self.status(id).await?;
            ensure!(status.state == EXITED, "{status:?}");
            Ok(status)
        })
        .await
    }

    /// Runs a command in a container: exit code and stdout.
    pub async fn exec(&self, id: &str, command: &[&str]) -> Result<(i32, String)> {
        self.exec_within(id, command, 20).await
    }

    /// The same, ended by the plugin after `seconds`.
    pub async fn exec_within(&self, id: &str, command: &[&str], seconds: i64) -> Result<(i32, String)> {
        let command = command.iter().map(|word| (*word).to_owned()).collect();
        let answer: ExecResponse = self.call(method::EXEC, ExecRequest { id: id.to_owned(), command, timeout: seconds }).await?;
        Ok((answer.exit_code, String::from_utf8_lossy(&answer.stdout).into_owned()))
    }

    /// Runs a shell script in a container, which must succeed, and returns its output without the last line's end.
    pub async fn sh(&self, id: &str, script: &str) -> Result<String> {
        let (code, out) = self.exec(id, &["sh", "-c", script]).await?;
        ensure!(code == 0, "{script}: {code} {out:?}");
        Ok(out.trim_end().to_owned())
    }

    /// Processor time and memory of a container.
    pub async fn stats(&self, id: &str) -> Result<(u64, u64)> {
        let answer: StatsResponse = self.call(method::STATS, ContainerId { id: id.to_owned() }).await?;
        let stats = answer.stats.context("no statistics")?;
        let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).context("no processor time")?.value;
        let memory = stats.memory.and_then(|memory| memory.working_set_bytes).context("no memory")?.value;
        Ok((cpu, memory))
    }

    /// Stops a container: a signal, and a kill after `seconds`.
    pub async fn stop(&self, id: &str, seconds: i64) -> Result<()> {
        self.call::<Nothing>(method::STOP, StopRequest { id: id.to_owned(), timeout: seconds }).await.map(drop)
    }

    /// Removes a container.
    pub async fn remove(&self, id: &str) -> Result<()> {
        self.call::<Nothing>(method::REMOVE, ContainerId { id: id.to_owned() }).await.map(drop)
    }

    /// The log of a container, without the time and the name of the stream at the beginning of each line.
    pub fn log(&self, pod: &Pod, name: &str) -> String {
        let path = PathBuf::from(&pod.config.log_directory).join(format!("{name}.log"));
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).map(|line| format!("{line}\n")).collect()
    }

    /// The bundle of a container.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.daemon.bundle(NAMESPACE, id)
    }
}
