//! What criu saves of a container, and what it makes of it. Skipped where there is none that works.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::bundle;
use scratch::eventually;

use crate::stage::Stage;

crate::cases![
    a_container_goes_on_from_its_checkpoint,
    a_checkpoint_leaves_the_container_running,
    a_frozen_container_is_saved_and_stays_frozen,
    a_failed_checkpoint_leaves_the_container_running,
    a_restored_container_has_the_limits_and_mounts_of_its_configuration,
    an_image_gives_no_more_than_the_configuration,
    a_failed_restore_leaves_nothing,
    a_criu_that_hangs_is_killed_with_its_children,
    a_criu_that_is_too_old_or_missing_is_refused,
    a_restored_terminal_is_the_controlling_one,
    a_network_namespace_is_joined_by_its_path_again,
];

/// Counts in a file system of its own, so that the count is a part of the checkpoint. In a folder that it makes once: where an image has it restored among the
/// mounts of the host, there is none, and nothing is written.
pub(crate) const COUNT: &str = "mkdir /run/x-engine-count; i=0; while :; do i=$((i+1)); echo $i > /run/x-engine-count/i; sleep 0.02; done";

/// A criu that works, or why there is none: the one in PATH, or that of the tests' cache.
fn criu() -> Result<PathBuf, String> {
    let cache =
        std::env::var_os("X_TESTS_CACHE").map(PathBuf::from).or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache/x-tests")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(cache.map(|cache| cache.join("forky/bin")));
    let program = folders.map(|folder| folder.join("criu")).find(|program| program.exists()).ok_or("no criu")?;
    let check = Command::new(&program).arg("check").output().map_err(|error| error.to_string())?;
    if check.status.success() { Ok(program) } else { Err(String::from_utf8_lossy(&check.stderr).into_owned()) }
}

/// How a test runs criu, with a folder for the image.
pub(crate) fn settings(stage: &Stage) -> Option<Value> {
    let program = criu().inspect_err(|why| eprintln!("skipped: {why}")).ok()?;
    let image = stage.folder.join("image");
    fs::create_dir_all(&image).expect("a folder");
    Some(json!({ "program": program, "image": image }))
}

fn count(stage: &Stage, id: &str) -> u32 {
    stage.exec_shell(id, "cat /run/x-engine-count/i 2>/dev/null || echo 0", |_| {}).trim().parse().unwrap_or(0)
}

pub(crate) fn counts_to(stage: &Stage, id: &str, goal: u32) {
    eventually(&format!("a count of {goal}"), || count(stage, id) >= goal);
}

/// A container of a test that counts.
pub(crate) fn counting<'a>(stage: &'a Stage, config: &Value) -> crate::stage::Process<'a> {
    let init = stage.create_piped("c", config).expect("created");
    stage.start("c");
    counts_to(stage, "c", 5);
    init
}

fn log(stage: &Stage, name: &str) -> String {
    let text = fs::read_to_string(stage.folder.join("image").join(name)).unwrap_or_default();
    text.lines().filter(|line| line.contains("Error") || line.contains("Warn")).collect::<Vec<_>>().join("\n")
}

pub(crate) fn saved(stage: &Stage, settings: &Value, exit: bool, paused: bool) {
    stage.checkpoint("c", settings, exit, paused).unwrap_or_else(|error| panic!("{error}\n{}", log(stage, "dump.log")));
}

pub(crate) fn restored<'a>(stage: &'a Stage, config: &Value, settings: &Value) -> crate::stage::Process<'a> {
    stage.restore("c", config, settings).unwrap_or_else(|error| panic!("{error}\n{}", log(stage, "restore.log")))
}

fn a_container_goes_on_from_its_checkpoint() {
    let stage = Stage::new();
    let Some(settings) = settings(&stage) else { return };
    let config = stage.config(&["sh", "-c", &format!("trap 'echo ended; exit 7' TERM; {COUNT}")]);
    let init = counting(&stage, &config);
    saved(&stage, &settings, true, false);
    assert_eq!(init.end().0, 137);
    stage.delete("c").expect("deleted");
    assert!(stage.folder.join("image/inventory.img").exists());
    // In a hierarchy in which the container has no cgroup these would be all of the host.
    let log = fs::read_to_string(stage.folder.join("image/dump.log")).expect("a log");
    assert!(!log.contains("cg: adding cgroup"), "{log}");
    let init = restored(&stage, &config, &settings);
    let before = count(&stage, "c");
    assert!(before >= 5, "{before}");
    counts_to(&stage, "c", before + 5);
    assert_eq!(stage.count("c"), 2, "init and its sleep");
    // Its pid is 1 as before, it hears signals, and its output goes to the new pipe.
    stage.exec_shell("c", "test $(readlink /proc/1/exe) = /bin/busybox; kill -TERM 1", |_| {});
    assert_eq!(init.end().0, 7);
    assert_eq!(init.terminal(), "ended\n");
    stage.delete("c").expect("deleted");
    assert_eq!(stage.cgroups(), Vec::<PathBuf>::new());
}

