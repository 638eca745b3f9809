//! Operations that fail.
use serde_json::{Value, json};

use crate::bundle;
use crate::stage::{Stage, repeated};

crate::cases![
    a_failure_at_any_step_leaves_nothing,
    an_added_process_that_fails_at_any_step_leaves_nothing,
    texts_of_any_length_are_taken_or_refused_with_the_reason,
    texts_with_a_nul_are_refused,
];

/// A configuration that fails, at a step that the error shows.
type Failing = (&'static str, fn(&mut Value));

/// In the order of the steps.
const FAILING: &[Failing] = &[
    ("listenerPath", |config| {
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/no/such", "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_NOTIFY" }],
        });
    }),
    ("/no/such/namespace", |config| config["linux"]["namespaces"][4]["path"] = json!("/no/such/namespace")),
    ("/no/such/root", |config| config["root"]["path"] = json!("/no/such/root")),
    ("mount nothing", |config| add_mount(config, bundle::mount("/x", "nothing", "x", &[]))),
    ("/no/such/source", |config| add_mount(config, bundle::mount("/x", "bind", "/no/such/source", &["bind"]))),
    ("mount tmpfs on /etc/passwd", |config| add_mount(config, bundle::mount("/etc/passwd", "tmpfs", "tmpfs", &[]))),
    ("/sys/x", |config| config["linux"]["devices"] = json!([{ "path": "/sys/x", "type": "c", "major": 1, "minor": 3 }])),
    ("cpu.cfs_quota_us", |config| config["linux"]["resources"]["cpu"] = json!({ "quota": 1 })),
    ("hook #0", |config| config["hooks"]["prestart"] = json!([{ "path": "/bin/false" }])),
    ("hook #0", |config| config["hooks"]["createRuntime"] = json!([{ "path": "/bin/false" }])),
    ("hook #0", |config| config["hooks"]["createContainer"] = json!([{ "path": "/bin/false" }])),
    ("terminal", |config| {
        config["process"]["terminal"] = json!(true);
        config["mounts"].as_array_mut().expect("an array").retain(|mount| mount["destination"] != "/dev/pts");
    }),
    ("host name", |config| config["hostname"] = json!("x".repeat(65))),
    ("/proc/sys/net", |config| config["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "nonsense" })),
    ("/etc/passwd/x", |config| config["linux"]["readonlyPaths"] = json!(["/etc/passwd/x"])),
    ("/etc/passwd/x", |config| config["linux"]["maskedPaths"] = json!(["/etc/passwd/x"])),
    ("limit of resource 7", |config| {
        config["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": u64::MAX, "hard": u64::MAX }])
    }),
    ("chdir", |config| config["process"]["cwd"] = json!("/etc/passwd")),
    ("executable file not found", |config| config["process"]["args"] = json!(["no-such-program"])),
];

fn add_mount(config: &mut Value, mount: Value) {
    config["mounts"].as_array_mut().expect("an array").push(mount);
}

/// What could be left of a failure: descriptors of the keeper, living processes, mounts.
fn what_is_there(stage: &Stage) -> (u64, String, String) {
    // But for those that look.
    let living = "for p in /proc/[0-9]*; do read -r name < $p/comm; grep -q '^State:.*Z' $p/status || echo $name; done 2> /dev/null | grep -vxE 'sh|grep|sort' | sort";
    (stage.descriptors(), stage.on_host(living), stage.on_host("cat /proc/self/mountinfo"))
}

fn a_failure_at_any_step_leaves_nothing() {
    let stage = Stage::new();
    let before = what_is_there(&stage);
    for (words, change) in FAILING {
        for is_mapped in [false, true] {
            let mut config = stage.config(&["true"]);
            if is_mapped {
                crate::users::map(&stage, &mut config);
            }
            change(&mut config);
            for round in 0..repeated(2) {
                let error = stage.create("c", &config).err().unwrap_or_else(|| panic!("{words}: not refused"));
                assert!(error.contains(words), "{words}: {error}");
                assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new(), "{words}, {round}");
            }
            assert!(what_is_there(&stage) == before, "{words}: {:.300?}, {before:.300?}", what_is_there(&stage));
        }
    }
    assert_eq!(stage.run(&stage.config(&["true"])).0, 0);
}

