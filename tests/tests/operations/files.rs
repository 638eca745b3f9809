//! Invalid configurations, stores and paths.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, ensure};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::operator::{Own, binary, output_text, printed};
use shim_tests::proc;

/// Checks that a command fails with one clear message.
async fn fails(command: Command, sentence: &str) -> Result<()> {
    let mut command = tokio::process::Command::from(command);
    let output =
        tokio::time::timeout(SOON, command.kill_on_drop(true).output()).await.with_context(|| format!("{command:?} does not exit"))??;
    let text = output_text(&output);
    ensure!(!output.status.success() && text.contains(sentence), "{command:?}: {:?}, not {sentence:?}", text);
    ensure!(text.lines().filter(|line| !line.contains("level=info")).count() == 1, "more than one line: {text}");
    Ok(())
}

pub(crate) async fn a_typo_in_the_configuration_is_refused_with_its_line(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    own.start().await?;
    let pid = own.pid();
    own.configure("[limits]\nconections = 7\n")?;
    let sentence = format!("{}/config.toml, line 5: unknown field `conections`", own.folder().display());
    fails(own.command(&["config", "check"])?, &sentence).await?;
    fails(own.command(&[])?, &sentence).await?;
    // the running daemon checks the configuration before it hands anything over
    proc::signal(pid.map_or(0, u32::cast_signed), nix::sys::signal::Signal::SIGHUP)?;
    eventually_true("the log reports it", SOON, || {
        own.log().contains("upgrade failed") && own.log().contains("unknown field `conections`")
    })
    .await?;
    own.client().await?;
    own.configure("[limits]\nconnections = 7\n")?;
    printed(&mut own.command(&["config", "check"])?)?;
    printed(&mut own.command(&["upgrade"])?)?;
    ensure!(own.ended().await?);
    own.client().await.map(drop)
}

pub(crate) async fn the_store_and_its_lock_are_for_root_alone(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let root = own.folder().join("root");
    let mode =
        |path: &Path| -> Result<u32> { Ok(fs::metadata(path).with_context(|| path.display().to_string())?.permissions().mode() & 0o7777) };
    for round in ["new", "there already"] {
        own.start().await?;
        let client = own.client().await?;
        client.create_container(&round.replace(' ', "-"), "io.containerd.x.v2", None, prost_types::Any::default()).await?;
        for name in ["lock", "meta.db", "meta.db-wal", "meta.db-shm"] {
            let path = root.join(name);
            ensure!(mode(&path)? == 0o600, "{round}: {name}: {:o}", mode(&path)?);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
        }
        let copy = cx.folder().join(format!("copy of {round}"));
        printed(own.command(&["backup"])?.arg(&copy))?;
        let state = own.folder().join("state");
        for (path, right) in [(&copy, 0o600), (&root, 0o711), (&state, 0o711), (&state.join("control.sock"), 0o600)] {
            ensure!(mode(path)? == right, "{round}: {}: {:o}", path.display(), mode(path)?);
        }
        // not SIGTERM, after which there is no log of the store
        proc::kill_hard(own.pid().map_or(0, u32::cast_signed));
        own.ended().await?;
    }
    Ok(())
}

pub(crate) async fn a_hangup_while_it_starts_is_an_upgrade_when_it_has(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let root = own.folder().join("root");
    fs::create_dir(&root)?;
    // which delays it for a moment
    let lock = fs::File::create(root.join("lock"))?;
    lock.try_lock()?;
    let client = {
        let starting = own.start();
        let hangs_up = async {
            let text = format!("{}/config.toml", cx.folder().join("own").display());
            let pid = eventually("it starts", SOON, async || {
                let waits = |pid: &i32| proc::mentions(*pid, &text) && fs::read_dir(format!("/proc/{pid}/fd")).is_ok();
                proc::all().into_keys().find(|pid| *pid != std::process::id().cast_signed() && waits(pid)).context("no process")
            })
            .await?;
            eventually("it waits for hangups", SOON, async || {
                let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
                let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).context("a line")?;
                ensure!(u64::from_str_radix(caught.trim(), 16)? & 1 == 1, "{caught}");
                Ok(())
            })
            .await?;
            proc::signal(pid, nix::sys::signal::Signal::SIGHUP)?;
            lock.unlock()?;
            Ok::<_, anyhow::Error>(())
        };
        let (started, hung_up) = tokio::join!(starting, hangs_up);
        hung_up?;
        started?
    };
    ensure!(own.ended().await?, "{}", own.log());
    client.version().await?;
    ensure!(own.log().contains("another process has taken over"), "{}", own.log());
    own.client().await.map(drop)
}

