//! Profiles and labels of the kernel's security modules.
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::bundle;
use crate::differences::{Other, is_installed};
use crate::stage::Stage;
use crate::users;

crate::cases![
    what_needs_an_inactive_module_is_refused,
    init_hands_its_profile_to_the_kernel,
    an_added_process_hands_its_profile_to_the_kernel,
    profiles_of_a_user_namespace_are_handed_to_the_kernel,
    a_label_is_handed_to_the_kernel,
    the_label_of_a_pods_holder_is_handed_to_the_kernel,
    an_empty_profile_and_label_are_nothing,
    runc_refuses_the_same,
];

/// Whether this kernel has a module that would take what these tests write.
fn is_active() -> bool {
    let is_active = Path::new("/sys/module/apparmor").exists() || Path::new("/sys/fs/selinux/enforce").exists();
    if is_active {
        eprintln!("skipped: a security module is active here");
    }
    is_active
}

fn what_needs_an_inactive_module_is_refused() {
    if is_active() {
        return;
    }
    let stage = Stage::new();
    for (place, words) in [
        ("/process/apparmorProfile", "unable to apply apparmor profile"),
        ("/process/selinuxLabel", "selinux is disabled or not supported"),
        ("/linux/mountLabel", "selinux is disabled or not supported"),
    ] {
        let mut config = stage.config(&["true"]);
        set(&mut config, place, "a:b:c:s0");
        let error = stage.create("c", &config).err().expect("refused");
        assert!(error.contains(words) && error.contains(&place[1..].replace('/', ".")), "{error}");
    }
}

fn set(config: &mut Value, place: &str, value: &str) {
    let (parent, name) = place.rsplit_once('/').expect("a place");
    config.pointer_mut(parent).expect("an object")[name] = json!(value);
}

/// Without the module the kernel has the files, and refuses what is written to them: the write has reached it.
fn init_hands_its_profile_to_the_kernel() {
    if is_active() {
        return;
    }
    let stage = Stage::new();
    stage.pretend_security_modules();
    let mut config = stage.config(&["true"]);
    config["process"]["apparmorProfile"] = json!("some-profile");
    let error = stage.create("c", &config).err().expect("refused");
    assert_eq!(error, "unable to apply apparmor profile \"some-profile\": invalid argument");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

fn an_added_process_hands_its_profile_to_the_kernel() {
    if is_active() {
        return;
    }
    let stage = Stage::new();
    stage.pretend_security_modules();
    let mut config = stage.config(&["sleep", "1000"]);
    // Its own procfs is covered: the write must not go there.
    config["linux"]["maskedPaths"] = json!(["/proc"]);
    let _init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    let mut process = bundle::process(&["true"]);
    process["apparmorProfile"] = json!("some-profile");
    process["user"] = json!({ "uid": 1000, "gid": 1000 });
    let error = stage.exec("c", &process).err().expect("refused");
    assert_eq!(error, "unable to apply apparmor profile \"some-profile\": invalid argument");
}

/// There the kernel makes no procfs for a process that sees none, or that is in the host's pid namespace.
fn profiles_of_a_user_namespace_are_handed_to_the_kernel() {
    if is_active() {
        return;
    }
    let refused = "unable to apply apparmor profile \"some-profile\": invalid argument";
    for without in ["", "procfs", "pid"] {
        let stage = Stage::new();
        stage.pretend_security_modules();
        let mut config = stage.config(&["sleep", "1000"]);
        users::map(&stage, &mut config);
        match without {
            "procfs" => drop(config["mounts"].as_array_mut().expect("an array").remove(0)),
            "pid" => {
                config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "pid");
                config["mounts"][0] = bundle::mount("/proc", "bind", "/proc", &["rbind"]);
            }
            _ => {}
        }
        let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
        stage.start("c");
        let mut process = bundle::process(&["true"]);
        process["apparmorProfile"] = json!("some-profile");
        process["user"] = json!({ "uid": 1000, "gid": 1000 });
        assert_eq!(stage.exec("c", &process).err().expect("refused"), refused, "without {without}");
        init.kill();
        init.end();
        stage.delete("c").expect("deleted");
        config["process"]["apparmorProfile"] = json!("some-profile");
        assert_eq!(stage.create("c", &config).err().expect("refused"), refused, "without {without}");
    }
}

fn a_label_is_handed_to_the_kernel() {
    if is_active() {
        return;
    }
    let stage = Stage::new();
    stage.pretend_security_modules();
    let mut config = stage.config(&["true"]);
    config["process"]["selinuxLabel"] = json!("a:b:c:s0");
    let error = stage.create("c", &config).err().expect("refused");
    assert_eq!(error, "set the label \"a:b:c:s0\" of keyrings: invalid argument");
    config["process"]["selinuxLabel"] = json!("");
    config["linux"]["mountLabel"] = json!("a:b:c:s0");
    let error = stage.create("c", &config).err().expect("refused");
    assert_eq!(error, "mount tmpfs on /dev: invalid argument");
}

/// Its last step: where it is refused, no holder is left.
fn the_label_of_a_pods_holder_is_handed_to_the_kernel() {
    if is_active() {
        return;
    }
    let stage = Stage::new();
    // Without those that have exited.
    let holders = || stage.on_host("cat /proc/[0-9]*/stat 2>/dev/null | grep '(pod) [^Z]' | wc -l").trim().to_owned();
    let error = stage.holder(Some("a:b:c:s0")).err().expect("refused");
    assert_eq!(error, "set the label \"a:b:c:s0\": invalid argument");
    assert_eq!(holders(), "0");
    let holder = stage.holder(None).unwrap_or_else(|error| panic!("holder: {error}"));
    assert_eq!(holders(), "1");
    holder.kill();
    holder.end();
}

fn an_empty_profile_and_label_are_nothing() {
    let stage = Stage::new();
    let output = stage.shell("echo fine", |config| {
        config["process"]["apparmorProfile"] = json!("");
        config["process"]["selinuxLabel"] = json!("");
        config["linux"]["mountLabel"] = json!("");
    });
    assert_eq!(output, "fine\n");
}

fn runc_refuses_the_same() {
    if is_active() || !is_installed("runc") {
        return;
    }
    let stage = Stage::new();
    for (place, words) in [
        ("/process/apparmorProfile", "unable to apply apparmor profile"),
        ("/process/selinuxLabel", "selinux label is specified in config"),
    ] {
        let mut config = stage.config(&["true"]);
        set(&mut config, place, "a:b:c:s0");
        let ours = stage.create("c", &config).err().expect("refused");
        let other = Other { runtime: "runc", stage: &stage };
        let output = other.command().args(["run", "other"]).stderr(Stdio::piped()).output().expect("runc");
        let theirs = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(ours.contains(words) && theirs.contains(words) && !output.status.success(), "{ours}\n{theirs}");
    }
}
