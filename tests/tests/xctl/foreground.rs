//! Containers in the foreground without a terminal, and mistakes.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use shim_tests::context::Context;
use shim_tests::operator::output_text;
use shim_tests::{rootfs, suite};
use tokio::io::AsyncWriteExt as _;

use crate::harness::{Child, Xctl};

pub(crate) async fn run_prints_and_exits_like_the_program(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let output = xctl.run(&["--rm"], &["sh", "-c", "echo hello; echo oops >&2; exit 3"])?;
    ensure!(output.status.code() == Some(3) && output.stdout == b"hello\n" && output.stderr == b"oops\n", "{output:?}");
    let output = xctl.run(&["--rm"], &["seq", "1", "200000"])?;
    ensure!(output.status.success() && output.stdout.len() == 1_288_895, "{} bytes", output.stdout.len());
    // whoever reads no more does not stop the container
    let command = xctl.container("run", &["--rm"], &["sh", "-c", "seq 1 200000; exit 4"])?;
    let mut child = Child::piped(&command)?;
    child.deafen();
    ensure!(child.status().await? == 4);
    xctl.leaves_nothing().await
}

pub(crate) async fn input_reaches_the_program_and_ends(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let mut child = Child::piped(&xctl.container("run", &["--rm", "--interactive"], &["wc", "-c"])?)?;
    child.stdin.take().context("piped")?.write_all(&vec![b'x'; 1_000_001]).await?;
    let line = child.line().await?;
    ensure!(child.status().await? == 0 && line.trim() == "1000001", "{line:?}");
    // without --interactive there is none to wait for
    let output = xctl.container("run", &["--rm"], &["cat"])?.stdin(Stdio::piped()).output()?;
    ensure!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    xctl.leaves_nothing().await
}

pub(crate) async fn options_reach_the_container(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let data = cx.folder().join("data");
    fs::create_dir(&data)?;
    fs::write(data.join("file"), "of the host\n")?;
    let volume = format!("{}:/mnt:ro", data.display());
    let script = "cat /mnt/file; echo x 2>/dev/null > /mnt/file || echo refused; echo $A $LENT $TERM; pwd; hostname; ls /sys/class/net; \
                  grep -c ' /tmp tmpfs ' /proc/mounts; touch /tmp/x && ls -A /tmp; ulimit -n";
    let flags = ["--rm", "-v", &volume, "--tmpfs", "/tmp:size=1m", "-e", "A=1", "-e", "LENT", "-w", "/root", "--hostname", "inside"];
    let output = xctl.run(&flags, &["sh", "-c", script])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(text == "of the host\nrefused\n1 borrowed\n/root\ninside\nlo\n1\nx\n1024\n", "{output:?}");
    let output = xctl.run(&["--rm", "--network", "host"], &["ls", "/sys/class/net"])?;
    let mut own: Vec<_> = fs::read_dir("/sys/class/net")?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    own.sort();
    ensure!(String::from_utf8_lossy(&output.stdout).lines().eq(own), "{output:?}");
    let output = xctl.run(&["--rm", "--memory", "32m", "--read-only"], &["sh", "-c", "tail /dev/zero; echo $?; touch /x || echo no"])?;
    ensure!(output.stdout == b"137\nno\n", "{output:?}");
    xctl.leaves_nothing().await
}

pub(crate) async fn users_are_those_of_the_container(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let root = cx.folder().join("root");
    rootfs::make(&root)?;
    fs::write(root.join("etc/group"), "root:x:0:\nstaff:x:50:user\n")?;
    for (user, expected) in
        [("user", "1000 1000 1000 50"), ("1000", "1000 1000 1000 50"), ("user:staff", "1000 50 50"), ("7:8", "7 8 8"), ("9", "9 0 0")]
    {
        let mut command = xctl.command(&["run", "--rm", "--rootfs"]);
        let output =
            command.arg(&root).args(xctl.place()).args(["--user", user, "sh", "-c", "echo $(id -u) $(id -g) $(id -G)"]).output()?;
        ensure!(String::from_utf8_lossy(&output.stdout).trim() == expected, "{user}: {output:?}");
    }
    // links that lead to files of the host lead to nothing in the container
    let (users, groups) = (cx.folder().join("users"), cx.folder().join("groups"));
    fs::write(&users, "daemon:x:1:1::/:\n")?;
    fs::write(&groups, "daemon:x:1:\n")?;
    for file in ["passwd", "group"] {
        fs::remove_file(root.join("etc").join(file))?;
    }
    std::os::unix::fs::symlink(&users, root.join("etc/passwd"))?;
    std::os::unix::fs::symlink(format!("../../../../../../../..{}", groups.display()), root.join("etc/group"))?;
    for user in ["daemon", "0:daemon"] {
        let mut command = xctl.command(&["run", "--rm", "--rootfs"]);
        let output = command.arg(&root).args(xctl.place()).args(["--user", user, "true"]).output()?;
        ensure!(output.status.code() == Some(125) && output_text(&output).contains("in the container's root file system"), "{output:?}");
    }
    xctl.leaves_nothing().await
}

