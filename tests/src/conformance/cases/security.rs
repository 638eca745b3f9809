//! Access to a shim from outside, and to the host from a container.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use serde_json::json;

use super::{Streams, sleeper, start_through, text};
use crate::bundle::leave;
use crate::clauses;
use crate::conformance::Case;
use crate::eventually::{SOON, eventually};
use crate::proc;
use crate::programs;
use crate::spec::Spec;
use crate::stand::Stand;
use crate::suite;
use crate::ttrpc::refusal;

pub(super) fn cases() -> Vec<Case> {
    clauses![security:
        "X1" => sockets_are_for_root_alone;
        "X2" => a_container_has_three_descriptors;
        "X3" => a_container_does_not_get_its_log_file_itself;
        "X4" => no_secret_of_the_daemon_reaches_the_runtime;
        "X5" => a_container_does_not_inherit_the_shims_scheduling_and_limits;
        "X6" => a_container_cannot_write_to_a_host_program;
        "X7" => masked_paths_are_masked_for_init_and_execs;
    ]
}

async fn sockets_are_for_root_alone(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    let socket = container.task.socket();
    let about = fs::metadata(socket).with_context(|| text(socket))?;
    ensure!(about.file_type().is_socket() && about.uid() == 0, "{}", socket.display());
    ensure!(about.mode() & 0o077 == 0, "{}: mode {:o}", socket.display(), about.mode() & 0o777);
    let folder = fs::symlink_metadata(socket.parent().context("a folder")?)?;
    ensure!(folder.is_dir() && folder.mode() & 0o022 == 0 && folder.uid() == 0, "its folder: mode {:o}", folder.mode() & 0o7777);
    // every listening socket of the shim has a path that only root can reach
    let unix = fs::read_to_string("/proc/net/unix")?;
    for (number, target) in proc::open_files(container.shim_pid()?)? {
        let target = target.display().to_string();
        let Some(inode) = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) else { continue };
        let line = unix.lines().find(|line| line.split_whitespace().nth(6) == Some(inode));
        // flags 00010000: it listens
        let Some(line) = line.filter(|line| line.contains(" 00010000 ")) else { continue };
        let path = line.split_whitespace().nth(7).unwrap_or("@");
        ensure!(!path.starts_with('@'), "descriptor {number} listens on an abstract socket: {line}");
        ensure!(fs::metadata(path)?.mode() & 0o077 == 0, "descriptor {number} can be reached by other users: {line}");
    }
    container.shut_down().await.map(drop)
}

/// The daemon leaks a descriptor into the shim, and a file gets the output.
async fn a_container_has_three_descriptors(stand: Stand) -> Result<()> {
    let log = stand.folder().join("out.log");
    let uri = format!("file://{}", log.display());
    let bundle = stand.bundle("c1", &["sleep", "1000"]).stdio("", &uri, &uri);
    let task = start_through(&stand, &bundle, "exec 9</etc/passwd; exec \"$@\"").await?;
    let container = bundle.run_in(&task).await?;
    let exec = api::ExecProcessRequest { stdout: uri.clone(), stderr: uri, ..container.bundle.exec_request("e", &["sleep", "1000"]) };
    container.task.exec(&exec).await?;
    let exec = container.task.start("c1", "e").await?;
    for pid in [container.pid, exec] {
        let files = files_of_the_program(pid.cast_signed()).await?;
        ensure!(files.len() == 3, "{files:?}");
    }
    container.shut_down().await.map(drop)
}

/// The targets of a process's descriptors, once it is the program itself.
async fn files_of_the_program(pid: i32) -> Result<Vec<String>> {
    eventually("it is the program itself", SOON, async || {
        let command = proc::Process::read(pid)?.command;
        ensure!(command == "sleep 1000", "{command}");
        Ok(())
    })
    .await?;
    Ok(proc::open_files(pid)?.values().map(|target| target.display().to_string()).collect())
}

/// Else it could truncate what it has written, and change its mode.
async fn a_container_does_not_get_its_log_file_itself(stand: Stand) -> Result<()> {
    let log = stand.folder().join("out.log");
    fs::write(&log, "before\n")?;
    fs::set_permissions(&log, fs::Permissions::from_mode(0o640))?;
    let uri = format!("file://{}", log.display());
    let script = "chmod 777 /proc/self/fd/1; echo x > /dev/stdout; echo y; exit 3";
    let container = stand.bundle("c1", &["sh", "-c", script]).stdio("", &uri, &uri).run().await?;
    ensure!(container.finish().await? == 3);
    leave(&container.task, container.shim_pid()?, "c1").await?;
    let written = fs::read_to_string(&log)?;
    ensure!(written.starts_with("before\n") && written.ends_with("y\n"), "{written:?}");
    ensure!(fs::metadata(&log)?.mode() & 0o777 == 0o640, "its mode is changed");
    Ok(())
}

/// An OCI runtime that writes its environment to a file, and fails.
async fn no_secret_of_the_daemon_reaches_the_runtime(stand: Stand) -> Result<()> {
    let runtime = programs::script(stand.folder(), "runtime", "#!/bin/sh\n/usr/bin/env > $0.environment\nexit 1\n")?;
    let bundle = stand.bundle("c1", &["true"]).runtime(&runtime);
    let task = bundle.shim().await?;
    drop(refusal(task.create(&bundle.request()).await)?);
    leave(&task, bundle.shim_pid()?, "c1").await?;
    let environment = fs::read_to_string(runtime.with_extension("environment"))?;
    ensure!(environment.contains("PATH="), "{environment}");
    for secret in ["SECRET_OF_THE_DAEMON", "GOMAXPROCS", "TTRPC_ADDRESS", "NOTIFY_SOCKET"] {
        ensure!(!environment.contains(secret), "{secret} is there: {environment}");
    }
    Ok(())
}

