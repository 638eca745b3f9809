//! A virtual machine is killed while x-manager in it imports images: what it has written to its disk and not flushed may be there or not, what is
//! in its memory is lost. The record of `power.rs` loses more; here nothing but the machine is ours.
//!
//! `X_VM_KILLS` machines, none without it: each boots for a quarter of a minute, and much longer on a busy host.

use std::env;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use shim_tests::context::Context;
use shim_tests::dice::Dice;
use shim_tests::image::{Image, Layer};
use shim_tests::import::Fact;
use shim_tests::operator::{binary, printed};
use shim_tests::runner::skip;
use shim_tests::{isolation, proc};

use crate::power::{judge, number};

/// Five minutes for each machine.
pub(crate) fn deadline() -> Duration {
    Duration::from_secs(60 + 300 * (1 + number("X_VM_KILLS").unwrap_or(0)))
}

pub(crate) async fn an_acknowledged_image_survives_the_end_of_its_virtual_machine(cx: Context) -> Result<()> {
    let Some(kills) = number("X_VM_KILLS") else { return skip("X_VM_KILLS is not set: a machine takes a minute") };
    let mut dice = Dice::new(number("X_SEED").unwrap_or(1));
    let base = Arc::new(Layer::random(&mut dice, 0, 10));
    let mut images = Vec::new();
    for name in ["first", "second", "third"] {
        let own: Vec<_> = (1..3).map(|layer| Arc::new(Layer::random(&mut dice, layer, 20))).collect();
        images.push(Image::new(&format!("example.com/vm/{name}:1"), &[&[Arc::clone(&base)][..], &own].concat()));
    }
    let folder = cx.folder().join("vm");
    // not below /run, which is the guest's own there
    let guest = scratch::Folder::new("power-vm");
    let archives: Vec<_> = (0..images.len()).map(|number| guest.join(format!("{number}.tar"))).collect();
    fs::create_dir_all(&folder)?;
    for (archive, image) in archives.iter().zip(&images) {
        fs::write(archive, image.archive())?;
    }
    // the first one is killed at its end, and tells how long the others take
    let mut whole = None;
    let (mut acknowledged, mut interrupted) = (0, 0);
    for kill in 0..=kills {
        let disk = folder.join("disk");
        File::create(&disk)?.set_len(96 << 20)?;
        printed(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&disk))?;
        let mut machine = Machine::start(&disk, &archives)?;
        machine.until("begins")?;
        let begin = Instant::now();
        let after = match whole {
            None => {
                machine.until("ends")?;
                whole = Some(begin.elapsed());
                begin.elapsed()
            }
            Some(whole) => {
                let after = whole.mul_f64(u32::try_from(dice.below(1000))?.into()).div_f64(1000.0);
                machine.until_elapsed(begin, after)?;
                after
            }
        };
        machine.kill()?;
        let known = machine.acknowledged();
        (acknowledged, interrupted) = (acknowledged + known.len(), interrupted + usize::from(known.len() < images.len()));
        let facts = images.iter().zip(&archives).filter(|(_, archive)| known.contains(archive)).flat_map(|(image, _)| {
            let blobs = image.blobs().map(|(digest, _)| Fact::Blob(digest)).collect::<Vec<_>>();
            blobs.into_iter().chain(image.chains().into_iter().map(Fact::Snapshot)).chain([Fact::Image(image.name.clone())])
        });
        let verdict = judge(shim_tests::power::Program::Manager, &disk, "root", &folder, &images, facts.collect()).await;
        let verdict = verdict.with_context(|| format!("machine {kill}, killed after {after:?}"))?;
        let unmended = verdict.unmended.into_iter().map(|damage| format!("after a second import: {damage}"));
        let wrong: Vec<_> = verdict.damage.into_iter().chain(unmended).collect();
        ensure!(wrong.is_empty(), "machine {kill}, killed after {after:?} with {} images acknowledged: {wrong:#?}", known.len());
        println!(
            "machine {kill}: killed {after:?} after x-manager began to serve, {} of {} imports acknowledged: all is whole",
            known.len(),
            images.len()
        );
    }
    ensure!(kills == 0 || interrupted > 0, "no import was interrupted");
    println!(
        "{} machines killed, {interrupted} of them during an import; {acknowledged} images were acknowledged, and are whole",
        kills + 1
    );
    Ok(())
}

/// A machine with x-manager in it.
struct Machine {
    process: Child,
    disk: PathBuf,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Machine {
    fn start(disk: &Path, archives: &[PathBuf]) -> Result<Self> {
        let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools");
        let manager = fs::canonicalize(binary()?)?;
        let mut command = Command::new(tools.join("cgroup2-vm"));
        command.arg("--disk").arg(disk).arg("--with").arg(&manager).args(["--with", "ctr"]);
        for archive in archives {
            command.arg("--with").arg(archive);
        }
        command.arg(tools.join("power-guest")).arg(&manager).args(archives);
        command.env("X_VM_SECONDS", "600").env("X_VM_MIB", "1024").stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = command.spawn().with_context(|| format!("{command:?}"))?;
        isolation::keep(process.id());
        let output = BufReader::new(process.stdout.take().context("a pipe")?);
        let (send, lines) = channel();
        thread::spawn(move || output.lines().map_while(Result::ok).all(|line| send.send(line.trim().to_owned()).is_ok()));
        Ok(Self { process, disk: disk.to_owned(), lines, seen: Vec::new() })
    }

    /// Waits for that line.
    fn until(&mut self, line: &str) -> Result<()> {
        while self.seen.last().is_none_or(|seen| seen != line) {
            match self.lines.recv_timeout(Duration::from_secs(280)) {
                Ok(seen) => self.seen.push(seen),
                Err(error) => bail!("{error} for {line:?} after {:#?}", self.seen),
            }
        }
        Ok(())
    }

    /// Waits until that time has passed since `begin`.
    fn until_elapsed(&mut self, begin: Instant, time: Duration) -> Result<()> {
        loop {
            match self.lines.recv_timeout(time.saturating_sub(begin.elapsed())) {
                Ok(seen) => self.seen.push(seen),
                Err(RecvTimeoutError::Timeout) => return Ok(()),
                Err(error) => bail!("{error} after {:#?}", self.seen),
            }
        }
    }

    /// Ends its processor at once.
    fn kill(&mut self) -> Result<()> {
        let disk = format!("file={}", self.disk.display());
        let machines = proc::all().into_values().filter(|process| process.command.contains(&disk) && process.comm.starts_with("qemu"));
        let machines: Vec<_> = machines.collect();
        machines.iter().for_each(|machine| proc::kill_hard(machine.pid));
        ensure!(machines.len() == 1, "{} machines with {disk}", machines.len());
        self.process.wait()?;
        isolation::forget(self.process.id());
        self.seen.extend(self.lines.iter());
        Ok(())
    }

    /// The archives whose import has ended.
    fn acknowledged(&self) -> Vec<PathBuf> {
        self.seen.iter().filter_map(|line| line.strip_prefix("acknowledged ")).map(PathBuf::from).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !matches!(self.process.try_wait(), Ok(Some(_))) {
            let _it_may_have_ended = self.kill();
        }
    }
}
