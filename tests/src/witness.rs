//! A container whose shim gets invalid input or many requests: it must not be affected.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use crate::bundle::{Bundle, Container};
use crate::eventually::{a_second, eventually};
use crate::proc;
use crate::stand::Stand;
use crate::stdio::{self, Pace, Reader};

/// A container that prints numbers, in the shim under test: it must keep counting without a gap.
#[derive(Debug)]
pub struct Witness {
    /// The container.
    pub container: Container,
    numbers: Reader,
}

/// The counting program: about once a millisecond, without a shell.
const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i; usleep 2000; done";

impl Witness {
    /// Starts it in a shim of its own, which others may join under the group `pod`.
    pub async fn start(stand: &Stand) -> Result<Self> {
        let fifo = stand.folder().join("numbers");
        stdio::fifo(&fifo)?;
        let numbers = Reader::open(&fifo, Pace::Keep)?;
        let path = fifo.display().to_string();
        let bundle = stand.bundle("witness", &["sh", "-c", COUNT]).group("pod").stdio("", &path, &path);
        let witness = Self { container: bundle.run().await?, numbers };
        witness.goes_on().await?;
        Ok(witness)
    }

    /// A container in the same shim.
    pub fn sibling(&self, id: &str, args: &[&str]) -> Bundle {
        self.container.stand().bundle(id, args).group("pod")
    }

    /// Where their shim listens.
    pub fn socket(&self) -> &Path {
        self.container.task.socket()
    }

    async fn goes_on(&self) -> Result<()> {
        let before = self.numbers.count();
        eventually("the witness keeps counting", a_second() * 2, async || {
            ensure!(self.numbers.count() > before, "{before} bytes");
            Ok(())
        })
        .await
    }

    /// Checks that nothing has happened to it: it answers State within a second on the old connection and on a new one, is the same
    /// process, counts on, and has skipped no number.
    pub async fn is_untouched(&self) -> Result<()> {
        let second = a_second();
        for task in [self.container.task.clone(), self.container.task.another().await?] {
            let state = task.state_within("witness", "", second).await.context("state of the witness")?;
            ensure!(state.pid == self.container.pid && state.status.value() == 2, "{state:?}");
        }
        ensure!(proc::is_alive(self.container.pid.cast_signed()), "the witness is dead");
        self.goes_on().await?;
        let text = self.numbers.text();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        for (index, line) in whole.lines().enumerate() {
            ensure!(line == (index + 1).to_string(), "{line:?} in the place of {}", index + 1);
        }
        Ok(())
    }

    /// Checks it a last time, and deletes it and its shim.
    pub async fn dismiss(self) -> Result<()> {
        self.is_untouched().await?;
        ensure!(self.container.shut_down().await? == 137);
        Ok(())
    }
}
