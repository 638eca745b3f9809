//! Hooks.
use std::fs;

use serde_json::{Value, json};

use crate::stage::Stage;

crate::cases![
    hooks_run_in_their_order_with_the_state,
    a_failing_hook_fails_the_creation_with_what_it_said,
    a_hook_that_takes_too_long_is_killed,
    hooks_get_the_environment_that_they_ask_for_or_none,
    hooks_on_the_host_see_the_mounts_and_the_limits,
    a_hook_before_the_program_runs_in_the_container,
    a_network_is_set_up_by_a_hook_as_dockerd_20_and_26_do,
    a_network_is_set_up_between_create_and_start_as_dockerd_28_does,
    hooks_prepare_libraries_and_devices_as_nvidias_do,
];

fn hook(script: &str) -> Value {
    json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }])
}

fn hooks_run_in_their_order_with_the_state() {
    let stage = Stage::new();
    let log = stage.folder.join("log");
    let mut config = stage.config(&["true"]);
    config["annotations"] = json!({ "some": "thing" });
    // On the host, the container's folder is in sight; inside, its root only.
    for kind in ["prestart", "createRuntime", "createContainer", "poststart", "poststop"] {
        config["hooks"][kind] = hook(&format!("echo {kind} $(pwd) >> {0}; cat >> {0}; echo >> {0}", log.display()));
    }
    let (status, output) = stage.run(&config);
    assert_eq!(status, 0, "{output}");
    let text = fs::read_to_string(&log).expect("a file");
    let lines: Vec<&str> = text.lines().collect();
    let bundle = stage.folder.display().to_string();
    let expected = [
        ("prestart", "creating", bundle.clone()),
        ("createRuntime", "creating", bundle.clone()),
        ("createContainer", "creating", format!("{bundle}/rootfs")),
        ("poststart", "running", bundle.clone()),
        ("poststop", "stopped", bundle.clone()),
    ];
    assert_eq!(lines.len(), 2 * expected.len(), "{text}");
    for ((kind, status, cwd), lines) in expected.iter().zip(lines.chunks(2)) {
        assert_eq!(lines[0], format!("{kind} {cwd}"));
        let state: Value = serde_json::from_str(lines[1]).expect("JSON");
        assert_eq!((&state["status"], &state["id"], &state["bundle"]), (&json!(status), &json!("c"), &json!(bundle)), "{kind}");
        assert_eq!(state["annotations"], json!({ "some": "thing" }));
        assert_eq!(state["pid"].is_null(), *kind == "poststop", "{kind}");
    }
}

fn a_failing_hook_fails_the_creation_with_what_it_said() {
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let stage = Stage::new();
        let mut config = stage.config(&["true"]);
        config["hooks"][kind] = hook("echo reason >&2; exit 3");
        let error = stage.create("c", &config).err().expect("refused");
        assert!(error.contains("hook #0: /bin/sh: exit status: 3, output: reason"), "{error}");
        assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
    }
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    config["hooks"]["prestart"] = json!([{ "path": "/not/there" }]);
    let error = stage.create("c", &config).err().expect("refused");
    assert!(error.contains("/not/there: no such file or directory"), "{error}");
}