fn a_checkpoint_leaves_the_container_running() {
    let stage = Stage::new();
    let Some(settings) = settings(&stage) else { return };
    let init = counting(&stage, &stage.config(&["sh", "-c", COUNT]));
    saved(&stage, &settings, false, false);
    let streams: Vec<String> =
        serde_json::from_slice(&fs::read(stage.folder.join("image/descriptors.json")).expect("a file")).expect("a list");
    assert_eq!((streams.len(), streams[0].as_str()), (3, "/dev/null"));
    assert!(streams[1].starts_with("pipe:["), "{streams:?}");
    counts_to(&stage, "c", count(&stage, "c") + 5);
    init.kill();
    assert_eq!(init.end().0, 137);
}

fn a_frozen_container_is_saved_and_stays_frozen() {
    let stage = Stage::new();
    let Some(settings) = settings(&stage) else { return };
    let config = stage.config(&["sh", "-c", COUNT]);
    let init = counting(&stage, &config);
    stage.freeze("c", true).expect("frozen");
    saved(&stage, &settings, false, true);
    assert_eq!(stage.limit("freezer", "freezer.state"), "FROZEN");
    // What is saved of a frozen container runs.
    saved(&stage, &settings, true, true);
    assert_eq!(init.end().0, 137, "what is killed is thawed");
    stage.delete("c").expect("deleted");
    let _init = restored(&stage, &config, &settings);
    counts_to(&stage, "c", count(&stage, "c") + 5);
}

fn a_failed_checkpoint_leaves_the_container_running() {
    let stage = Stage::new();
    let Some(settings) = settings(&stage) else { return };
    // A file of the host, which no restore could open again.
    let init = stage.create("c", &stage.config(&["sh", "-c", COUNT])).expect("created");
    stage.start("c");
    counts_to(&stage, "c", 5);
    let error = stage.checkpoint("c", &settings, true, false).expect_err("cannot be saved");
    assert!(error.starts_with("criu failed to checkpoint the container"), "{error}");
    assert!(log(&stage, "dump.log").contains("Error ("));
    assert_eq!(stage.limit("freezer", "freezer.state"), "THAWED");
    counts_to(&stage, "c", count(&stage, "c") + 5);
    stage.freeze("c", true).expect("frozen");
    stage.checkpoint("c", &settings, true, true).expect_err("cannot be saved");
    assert_eq!(stage.limit("freezer", "freezer.state"), "FROZEN");
    init.kill();
}