fn an_added_process_that_fails_at_any_step_leaves_nothing() {
    let failing: &[Failing] = &[
        ("chdir", |process| process["cwd"] = json!("/no/such")),
        ("executable file not found", |process| process["args"] = json!(["no-such-program"])),
        ("limit of resource 7", |process| process["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": u64::MAX, "hard": u64::MAX }])),
        ("setting scheduler", |process| {
            process["scheduler"] = json!({ "policy": "SCHED_DEADLINE", "runtime": 3, "deadline": 2, "period": 1 })
        }),
        ("exec /nonsense: exec format error", |process| process["args"] = json!(["/nonsense"])),
    ];
    for is_mapped in [false, true] {
        let stage = Stage::new();
        let nonsense = stage.root().join("nonsense");
        std::fs::write(&nonsense, "\x7fELFnot").expect("a file");
        std::fs::set_permissions(&nonsense, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("permissions");
        let mut config = stage.config(&["sleep", "1000"]);
        if is_mapped {
            crate::users::map(&stage, &mut config);
        }
        let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
        stage.start("c");
        init.executes("sleep");
        let before = what_is_there(&stage);
        for (words, change) in failing {
            for _ in 0..repeated(3) {
                let mut process = bundle::process(&["true"]);
                change(&mut process);
                let error = stage.exec("c", &process).err().unwrap_or_else(|| panic!("{words}: not refused"));
                assert!(error.contains(words), "{words}: {error}");
            }
            assert!(what_is_there(&stage) == before, "{words}: {:.300?}, {before:.300?}", what_is_there(&stage));
            assert_eq!(stage.count("c"), 1, "{words}");
        }
        init.kill();
        init.end();
        stage.delete("c").expect("deleted");
    }
}

type Put = fn(&mut Value, &str);

/// Where a configuration has text that a system call gets.
const TEXTS: &[(&str, Put)] = &[
    ("hostname", |config, text| config["hostname"] = json!(text)),
    ("domainname", |config, text| config["domainname"] = json!(text)),
    ("root.path", |config, text| config["root"]["path"] = json!(format!("/{text}"))),
    ("mounts[].destination", |config, text| add_mount(config, bundle::mount(&format!("/{text}"), "tmpfs", "tmpfs", &[]))),
    ("mounts[].source", |config, text| add_mount(config, bundle::mount("/x", "bind", &format!("/{text}"), &["bind"]))),
    ("mounts[].type", |config, text| add_mount(config, bundle::mount("/x", text, "x", &[]))),
    ("mounts[].options", |config, text| add_mount(config, bundle::mount("/x", "tmpfs", "tmpfs", &[text]))),
    ("process.args", |config, text| config["process"]["args"] = json!(["true", text])),
    ("process.args[0]", |config, text| config["process"]["args"] = json!([text])),
    ("process.cwd", |config, text| config["process"]["cwd"] = json!(format!("/{text}"))),
    ("process.env", |config, text| config["process"]["env"] = json!(["PATH=/bin", format!("X={text}")])),
    ("linux.maskedPaths", |config, text| config["linux"]["maskedPaths"] = json!([format!("/{text}")])),
    ("linux.readonlyPaths", |config, text| config["linux"]["readonlyPaths"] = json!([format!("/{text}")])),
    ("linux.namespaces", |config, text| config["linux"]["namespaces"][4]["path"] = json!(format!("/{text}"))),
    ("linux.sysctl", |config, text| config["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": text })),
    ("linux.devices", |config, text| {
        config["linux"]["devices"] = json!([{ "path": format!("/dev/{text}"), "type": "c", "major": 1, "minor": 3 }]);
    }),
    ("linux.cgroupsPath", |config, text| {
        // Folders above the last one would stay.
        let path = config["linux"]["cgroupsPath"].as_str().expect("a path").trim_end_matches('c').to_owned();
        config["linux"]["cgroupsPath"] = json!(format!("{path}{text}"));
    }),
    ("hooks", |config, text| config["hooks"]["prestart"] = json!([{ "path": "/bin/true", "args": ["true", text] }])),
    ("hooks.path", |config, text| config["hooks"]["createContainer"] = json!([{ "path": format!("/{text}") }])),
    ("annotations", |config, text| config["annotations"] = json!({ "x": text })),
];

/// The reason is not lost on the way from the child to the keeper, whatever it quotes.
fn texts_of_any_length_are_taken_or_refused_with_the_reason() {
    let stage = Stage::new();
    for length in [300, 5_000, 64 << 10, 1 << 20] {
        let text = "x".repeat(length);
        for (field, change) in TEXTS {
            let mut config = stage.config(&["true"]);
            change(&mut config, &text);
            match stage.create("c", &config) {
                Ok(init) => {
                    stage.start("c");
                    init.end();
                    stage.delete("c").expect("deleted");
                }
                Err(error) => {
                    let is_lost =
                        ["killed before", "performer was killed", "wait for the process"].iter().any(|words| error.contains(words));
                    assert!(!is_lost && error.len() < 8 << 10, "{field}, {length}: {} bytes: {error:.1000}", error.len());
                }
            }
            assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new(), "{field}, {length}");
        }
    }
}

fn texts_with_a_nul_are_refused() {
    let stage = Stage::new();
    let mut taken = Vec::new();
    for (field, change) in TEXTS {
        let mut config = stage.config(&["true"]);
        change(&mut config, "x\0y");
        if stage.create("c", &config).is_ok() {
            taken.push(*field);
            stage.delete("c").expect("deleted");
        }
        assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new(), "{field}");
    }
    // They are no more than text to clients and hooks.
    assert_eq!(taken, ["annotations"]);
}
