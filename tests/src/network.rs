//! A network namespace of a test's own, which takes everything in it along when the last process in it and its owner are gone.

use std::fs::File;
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace with nothing but a loopback device that is up.
#[derive(Debug)]
pub struct Network(File);

impl Network {
    /// Makes one.
    pub fn new() -> Result<Self> {
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("a new network namespace")?;
            let output = Command::new("ip").args(["link", "set", "lo", "up"]).output().context("run ip")?;
            ensure!(output.status.success(), "ip link set lo up: {}", String::from_utf8_lossy(&output.stderr));
            Ok(Self(File::open("/proc/thread-self/ns/net").context("open the new network namespace")?))
        })
    }

    /// Does something in it: what is spawned there stays there.
    pub fn within<T: Send>(&self, action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            setns(&self.0, CloneFlags::CLONE_NEWNET).context("enter a network namespace")?;
            action()
        })
    }
}

/// A thread has namespaces of its own, so no other is moved.
fn on_a_thread<T: Send>(action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| scope.spawn(action).join().expect("no panic on this thread"))
}