fn a_restored_container_has_the_limits_and_mounts_of_its_configuration() {
    let stage = Stage::new();
    let Some(settings) = settings(&stage) else { return };
    let source = |name: &str| {
        let folder = stage.folder.join(name);
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join("name"), name).expect("a file");
        folder
    };
    let (first, second) = (source("first"), source("second"));
    std::os::unix::fs::symlink("/mnt", stage.root().join("link")).expect("a link");
    let configured = |source: &Path, pids: u32| {
        let mut config = stage.config(&["sh", "-c", COUNT]);
        for (target, source) in [("/volume", source.to_owned()), ("/link/deep", source.to_owned()), ("/file", source.join("name"))] {
            let mount = bundle::mount(target, "bind", &source.display().to_string(), &["rbind", "ro"]);
            config["mounts"].as_array_mut().expect("a list").push(mount);
        }
        config["linux"]["resources"]["pids"] = json!({ "limit": pids });
        config["root"]["readonly"] = json!(true);
        config["process"]["oomScoreAdj"] = json!(100);
        config
    };
    let config = configured(&first, 20);
    let init = counting(&stage, &config);
    let look = "cat /volume/name /mnt/deep/name /file; touch /volume/x || touch /x || hostname; cat /proc/1/oom_score_adj";
    assert_eq!(stage.exec_shell("c", look, |_| {}).lines().last(), Some("100"));
    saved(&stage, &settings, true, false);
    assert_eq!(init.end().0, 137);
    stage.delete("c").expect("deleted");
    fs::remove_dir(stage.root().join("volume")).expect("the target of a mount");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let _init = restored(&stage, &configured(&second, 30), &settings);
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").expect("mounts"), mounts);
    assert_eq!(stage.exec_shell("c", "cat /volume/name /mnt/deep/name /file", |_| {}), "secondsecondsecond");
    let written = "for f in /volume/x /mnt/deep/x /file /x; do touch $f && echo written; done";
    let refused = stage.exec_shell("c", &format!("{written}; hostname; cat /proc/1/oom_score_adj; ip link show lo"), |_| {});
    assert!(refused.starts_with("touch: /volume/x: Read-only") && refused.contains("\nx-engine\n100\n"), "{refused}");
    assert!(!refused.contains("written"), "{refused}");
    assert!(refused.contains("LOOPBACK,UP"), "{refused}");
    assert_eq!(stage.limit("pids", "pids.max"), "30");
    let kcore = stage.exec_shell(
        "c",
        "ls -l /proc/keys; wc -c < /proc/timer_list; ls /sys/firmware; touch /proc/sys/kernel/domainname 2>&1 || true",
        |_| {},
    );
    assert!(kcore.contains("1,") && kcore.contains("Read-only"), "{kcore}");
    // Nothing but the streams is open, and nothing of the host is in sight.
    let open = stage.exec_shell("c", "ls /proc/1/fd | grep -v '^10$' | tr '\\n' ' '; ls -l /proc/1/root /proc/1/cwd", |_| {});
    assert!(open.starts_with("0 1 2 "), "{open}");
    assert!(open.contains("/proc/1/root -> /\n") && open.contains("/proc/1/cwd -> /\n"), "{open}");
    let seen = stage.exec_shell("c", "cat /proc/1/mountinfo", |_| {});
    let targets: Vec<&str> = seen.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    assert!(
        targets.contains(&"/mnt/deep") && !targets.iter().any(|target| target.contains("criu") || target.contains("crtools")),
        "{seen}"
    );
}

fn an_image_gives_no_more_than_the_configuration() {
    let stage = Stage::new();
    let Some(settings) = settings(&stage) else { return };
    let strict = stage.config(&["sh", "-c", COUNT]);
    let mut lax = strict.clone();
    lax["linux"]["maskedPaths"] = json!([]);
    lax["linux"]["readonlyPaths"] = json!([]);
    let init = counting(&stage, &lax);
    saved(&stage, &settings, true, false);
    init.end();
    stage.delete("c").expect("deleted");
    let init = restored(&stage, &strict, &settings);
    let seen = stage.exec_shell(
        "c",
        "wc -c < /proc/timer_list; ls -l /proc/keys; ls /sys/firmware; touch /proc/sys/kernel/domainname 2>&1 || true",
        |_| {},
    );
    assert!(seen.starts_with("0\ncrw-rw-rw-") && seen.contains("Read-only"), "{seen}");
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    for (field, words) in [("capabilities", "process.capabilities does not have"), ("seccomp", "without a filter of linux.seccomp")] {
        let mut config = strict.clone();
        match field {
            "capabilities" => config["process"]["capabilities"] = json!({ "bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"] }),
            _ => config["linux"]["seccomp"] = bundle::filter(),
        }
        let error = stage.restore("c", &config, &settings).err().expect("more than that");
        assert!(error.contains(words), "{error}");
        assert_eq!(stage.cgroups(), Vec::<PathBuf>::new());
    }
}

fn a_failed_restore_leaves_nothing() {
    let stage = Stage::new();
    let Some(settings) = settings(&stage) else { return };
    let config = stage.config(&["sh", "-c", COUNT]);
    let error = stage.restore("c", &config, &settings).err().expect("no image");
    assert!(error.starts_with("read descriptors.json in "), "{error}");
    let init = counting(&stage, &config);
    saved(&stage, &settings, true, false);
    assert_eq!(init.end().0, 137);
    stage.delete("c").expect("deleted");
    // A limit that the kernel refuses, when all processes are there already.
    let mut limited = config.clone();
    limited["linux"]["resources"]["unified"] = json!({});
    limited["linux"]["resources"]["memory"] = json!({ "limit": 4096 });
    let error = stage.restore("c", &limited, &settings).err().expect("no memory");
    assert!(error.contains("memory.limit_in_bytes"), "{error}");
    assert_eq!(stage.cgroups(), Vec::<PathBuf>::new());
    // A damaged image.
    fs::write(stage.folder.join("image/core-1.img"), "damaged").expect("a file");
    let error = stage.restore("c", &config, &settings).err().expect("no image");
    assert!(error.starts_with("criu failed to restore the container"), "{error}");
    assert!(log(&stage, "restore.log").contains("Error ("));
    assert_eq!(stage.cgroups(), Vec::<PathBuf>::new());
}

