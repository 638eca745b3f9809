//! x-manager under a service manager.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::GetContainerRequest;
use shim_tests::container::Stdio;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::operator::{Own, binary, printed};
use shim_tests::proc;

fn received(manager: &UnixDatagram) -> Result<String> {
    let mut bytes = [0; 1000];
    let count = loop {
        match manager.recv(&mut bytes) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            count => break count?,
        }
    };
    Ok(String::from_utf8_lossy(&bytes[..count]).into_owned())
}

pub(crate) async fn the_service_manager_is_notified_of_readiness_and_main_pid(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let address = cx.folder().join("notify");
    let manager = UnixDatagram::bind(&address)?;
    manager.set_read_timeout(Some(SOON))?;
    let mut command = own.command(&[])?;
    command.env("NOTIFY_SOCKET", &address);
    own.start_as(command).await?;
    ensure!(received(&manager)?.starts_with("READY=1\n"));
    let pid = printed(&mut own.command(&["upgrade"])?)?.split(' ').nth(1).context("a pid")?.to_owned();
    let notified = [received(&manager)?, received(&manager)?];
    ensure!(notified.contains(&format!("MAINPID={pid}")) && notified.iter().any(|line| line.starts_with("READY=1\n")), "{notified:?}");
    ensure!(own.ended().await?, "{}", own.log());
    proc::signal(pid.parse()?, nix::sys::signal::Signal::SIGTERM)?;
    ensure!(received(&manager)? == "STOPPING=1");
    eventually_true("it has exited", SOON, || !proc::is_alive(pid.parse().unwrap_or(0))).await
}

pub(crate) async fn sockets_of_the_service_manager_are_served_and_kept(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let listener = UnixListener::bind(own.address())?;
    // a client that connects before the daemon runs is served too
    let early = UnixStream::connect(own.address())?;
    let binary = binary()?.display().to_string();
    let activated = |own: &Own| {
        let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&0 < /dev/null";
        let mut command = Command::new("sh");
        command.args(["-c", script, &binary, "--config"]).arg(own.folder().join("config.toml"));
        listener.try_clone().map(|listener| command.stdin(OwnedFd::from(listener))).map(|_| ()).map(|()| command)
    };
    own.start_as(activated(&own)?).await?;
    let shims = proc::open_files(own.pid().context("it runs")?.cast_signed())?;
    ensure!(shims.len() > 5, "{shims:?}");
    let mut early_end = early.try_clone()?;
    early_end.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")?;
    early_end.set_read_timeout(Some(SOON))?;
    let mut frame = [0; 9];
    early_end.read_exact(&mut frame)?;
    ensure!(frame[3] == 4, "no settings: {frame:?}");
    drop((early, early_end));
    // when it is stopped, its socket stays, and a client waits for the next daemon
    proc::signal(own.pid().context("it runs")?.cast_signed(), nix::sys::signal::Signal::SIGTERM)?;
    ensure!(own.ended().await?);
    let address = own.address();
    let waiting = std::thread::spawn(move || UnixStream::connect(address).is_ok());
    own.start_as(activated(&own)?).await?;
    ensure!(waiting.join().expect("no panic"));
    // the daemon reports a socket that the configuration does not name
    own.configure("").and_then(|()| {
        std::fs::write(
            own.folder().join("other.toml"),
            format!("root = \"{0}/r2\"\nstate = \"{0}/s2\"\naddress = \"{0}/y.sock\"\n", own.folder().display()),
        )
        .map_err(Into::into)
    })?;
    let mut command = activated(&own)?;
    command.arg("--config").arg(own.folder().join("other.toml"));
    let output = command.output()?;
    ensure!(shim_tests::operator::output_text(&output).contains("that the configuration does not name"), "{output:?}");
    Ok(())
}

pub(crate) async fn a_stop_lets_calls_end_and_containers_run(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let gate = cx.gate()?;
    gate.hold("create")?;
    let local = tokio::task::LocalSet::new();
    local
        .run_until(async {
            let running = cx.container(&["sleep", "1000"]).id("running").start().await?;
            let slow = cx.container(&["sleep", "1000"]).id("slow").stdio(Stdio::OUTPUT).runtime_binary(&gate.binary());
            let slow = tokio::task::spawn_local(slow.create());
            gate.held("create").await?;
            let pid = cx.daemon().pid().context("a daemon")?.cast_signed();
            proc::signal(pid, nix::sys::signal::Signal::SIGTERM)?;
            eventually("it is stopping", SOON, async || {
                ensure!(cx.daemon().log().contains("stopping"));
                Ok(())
            })
            .await?;
            gate.release("create")?;
            let slow = slow.await??;
            cx.daemon().stop()?;
            cx.revive_daemon().await?;
            slow.destroy().await?;
            running.destroy().await?;
            Ok::<_, anyhow::Error>(())
        })
        .await?;
    cx.leaves_nothing().await
}

pub(crate) async fn metrics_are_served_where_they_are_wanted(cx: Context) -> Result<()> {
    let folder = cx.folder().join("own");
    let mut own = Own::new(&folder, &format!("[metrics]\naddress = \"unix://{}/metrics.sock\"\n", folder.display()))?;
    own.start().await?;
    let ask = |request: &str| -> Result<String> {
        let mut socket = UnixStream::connect(folder.join("metrics.sock"))?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        socket.write_all(request.as_bytes())?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let of_calls = [
        "x_manager_calls_total{method=\"/containerd.services.containers.v1.Containers/Get\",code=\"NotFound\"} 1",
        "x_manager_calls_total{method=\"/containerd.services.version.v1.Version/Version\",code=\"Ok\"} ",
        "x_manager_calls_total{method=\"other\",code=\"Unimplemented\"} 1",
        "x_manager_call_seconds_bucket{method=\"/containerd.services.containers.v1.Containers/Get\",le=\"+Inf\"} 1",
        "x_manager_calls_under_way 0",
        "x_manager_event_queue_bytes 0",
        "x_manager_store_jobs_total{kind=\"write\"} ",
        "x_manager_store_queue{kind=\"read\"} 0",
        "x_manager_store_bytes{file=\"meta\"} ",
    ];
    for _process in 0..2 {
        let client = own.client().await?;
        let get = client.request(GetContainerRequest { id: "none".to_owned() });
        ensure!(client.api().containers().get(get).await.is_err());
        ensure!(client.unserved().await.is_err());
        let answer = ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
        ensure!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        for line in
            ["x_manager_tasks{phase=\"live\"} 0", "# TYPE x_manager_events_total counter", "process_open_fds "].into_iter().chain(of_calls)
        {
            ensure!(answer.contains(line), "no {line} in {answer}");
        }
        ensure!(ask("POST / HTTP/1.1\r\n\r\n")?.starts_with("HTTP/1.1 405 "));
        printed(&mut own.command(&["upgrade"])?)?;
    }
    Ok(())
}
