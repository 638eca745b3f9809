//! A container that a shim has created from a bundle.

use anyhow::{Context as _, Result, ensure};

use super::Bundle;
use crate::stand::Stand;
use crate::task::Task;
use crate::ttrpc::Code;

/// A container that exists.
#[derive(Debug)]
pub struct Container {
    /// A client of its shim.
    pub task: Task,
    /// Its id.
    pub id: String,
    /// The pid of its init.
    pub pid: u32,
    /// Its bundle.
    pub bundle: Bundle,
}

impl Container {
    /// Starts init.
    pub async fn start(&self) -> Result<()> {
        let pid = self.task.start(&self.id, "").await.with_context(|| format!("start {}", self.id))?;
        ensure!(pid == self.pid, "create reports pid {}, start reports {pid}", self.pid);
        Ok(())
    }

    /// Adds a process.
    pub async fn add(&self, exec: &str, args: &[&str]) -> Result<()> {
        self.task.exec(&self.bundle.exec_request(exec, args)).await.with_context(|| format!("exec {exec}"))
    }

    /// Adds a process and starts it.
    pub async fn exec(&self, exec: &str, args: &[&str]) -> Result<u32> {
        self.add(exec, args).await?;
        self.task.start(&self.id, exec).await.with_context(|| format!("start {exec}"))
    }

    /// Runs a process to its end and deletes it.
    pub async fn run(&self, exec: &str, args: &[&str]) -> Result<u32> {
        self.exec(exec, args).await?;
        let status = self.task.wait(&self.id, exec).await?;
        let deleted = self.task.delete(&self.id, exec).await?;
        ensure!(deleted.exit_status == status, "wait reports {status}, delete reports {}", deleted.exit_status);
        Ok(status)
    }

    /// Kills init, waits for its end and deletes it.
    pub async fn destroy(&self) -> Result<u32> {
        match self.task.kill(&self.id, "", 9).await {
            Err(error) if error.code() != Some(Code::NotFound) => return Err(error.into()),
            _ => {}
        }
        self.finish().await
    }

    /// Waits for the end and deletes it.
    pub async fn finish(&self) -> Result<u32> {
        let status = self.task.wait(&self.id, "").await?;
        let deleted = self.task.delete(&self.id, "").await?;
        ensure!(deleted.exit_status == status, "wait reports {status}, delete reports {}", deleted.exit_status);
        Ok(status)
    }

    /// Deletes it, calls Shutdown, and waits until the shim has exited.
    pub async fn shut_down(&self) -> Result<u32> {
        let status = self.destroy().await?;
        super::leave(&self.task, self.bundle.shim_pid()?, &self.id).await?;
        Ok(status)
    }

    /// The pid of its shim.
    pub fn shim_pid(&self) -> Result<i32> {
        self.bundle.shim_pid()
    }

    /// The pid of the worker of its shim, once there is one.
    pub async fn worker_pid(&self) -> Result<i32> {
        super::worker_of(self.shim_pid()?).await
    }

    /// Its stand.
    pub fn stand(&self) -> &Stand {
        self.bundle.stand()
    }
}