fn a_criu_that_hangs_is_killed_with_its_children() {
    let stage = Stage::new();
    let image = stage.folder.join("image");
    fs::create_dir_all(&image).expect("a folder");
    let program = script(&stage, "echo stuck >&2; sleep 1234567 & sleep 1234567");
    let settings = json!({ "program": program, "image": image, "within": 1 });
    let init = counting(&stage, &stage.config(&["sh", "-c", COUNT]));
    let error = stage.checkpoint("c", &settings, true, false).expect_err("it hangs");
    assert_eq!(error, "criu was not done after 1 s and was killed; it has written: stuck");
    assert_eq!(stage.on_host("pgrep -f 'sleep [1]234567' || true"), "");
    counts_to(&stage, "c", count(&stage, "c") + 5);
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    fs::write(image.join("descriptors.json"), "[]").expect("a file");
    let error = stage.restore("c", &stage.config(&["true"]), &settings).err().expect("it hangs");
    assert!(error.starts_with("criu was not done after 1 s"), "{error}");
    assert_eq!(stage.on_host("pgrep -f 'sleep [1]234567' || true"), "");
    assert_eq!(stage.cgroups(), Vec::<PathBuf>::new());
}

fn a_criu_that_is_too_old_or_missing_is_refused() {
    let stage = Stage::new();
    let image = stage.folder.join("image");
    fs::create_dir_all(&image).expect("a folder");
    counting(&stage, &stage.config(&["sh", "-c", COUNT]));
    let error = stage.checkpoint("c", &json!({ "program": "/no/criu", "image": image }), true, false).expect_err("no criu");
    assert_eq!(error, "start /no/criu: no such file or directory");
    let program = script(&stage, "echo no such command; exit 3");
    let error = stage.checkpoint("c", &json!({ "program": program, "image": image }), true, false).expect_err("no criu");
    assert!(error.contains("exit status: 3") && error.contains("no such command"), "{error}");
    counts_to(&stage, "c", count(&stage, "c") + 5);
}

fn a_restored_terminal_is_the_controlling_one() {
    let stage = Stage::new();
    let Some(settings) = settings(&stage) else { return };
    let mut config =
        stage.config(&["sh", "-c", "trap 'tty; echo again > /dev/tty; echo > /dev/console; exit 0' TERM; while :; do sleep 0.02; done"]);
    config["process"]["terminal"] = json!(true);
    let init = stage.create("c", &config).expect("created");
    stage.start("c");
    eventually("the program runs", || stage.exec_shell("c", "readlink /proc/1/exe; ls /proc", |_| {}).starts_with("/bin/busybox"));
    saved(&stage, &settings, true, false);
    assert_eq!(init.end().0, 137);
    stage.delete("c").expect("deleted");
    let init = restored(&stage, &config, &settings);
    stage.exec_shell("c", "kill -TERM 1", |_| {});
    assert_eq!(init.end().0, 0);
    assert_eq!(init.terminal().replace('\r', ""), "/dev/pts/0\nagain\n\n");
}

fn a_network_namespace_is_joined_by_its_path_again() {
    let stage = Stage::new();
    let Some(settings) = settings(&stage) else { return };
    let namespace = |name: &str| {
        let path = stage.folder.join(name);
        fs::write(&path, "").expect("a file");
        stage.on_host(&format!("unshare --net={} true", path.display()));
        path
    };
    let configured = |path: &Path| {
        let mut config = stage.config(&["sh", "-c", COUNT]);
        for kind in config["linux"]["namespaces"].as_array_mut().expect("a list") {
            if kind["type"] == json!("network") {
                kind["path"] = json!(path);
            }
        }
        config
    };
    let (first, second) = (namespace("first"), namespace("second"));
    let init = counting(&stage, &configured(&first));
    saved(&stage, &settings, true, false);
    init.end();
    stage.delete("c").expect("deleted");
    let _init = restored(&stage, &configured(&second), &settings);
    let inode = stage.on_host(&format!("stat -L -c %i {}", second.display()));
    assert_eq!(stage.exec_shell("c", "readlink /proc/1/ns/net", |_| {}), format!("net:[{}]\n", inode.trim()));
}

fn script(stage: &Stage, text: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = stage.folder.join("criu");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("its mode");
    path
}
