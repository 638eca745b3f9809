//! Roots that are mounted in the container's mount namespace alone.
use std::fs;
use std::path::PathBuf;

use serde_json::json;

use crate::stage::Stage;
use crate::users;

crate::cases![
    an_overlay_is_the_root,
    an_overlay_with_long_paths_is_the_root,
    an_overlay_of_many_layers_is_the_root,
    a_bind_is_the_root,
    mounts_of_a_root_cover_each_other,
    an_overlay_is_the_root_in_a_user_namespace,
    an_overlay_is_the_root_where_it_is_moved,
    an_overlay_of_layers_in_one_folder_is_the_root,
    a_folder_with_a_comma_is_a_layer,
    a_bind_keeps_the_attributes_of_its_source,
    a_root_that_cannot_be_mounted_fails_the_creation,
    what_a_file_system_says_of_its_options_is_reported,
    a_root_is_not_mounted_where_hooks_need_it_on_the_host,
];

/// Moves the test's root to a layer, and leaves an empty folder.
fn layer(stage: &Stage) -> PathBuf {
    let layer = stage.folder.join("layer");
    fs::rename(stage.root(), &layer).expect("renamed");
    for folder in [stage.root(), stage.folder.join("upper"), stage.folder.join("work")] {
        fs::create_dir(folder).expect("a folder");
    }
    layer
}

fn overlay(stage: &Stage, lower: &str, upper: &str) -> (String, String, Vec<String>) {
    let folder = |name: &str| stage.folder.join(name).display().to_string();
    let options =
        vec!["index=off".to_owned(), format!("workdir={}", folder("work")), format!("upperdir={upper}"), format!("lowerdir={lower}")];
    ("overlay".to_owned(), "overlay".to_owned(), options)
}

const SHOW: &str = "cat /etc/group | head -1; touch /made; sed -n 's/.* \\/ \\/ .* - //p' /proc/self/mountinfo | cut -d' ' -f1";

fn assert_is_overlay(stage: &Stage, upper: &std::path::Path) {
    let host = stage.on_host("cat /proc/self/mountinfo");
    let mut config = stage.config(&["sh", "-c", &format!("{SHOW}; exec sleep 1000")]);
    config["linux"]["maskedPaths"] = json!([]);
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    assert_eq!(stage.exec_shell("c", SHOW, |_| {}), "root:x:0:\noverlay\n");
    assert!(stage.on_host("cat /proc/self/mountinfo") == host);
    assert_eq!(fs::read_dir(stage.root()).expect("a folder").count(), 0);
    assert!(upper.join("made").exists());
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    // The folders are free again.
    fs::remove_dir_all(stage.folder.join("work")).expect("removed");
}

fn an_overlay_is_the_root() {
    let stage = Stage::new();
    let lower = layer(&stage).display().to_string();
    let upper = stage.folder.join("upper");
    stage.root_mounts.replace(vec![overlay(&stage, &lower, &upper.display().to_string())]);
    assert_is_overlay(&stage, &upper);
}

/// Longer than fsconfig(2) takes.
fn an_overlay_with_long_paths_is_the_root() {
    let stage = Stage::new();
    let lower = layer(&stage).display().to_string();
    let upper = stage.folder.join("x".repeat(150)).join("y".repeat(150));
    fs::create_dir_all(&upper).expect("a folder");
    stage.root_mounts.replace(vec![overlay(&stage, &lower, &upper.display().to_string())]);
    assert_is_overlay(&stage, &upper);
}

/// More than mount(2) takes.
fn an_overlay_of_many_layers_is_the_root() {
    let stage = Stage::new();
    let lower = layer(&stage);
    let mut lowers = vec![lower.display().to_string()];
    for number in 0..60 {
        let folder = stage.folder.join(format!("{number}-{}", "z".repeat(80)));
        fs::create_dir_all(&folder).expect("a folder");
        lowers.push(folder.display().to_string());
    }
    let upper = stage.folder.join("upper");
    stage.root_mounts.replace(vec![overlay(&stage, &lowers.join(":"), &upper.display().to_string())]);
    assert_is_overlay(&stage, &upper);
}

