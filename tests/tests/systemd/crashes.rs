//! Creations that fail, and workers and shims that are killed during one: nothing is left of unit or cgroup.
use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use shim_tests::eventually::{SOON, eventually_true};
use shim_tests::proc;
use shim_tests::stand::Stand;
use shim_tests::ttrpc::{Code, refusal};

use super::{nothing_is_left_of, scope, scoped, show};

pub(crate) async fn a_failed_creation_leaves_nothing(stand: Stand) -> Result<()> {
    let anchor = scoped(&stand, "anchor-failing", &["sleep", "1000"])?.run().await?;
    let failing = scoped(&stand, "failing", &["/no/such/program"])?;
    failing.write()?;
    let (_, message) = refusal(anchor.task.create(&failing.request()).await)?;
    ensure!(message.contains("no such file or directory"), "{message}");
    nothing_is_left_of(&scope("failing")).await?;
    failing.delete_command().await?;
    // Its name is free.
    let again = scoped(&stand, "failing", &["sleep", "1000"])?.run_in(&anchor.task).await?;
    again.destroy().await?;
    anchor.shut_down().await?;
    nothing_is_left_of(&scope("failing")).await
}

/// The messages of a worker, by their numbers, from a creation without crashes.
async fn messages_of_a_creation(stand: &Stand, id: &str) -> Result<Vec<String>> {
    let plans = stand.folder().join("plans");
    fs::create_dir_all(&plans)?;
    fs::write(plans.join(id), "")?;
    let container = scoped(stand, id, &["sleep", "1000"])?.env("X_FAULT", &plans.display().to_string()).create().await?;
    container.shut_down().await?;
    let trace = fs::read_to_string(plans.join(format!("{id}.trace"))).context("a shim with the feature fault-injection")?;
    Ok(trace.lines().filter_map(|line| line.strip_prefix("out ")).map(str::to_owned).collect())
}

pub(crate) async fn a_worker_that_is_killed_at_any_message_of_a_creation_is_not_noticed(stand: Stand) -> Result<()> {
    let messages = messages_of_a_creation(&stand, "traced-once").await?;
    // From the placeholder on; the commit answers.
    let first = messages.iter().position(|message| message.ends_with(".24")).context("no placeholder was made")?;
    let last = first + messages[first..].iter().position(|message| message.starts_with("commit")).context("no commit")?;
    ensure!(messages[first..last].iter().any(|message| message.ends_with(".5")), "no plan was performed: {messages:?}");
    let plans = stand.folder().join("plans");
    for number in first + 1..=last + 1 {
        for when in ["before", "after"] {
            let id = format!("out{number}{when}");
            fs::write(plans.join(&id), format!("out:{number}:{when}"))?;
            let container = scoped(&stand, &id, &["sleep", "1000"])?
                .env("X_FAULT", &plans.display().to_string())
                .run()
                .await
                .with_context(|| id.clone())?;
            let trace = fs::read_to_string(plans.join(format!("{id}.trace")))?;
            ensure!(trace.lines().filter(|line| *line == "dies").count() == 1, "{id}: {trace}");
            ensure!(show(&scope(&id), "ActiveState")? == "active", "{id}");
            ensure!(container.run("e1", &["true"]).await? == 0, "{id}");
            container.shut_down().await?;
            nothing_is_left_of(&scope(&id)).await?;
        }
    }
    Ok(())
}

/// Each generation meets the unit of another as if it were the first.
pub(crate) async fn a_live_unit_of_the_name_is_left_alone_whenever_workers_are_killed(stand: Stand) -> Result<()> {
    let slice_of_another = format!("xtests-{}-taken.slice", stand.namespace());
    for (kind, unit) in [("scope", scope("taken")), ("slice", slice_of_another)] {
        let mut other = Command::new("systemd-run");
        match kind {
            "scope" => other.arg(format!("--unit={unit}")),
            _ => other.arg(format!("--slice={unit}")),
        };
        let mut other = other.args(["--scope", "--quiet", "sleep", "1000"]).spawn()?;
        eventually_true("the other unit is active", SOON, || show(&unit, "ActiveState").is_ok_and(|state| state == "active")).await?;
        let left_alone = is_left_alone(&stand, kind, &unit, &other).await;
        other.kill()?;
        other.wait()?;
        left_alone.context(kind)?;
    }
    Ok(())
}