fn a_hook_that_takes_too_long_is_killed() {
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    config["hooks"]["prestart"] = json!([{ "path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1 }]);
    let error = stage.create("c", &config).err().expect("refused");
    assert!(error.contains("killed after 1 s"), "{error}");
}

fn hooks_get_the_environment_that_they_ask_for_or_none() {
    let stage = Stage::new();
    let output = stage.folder.join("env");
    let mut config = stage.config(&["true"]);
    config["process"]["env"].as_array_mut().expect("an array").push(json!("LD_PRELOAD=/evil.so"));
    for kind in ["prestart", "createContainer"] {
        config["hooks"][kind] = json!([
            { "path": "/bin/busybox", "args": ["env"], "env": ["OWN=1"] },
            { "path": "/bin/sh", "args": ["sh", "-c", format!("/bin/busybox tr '\\0' '\\n' < /proc/self/environ >> {}", output.display())] },
        ]);
    }
    stage.run(&config);
    assert_eq!(fs::read_to_string(&output).expect("a file"), "");
}

fn hooks_on_the_host_see_the_mounts_and_the_limits() {
    let stage = Stage::new();
    let output = stage.folder.join("seen");
    let mut config = stage.config(&["sh", "-c", "mknod /tmp/x c 10 237; head -c 0 /tmp/x; echo done"]);
    config["hooks"]["prestart"] = hook(&format!(
        "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); grep -c ' {root}/dev/shm ' /proc/$pid/mountinfo > {output}; \
         cat /sys/fs/cgroup/devices{cgroup}/c/devices.list >> {output}; echo 'c 10:237 rwm' > /sys/fs/cgroup/devices{cgroup}/c/devices.allow",
        root = stage.root().display(),
        output = output.display(),
        cgroup = stage.cgroup,
    ));
    let (_, said) = stage.run(&config);
    let seen = fs::read_to_string(&output).expect("a file");
    assert!(seen.starts_with("1\n") && seen.contains("c 136:* rwm"), "{seen}");
    assert!(said.ends_with("done\n") && !said.contains("not permitted"), "{said}");
}

fn a_hook_before_the_program_runs_in_the_container() {
    let stage = Stage::new();
    let output = stage.shell("cat /tmp/hooked", |config| {
        config["process"]["user"]["uid"] = json!(1000);
        config["hooks"]["startContainer"] = hook("umask 0; echo $A $(id -u) > /tmp/hooked");
        config["process"]["env"].as_array_mut().expect("an array").push(json!("A=env"));
        config["mounts"].as_array_mut().expect("an array").push(crate::bundle::mount("/tmp", "tmpfs", "tmpfs", &["mode=1777"]));
    });
    assert_eq!(output, "env 1000\n");
}

/// The pid in the state on a hook's standard input.
const PID: &str = "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/')";

/// It hands the network namespace to its daemon, which configures it: so it has to be there, under the host's pid, and stay.
fn a_network_is_set_up_by_a_hook_as_dockerd_20_and_26_do() {
    let stage = Stage::new();
    let netns = stage.folder.join("netns").display().to_string();
    let mut config = stage.config(&["sh", "-c", "ip -o addr show dev lo"]);
    config["hooks"]["prestart"] = hook(&format!(
        "{PID}; touch {netns}; mount --bind /proc/$pid/ns/net {netns} && nsenter --net={netns} busybox ip addr add 10.9.8.7/32 dev lo"
    ));
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    let same = stage.on_host(&format!("stat -L -c %i {netns} /proc/{}/ns/net | uniq | wc -l", init.pid));
    assert_eq!(same, "1\n");
    stage.on_host(&format!("nsenter --net={netns} busybox ip addr add 10.9.8.6/32 dev lo"));
    stage.start("c");
    let (_, output) = init.end();
    assert!(output.contains("127.0.0.1") && output.contains("10.9.8.7") && output.contains("10.9.8.6"), "{output}");
    // It outlives the container, until the daemon gives it up.
    stage.delete("c").expect("deleted");
    assert!(stage.on_host(&format!("nsenter --net={netns} busybox ip -o addr show dev lo; umount {netns}")).contains("10.9.8.7"));
}

fn a_network_is_set_up_between_create_and_start_as_dockerd_28_does() {
    let stage = Stage::new();
    let init =
        stage.create("c", &stage.config(&["ip", "-o", "addr", "show", "dev", "lo"])).unwrap_or_else(|error| panic!("create: {error}"));
    stage.on_host(&format!("nsenter --net=/proc/{}/ns/net busybox ip addr add 10.9.8.7/32 dev lo", init.pid));
    stage.start("c");
    assert!(init.end().1.contains("10.9.8.7"));
    stage.delete("c").expect("deleted");
}

/// Of a CDI specification: links, modes and a cache of libraries below the root, while a folder of it is read-only and `/dev` is the host's.
fn hooks_prepare_libraries_and_devices_as_nvidias_do() {
    let stage = Stage::new();
    fs::create_dir_all(stage.folder.join("libraries")).expect("a folder");
    fs::write(stage.folder.join("libraries/libx.so.1.2"), "library").expect("a file");
    fs::create_dir_all(stage.folder.join("etc")).expect("a folder");
    fs::write(stage.folder.join("etc/settings"), "settings").expect("a file");
    let mut config = stage.config(&["sh", "-c", "cat /usr/lib/libx.so /etc/nvidia/settings /etc/ld.so.cache; cat /first; stat -c %t:%T /dev/null; true > /dev/null && ls -l /usr/lib | wc -l"]);
    let mounts = config["mounts"].as_array_mut().expect("an array");
    mounts.retain(|mount| !mount["destination"].as_str().is_some_and(|path| path.starts_with("/dev")));
    mounts.push(crate::bundle::mount("/dev", "bind", "/dev", &["rbind", "rprivate"]));
    mounts.push(crate::bundle::mount("/usr/lib/libx.so.1.2", "bind", "libraries/libx.so.1.2", &["ro", "nosuid", "nodev", "bind"]));
    mounts.push(crate::bundle::mount("/etc/nvidia", "bind", "etc", &["ro", "rbind"]));
    let in_root = |script: &str| {
        // As these hooks find it: by the bundle in the state, and root.path in its configuration.
        let find =
            "bundle=$(sed 's/.*\"bundle\":\"\\([^\"]*\\).*/\\1/'); root=$bundle/rootfs; test -f $bundle/config.json || exit 9; cd $root";
        json!({ "path": "/bin/sh", "args": ["sh", "-c", format!("{find}; {script}")] })
    };
    config["hooks"]["createContainer"] = json!([
        in_root("ln -s libx.so.1.2 usr/lib/libx.so.1"),
        in_root("ln -s libx.so.1 usr/lib/libx.so"),
        in_root("chmod 755 usr/lib"),
        in_root("test -f etc/nvidia/settings && ! touch etc/nvidia/new 2> /dev/null"),
        in_root("chroot . /bin/sh -c 'ls /usr/lib > /etc/ld.so.cache; test -c /dev/null'"),
        in_root(
            "grep -q ' / / ' /proc/self/mountinfo; test $(readlink /proc/self/ns/mnt) != $(readlink /proc/1/ns/mnt) && echo sixth > first"
        ),
    ]);
    let (status, output) = stage.run(&config);
    assert_eq!((status, output.as_str()), (0, "librarysettingslibx.so\nlibx.so.1\nlibx.so.1.2\nsixth\n1:3\n4\n"));
}