/// More than mount(2) takes, unless it is relative to their folder.
fn an_overlay_of_layers_in_one_folder_is_the_root() {
    let stage = Stage::new();
    let lower = layer(&stage);
    let shared = stage.folder.join("s".repeat(100));
    let mut lowers = Vec::new();
    for number in 0..60 {
        let folder = shared.join(format!("{number}/fs"));
        fs::create_dir_all(&folder).expect("a folder");
        lowers.push(folder.display().to_string());
    }
    let last = shared.join("60");
    fs::rename(&lower, &last).expect("renamed");
    lowers.push(last.display().to_string());
    let upper = stage.folder.join("upper");
    stage.root_mounts.replace(vec![overlay(&stage, &lowers.join(":"), &upper.display().to_string())]);
    assert_is_overlay(&stage, &upper);
}

fn a_folder_with_a_comma_is_a_layer() {
    let stage = Stage::new();
    let lower = stage.folder.join("a,b");
    fs::rename(layer(&stage), &lower).expect("renamed");
    let upper = stage.folder.join("upper");
    let lower = lower.display().to_string().replace(',', "\\,");
    stage.root_mounts.replace(vec![overlay(&stage, &lower, &upper.display().to_string())]);
    assert_is_overlay(&stage, &upper);
}

fn a_bind_keeps_the_attributes_of_its_source() {
    let stage = Stage::new();
    let source = layer(&stage).display().to_string();
    let first = ("bind".to_owned(), source.clone(), vec!["rbind".to_owned(), "nosuid".to_owned(), "noexec".to_owned()]);
    let root = stage.root().display().to_string();
    for (words, expected) in [(&["rbind", "rw"][..], "noexec"), (&["rbind", "ro", "exec"], "ro,nosuid")] {
        let words = words.iter().map(|&word| word.to_owned()).collect();
        stage.root_mounts.replace(vec![first.clone(), ("bind".to_owned(), root.clone(), words)]);
        let created = stage.create("c", &stage.config(&["/bin/sleep", "1000"]));
        if expected.contains("noexec") {
            assert!(created.err().expect("refused").ends_with(": permission denied"));
            continue;
        }
        let init = created.expect("created");
        let mounts = stage.on_host(&format!("cat /proc/{}/mountinfo", init.pid));
        let of_root = mounts.lines().rfind(|line| line.split(' ').nth(4) == Some("/")).expect("a root");
        assert!(of_root.split(' ').nth(5).expect("attributes").starts_with(expected), "{expected}: {of_root}");
        stage.delete("c").expect("deleted");
    }
}

fn a_bind_is_the_root() {
    let stage = Stage::new();
    let source = layer(&stage).display().to_string();
    for (options, is_readonly) in [(vec!["rbind", "ro"], true), (vec!["rbind", "rw"], false)] {
        let options = options.into_iter().map(str::to_owned).collect();
        stage.root_mounts.replace(vec![("bind".to_owned(), source.clone(), options)]);
        let output = stage.shell("cat /etc/group | head -1; touch /made 2>&1 | grep -o Read-only; true", |_| {});
        assert_eq!(output == "root:x:0:\nRead-only\n", is_readonly, "{output}");
    }
    assert!(stage.folder.join("layer/made").exists());
}

fn mounts_of_a_root_cover_each_other() {
    let stage = Stage::new();
    let source = layer(&stage).display().to_string();
    let first = ("tmpfs".to_owned(), "tmpfs".to_owned(), vec!["mode=0700".to_owned(), "nosuid".to_owned()]);
    stage.root_mounts.replace(vec![first, ("bind".to_owned(), source, vec!["rbind".to_owned()])]);
    assert_eq!(stage.shell("cat /etc/group | head -1; grep -c tmpfs.*mode=700 /proc/self/mountinfo; true", |_| {}), "root:x:0:\n0\n");
}

