//! Images and processes that try to reach the host.
use std::fs;
use std::os::unix::fs::symlink;

use serde_json::json;

use crate::bundle;
use crate::stage::Stage;

crate::cases![
    proc_and_sys_may_not_be_links,
    a_link_in_place_of_dev_stays_in_the_root,
    mount_targets_are_resolved_in_the_root,
    files_made_for_mounts_stay_in_the_root,
    a_false_null_device_is_not_used,
    a_working_directory_outside_the_root_is_refused,
    no_path_leads_through_a_descriptor_to_the_host,
    a_link_in_place_of_passwd_is_harmless,
    a_fifo_in_place_of_passwd_does_not_block,
    a_joining_process_cannot_be_traced,
    a_joining_process_shows_nothing_of_the_host_to_one_that_may_trace,
    masked_paths_through_links_stay_in_the_root,
    a_link_in_place_of_the_console_is_not_followed,
    the_shims_executable_cannot_be_written,
    a_target_that_is_exchanged_meanwhile_stays_in_the_root,
];

/// The argument with which a copy of this program only waits.
pub(crate) const HOLD: &str = "hold-in-a-container";

/// A folder of the host, which is to stay empty.
fn outside(stage: &Stage) -> std::path::PathBuf {
    let folder = stage.folder.join("outside");
    fs::create_dir_all(&folder).expect("a folder");
    folder
}

fn is_empty(folder: &std::path::Path) -> bool {
    fs::read_dir(folder).expect("a folder").next().is_none()
}

fn proc_and_sys_may_not_be_links() {
    for name in ["proc", "sys"] {
        let stage = Stage::new();
        let root = stage.root();
        fs::remove_dir(root.join(name)).expect("removed");
        symlink("/tmp", root.join(name)).expect("a link");
        let error = stage.create("c", &stage.config(&["true"])).err().expect("refused");
        assert!(error.contains(&format!("on /{name}: ")), "{error}");
    }
}

fn a_link_in_place_of_dev_stays_in_the_root() {
    for target in ["/outside", "../../../../../../outside", "/", "/etc"] {
        let stage = Stage::new();
        let outside = outside(&stage);
        let root = stage.root();
        fs::remove_dir(root.join("dev")).expect("removed");
        let target = target.replace("/outside", &outside.display().to_string());
        symlink(target, root.join("dev")).expect("a link");
        let before = fs::read_dir("/dev").expect("devices").count();
        // Whether it works depends on what the link leads to in the root.
        if stage.create("c", &stage.config(&["true"])).is_ok() {
            stage.start("c");
        }
        assert!(is_empty(&outside));
        assert_eq!(fs::read_dir("/dev").expect("devices").count(), before);
    }
}

fn mount_targets_are_resolved_in_the_root() {
    let stage = Stage::new();
    let outside = outside(&stage);
    symlink(&outside, stage.root().join("absolute")).expect("a link");
    symlink("../../../../../../../../tmp", stage.root().join("relative")).expect("a link");
    let output = stage.shell("grep -c marker /proc/self/mountinfo; ls -d /relative/in /tmp/in", |config| {
        let mounts = config["mounts"].as_array_mut().expect("an array");
        mounts.push(bundle::mount("/absolute/in", "tmpfs", "marker", &[]));
        mounts.push(bundle::mount("/relative/in", "tmpfs", "marker", &[]));
    });
    assert_eq!(output, "2\n/relative/in\n/tmp/in\n");
    assert!(is_empty(&outside));
}

fn files_made_for_mounts_stay_in_the_root() {
    let stage = Stage::new();
    let outside = outside(&stage);
    fs::write(stage.folder.join("file"), "content").expect("a file");
    symlink(outside.join("made"), stage.root().join("dangling")).expect("a link");
    symlink(&outside, stage.root().join("folder")).expect("a link");
    let output = stage.shell("cat /dangling /folder/made", |config| {
        let mounts = config["mounts"].as_array_mut().expect("an array");
        mounts.push(bundle::mount("/dangling", "bind", "file", &["bind"]));
        mounts.push(bundle::mount("/folder/made", "bind", "file", &["bind"]));
    });
    assert_eq!(output, "contentcontent");
    assert!(is_empty(&outside));
}

fn a_false_null_device_is_not_used() {
    let stage = Stage::new();
    // A shared `/dev` whose null device is a file that the container could write.
    let shared = stage.folder.join("shared");
    fs::create_dir_all(&shared).expect("a folder");
    fs::write(shared.join("null"), "").expect("a file");
    let mut config = stage.config(&["true"]);
    config["mounts"][1] = bundle::mount("/dev", "bind", &shared.display().to_string(), &["bind"]);
    config["mounts"]
        .as_array_mut()
        .expect("an array")
        .retain(|mount| !mount["destination"].as_str().is_some_and(|path| path.starts_with("/dev/")));
    let error = stage.create("c", &config).err().expect("refused");
    assert!(error.contains("/dev/null"), "{error}");
}

