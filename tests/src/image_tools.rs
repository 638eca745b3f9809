//! Programs of other projects that keep images: a registry on loopback, skopeo and umoci.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use anyhow::{Context as _, Result, ensure};

use crate::eventually::{SOON, eventually};
use crate::{isolation, suite};

/// Runs `tools/fetch-image-tools`, which does nothing when nothing is missing.
pub fn fetch() -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/fetch-image-tools");
    let status = Command::new(&script).status().with_context(|| format!("run {}", script.display()))?;
    ensure!(status.success(), "{} failed: {status}", script.display());
    Ok(())
}

/// One of these programs.
pub fn program(name: &str) -> PathBuf {
    suite::cache().join("image-tools/bin").join(name)
}

/// Debian's registry on a port of loopback, with its files in a folder, until it is dropped.
#[derive(Debug)]
pub struct Registry {
    port: u16,
    process: Child,
}

impl Registry {
    /// Starts it and waits until it accepts connections.
    pub async fn start(folder: &Path) -> Result<Self> {
        fetch()?;
        fs::create_dir_all(folder)?;
        // free at this moment; the registry names no port that it chose itself
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = serde_json::json!({
            "version": 0.1,
            "log": { "level": "warn", "accesslog": { "disabled": true } },
            "storage": { "filesystem": { "rootdirectory": folder.join("files") }, "delete": { "enabled": true } },
            "http": { "addr": format!("127.0.0.1:{port}") },
        });
        // which is YAML too
        fs::write(folder.join("config.yml"), config.to_string())?;
        let log = File::create(folder.join("log"))?;
        let process = Command::new(program("docker-registry"))
            .arg("serve")
            .arg(folder.join("config.yml"))
            .env_clear()
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start docker-registry")?;
        isolation::keep(process.id());
        let registry = Self { port, process };
        eventually("the registry accepts connections", SOON, async || Ok(TcpStream::connect(("127.0.0.1", port)).map(drop)?))
            .await
            .with_context(|| fs::read_to_string(folder.join("log")).unwrap_or_default())?;
        Ok(registry)
    }

    /// The name of an image there.
    pub fn image(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}", self.port)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _already_dead = self.process.kill();
        let _already_reaped = self.process.wait();
        isolation::forget(self.process.id());
    }
}

/// A port of loopback that leads to another one, and holds back what comes from there after a number of bytes, until it is released.
#[derive(Debug)]
pub struct HeldPort {
    port: u16,
    state: Arc<(Mutex<Held>, Condvar)>,
}

#[derive(Debug)]
struct Held {
    left: usize,
    is_holding: bool,
    is_released: bool,
}

impl HeldPort {
    /// Leads to `port`.
    pub fn new(port: u16, after_bytes: usize) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let held = Held { left: after_bytes, is_holding: false, is_released: false };
        let this = Self { port: listener.local_addr()?.port(), state: Arc::new((Mutex::new(held), Condvar::new())) };
        let state = Arc::clone(&this.state);
        // it ends with the test's process
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let state = Arc::clone(&state);
                thread::spawn(move || serve(&client, port, &state));
            }
        });
        Ok(this)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether bytes are held back now.
    pub fn is_holding(&self) -> bool {
        self.state.0.lock().expect("no panic under this lock").is_holding
    }

    /// Lets everything pass from now on.
    pub fn release(&self) {
        self.state.0.lock().expect("no panic under this lock").is_released = true;
        self.state.1.notify_all();
    }
}

impl Drop for HeldPort {
    fn drop(&mut self) {
        self.release();
    }
}

fn serve(client: &TcpStream, port: u16, state: &(Mutex<Held>, Condvar)) -> io::Result<()> {
    let server = TcpStream::connect(("127.0.0.1", port))?;
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || {
        let _either_has_gone = io::copy(&mut from, &mut to);
        let _already_closed = to.shutdown(Shutdown::Both);
    });
    let (mut from, mut to) = (server, client.try_clone()?);
    let mut buffer = [0; 16 << 10];
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return to.shutdown(Shutdown::Both);
        }
        let mut held = state.0.lock().expect("no panic under this lock");
        held.left = held.left.saturating_sub(count);
        while held.left == 0 && !held.is_released {
            held.is_holding = true;
            held = state.1.wait(held).expect("no panic under this lock");
        }
        drop(held);
        to.write_all(&buffer[..count])?;
    }
}