fn an_overlay_is_the_root_in_a_user_namespace() {
    let stage = Stage::new();
    let mut config = stage.config(&[
        "sh",
        "-c",
        "id -u; touch /made && stat -c %u /made /etc; sed -n 's/.* \\/ \\/ .* - //p' /proc/self/mountinfo | cut -d' ' -f1",
    ]);
    users::map(&stage, &mut config);
    let lower = layer(&stage).display().to_string();
    let upper = stage.folder.join("upper");
    std::os::unix::fs::chown(&upper, Some(users::FIRST), Some(users::FIRST)).expect("owned");
    fs::set_permissions(stage.folder.join("upper"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("changed");
    stage.root_mounts.replace(vec![overlay(&stage, &lower, &upper.display().to_string())]);
    assert_eq!(stage.run(&config), (0, "0\n0\n0\noverlay\n".to_owned()));
}

fn an_overlay_is_the_root_where_it_is_moved() {
    let stage = Stage::new();
    stage.no_pivot_root.set(true);
    let lower = layer(&stage).display().to_string();
    let upper = stage.folder.join("upper");
    stage.root_mounts.replace(vec![overlay(&stage, &lower, &upper.display().to_string())]);
    assert_is_overlay(&stage, &upper);
}

fn a_root_that_cannot_be_mounted_fails_the_creation() {
    let stage = Stage::new();
    layer(&stage);
    let root = stage.root().display().to_string();
    let bind = || ("bind".to_owned(), "/not-there".to_owned(), vec!["rbind".to_owned()]);
    let unknown = ("no-such-type".to_owned(), "/not-there".to_owned(), Vec::new());
    let many = (0..90).map(|number| format!("/not-there/{number}/{}", "x".repeat(50))).collect::<Vec<_>>().join(":");
    for (mount, start, end) in [
        (overlay(&stage, "/not-there", "/not-there"), "mount overlay from \"overlay\" at ", ": no such file or directory"),
        (overlay(&stage, &many, "/not-there"), "mount overlay from \"overlay\" at ", ": no such file or directory"),
        (bind(), "mount bind from \"/not-there\" at ", ": no such file or directory"),
        (unknown, "mount no-such-type from \"/not-there\" at ", ": no such device"),
    ] {
        for is_mapped in [false, true] {
            stage.root_mounts.replace(vec![mount.clone()]);
            let mut config = stage.config(&["true"]);
            if is_mapped {
                users::map(&stage, &mut config);
            }
            let error = stage.create("c", &config).err().expect("refused");
            assert!(error.starts_with(&format!("{start}{root}")) && error.ends_with(end), "{error}");
            assert_eq!(stage.cgroups(), Vec::<PathBuf>::new());
        }
    }
}

fn what_a_file_system_says_of_its_options_is_reported() {
    let stage = Stage::new();
    let lower = layer(&stage).display().to_string();
    let (kind, source, mut options) = overlay(&stage, &lower, &stage.folder.join("upper").display().to_string());
    options.push("index=maybe".to_owned());
    stage.root_mounts.replace(vec![(kind, source, options)]);
    let error = stage.create("c", &stage.config(&["true"])).err().expect("refused");
    assert!(error.contains("index") && error.ends_with("): invalid argument"), "{error}");
}

fn a_root_is_not_mounted_where_hooks_need_it_on_the_host() {
    let stage = Stage::new();
    let source = layer(&stage).display().to_string();
    stage.root_mounts.replace(vec![("bind".to_owned(), source, vec!["rbind".to_owned()])]);
    let mut config = stage.config(&["true"]);
    config["hooks"] = json!({ "createRuntime": [{ "path": "/bin/true", "args": ["true"] }] });
    let error = stage.create("c", &config).err().expect("refused");
    assert_eq!(error, "hooks.createRuntime: needs a root that is mounted on the host");
    // Later ones do not.
    config["hooks"] = json!({ "poststart": [{ "path": "/bin/true", "args": ["true"] }] });
    assert_eq!(stage.run(&config).0, 0);
}