fn a_working_directory_outside_the_root_is_refused() {
    let stage = Stage::new();
    stage.leak();
    symlink("/proc/self/fd/7", stage.root().join("fd7")).expect("a link");
    for number in 3..16 {
        for cwd in [format!("/proc/self/fd/{number}"), "/fd7".to_owned()] {
            let mut config = stage.config(&["cat", "/etc/passwd"]);
            config["process"]["cwd"] = json!(cwd);
            assert!(stage.create("c", &config).is_err(), "{cwd}");
        }
    }
    let _init = stage.create("c", &stage.config(&["sleep", "1000"])).expect("created");
    for number in 3..16 {
        let mut process = bundle::process(&["true"]);
        process["cwd"] = json!(format!("/proc/self/fd/{number}"));
        assert!(stage.exec("c", &process).is_err(), "{number}");
    }
}

/// `..` in the folder that a descriptor is of leads up to the root of its mount namespace.
fn no_path_leads_through_a_descriptor_to_the_host() {
    let stage = Stage::new();
    stage.leak();
    let outside = outside(&stage);
    fs::copy("/bin/busybox", stage.folder.join("busybox-of-the-host")).expect("a copy");
    let up = "../".repeat(12);
    let to_host = |number: u32| format!("/proc/self/fd/{number}/{up}{}", stage.folder.display().to_string().trim_start_matches('/'));
    fs::remove_file(stage.root().join("etc/passwd")).expect("removed");
    fs::write(stage.folder.join("passwd"), "root:x:0:0::/of-the-host:/bin/sh\n").expect("a file");
    let tamper = |process: &mut serde_json::Value, number: u32, way: u32| match way {
        0 => process["cwd"] = json!(format!("{}/outside", to_host(number))),
        1 => process["cwd"] = json!(format!("{}/outside/made", to_host(number))),
        2 => process["args"] = json!([format!("{}/busybox-of-the-host", to_host(number)), "true"]),
        _ => {
            process["env"] = json!([format!("PATH={}:/nowhere", to_host(number))]);
            process["args"] = json!(["busybox-of-the-host", "true"]);
        }
    };
    let init = stage.create("other", &stage.config(&["sleep", "1000"])).expect("created");
    for number in 3..40 {
        for way in 0..4 {
            let mut config = stage.config(&["true"]);
            tamper(&mut config["process"], number, way);
            config["linux"]["cgroupsPath"] = json!(format!("{}/c", stage.cgroup));
            assert!(stage.create("c", &config).is_err(), "init, descriptor {number}, {way}");
            let mut process = bundle::process(&["true"]);
            tamper(&mut process, number, way);
            assert!(stage.exec("other", &process).is_err(), "exec, descriptor {number}, {way}");
        }
        let link = stage.root().join("etc/passwd");
        symlink(format!("{}/passwd", to_host(number)), &link).expect("a link");
        let home = stage.exec_shell("other", "echo $HOME", |_| {});
        assert_eq!(home, "/\n", "descriptor {number}");
        fs::remove_file(&link).expect("removed");
    }
    assert!(is_empty(&outside));
    init.kill();
    init.end();
}

fn a_link_in_place_of_passwd_is_harmless() {
    let stage = Stage::new();
    fs::remove_file(stage.root().join("etc/passwd")).expect("removed");
    symlink("/proc/1/root/../../../../etc/passwd", stage.root().join("etc/passwd")).expect("a link");
    assert_eq!(stage.shell("echo $HOME", |config| config["process"]["user"]["uid"] = json!(1)), "/\n");
}

fn a_fifo_in_place_of_passwd_does_not_block() {
    let stage = Stage::new();
    fs::remove_file(stage.root().join("etc/passwd")).expect("removed");
    nix::unistd::mkfifo(&stage.root().join("etc/passwd"), nix::sys::stat::Mode::from_bits_truncate(0o666)).expect("a fifo");
    assert_eq!(stage.shell("echo $HOME", |_| {}), "/\n");
}

/// While processes join, the container's root looks at each for what it could take from it.
fn a_joining_process_cannot_be_traced() {
    let stage = Stage::new();
    let script = "while :; do for p in /proc/[0-9]*; do case $(readlink $p/exe) in */busybox|'') ;; *) echo $p $(readlink $p/exe);; esac; \
        for fd in $p/fd/[3-9]*; do case $(readlink $fd) in ''|/|/proc*|pipe*|/bin*) ;; *) echo $fd $(readlink $fd);; esac; done; done; done > /tmp/seen";
    let init = stage.create("c", &stage.config(&["sh", "-c", script])).expect("created");
    stage.start("c");
    for _ in 0..50 {
        stage.exec_shell("c", "true", |_| {});
    }
    init.kill();
    init.end();
    assert_eq!(fs::read_to_string(stage.root().join("tmp/seen")).expect("a file"), "");
}

