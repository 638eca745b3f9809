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
