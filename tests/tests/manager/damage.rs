//! Bytes of the store that are not what was written.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use shim_tests::client::Client;
use shim_tests::context::Context;
use shim_tests::dice::Dice;
use shim_tests::image::{Image, Layer};
use shim_tests::import::Import;
use shim_tests::isolation;
use shim_tests::operator::{binary, output_text};
use shim_tests::power::{Program, Server};
use shim_tests::stored::Stored;

/// 24 times; `X_TIMES` for more. A start that is refused leaves the files as they are: an operator restores a backup.
pub(crate) async fn a_damaged_store_is_refused_with_a_sentence_or_served_and_panics_nowhere(cx: Context) -> Result<()> {
    let folder = cx.folder().join("damage");
    let mut server = Server::new(Program::Manager, &folder)?;
    let client = server.start().await?;
    let mut dice = Dice::new(100);
    let layers: Vec<_> = (0..3).map(|number| std::sync::Arc::new(Layer::random(&mut dice, number, 3))).collect();
    let image = Image::new("example.com/damage:1", &layers);
    let import = Import::begin(&client, &image, "l").await?;
    import.run(&mut |_fact| {}).await?;
    import.end().await?;
    // what a crash leaves has a WAL too
    server.end(Signal::SIGKILL)?;
    let (killed, stopped) = (folder.join("killed"), folder.join("stopped"));
    copy(&server.root(), &killed)?;
    server.start().await?;
    server.end(Signal::SIGTERM)?;
    copy(&server.root(), &stopped)?;
    // a torn WAL is not noticed: SQLite ends it where a checksum is wrong
    let (mut refused, mut served, mut unsound) = (0, 0, 0);
    for time in 0..24 * shim_tests::times::times() {
        let (whole, name) = if time % 2 == 0 { (&stopped, "meta.db") } else { (&killed, "meta.db-wal") };
        copy(whole, &server.root())?;
        let file = server.root().join(name);
        let mut bytes = fs::read(&file)?;
        let at = usize::try_from(dice.below(bytes.len() as u64))?;
        let what = match dice.below(4) {
            0 => {
                bytes.truncate(at);
                format!("cut at {at}")
            }
            1 => {
                let end = bytes.len().min(at + 4096);
                bytes[at..end].fill(0);
                format!("zeros at {at}")
            }
            2 => {
                let bit = dice.below(8);
                bytes[at] ^= 1 << bit;
                format!("bit {bit} of {at}")
            }
            _ => {
                let end = bytes.len().min(at + 512);
                let noise = dice.bytes(end - at);
                bytes[at..end].copy_from_slice(&noise);
                format!("noise at {at}")
            }
        };
        let what = format!("time {time}, {}: {what}", file.display());
        fs::write(&file, &bytes)?;
        match begin(&folder).await.with_context(|| what.clone())? {
            Begun::Refused(sentence) => {
                refused += 1;
                ensure!(sentence.contains("meta.db") && sentence.trim().lines().count() <= 3, "{what}: {sentence}");
            }
            Begun::Serves(mut child, client) => {
                served += 1;
                // it may have lost rows, or refuse to read some; it answers
                let rows = Stored::new(&client, &server.root()).rows().await;
                let is_alive = child.try_wait()?.is_none();
                child.kill()?;
                child.wait()?;
                isolation::forget(child.id());
                ensure!(is_alive, "{what}: {rows:?}");
            }
        }
        let log = server.log();
        ensure!(!log.contains("panicked"), "{what}: {log}");
        let check = Command::new(binary()?).arg("--root").arg(server.root()).arg("check").output()?;
        ensure!(!output_text(&check).contains("panicked") && check.status.code().is_some(), "{what}: {}", output_text(&check));
        unsound += u32::from(!check.status.success());
    }
    println!("{refused} damaged stores were refused, {served} served; `check` reports {unsound} of all");
    ensure!(refused > 0 && served > 0);
    Ok(())
}

/// How a start has ended.
enum Begun {
    Refused(String),
    Serves(Child, Client),
}

async fn begin(folder: &Path) -> Result<Begun> {
    let path = folder.join("refusal");
    let log = File::create(&path)?;
    let mut command = Command::new(binary()?);
    let mut child =
        command.arg("--config").arg(folder.join("config.toml")).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
    isolation::keep(child.id());
    let begin = Instant::now();
    loop {
        if child.try_wait()?.is_some() {
            isolation::forget(child.id());
            return Ok(Begun::Refused(fs::read_to_string(path)?));
        }
        if let Ok(client) = Client::connect(&folder.join("x.sock"), "default").await
            && client.version().await.is_ok()
        {
            return Ok(Begun::Serves(child, client));
        }
        if begin.elapsed() > Duration::from_secs(20) {
            child.kill()?;
            child.wait()?;
            isolation::forget(child.id());
            anyhow::bail!("it neither serves nor ends");
        }
        tokio::time::sleep(Duration::from_millis(5)).await; // the polling interval
    }
}

/// Copies the files of a store; what else is in the folder stays.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for name in ["meta.db", "meta.db-wal", "meta.db-shm"] {
        match fs::copy(from.join(name), to.join(name)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => match fs::remove_file(to.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            },
            copied => drop(copied?),
        }
    }
    Ok(())
}