/// With the capability to trace, the container's root may look at a joining process: it must be in the container from its birth.
fn a_joining_process_shows_nothing_of_the_host_to_one_that_may_trace() {
    for has_mounts in [true, false] {
        let stage = Stage::new();
        let marker = stage.folder.join("config.json").display().to_string();
        let script = format!(
            "mount -t proc proc /proc; while :; do for p in /proc/[0-9]*; do for way in root cwd; do test -e $p/$way{marker} && echo $p $way; done; done; done > /tmp/seen"
        );
        let mut config = stage.config(&["sh", "-c", &script]);
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_SYS_ADMIN"]);
        }
        if !has_mounts {
            let namespaces = config["linux"]["namespaces"].as_array_mut().expect("an array");
            namespaces.retain(|namespace| namespace["type"] != "mount");
            for (field, nothing) in [("/mounts", json!([])), ("/linux/maskedPaths", json!([])), ("/linux/readonlyPaths", json!([]))] {
                *config.pointer_mut(field).expect("present") = nothing;
            }
        }
        let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
        stage.start("c");
        for _ in 0..100 {
            stage.exec_shell("c", "true", |_| {});
        }
        init.kill();
        init.end();
        assert_eq!(fs::read_to_string(stage.root().join("tmp/seen")).expect("a file"), "");
        stage.on_host(&format!("umount {}/proc 2>/dev/null; true", stage.root().display()));
    }
}

fn masked_paths_through_links_stay_in_the_root() {
    let stage = Stage::new();
    let outside = outside(&stage);
    symlink(&outside, stage.root().join("masked")).expect("a link");
    let output = stage.shell("ls / | grep -c masked", |config| config["linux"]["maskedPaths"] = json!(["/masked", "/masked/x"]));
    assert_eq!(output, "1\n");
    assert!(is_empty(&outside));
}

fn a_link_in_place_of_the_console_is_not_followed() {
    let stage = Stage::new();
    let shared = stage.folder.join("shared");
    fs::create_dir_all(&shared).expect("a folder");
    symlink("/etc/passwd", shared.join("console")).expect("a link");
    let mut config = stage.config(&["cat", "/etc/passwd"]);
    config["process"]["terminal"] = json!(true);
    // A tmpfs of the container's own, with a link that an earlier mount brought.
    config["mounts"].as_array_mut().expect("an array").push(bundle::mount("/dev/console", "bind", "shared/console", &["bind"]));
    match stage.create("c", &config) {
        Err(_) => {}
        Ok(init) => {
            stage.start("c");
            init.end();
            assert!(init.terminal().contains("root:x:0"));
        }
    }
}

/// The container has its keeper's executable executed. While any process executes it, the kernel refuses to open it for writing; afterwards the mount does,
/// which shows already: access(2) asks the mount, not who executes.
fn the_shims_executable_cannot_be_written() {
    let stage = Stage::new();
    let _init = stage.create("c", &stage.config(&["sleep", "1000"])).expect("created");
    let held = stage.exec("c", &bundle::process(&["/proc/self/exe", HOLD])).expect("executed");
    assert_eq!(held.write_access(), Err("EROFS: Read-only file system".to_owned()));
    let other = stage.exec("c", &bundle::process(&["sleep", "1000"])).expect("executed");
    assert_eq!(other.write_access(), Ok(()), "the container's own executables can be written");
    held.kill();
    held.end();
}

/// As when two containers share a volume: a folder and a link to the outside change places all the time.
fn a_target_that_is_exchanged_meanwhile_stays_in_the_root() {
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    let stage = Stage::new();
    let outside = outside(&stage);
    let (folder, link) = (stage.root().join("folder"), stage.root().join("link"));
    fs::create_dir_all(&folder).expect("a folder");
    symlink(&outside, &link).expect("a link");
    fs::write(stage.folder.join("file"), "").expect("a file");
    let is_done = AtomicBool::new(false);
    let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let before = mounts();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                renameat2(AT_FDCWD, &folder, AT_FDCWD, &link, RenameFlags::RENAME_EXCHANGE).expect("exchanged");
            }
        });
        let mut config = stage.config(&["true"]);
        let targets = config["mounts"].as_array_mut().expect("an array");
        targets.push(bundle::mount("/folder/a/b", "tmpfs", "tmpfs", &[]));
        targets.push(bundle::mount("/folder/made", "bind", "file", &["bind"]));
        config["linux"]["devices"] = json!([{ "path": "/folder/device", "type": "c", "major": 1, "minor": 3 }]);
        let mut made = 0;
        for _ in 0..200 {
            // It may fail: what it had resolved is gone.
            if let Ok(init) = stage.create("c", &config) {
                made += 1;
                init.kill();
                init.end();
                stage.delete("c").expect("deleted");
            }
            assert!(is_empty(&outside));
        }
        is_done.store(true, Ordering::Relaxed);
        assert!(made > 0);
    });
    assert_eq!(mounts(), before);
}
