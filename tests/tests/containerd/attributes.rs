//! Attributes that init and execs inherit from the shim: the same as under the stock shim.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use shim_tests::container::{Container, Stdio};
use shim_tests::context::Context;
use shim_tests::proc;
use shim_tests::suite::{Runtime, STOCK_TYPE};

/// Everything that a process inherits and that the kernel shows; but for pending signals, since runc's Go runtime sometimes leaves a SIGURG
/// of its own pending.
fn attributes(pid: i32) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for name in [
        "Umask",
        "Groups",
        "Uid",
        "Gid",
        "NStgid",
        "SigQ",
        "SigBlk",
        "SigIgn",
        "SigCgt",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Cpus_allowed",
        "Mems_allowed",
        "THP_enabled",
        "Speculation_Store_Bypass",
        "SpeculationIndirectBranch",
    ] {
        found.insert(name.to_owned(), proc::status_field(pid, name).unwrap_or_default());
    }
    // What runc passes on of a SIGHUP that these tests ignore, as under nohup, is a matter of chance: since 1.2 it sets its handlers while it starts init.
    let ignored = u64::from_str_radix(&found["SigIgn"], 16).context("SigIgn")?;
    found.insert("SigIgn".to_owned(), format!("{:016x}", ignored & !1));
    // the first is the number in the namespace of the run, the queue of signals is the user's
    found.remove("NStgid");
    found.remove("SigQ");
    for file in ["limits", "oom_score_adj", "timerslack_ns", "personality", "coredump_filter", "environ", "autogroup", "loginuid"] {
        let text = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        found.insert(file.to_owned(), String::from_utf8_lossy(&text).into_owned());
    }
    found.remove("autogroup"); // a number that counts sessions
    let stat = proc::stat(pid)?;
    for (name, field) in [("priority", 18), ("nice", 19), ("threads", 20), ("rt_priority", 40), ("policy", 41)] {
        found.insert(name.to_owned(), stat.field(field).to_owned());
    }
    let session_leader = stat.field(6) == pid.to_string();
    let group_leader = stat.field(5) == pid.to_string();
    found.insert("leads".to_owned(), format!("session {session_leader}, group {group_leader}"));
    let files = proc::open_files(pid)?;
    let kinds = files.iter().map(|(number, target)| {
        let target = target.display().to_string();
        format!("{number}: {}", target.split([':', '[']).next().unwrap_or_default())
    });
    found.insert("files".to_owned(), kinds.collect::<Vec<_>>().join(", "));
    for file in ["cwd", "root"] {
        let link = fs::read_link(format!("/proc/{pid}/{file}")).context(file)?;
        found.insert(file.to_owned(), link.display().to_string().replace(|c: char| c.is_ascii_digit(), "#"));
    }
    Ok(found)
}

async fn pair(cx: &Context, stdio: Stdio, terminal: bool) -> Result<()> {
    let mut both = Vec::new();
    for runtime_type in [STOCK_TYPE, &cx.shim().runtime_type] {
        let container = cx.container(&["sleep", "1000"]).runtime_type(runtime_type).stdio(stdio.clone());
        let is_beside_native = runtime_type == STOCK_TYPE && cx.runtime() == Runtime::Native;
        // whose execs have sessions, other than crun's before 1.20
        let container = if is_beside_native { container.runtime_binary(&cx.suite().runtime(Runtime::Runc)) } else { container };
        let container = if terminal { container.terminal() } else { container };
        let container = container.start().await?;
        let exec = container.exec("e", &["sleep", "1000"]).stdio(stdio.clone());
        let exec = if terminal { exec.terminal() } else { exec };
        let exec = exec.start().await?;
        both.push((settled(&container, container.pid).await?, settled(&container, exec.state().await?.pid).await?));
        exec.kill(9).await?;
        exec.finish().await?;
        container.destroy().await?;
    }
    let [stock, ours] = &both[..] else { anyhow::bail!("two were started") };
    for (whose, mut stock, ours) in [("init", stock.0.clone(), &ours.0), ("exec", stock.1.clone(), &ours.1)] {
        if cx.runtime() == Runtime::Native {
            // what an OCI runtime leaves ignored, beside what it was started with
            stock.insert("SigIgn".to_owned(), "0".repeat(16));
        }
        let differences: Vec<_> = stock
            .iter()
            .filter(|(name, value)| ours.get(*name) != Some(value))
            .map(|(name, value)| format!("{whose} {name}: stock {value:?}, under test {:?}", ours.get(name)))
            .collect();
        ensure!(differences.is_empty(), "{differences:#?}");
    }
    Ok(())
}

/// The attributes once the process has become the program itself.
async fn settled(_container: &Container, pid: u32) -> Result<BTreeMap<String, String>> {
    let pid = pid.cast_signed();
    shim_tests::eventually::eventually("the program runs", shim_tests::eventually::SOON, async || {
        ensure!(proc::Process::read(pid)?.command == "sleep 1000");
        attributes(pid)
    })
    .await
}

pub(crate) async fn init_and_exec_inherit_the_same_as_under_the_stock_shim(cx: Context) -> Result<()> {
    pair(&cx, Stdio::OUTPUT, false).await
}

pub(crate) async fn init_and_exec_without_stdio_inherit_the_same(cx: Context) -> Result<()> {
    pair(&cx, Stdio::None, false).await
}

pub(crate) async fn init_and_exec_with_a_terminal_inherit_the_same(cx: Context) -> Result<()> {
    pair(&cx, Stdio::OUTPUT, true).await
}

pub(crate) async fn the_environment_of_the_runtime_holds_no_secret_of_the_daemon(cx: Context) -> Result<()> {
    if !cx.shim().is_ours() {
        return shim_tests::runner::skip("the stock shim passes its environment to the runtime");
    }
    let gate = cx.gate()?;
    gate.hold("create")?;
    let binary = gate.binary();
    let container = cx.container(&["sleep", "1000"]).runtime_binary(&binary);
    let create = tokio::task::LocalSet::new();
    let container = create
        .run_until(async {
            let create = tokio::task::spawn_local(container.create());
            gate.held("create").await?;
            let runtime = proc::all().into_values().find(|p| p.command.starts_with(&binary.display().to_string()));
            let runtime = runtime.context("the runtime is held but not there")?;
            let environment = fs::read(format!("/proc/{}/environ", runtime.pid))?;
            let environment = String::from_utf8_lossy(&environment).into_owned();
            gate.release("create")?;
            for secret in ["GOMAXPROCS", "TTRPC_ADDRESS", "GRPC_ADDRESS", "MAX_SHIM_VERSION"] {
                ensure!(!environment.contains(secret), "{environment:?}");
            }
            create.await?
        })
        .await?;
    container.delete().await?;
    Ok(())
}