async fn is_left_alone(stand: &Stand, kind: &str, unit: &str, other: &std::process::Child) -> Result<()> {
    let plans = stand.folder().join("plans");
    fs::create_dir_all(&plans)?;
    let path = if kind == "scope" { format!("{}:x:taken", super::slice(stand)) } else { format!("{}:x:{unit}", super::slice(stand)) };
    let refused_with = async |id: &str, plan: &str| -> Result<Vec<String>> {
        fs::write(plans.join(id), plan)?;
        let refused = scoped(stand, id, &["sleep", "1000"])?.systemd_cgroup(&path).env("X_FAULT", &plans.display().to_string());
        let task = refused.shim().await?;
        let (code, message) = refusal(task.create(&refused.request()).await)?;
        ensure!(
            code == Code::AlreadyExists && (message.contains(unit) || message.contains("an earlier worker has found")),
            "{code:?} {message}"
        );
        ensure!(show(unit, "ActiveState")? == "active" && proc::is_alive(other.id().cast_signed()), "the other unit was stopped");
        let shim = refused.shim_pid()?;
        proc::kill_hard(shim);
        eventually_true("the shim is dead", SOON, || !proc::is_alive(shim)).await?;
        refused.delete_command().await?;
        ensure!(
            show(unit, "ActiveState")? == "active" && proc::is_alive(other.id().cast_signed()),
            "the command delete has stopped the other unit"
        );
        let trace = fs::read_to_string(plans.join(format!("{id}.trace")))?;
        Ok(trace.lines().map(str::to_owned).collect())
    };
    let lines = refused_with(&format!("{kind}-traced"), "").await?;
    let messages: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("out ")).collect();
    let last = messages.iter().rposition(|message| message.starts_with("commit")).context("no commit")?;
    // From the creation's own operations on; the commit answers.
    let first = messages.iter().position(|message| message.contains('.')).context("no operation")?;
    for number in first + 1..=last + 1 {
        let id = format!("{kind}-{number}");
        let lines = refused_with(&id, &format!("out:{number}:before")).await.with_context(|| id.clone())?;
        ensure!(lines.iter().any(|line| line == "dies"), "{id}: {lines:?}");
    }
    Ok(())
}

pub(crate) async fn a_creation_that_kills_every_worker_leaves_nothing(stand: Stand) -> Result<()> {
    let messages = messages_of_a_creation(&stand, "traced-poison").await?;
    let plans = stand.folder().join("plans");
    // The unit is started, its plan not performed. A later generation sends other messages before that.
    let number_of_the_plan = |messages: &mut dyn Iterator<Item = &str>| {
        let sent = messages.filter_map(|line| line.strip_prefix("out "));
        sent.enumerate().find(|(_, message)| message.ends_with(".5")).map(|(index, _)| index + 1).context("no plan was performed")
    };
    let first = 1 + messages.iter().position(|message| message.ends_with(".5")).context("no plan was performed")?;
    fs::write(plans.join("once"), format!("out:{first}:before"))?;
    let once = scoped(&stand, "once", &["sleep", "1000"])?.env("X_FAULT", &plans.display().to_string()).create().await?;
    once.shut_down().await?;
    let trace = fs::read_to_string(plans.join("once.trace"))?;
    let later = number_of_the_plan(&mut trace.lines().skip_while(|line| *line != "dies"))?;
    fs::write(plans.join("poison"), format!("out:{first}:before {}", format!("out:{later}:before ").repeat(19)))?;
    let poison = scoped(&stand, "poison", &["sleep", "1000"])?.env("X_FAULT", &plans.display().to_string());
    let task = poison.shim().await?;
    let refused = task.create(&poison.request()).await;
    ensure!(refused.is_err(), "{refused:?}");
    let trace = fs::read_to_string(plans.join("poison.trace"))?;
    ensure!(!trace.lines().any(|line| line.starts_with("out ") && line.ends_with(".5")), "the plan was performed: {trace}");
    // The placeholder ends with the request, though no worker has come to its end.
    nothing_is_left_of(&scope("poison")).await?;
    let shim = poison.shim_pid()?;
    proc::kill_hard(shim);
    eventually_true("the shim is dead", SOON, || !proc::is_alive(shim)).await?;
    poison.delete_command().await.map(drop)
}

pub(crate) async fn a_shim_that_is_killed_during_a_creation_leaves_nothing(stand: Stand) -> Result<()> {
    // The hook holds up the performer: init is in the scope, and the container not made.
    let slow = scoped(&stand, "slow", &["sleep", "1000"])?.spec(|spec| spec.hook("createRuntime", "/bin/sleep", &["sleep", "1000"]));
    let task = slow.shim().await?;
    let shim = slow.shim_pid()?;
    let request = slow.request();
    let creation = tokio::spawn(async move { task.create(&request).await });
    eventually_true("the unit is active", SOON, || show(&scope("slow"), "ActiveState").is_ok_and(|state| state == "active")).await?;
    proc::kill_hard(shim);
    ensure!(creation.await?.is_err());
    slow.delete_command().await?;
    nothing_is_left_of(&scope("slow")).await
}