pub(crate) async fn the_default_configuration_can_be_used(cx: Context) -> Result<()> {
    let own = Own::new(&cx.folder().join("own"), "")?;
    let text = printed(&mut own.command(&["config", "default"])?)?;
    let file = cx.folder().join("default.toml");
    fs::write(&file, text)?;
    let message = printed(own.command(&["config", "check"])?.arg(&file))?;
    ensure!(message.contains("/run/x-manager/x-manager.sock"), "{message}");
    Ok(())
}

pub(crate) async fn a_store_of_a_newer_version_is_refused_and_left_alone(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    own.start().await?;
    // bytes 60 to 63 of an SQLite file are the version that its program has given it
    let root = own.folder().join("root");
    let (store, copy) = (root.join("meta.db"), root.join("copy"));
    printed(own.command(&["backup"])?.arg(&copy))?;
    proc::signal(own.pid().map_or(0, u32::cast_signed), nix::sys::signal::Signal::SIGTERM)?;
    ensure!(own.ended().await?);
    for entry in fs::read_dir(&root)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("meta.db-") {
            fs::remove_file(entry.path())?;
        }
    }
    let mut bytes = fs::read(&copy)?;
    ensure!(bytes.starts_with(b"SQLite format 3\0") && bytes.len() > 100);
    bytes[60..64].copy_from_slice(&99_u32.to_be_bytes());
    fs::write(&store, &bytes)?;
    let sentence = "is of version 99, from a newer x-manager";
    fails(own.command(&[])?, sentence).await?;
    fails(own.command(&["check"])?, sentence).await?;
    ensure!(fs::read(&store)? == bytes, "the store was changed");
    Ok(())
}

pub(crate) async fn a_socket_or_store_in_use_is_refused(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    own.start().await?;
    fails(own.command(&[])?, "is already in use by another x-manager").await?;
    let other = cx.folder().join("other");
    let other = Own::new(&other, "")?;
    let _other_process = UnixListener::bind(other.address())?;
    fails(other.command(&[])?, &format!("{} is already in use by another process", other.address().display())).await?;
    let third = Own::new(&cx.folder().join("third"), "")?;
    fs::write(third.address(), "precious")?;
    fails(third.command(&[])?, "exists and is not a socket").await?;
    ensure!(fs::read_to_string(third.address())? == "precious");
    fails(third.command(&["upgrade"])?, "cannot reach x-manager at").await?;
    own.client().await.map(drop)
}

pub(crate) async fn a_backup_of_a_busy_store_has_what_was_acknowledged(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let client = own.start().await?;
    let enough = AtomicBool::new(false);
    let writer = async {
        let mut count = 0;
        while !enough.load(Ordering::Relaxed) {
            client.create_container(&format!("c{count}"), "io.containerd.x.v2", None, prost_types::Any::default()).await?;
            count += 1;
        }
        Ok::<_, anyhow::Error>(count)
    };
    let backups = async {
        for number in 0..5 {
            let file = cx.folder().join(format!("copy{number}"));
            client.create_container(&format!("known{number}"), "io.containerd.x.v2", None, prost_types::Any::default()).await?;
            let mut command = tokio::process::Command::from(own.command(&["backup"])?);
            let output = command.arg(&file).output().await?;
            ensure!(output.status.success(), "{}", output_text(&output));
            // a folder in which the copy is the store
            let restored = Own::new(&cx.folder().join(format!("restored{number}")), "")?;
            fs::create_dir_all(restored.folder().join("root"))?;
            fs::copy(&file, restored.folder().join("root/meta.db"))?;
            printed(&mut restored.command(&["check"])?)?;
            ensure!(fs::read(&file)?.windows(6).any(|bytes| bytes == format!("known{number}").as_bytes()), "{number} is not in it");
        }
        enough.store(true, Ordering::Relaxed);
        Ok(())
    };
    let (written, ()) = tokio::try_join!(writer, backups)?;
    ensure!(written > 5, "{written}");
    fails(own.command(&["backup", &cx.folder().join("copy0").display().to_string()])?, "already exists").await?;
    printed(&mut own.command(&["check"])?).map(drop)
}

