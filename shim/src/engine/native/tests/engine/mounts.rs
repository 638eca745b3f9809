//! Kinds of mounts, and what is done to them.
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use serde_json::{Value, json};

use crate::bundle;
use crate::stage::Stage;
use crate::users;

crate::cases![
    any_file_system_of_the_kernel_is_mounted,
    an_image_of_a_disk_is_mounted,
    an_overlay_of_many_folders_is_mounted,
    an_unknown_file_system_fails_the_creation,
    a_word_that_the_file_system_does_not_know_fails_the_creation,
    a_tmpfs_is_filled_with_what_it_covers,
    a_tmpfs_is_filled_in_a_user_namespace_too,
    filling_a_tmpfs_follows_no_link,
    what_is_mounted_can_be_changed,
    a_remount_of_what_is_no_mount_fails_the_creation,
    recursive_attributes_hold_for_new_file_systems,
    a_procfs_can_be_bound_on_proc,
    only_a_whole_procfs_can_be_bound_on_proc,
    the_root_has_the_propagation_that_was_asked_for,
    mounts_below_a_shared_root_stay_in_the_container,
];

fn add(config: &mut Value, destination: &str, kind: &str, source: &str, options: &[&str]) {
    config["mounts"].as_array_mut().expect("an array").push(bundle::mount(destination, kind, source, options));
}

fn any_file_system_of_the_kernel_is_mounted() {
    let stage = Stage::new();
    for folder in ["lower", "upper", "work"] {
        fs::create_dir_all(stage.folder.join(folder)).expect("a folder");
    }
    fs::write(stage.folder.join("lower/file"), "below").expect("a file");
    let of = |folder: &str| stage.folder.join(folder).display().to_string();
    let layers = [format!("lowerdir={}", of("lower")), format!("upperdir={}", of("upper")), format!("workdir={}", of("work"))];
    let script = "grep -E ' /(o|r) ' /proc/self/mountinfo | sed 's/.* - //' | cut -d' ' -f1,2; cat /o/file; touch /o/made /r/made";
    let output = stage.shell(script, |config| {
        add(config, "/o", "overlay", "overlay", &[&layers[0], &layers[1], &layers[2], "nosuid"]);
        add(config, "/r", "ramfs", "some", &["mode=0700", "nodev"]);
    });
    assert_eq!(output, "overlay overlay\nramfs some\nbelow");
    assert!(stage.folder.join("upper/made").exists());
}

fn an_image_of_a_disk_is_mounted() {
    let stage = Stage::new();
    let image = stage.folder.join("image").display().to_string();
    let make = format!("truncate -s 8M {image} && mkfs.ext4 -q {image} && losetup --find --show {image}");
    let made = std::process::Command::new("sh").args(["-c", &make]).output().expect("sh");
    if !made.status.success() {
        return eprintln!("skipped: no ext4 on a loop device: {}", String::from_utf8_lossy(&made.stderr));
    }
    let device = String::from_utf8_lossy(&made.stdout).trim().to_owned();
    let output = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        stage.shell("sed -n 's/.* \\(\\/disk .*\\)/\\1/p' /proc/self/mountinfo; touch /disk/x 2>&1 | grep -o Read-only", |config| {
            add(config, "/disk", "ext4", &device, &["ro", "noatime", "data=ordered", "errors=continue"]);
        })
    }));
    let _ = std::process::Command::new("losetup").args(["--detach", &device]).status();
    let output = output.expect("mounted");
    assert!(output.starts_with("/disk ro,noatime - ext4 ") && output.ends_with("Read-only\n"), "{output}");
}

fn an_overlay_of_many_folders_is_mounted() {
    let stage = Stage::new();
    let folders: Vec<String> = (0..20).map(|number| stage.folder.join(format!("layer-{number}")).display().to_string()).collect();
    for folder in &folders {
        fs::create_dir_all(folder).expect("a folder");
        fs::write(format!("{folder}/{}", &folder[folder.len() - 2..]), "").expect("a file");
        fs::write(format!("{folder}/same"), folder).expect("a file");
    }
    let list = format!("lowerdir={}", folders.join(":"));
    let output = stage.shell("ls /o | wc -l; cat /o/same", |config| add(config, "/o", "overlay", "overlay", &[&list]));
    assert_eq!(output, format!("21\n{}", folders[0]));
}