pub(crate) async fn signals_are_passed_on(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    for (signal, status) in [(Signal::SIGTERM, 7), (Signal::SIGINT, 8), (Signal::SIGUSR1, 9)] {
        let script = "trap 'exit 7' TERM; trap 'exit 8' INT; trap 'exit 9' USR1; echo ready; sleep 1000 & wait";
        let mut child = Child::piped(&xctl.container("run", &["--rm"], &["sh", "-c", script])?)?;
        ensure!(child.line().await? == "ready");
        child.signal(signal)?;
        ensure!(child.status().await? == status, "{signal}");
    }
    xctl.leaves_nothing().await
}

pub(crate) async fn a_wait_outlasts_a_crash_of_the_daemon(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let xctl = Xctl::new(&cx)?;
    let script = "trap 'echo waited' USR1; echo ready; while ! read go; do :; done; echo $go; exit 5";
    let mut child = Child::piped(&xctl.container("run", &["--interactive"], &["sh", "-c", script])?)?;
    ensure!(child.line().await? == "ready");
    // it passes signals on once it waits
    child.signal(Signal::SIGUSR1)?;
    ensure!(child.line().await? == "waited");
    cx.crash_daemon().await?;
    child.stdin.take().context("piped")?.write_all(b"went on\n").await?;
    ensure!(child.line().await? == "went on" && child.status().await? == 5);
    let name = xctl.prints(&["ps", "--all", "--quiet"])?;
    xctl.prints(&["rm", name.trim()])?;
    xctl.leaves_nothing().await
}

pub(crate) async fn a_program_that_is_missing_leaves_nothing(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    for detach in [&[][..], &["--detach"]] {
        let output = xctl.run(&[&["--name", "nothing"], detach].concat(), &["/no/such/program"])?;
        let status = if detach.is_empty() { 127 } else { 1 };
        ensure!(output.status.code() == Some(status) && output_text(&output).contains("/no/such/program"), "{output:?}");
        xctl.leaves_nothing().await?;
    }
    Ok(())
}

pub(crate) async fn mistakes_are_refused_with_what_to_do(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    for (words, status, sentence) in [
        (&["logs", "none"][..], 1, "there is no container none in namespace"),
        (&["exec", "none", "true"], 125, "`xctl ps --all` lists containers"),
        (&["start", "none"], 1, "there is no container none"),
        (&["run"], 125, "--rootfs FOLDER"),
        (&["run", "--rootfs", "/nonexistent", "true"], 2, "No such file"),
        (&["run", "--memory", "lots", "image"], 2, "a number of bytes"),
        (&["run", "-v", "/nonexistent:/x", "image"], 2, "a folder must exist"),
        (&["run", "-t", "--rootfs", "/", "true"], 125, "is not a terminal"),
        (&["run", "--restart", "always", "--rootfs", "/", "true"], 125, "--restart needs --detach"),
        (&["run", "nosuchimage"], 125, "docker.io/library/nosuchimage:latest"),
        (&["--address", "/nonexistent.sock", "ps"], 1, "cannot connect to /nonexistent.sock"),
        (&["frobnicate"], 2, "unrecognized subcommand"),
        (&["inspect", "none"], 1, "there is neither a container nor an image none in namespace"),
        (&["export", "--output", "/dev/null", "busybox"], 1, "is not overwritten"),
        // port 1 has no registry, and nothing was transferred
        (&["pull", "127.0.0.1:1/app:1"], 1, "pull 127.0.0.1:1/app:1: "),
    ] {
        let mut command = Command::new(suite::xctl()?);
        if words[0] != "--address" {
            command.arg("--address").arg(cx.daemon().address());
        }
        let output = command.args(["--namespace", cx.client().namespace()]).args(words).stdin(Stdio::null()).output()?;
        let text = output_text(&output);
        ensure!(output.status.code() == Some(status) && text.contains(sentence), "{words:?}: {output:?}");
        ensure!(!text.contains("panicked") && !text.contains("a second"), "{text}");
    }
    ensure!(xctl.prints(&["events", "--help"])?.contains("Examples:\n  xctl events\n"));
    xctl.leaves_nothing().await
}

pub(crate) async fn completions_and_manual_pages_are_made(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    for shell in ["bash", "zsh", "fish"] {
        ensure!(xctl.prints(&["completion", shell])?.contains("detach-keys"), "{shell}");
    }
    let folder = cx.folder().join("man");
    fs::create_dir(&folder)?;
    xctl.prints(&["man", &folder.to_string_lossy()])?;
    let page = fs::read_to_string(folder.join("xctl-run.1"))?;
    ensure!(page.contains("tmpfs") && page.contains("xctl run \\-\\-rm") && folder.join("xctl.1").exists(), "{page}");
    // as `xctl completion bash | head` ends it
    let mut completion = xctl.command(&["completion", "bash"]);
    let mut child = completion.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    drop(child.stdout.take());
    let output = child.wait_with_output()?;
    ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    Ok(())
}
