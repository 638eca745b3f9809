//! A proxy in place of a shim: it runs the real one and forwards everything, except for one fault. See `src/conformance/faults.rs`.
//!
//! ```text
//! containerd ──start──▶ this ──start, with another address for events──▶ real shim
//!     │                   └─▶ proxy: clients' socket ◀─▶ the shim's socket, events of the shim ◀─▶ containerd
//!     └──calls──▶ proxy
//! ```
//! Each place has a table of its faults: [`requests`], [`answers`], [`events`], and here [`start`] and [`delete`].

mod answers;
mod calls;
mod events;
mod requests;
mod stdout;

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::BootstrapResult;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::Message;
use shim_tests::bundle::read_address;

const PROXY: &str = "mitm-proxy";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().collect();
    let result = match (arguments.first().map(String::as_str), arguments.last().map(String::as_str)) {
        (Some(PROXY), _) => proxy(&arguments[1..]),
        (_, Some("start")) if env::var_os("TTRPC_ADDRESS").is_some() => start(&arguments[1..]),
        (_, Some("start")) => bootstrap(&arguments[1..]),
        (_, Some("delete")) => delete(&arguments[1..]),
        _ => become_real(&arguments[1..]),
    };
    result.unwrap_or_else(|error| {
        eprintln!("man-in-the-middle: {error:#}");
        ExitCode::FAILURE
    })
}

/// The content of a file beside this program.
fn order(name: &str) -> Result<String> {
    let path = env::current_exe()?.with_file_name(name);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

fn become_real(arguments: &[String]) -> Result<ExitCode> {
    Err(Command::new(order("real")?).args(arguments).exec().into())
}

/// The command in the bundle's folder.
fn delete(arguments: &[String]) -> Result<ExitCode> {
    let dead = || DeleteResponse { exit_status: 137, ..Default::default() };
    match order("fault")?.as_str() {
        "delete-nothing" => say(&dead()),
        "delete-no-member" if fs::read_to_string("config.json")?.contains("runc.v2.group") => say(&dead()),
        "delete-137" => {
            let mut answer = DeleteResponse::parse_from_bytes(&output_of_real(arguments, &[])?.stdout)?;
            answer.exit_status = 137;
            say(&answer)
        }
        "delete-the-shim" => {
            kill(Pid::from_raw(fs::read_to_string("shim.pid")?.trim().parse()?), Signal::SIGKILL)?;
            become_real(arguments)
        }
        "delete-for-ever" => {
            fs::write(mark_of(arguments)?, "")?;
            become_real(arguments)
        }
        "late-unmount" => {
            let output = output_of_real(arguments, &[])?;
            let script = "mount --bind rootfs rootfs; (sleep 1; umount rootfs) </dev/null >/dev/null 2>&1 &";
            Command::new("/bin/sh").args(["-c", script]).env_clear().env("PATH", "/bin:/usr/bin").status()?;
            io::stdout().write_all(&output.stdout)?;
            Ok(ExitCode::SUCCESS)
        }
        _ => become_real(arguments),
    }
}

/// The file that records that the container of a command was deleted, beside the bundles.
fn mark_of(arguments: &[String]) -> Result<PathBuf> {
    let id = arguments.iter().skip_while(|argument| *argument != "-id").nth(1).context("no id")?;
    Ok(Path::new("..").join(format!("deleted-{id}")))
}

fn say(answer: &impl Message) -> Result<ExitCode> {
    io::stdout().write_all(&answer.write_to_bytes()?)?;
    Ok(ExitCode::SUCCESS)
}

/// `start` as containerd from 2.3 on runs it: the shim itself belongs to the client alone.
fn bootstrap(arguments: &[String]) -> Result<ExitCode> {
    if order("fault")? != "wrong-protocol" {
        return become_real(arguments);
    }
    let mut input = Vec::new();
    io::stdin().read_to_end(&mut input)?;
    let mut result = BootstrapResult::parse_from_bytes(&output_of_real(arguments, &input)?.stdout)?;
    result.protocol = "grpc".to_owned();
    say(&result)
}

/// Runs the real one, which reports its own errors.
fn output_of_real(arguments: &[String], input: &[u8]) -> Result<Output> {
    let mut real = Command::new(order("real")?);
    real.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut real = real.spawn()?;
    let _it_need_not_read = real.stdin.take().map(|mut stdin| stdin.write_all(input));
    let output = real.wait_with_output()?;
    ensure!(output.status.success(), "the real shim: {}", output.status);
    Ok(output)
}

/// The output of `start` for input that it refuses.
fn complaint(fault: &str, arguments: &[String], input: &[u8]) -> Result<Option<&'static str>> {
    let is_about_options = input.windows(OPTIONS.len()).any(|bytes| bytes == OPTIONS.as_bytes());
    Ok(match fault {
        "no-options" if is_about_options => Some("no options are taken"),
        "delete-for-ever" if mark_of(arguments)?.exists() => Some("this name is used up"),
        _ => None,
    })
}

const OPTIONS: &str = "containerd.runc.v1.Options";

fn start(arguments: &[String]) -> Result<ExitCode> {
    let fault = order("fault")?;
    let mut input = Vec::new();
    io::stdin().read_to_end(&mut input)?;
    if let Some(complaint) = complaint(&fault, arguments, &input)? {
        anyhow::bail!(complaint);
    }
    if fault == "chatty-debug" && arguments.iter().any(|argument| argument == "-debug") {
        eprintln!("it is about to start");
    }
    let daemon = env::var("TTRPC_ADDRESS")?;
    let events_path = PathBuf::from(format!("{daemon}.{}", std::process::id()));
    let events = UnixListener::bind(&events_path)?;
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
    // a shim that replaces a killed one has a proxy of its own
    let number = if fault == "no-group" { u64::from(std::process::id()) } else { fs::metadata(&socket)?.ino() };
    let own = PathBuf::from(format!("{}.m{number}", socket.display()));
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

/// Runs the proxy for as long as the shim runs.
fn proxy(arguments: &[String]) -> Result<ExitCode> {
    let [real, own, events, daemon, bundle] = arguments else { anyhow::bail!("arguments of the proxy") };
    let fault = order("fault")?;
    let take = |fd: io::Result<OwnedFd>| fd.map(UnixListener::from);
    let clients = take(std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned())?;
    let publishers = take(std::os::fd::AsFd::as_fd(&io::stdout()).try_clone_to_owned())?;
    if fault == "leak" {
        // tests take this process for the shim and inspect its descriptors
        fs::write(Path::new(bundle).join("shim.pid"), std::process::id().to_string())?;
    }
    let shared = calls::Shared::new(&fault, real, own);
    let (daemon, for_events) = (PathBuf::from(daemon), Arc::clone(&shared));
    thread::spawn(move || events::accept(&publishers, &daemon, &for_events));
    thread::spawn(move || calls::accept(&clients, &shared));
    // with `ghost`, the proxy stays until the socket of the killed shim is removed
    let number = |path: &str| fs::metadata(path).map(|about| about.ino()).ok();
    let first = number(real);
    while number(real) == first && UnixStream::connect(real).is_ok() || fault == "ghost" && Path::new(real).exists() {
        thread::sleep(Duration::from_millis(50)); // an exiting process notifies no one
    }
    let _somebody_was_faster = (fs::remove_file(own), fs::remove_file(events));
    Ok(ExitCode::SUCCESS)
}
