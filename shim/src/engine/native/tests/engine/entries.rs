//! Roots that are entered in another way than by pivot_root(2) in a new mount namespace.
use std::fs;

use serde_json::{Value, json};

use crate::stage::Stage;
use crate::users;

crate::cases![
    a_root_can_be_moved,
    a_moved_root_hides_the_hosts_procfs,
    a_root_can_be_moved_in_a_user_namespace,
    a_moved_root_leaves_the_hosts_mounts,
    a_root_can_be_entered_without_a_mount_namespace,
    a_mount_namespace_is_joined_by_path,
    the_runtimes_mount_namespace_is_not_joined,
    a_moved_root_looks_as_with_runc,
];

fn moving() -> Stage {
    let stage = Stage::new();
    stage.no_pivot_root.set(true);
    stage
}

const SHOW: &str = "pwd; readlink /proc/self/root; ls /etc; cat /proc/keys | wc -c; touch /x /run/x; grep -c . /proc/self/mountinfo";

fn a_root_can_be_moved() {
    let stage = moving();
    let mut config = stage.config(&["sh", "-c", &format!("{SHOW}; exec sleep 1000")]);
    config["root"]["readonly"] = json!(true);
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    let added = stage.exec_shell("c", &format!("{SHOW}; true"), |_| {});
    assert!(added.starts_with("/\n/\n") && added.contains("\ngroup\npasswd\n0\n") && added.contains("/x: Read-only"), "{added}");
    scratch::eventually("init has shown what it sees", || {
        fs::read_to_string(stage.folder.join("output-1")).is_ok_and(|text| text == added)
    });
    init.kill();
    init.end();
}

/// In a namespace of its own, where it cannot unmount what hides a part of procfs, a process may mount another procfs if a whole one is there already:
/// also one that no path leads to.
fn a_moved_root_hides_the_hosts_procfs() {
    let script =
        "unshare -U -r -m -p -f mount -t proc p /tmp 2>&1; unshare -U -r -m -n mount -t sysfs s /tmp 2>&1; unshare -U -r -m echo allowed";
    let mount = |stage: &Stage, masked: &[&str]| {
        stage.shell(script, |config| {
            config["linux"]["maskedPaths"] = json!(masked);
            config["linux"]["readonlyPaths"] = json!([]);
            // Its attributes are locked too.
            config["mounts"][0]["options"] = json!([]);
            config["mounts"][5]["options"] = json!([]);
        })
    };
    assert_eq!(mount(&moving(), &[]), "allowed\n");
    let output = mount(&moving(), &["/proc/keys", "/sys/firmware"]);
    assert_eq!(output.matches("permission denied").count(), 2, "{output}");
    assert!(output.ends_with("allowed\n"), "{output}");
    assert_eq!(mount(&Stage::new(), &["/proc/keys", "/sys/firmware"]), output);
}

fn a_root_can_be_moved_in_a_user_namespace() {
    let stage = moving();
    let output = stage.shell("id -u; cat /proc/self/uid_map; cat /proc/keys | wc -c; head -c 0 /dev/null && pwd", |config| {
        users::map(&stage, config);
    });
    assert_eq!(output.split_whitespace().collect::<Vec<_>>(), ["0", "0", "100000", "65536", "0", "/"]);
}

fn a_moved_root_leaves_the_hosts_mounts() {
    for word in ["rslave", "slave", "shared"] {
        let stage = moving();
        stage.on_host("mount --make-rshared /");
        let before = stage.on_host("cat /proc/self/mountinfo");
        let output = stage.shell("echo ran", |config| config["linux"]["rootfsPropagation"] = json!(word));
        assert_eq!(output, "ran\n");
        assert!(stage.on_host("cat /proc/self/mountinfo") == before, "{word}");
    }
}

fn without_mounts(config: &mut Value) {
    config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "mount");
    config["mounts"] = json!([]);
    config["linux"]["maskedPaths"] = json!([]);
    config["linux"]["readonlyPaths"] = json!([]);
}

