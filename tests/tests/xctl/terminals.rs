//! Containers with a terminal, on a terminal.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::Command;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, ensure};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::Signal;
use nix::sys::termios::{LocalFlags, tcgetattr};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};

use crate::harness::{Child, Xctl};

/// A terminal, with what was shown on it.
struct Terminal {
    keyboard: File,
    /// The end that programs have; its modes are looked at.
    end: File,
    shown: Arc<Mutex<String>>,
}

impl Terminal {
    fn new() -> Result<Self> {
        let size = Winsize { ws_row: 33, ws_col: 111, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None)?;
        let (keyboard, end) = (File::from(pair.master), File::from(pair.slave));
        let shown = Arc::new(Mutex::new(String::new()));
        let (mut screen, text) = (keyboard.try_clone()?, Arc::clone(&shown));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = screen.read(&mut buffer) {
                text.lock().expect("no panic under this lock").push_str(&String::from_utf8_lossy(&buffer[..length]));
            }
        });
        Ok(Self { keyboard, end, shown })
    }

    fn run(&self, command: Command) -> Result<Child> {
        let end = || self.end.try_clone();
        Child::spawn(&command, end()?.into(), end()?.into(), end()?.into())
    }

    fn text(&self) -> String {
        self.shown.lock().expect("no panic under this lock").clone()
    }

    async fn shows(&self, text: &str) -> Result<()> {
        eventually(format!("{text:?} is shown"), SOON, async || {
            let shown = self.text();
            ensure!(shown.contains(text), "{shown:?}");
            Ok(())
        })
        .await
    }

    async fn types(&mut self, text: &str) -> Result<()> {
        Ok(self.keyboard.write_all(text.as_bytes())?)
    }

    fn is_raw(&self) -> Result<bool> {
        Ok(!tcgetattr(&self.end)?.local_flags.contains(LocalFlags::ICANON))
    }

    /// Its size is changed from outside, as by a window.
    fn resize(&self, rows: &str, columns: &str) -> Result<()> {
        let status = Command::new("stty").args(["rows", rows, "cols", columns]).stdin(self.end.try_clone()?).status()?;
        ensure!(status.success(), "stty: {status}");
        Ok(())
    }
}

pub(crate) async fn a_terminal_is_passed_through_resized_and_restored(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let mut terminal = Terminal::new()?;
    let script = "trap 'echo now $(stty size)' WINCH; echo size $(stty size) $TERM; \
                  while :; do read line && echo got $line; test \"$line\" = end && exit 4; done";
    let mut child = terminal.run(xctl.container("run", &["--rm", "-it"], &["sh", "-c", script])?)?;
    terminal.shows("size 33 111 xterm").await?;
    ensure!(terminal.is_raw()?);
    terminal.resize("22", "77")?;
    child.signal(Signal::SIGWINCH)?;
    // a shell that waits for a child runs the trap later
    eventually("the size has arrived", SOON, async || {
        terminal.keyboard.write_all(b"x\n")?;
        ensure!(terminal.text().contains("now 22 77"), "{:?}", terminal.text());
        Ok(())
    })
    .await?;
    terminal.types("end\n").await?;
    let status = child.status().await?;
    ensure!(status == 4 && terminal.text().contains("got end"), "{status}: {:?}", terminal.text());
    ensure!(!terminal.is_raw()?);
    xctl.leaves_nothing().await
}

pub(crate) async fn keys_detach_and_attach_shows_it_again(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let mut terminal = Terminal::new()?;
    let script = "echo ready; while read line; do echo got $line; test $line = end && exit 4; done";
    let mut child = terminal.run(xctl.container("run", &["--name", "shell", "-it"], &["sh", "-c", script])?)?;
    terminal.shows("ready").await?;
    terminal.types("one\n").await?;
    terminal.shows("got one").await?;
    terminal.types("\u{10}\u{11}").await?;
    let status = child.status().await?;
    ensure!(status == 0 && !terminal.is_raw()?, "{status}");
    ensure!(xctl.prints(&["ps"])?.contains("shell"));
    let mut child = terminal.run(xctl.command(&["attach", "shell"]))?;
    eventually_true("the terminal is raw", SOON, || terminal.is_raw().is_ok_and(|raw| raw)).await?;
    terminal.types("two\n").await?;
    terminal.shows("got two").await?;
    terminal.types("end\n").await?;
    let status = child.status().await?;
    ensure!(status == 4, "{status}: {:?}", terminal.text());
    // it can be started again in the foreground
    let mut child = terminal.run(xctl.command(&["start", "--attach", "shell"]))?;
    eventually_true("the terminal is raw", SOON, || terminal.is_raw().is_ok_and(|raw| raw)).await?;
    terminal.types("end\n").await?;
    ensure!(child.status().await? == 4);
    xctl.prints(&["rm", "shell"])?;
    xctl.leaves_nothing().await
}

pub(crate) async fn a_detached_terminal_can_be_attached_to_and_logged(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let script = "echo ready; while read line; do echo got $line; test $line = end && exit 4; done";
    let output = xctl.run(&["--name", "shell", "--detach", "-it"], &["sh", "-c", script])?;
    ensure!(output.status.success(), "{output:?}");
    let mut terminal = Terminal::new()?;
    let mut first = terminal.run(xctl.command(&["attach", "shell"]))?;
    eventually_true("the terminal is raw", SOON, || terminal.is_raw().is_ok_and(|raw| raw)).await?;
    terminal.types("one\n").await?;
    terminal.shows("got one").await?;
    terminal.types("\u{10}\u{11}").await?;
    ensure!(first.status().await? == 0);
    let mut terminal = Terminal::new()?;
    let mut exec = terminal.run(xctl.command(&["exec", "-it", "shell", "sh"]))?;
    terminal.types("test -t 0 && echo $((20+3)); exit 6\n").await?;
    terminal.shows("23").await?;
    ensure!(exec.status().await? == 6);
    let mut second = terminal.run(xctl.command(&["attach", "shell"]))?;
    eventually_true("the terminal is raw", SOON, || terminal.is_raw().is_ok_and(|raw| raw)).await?;
    terminal.types("end\n").await?;
    let status = second.status().await?;
    ensure!(status == 4, "{status}: {:?}", terminal.text());
    let logs = xctl.prints(&["logs", "shell"])?;
    ensure!(["ready", "got one", "got end"].iter().all(|line| logs.contains(line)), "{logs:?}");
    xctl.prints(&["rm", "shell"]).context("it has exited")?;
    xctl.leaves_nothing().await
}
