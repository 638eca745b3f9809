//! A shim that is none: it runs a real one and passes everything on, but for one fault. See `src/conformance/faults.rs`.
//!
//! ```text
//! containerd ──start──▶ this ──start, with another address for events──▶ real shim
//!     │                   └─▶ proxy: clients' socket ◀─▶ the shim's socket, events of the shim ◀─▶ containerd
//!     └──calls──▶ proxy
//! ```

mod calls;
mod events;
mod stdout;

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context as _, Result};
use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message as _;
use shim_tests::bundle::read_address;

const PROXY: &str = "mitm-proxy";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().collect();
    let result = match (arguments.first().map(String::as_str), arguments.last().map(String::as_str)) {
        (Some(PROXY), _) => proxy(&arguments[1..]),
        (_, Some("start")) if env::var_os("TTRPC_ADDRESS").is_some() => start(&arguments[1..]),
        (_, Some("delete")) => delete(&arguments[1..]),
        _ => become_real(&arguments[1..]),
    };
    result.unwrap_or_else(|error| {
        eprintln!("man-in-the-middle: {error:#}");
        ExitCode::FAILURE
    })
}

/// What is written in a file beside this program.
fn order(name: &str) -> Result<String> {
    let path = env::current_exe()?.with_file_name(name);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

fn become_real(arguments: &[String]) -> Result<ExitCode> {
    Err(Command::new(order("real")?).args(arguments).exec().into())
}

fn delete(arguments: &[String]) -> Result<ExitCode> {
    let fault = order("fault")?;
    if fault == "delete-nothing" {
        io::stdout().write_all(&DeleteResponse { exit_status: 137, ..Default::default() }.write_to_bytes()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    if fault != "delete-137" {
        return become_real(arguments);
    }
    let output = Command::new(order("real")?).args(arguments).stderr(Stdio::inherit()).output()?;
    let mut answer = DeleteResponse::parse_from_bytes(&output.stdout)?;
    answer.exit_status = 137;
    io::stdout().write_all(&answer.write_to_bytes()?)?;
    Ok(if output.status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn start(arguments: &[String]) -> Result<ExitCode> {
    let fault = order("fault")?;
    let daemon = env::var("TTRPC_ADDRESS")?;
    let events_path = PathBuf::from(format!("{daemon}.{}", std::process::id()));
    let events = UnixListener::bind(&events_path)?;
    let mut input = Vec::new();
    io::stdin().read_to_end(&mut input)?;
    let mut real = Command::new(order("real")?)
        .args(arguments)
        .env("TTRPC_ADDRESS", &events_path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()?;
    let _it_need_not_read = real.stdin.take().map(|mut stdin| stdin.write_all(&input));
    let output = real.wait_with_output()?;
    if !output.status.success() {
        fs::remove_file(&events_path)?;
        io::stdout().write_all(&output.stdout)?;
        return Ok(ExitCode::FAILURE);
    }
    let socket = read_address(&output.stdout)?;
    let suffix = if fault == "no-group" { format!(".m{}", std::process::id()) } else { ".m".to_owned() };
    let own = PathBuf::from(format!("{}{suffix}", socket.display()));
    if UnixStream::connect(&own).is_ok() {
        fs::remove_file(&events_path)?;
    } else {
        let _of_one_that_is_dead = fs::remove_file(&own);
        let clients = UnixListener::bind(&own)?;
        let mode = if fault == "open-socket" { 0o666 } else { 0o600 };
        fs::set_permissions(&own, fs::Permissions::from_mode(mode))?;
        Command::new(env::current_exe()?)
            .arg0(PROXY)
            .args([&socket, &own, &events_path, Path::new(&daemon), &env::current_dir()?])
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(clients)))
            .stdout(Stdio::from(OwnedFd::from(events)))
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
    }
    let address = format!("unix://{}", own.display());
    match fault.as_str() {
        "no-address" => fs::remove_file("address")?,
        _ => fs::write("address", &address)?,
    }
    io::stdout()
        .write_all(String::from_utf8_lossy(&output.stdout).replace(&socket.display().to_string(), &own.display().to_string()).as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// The proxy: as long as the shim lives.
fn proxy(arguments: &[String]) -> Result<ExitCode> {
    let [real, own, events, daemon, bundle] = arguments else { anyhow::bail!("arguments of the proxy") };
    let fault = order("fault")?;
    let take = |fd: io::Result<OwnedFd>| fd.map(UnixListener::from);
    let clients = take(std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned())?;
    let publishers = take(std::os::fd::AsFd::as_fd(&io::stdout()).try_clone_to_owned())?;
    if fault == "leak" {
        // it passes for the shim, so that its own descriptors are looked at
        fs::write(Path::new(bundle).join("shim.pid"), std::process::id().to_string())?;
    }
    let shared = calls::Shared::new(&fault, Path::new(real), Path::new(own));
    thread::spawn(move || calls::accept(&clients, &shared));
    let (daemon, in_thread) = (PathBuf::from(daemon), fault.clone());
    thread::spawn(move || events::accept(&publishers, &daemon, &in_thread));
    while UnixStream::connect(real).is_ok() {
        thread::sleep(Duration::from_millis(50)); // whoever leaves tells nobody
    }
    let _somebody_was_faster = (fs::remove_file(own), fs::remove_file(events));
    Ok(ExitCode::SUCCESS)
}