pub(crate) async fn an_invalid_command_line_is_refused_in_one_line(cx: Context) -> Result<()> {
    let own = Own::new(&cx.folder().join("own"), "")?;
    for (words, sentence) in [
        (&["--rot"][..], "unexpected argument '--rot'"),
        (&["upgrad"], "unrecognized subcommand 'upgrad'"),
        (&["publish"], "--topic"),
        (&["--group", "no such group"], "/etc/group"),
        (&["--root", "here"], "should be an absolute path"),
    ] {
        fails(own.command(words)?, sentence).await?;
    }
    let help = printed(&mut own.command(&["help"])?)?;
    ensure!(["--root", "upgrade", "backup"].iter().all(|word| help.contains(word)), "{help}");
    let mut short = Command::new(binary()?);
    let message = printed(short.arg("-c").arg(own.folder().join("config.toml")).args(["--group=root", "config", "check"]))?;
    ensure!(message.contains("can be used"), "{message}");
    let mut unprivileged = own.command(&[])?;
    unprivileged.uid(65534);
    fails(unprivileged, "x-manager needs root").await
}

pub(crate) async fn config_check_finds_what_a_start_refuses(cx: Context) -> Result<()> {
    let own = Own::new(&cx.folder().join("own"), "")?;
    let folder = own.folder().display().to_string();
    let long = format!("{folder}/{}", "x".repeat(120));
    fs::write(own.folder().join("file"), "precious")?;
    for (settings, sentence) in [
        (format!("[metrics]\naddress = \"unix://{long}\"\n"), "bytes; the maximum is 103"),
        (format!("[metrics]\naddress = \"unix://{folder}/x.sock\"\n"), "is configured for two sockets"),
        (format!("[metrics]\naddress = \"unix://{folder}/file\"\n"), "exists and is not a socket"),
        (format!("[metrics]\naddress = \"unix://{folder}/file/socket\"\n"), "file is a file"),
        ("[metrics]\naddress = \"203.0.113.1:1\"\n".to_owned(), "listen at tcp://203.0.113.1:1"),
        ("[metrics]\naddress = \"no-such-host:1\"\n".to_owned(), "/etc/hosts"),
        ("group = \"no such group\"\n".to_owned(), "/etc/group"),
    ] {
        own.configure(&settings)?;
        fails(own.command(&["config", "check"])?, sentence).await?;
        fails(own.command(&[])?, sentence).await?;
    }
    let mut own = own;
    own.configure("group = \"root\"\n[metrics]\naddress = \"localhost:19120\"\n")?;
    own.start().await?;
    tokio::net::TcpStream::connect("127.0.0.1:19120").await?;
    // a running daemon does not prevent the check
    printed(&mut own.command(&["config", "check"])?).map(drop)
}

pub(crate) async fn check_accepts_a_missing_store_and_reports_what_repairs_a_damaged_one(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let store = own.folder().join("root/meta.db");
    ensure!(printed(&mut own.command(&["check"])?)?.contains("does not exist yet"));
    fs::create_dir_all(own.folder().join("root"))?;
    fs::write(&store, "")?;
    ensure!(printed(&mut own.command(&["check"])?)?.contains("is sound"));
    let client = own.start().await?;
    for number in 0..100 {
        let spec = prost_types::Any { type_url: "t".to_owned(), value: vec![0; 10_000] };
        client.create_container(&format!("c{number}"), "io.containerd.x.v2", None, spec).await?;
    }
    ensure!(printed(&mut own.command(&["check"])?)?.contains("is sound"));
    proc::signal(own.pid().map_or(0, u32::cast_signed), nix::sys::signal::Signal::SIGTERM)?;
    ensure!(own.ended().await?);
    let mut bytes = fs::read(&store)?;
    bytes[4096..].fill(0xff);
    fs::write(&store, &bytes)?;
    for words in [&[][..], &["check"], &["config", "check"]] {
        let sentence = format!("metadata store {} is damaged; stop x-manager, put a copy that `x-manager backup`", store.display());
        fails(own.command(words)?, &sentence).await?;
    }
    Ok(())
}

pub(crate) async fn a_daemon_whose_terminal_is_closed_stops_and_does_not_upgrade(cx: Context) -> Result<()> {
    let own = Own::new(&cx.folder().join("own"), "")?;
    let serve = format!("exec {} --config {1}/config.toml 2>{1}/log", binary()?.display(), own.folder().display());
    let mut terminal = Command::new("script");
    let mut terminal =
        terminal.args(["-qfec", &serve, "/dev/null"]).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).spawn()?;
    let answers = eventually("it answers", SOON, async || own.client().await).await;
    terminal.kill()?;
    terminal.wait()?;
    answers?;
    eventually_true("it has stopped", SOON, || own.log().contains("stopping")).await?;
    ensure!(!own.log().contains("successor"), "{}", own.log());
    eventually("no process serves", SOON, async || {
        ensure!(own.client().await.is_err());
        Ok(())
    })
    .await
}