fn an_unknown_file_system_fails_the_creation() {
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    add(&mut config, "/x", "not-there", "none", &[]);
    assert_eq!(stage.create("c", &config).err().expect("refused"), "mount not-there on /x: no such device");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

fn a_word_that_the_file_system_does_not_know_fails_the_creation() {
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    add(&mut config, "/x", "tmpfs", "tmpfs", &["not-there"]);
    assert_eq!(stage.create("c", &config).err().expect("refused"), "mount tmpfs on /x: invalid argument");
}

/// A folder of the root with one of everything.
fn fill(stage: &Stage) {
    let full = stage.root().join("full");
    fs::create_dir_all(full.join("inner/deep")).expect("a folder");
    fs::write(full.join("file"), "content").expect("a file");
    fs::hard_link(full.join("file"), full.join("inner/hard")).expect("a link");
    symlink("/etc/passwd", full.join("soft")).expect("a link");
    nix::unistd::mkfifo(&full.join("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    fs::set_permissions(full.join("inner"), PermissionsExt::from_mode(0o2751)).expect("changed");
    std::os::unix::fs::chown(full.join("file"), Some(7), Some(8)).expect("owned");
    fs::set_permissions(full.join("file"), PermissionsExt::from_mode(0o4750)).expect("changed");
    fs::set_permissions(&full, PermissionsExt::from_mode(0o1771)).expect("changed");
    std::os::unix::fs::chown(&full, Some(1000), None).expect("owned");
}

const DESCRIBE: &str = "cd /full; for f in . file inner inner/deep inner/hard soft fifo; do stat -c '%n %F %a %u:%g %h %Y' $f; done; readlink soft; cat inner/hard; \
    test $(stat -c %i file) = $(stat -c %i inner/hard) && echo same; stat -f -c %T .";

fn a_tmpfs_is_filled_with_what_it_covers() {
    let stage = Stage::new();
    fill(&stage);
    let before = stage.shell(DESCRIBE, |_| {});
    let after = stage.shell(&format!("{DESCRIBE}; touch new 2>&1 | grep -o Read-only"), |config| {
        add(config, "/full", "tmpfs", "tmpfs", &["tmpcopyup", "ro", "size=1m"]);
    });
    let described = |text: &str| {
        let lines =
            text.lines().filter(|line| !line.starts_with(". ") && !line.contains("UNKNOWN") && *line != "ext2/ext3" && *line != "tmpfs");
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let mut expected = described(&before);
    expected.push("Read-only".to_owned());
    assert_eq!(described(&after), expected);
    assert!(after.starts_with(". directory 1771 1000:0 ") && after.contains("\ntmpfs\n"), "{after}");
    // What it had is not changed by what is done to the copy.
    let output = stage.shell("rm -r /full/inner; echo x > /full/file; ls /full", |config| {
        add(config, "/full", "tmpfs", "tmpfs", &["tmpcopyup", "mode=0755"]);
    });
    assert_eq!(output, "fifo\nfile\nsoft\n");
    assert_eq!(fs::read_to_string(stage.root().join("full/inner/hard")).expect("a file"), "content");
    // The target can be missing.
    assert_eq!(stage.shell("ls -A /absent", |config| add(config, "/absent", "tmpfs", "tmpfs", &["tmpcopyup"])), "");
}

fn a_tmpfs_is_filled_in_a_user_namespace_too() {
    let stage = Stage::new();
    fill(&stage);
    let output = stage.shell("cd /full; stat -c '%n %a %u:%g' . file inner/hard; cat file", |config| {
        users::map(&stage, config);
        add(config, "/full", "tmpfs", "tmpfs", &["tmpcopyup"]);
    });
    // A change of owner has taken the bit of the set-user-ID file.
    assert_eq!(output, ". 1771 0:0\nfile 750 0:0\ninner/hard 750 0:0\ncontent");
}

fn filling_a_tmpfs_follows_no_link() {
    let stage = Stage::new();
    fs::create_dir_all(stage.folder.join("outside")).expect("a folder");
    fs::write(stage.folder.join("outside/secret"), "secret").expect("a file");
    let outside = stage.folder.join("outside").display().to_string();
    symlink(&outside, stage.root().join("linked")).expect("a link");
    fs::create_dir_all(stage.root().join("full")).expect("a folder");
    symlink(&outside, stage.root().join("full/inner")).expect("a link");
    symlink(format!("{outside}/secret"), stage.root().join("full/file")).expect("a link");
    let output =
        stage.shell("ls -A /linked; readlink /full/inner; readlink /full/file; cat /full/file /full/inner/secret 2>&1; true", |config| {
            add(config, "/linked", "tmpfs", "tmpfs", &["tmpcopyup"]);
            add(config, "/full", "tmpfs", "tmpfs", &["tmpcopyup"]);
        });
    assert!(output.starts_with(&format!("{outside}\n{outside}/secret\n")), "{output}");
    assert_eq!(output.matches("No such file or directory").count(), 2, "{output}");
}

fn what_is_mounted_can_be_changed() {
    let stage = Stage::new();
    fs::create_dir_all(stage.folder.join("data")).expect("a folder");
    let script =
        "grep -E ' /(t|b|run|sys) ' /proc/self/mountinfo | sed -E 's/^([^ ]+ ){4}//; s/(shared|master):[0-9]+ //'; touch /t/x /b/x; true";
    let output = stage.shell(script, |config| {
        add(config, "/t", "tmpfs", "tmpfs", &["size=64k", "nosuid"]);
        add(config, "/t", "tmpfs", "tmpfs", &["remount", "ro", "nodev", "size=128k"]);
        add(config, "/b", "bind", "data", &["rbind", "nosuid"]);
        add(config, "/b", "none", "", &["bind", "remount", "ro", "noexec"]);
        add(config, "/run", "none", "", &["remount", "bind", "rw", "nosuid", "nodev", "noatime"]);
        add(config, "/sys", "sysfs", "sysfs", &["remount", "nosuid", "noexec", "nodev", "rw"]);
    });
    let line = |target: &str| output.lines().find(|line| line.starts_with(target)).unwrap_or_else(|| panic!("{output}"));
    assert!(line("/t ").starts_with("/t ro,nodev,relatime - tmpfs tmpfs ro,size=128k"), "{output}");
    assert!(line("/b ").starts_with("/b ro,noexec,relatime - "), "{output}");
    assert!(line("/run ").starts_with("/run rw,nosuid,nodev,noatime - tmpfs tmpfs rw,"), "{output}");
    assert_eq!(line("/sys "), "/sys rw,nosuid,nodev,noexec,relatime - sysfs sysfs rw");
    assert_eq!(output.matches("Read-only file system").count(), 2, "{output}");
}

fn a_remount_of_what_is_no_mount_fails_the_creation() {
    for (target, kind, words, error) in [
        ("/etc", "none", &["bind", "remount", "ro"][..], "remount /etc: invalid argument"),
        ("/etc", "tmpfs", &["remount", "ro"], "remount /etc: invalid argument"),
        ("/not-there", "none", &["bind", "remount", "ro"], "remount /not-there: no such file or directory"),
    ] {
        let stage = Stage::new();
        let mut config = stage.config(&["true"]);
        add(&mut config, target, kind, "", words);
        assert_eq!(stage.create("c", &config).err().expect("refused"), error);
    }
}

fn recursive_attributes_hold_for_new_file_systems() {
    let stage = Stage::new();
    let output = stage.shell("grep -E ' /(a|b) ' /proc/self/mountinfo | cut -d' ' -f5,6", |config| {
        add(config, "/a", "tmpfs", "tmpfs", &["nosuid", "rro", "rnoexec", "rnoatime"]);
        add(config, "/b", "tmpfs", "tmpfs", &["nosuid", "rsuid", "rnodev"]);
    });
    assert_eq!(output, "/a ro,nosuid,noexec,noatime\n/b rw,nodev,relatime\n");
}

fn a_procfs_can_be_bound_on_proc() {
    for is_mapped in [false, true] {
        let stage = Stage::new();
        let output = stage.shell("grep ' /proc ' /proc/self/mountinfo | cut -d' ' -f4-6; cat /proc/self/comm; touch /proc/x", |config| {
            if is_mapped {
                users::map(&stage, config);
            }
            // The host's, as with the host's pid namespace.
            config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "pid");
            config["mounts"][0] = bundle::mount("/proc", "bind", "/proc", &["rbind", "nosuid", "noexec", "nodev"]);
            config["linux"]["maskedPaths"] = json!([]);
            config["linux"]["readonlyPaths"] = json!([]);
            config["process"]["args"][2] = json!(format!("{}; true", config["process"]["args"][2].as_str().expect("a script")));
        });
        assert!(output.starts_with("/ /proc rw,nosuid,nodev,noexec,relatime\ncat\n"), "{output}");
    }
}

fn only_a_whole_procfs_can_be_bound_on_proc() {
    let stage = Stage::new();
    fs::create_dir_all(stage.folder.join("data/self")).expect("a folder");
    let data = stage.folder.join("data").display().to_string();
    for source in [&data, "/sys", "/proc/sys", "/proc/self", "/dev/null"] {
        let mut config = stage.config(&["true"]);
        config["mounts"][0] = bundle::mount("/proc", "bind", source, &["rbind"]);
        assert_eq!(stage.create("c", &config).err().expect("refused"), format!("mount {source} on /proc: it is no procfs"));
    }
    fs::remove_dir(stage.root().join("proc")).expect("removed");
    symlink("/tmp", stage.root().join("proc")).expect("a link");
    let mut config = stage.config(&["true"]);
    config["mounts"][0] = bundle::mount("/proc", "bind", "/proc", &["rbind"]);
    let error = stage.create("c", &config).err().expect("refused");
    assert!(error.starts_with("mount /proc on /proc: "), "{error}");
}

fn the_root_has_the_propagation_that_was_asked_for() {
    let script = "grep -E ' / / |rootfs / ' /proc/self/mountinfo | cut -d' ' -f7; grep ' /run ' /proc/self/mountinfo | cut -d' ' -f7";
    for (word, of_root, of_others) in [
        ("shared", "shared:", "-"),
        ("rshared", "shared:", "shared:"),
        ("unbindable", "unbindable", "-"),
        ("runbindable", "unbindable", "unbindable"),
        ("private", "-", "-"),
        ("rslave", "-", "-"),
    ] {
        let stage = Stage::new();
        let output = stage.shell(script, |config| config["linux"]["rootfsPropagation"] = json!(word));
        let lines: Vec<&str> = output.lines().collect();
        assert!(lines[0].starts_with(of_root) && lines[1].starts_with(of_others), "{word}: {output}");
    }
}

fn mounts_below_a_shared_root_stay_in_the_container() {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let before = mounts();
    for word in ["shared", "rshared", "unbindable", "slave", "private", "rprivate"] {
        let stage = Stage::new();
        // The host's mounts are shared, as systemd has them, and so is the one that the root is in.
        let folder = stage.folder.display();
        stage.on_host(&format!("mount --bind {folder} {folder}; mount --make-rshared /"));
        let own = stage.on_host("cat /proc/self/mountinfo");
        let mut config =
            stage.config(&["sh", "-c", "mkdir /m; mount -t tmpfs leak /m && mount -t tmpfs leak /run && echo mounted; sleep 1000"]);
        config["linux"]["rootfsPropagation"] = json!(word);
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_SYS_ADMIN"]);
        }
        let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
        stage.start("c");
        let is_mounted = || fs::read_to_string(stage.folder.join("output-1")).is_ok_and(|text| text == "mounted\n");
        scratch::eventually("the container has mounted", is_mounted);
        assert_eq!(stage.on_host("cat /proc/self/mountinfo"), own, "{word}");
        init.kill();
        init.end();
        assert_eq!(fs::metadata(stage.root()).expect("a folder").uid(), 0);
    }
    assert_eq!(mounts(), before);
}