/// A container that has the OCI runtime's own program started once more, inside, opens it, and writes to it when it has ended.
async fn a_container_cannot_write_to_a_host_program(stand: Stand) -> Result<()> {
    // of a copy, since the installed runtime may be an old one
    let (runtime, programs) = match stand.runtime_program() {
        Ok(program) => {
            let copy = stand.folder().join(program.file_name().context("a file")?);
            programs::copy(&program, &copy)?;
            (copy.clone(), vec![copy, stand.binary().to_owned()])
        }
        // the shim's own
        Err(_) => (stand.runtime(), vec![stand.binary().to_owned()]),
    };
    let before = programs.iter().map(fs::read).collect::<Result<Vec<_>, _>>()?;
    let streams = Streams::new(&stand, "io")?;
    let write = "while [ -e $p ]; do :; done; for i in 1 2 3 4 5 6 7 8 9; do (echo x >>/proc/self/fd/3); done; echo tried";
    let attack = format!(
        "mkfifo /tmp/config.json; echo begun; while :; do for p in /proc/[0-9]*; do case $(readlink $p/exe) in */busybox|'') ;; \
         *) (exec 3<$p/exe || exit; echo found; {write});; esac; done; done"
    );
    // its shared libraries
    let libraries = |spec: Spec| {
        spec.with(|spec| {
            let cache = suite::cache();
            for folder in [Path::new("/lib"), Path::new("/lib64"), Path::new("/usr"), &cache].into_iter().filter(|folder| folder.exists()) {
                let mounts = spec["mounts"].as_array_mut().expect("made with the spec");
                mounts.push(json!({ "destination": folder, "type": "bind", "source": folder, "options": ["rbind", "ro"] }));
            }
        })
    };
    let bundle = stand.bundle("c1", &["sh", "-c", &attack]).runtime(&runtime).spec(libraries);
    let container = streams.output(bundle).run().await?;
    // before that, a runtime would find no configuration and end
    streams.out.until("begun").await?;
    if stand.runtime_program().is_ok() {
        // which waits until the test writes the command
        container.exec("e", &["/proc/self/exe", "run", "--bundle", "/tmp", "inner"]).await?;
        streams.out.until("found").await?;
        container.task.kill("c1", "e", 9).await?;
        container.task.wait("c1", "e").await?;
        container.task.delete("c1", "e").await?;
    } else {
        // a shim refuses this and ends: often enough, it is found before
        for attempt in 0..MANY {
            container.run(&format!("e{attempt}"), &["/proc/self/exe", "run"]).await?;
            if streams.out.text().contains("found") {
                break;
            }
        }
        streams.out.until("found").await?;
    }
    streams.out.until("tried").await?;
    container.shut_down().await?;
    for (program, before) in programs.iter().zip(&before) {
        ensure!(fs::read(program)? == *before, "{} was written to", program.display());
    }
    Ok(())
}

const MANY: usize = 500;

/// As in the spec, also for execs.
async fn masked_paths_are_masked_for_init_and_execs(stand: Stand) -> Result<()> {
    let look = "for masked in keys timer_list kcore; do head -c 1 /proc/$masked | wc -c; done; \
                for kept in core_pattern hostname; do (: >>/proc/sys/kernel/$kept) 2>/dev/null || echo kept; done";
    let expected = "0\n0\n0\nkept\nkept\n";
    for file in ["keys", "timer_list", "sys/kernel/core_pattern"] {
        ensure!(fs::exists(format!("/proc/{file}"))?, "the host has no /proc/{file}");
    }
    let streams = Streams::new(&stand, "io")?;
    let container = streams.all(stand.bundle("c1", &["sh", "-c", &format!("{look}; read go")])).run().await?;
    let exec = Streams::new(&stand, "exec")?;
    container.task.exec(&exec.exec(container.bundle.exec_request("e", &["sh", "-c", look]))).await?;
    container.task.start("c1", "e").await?;
    container.task.wait("c1", "e").await?;
    let found = exec.out.to_end().await?;
    ensure!(found == expected, "an exec reports {found:?}");
    streams.writer().await?.write_all(b"go\n")?;
    container.task.wait("c1", "").await?;
    let found = streams.out.to_end().await?;
    ensure!(found == expected, "init reports {found:?}");
    container.shut_down().await.map(drop)
}

/// Niceness, processors, limits, timer slack: as of the daemon, which is this process.
async fn a_container_does_not_inherit_the_shims_scheduling_and_limits(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    let exec = container.exec("e", &["sleep", "1000"]).await?;
    let own = inherited(1)?;
    for (who, pid) in [("init", container.pid), ("exec", exec)] {
        files_of_the_program(pid.cast_signed()).await?;
        let found = inherited(pid.cast_signed())?;
        ensure!(found == own, "{who} has {found:?}, the daemon {own:?}");
    }
    container.shut_down().await.map(drop)
}

fn inherited(pid: i32) -> Result<Vec<String>> {
    let stat = proc::stat(pid)?;
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).with_context(|| file.to_owned());
    Ok(vec![
        format!("niceness {}", stat.field(19)),
        format!("policy {}", stat.field(41)),
        format!("processors {}", proc::status_field(pid, "Cpus_allowed_list")?),
        format!("huge pages {}", proc::status_field(pid, "THP_enabled").unwrap_or_default()),
        format!("timer slack {}", read("timerslack_ns")?.trim()),
        format!("limits {}", read("limits")?),
    ])
}