fn a_root_can_be_entered_without_a_mount_namespace() {
    let stage = Stage::new();
    let host = stage.on_host("cat /proc/self/mountinfo");
    let mut config = stage.config(&["sh", "-c", "pwd; ls /; echo $$; hostname; echo x > /dev/null; exec sleep 1000"]);
    without_mounts(&mut config);
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    let added = stage.exec_shell("c", "pwd; ls / | head -2; ls /proc; cat /etc/group | head -1; cd ..; pwd; echo $HOME", |process| {
        process["user"] = json!({ "uid": 1000, "gid": 1000 });
    });
    assert_eq!(added, "/\nbin\ndev\nroot:x:0:\n/\n/tmp\n");
    assert_eq!(stage.on_host("cat /proc/self/mountinfo"), host);
    let seen = || fs::read_to_string(stage.folder.join("output-1")).unwrap_or_default();
    scratch::eventually("init has shown what it sees", || seen() == "/\nbin\ndev\netc\nproc\nroot\nrun\nsys\ntmp\n1\nx-engine\n");
    init.kill();
    init.end();
    // In a user namespace there are no nodes, and nothing to mount the host's on.
    let mut config = stage.config(&["true"]);
    without_mounts(&mut config);
    users::map(&stage, &mut config);
    fs::remove_dir_all(stage.root().join("dev")).expect("removed");
    let error = stage.create("mapped", &config).err().expect("refused");
    assert_eq!(error, "make device /dev/null: operation not permitted");
    assert_eq!(stage.on_host("cat /proc/self/mountinfo"), host);
}

/// One that sees the root, as a mount namespace that was made for several containers.
fn a_mount_namespace_is_joined_by_path() {
    let stage = Stage::new();
    let pin = stage.folder.join("pinned");
    fs::write(&pin, "").expect("a file");
    // The kernel pins a namespace only in one with a lower number, and numbers of other processors can be lower (Linux 6.18): more than one is tried.
    stage.on_host(&format!(
        "mount --make-private --bind /tmp /tmp; for attempt in $(seq 100); do \
         unshare --mount sh -c 'mount -t tmpfs seen-by-both /mnt; exec sleep 1000' & pid=$!; \
         until grep -q seen-by-both /proc/$pid/mountinfo; do :; done; \
         mount --bind /proc/$pid/ns/mnt {0} && is_pinned=1; kill $pid; test -z $is_pinned || exit 0; done; exit 1",
        pin.display()
    ));
    let before = stage.on_host("cat /proc/self/mountinfo");
    let mut config = stage.config(&["sh", "-c", "readlink /proc/self/ns/mnt; pwd; cat /etc/group | head -1; exec sleep 1000"]);
    let namespaces = config["linux"]["namespaces"].as_array_mut().expect("an array");
    namespaces.iter_mut().find(|namespace| namespace["type"] == "mount").expect("listed")["path"] = json!(pin.display().to_string());
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    let inode = stage.on_host(&format!("stat -L -c %i {}", pin.display()));
    let shown = stage.exec_shell("c", "readlink /proc/self/ns/mnt; pwd; cat /etc/group | head -1", |_| {});
    assert_eq!(shown, format!("mnt:[{}]\n/\nroot:x:0:\n", inode.trim()));
    scratch::eventually("init shows the same", || fs::read_to_string(stage.folder.join("output-1")).is_ok_and(|text| text == shown));
    assert_eq!(stage.on_host("cat /proc/self/mountinfo"), before);
    init.kill();
    init.end();
}

fn the_runtimes_mount_namespace_is_not_joined() {
    let stage = Stage::new();
    for path in ["/proc/self/ns/mnt", "/proc/1/ns/mnt"] {
        let mut config = stage.config(&["true"]);
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("an array");
        namespaces.iter_mut().find(|namespace| namespace["type"] == "mount").expect("listed")["path"] = json!(path);
        let error = stage.create("c", &config).err().expect("refused");
        assert_eq!(error, "the mount namespace to join is the runtime's: the host's root would be replaced");
    }
    assert_eq!(stage.shell("echo $0", |_| {}), "sh\n");
}

fn a_moved_root_looks_as_with_runc() {
    crate::differences::compare_moved("runc");
}
