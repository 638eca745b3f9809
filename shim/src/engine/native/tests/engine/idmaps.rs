//! Binds that show other owners than their sources have.
use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};

use crate::stage::Stage;
use crate::users::{self, FIRST};

crate::cases![
    owners_are_mapped_without_a_user_namespace,
    owners_are_those_of_the_user_namespace,
    mounts_below_are_mapped_on_request,
    an_added_process_sees_the_same_owners,
    private_folders_are_mapped_too,
    a_file_system_without_mapped_owners_fails_the_creation,
    owners_look_as_with_crun,
];

/// A folder with a file of each of some users.
fn volume(stage: &Stage) -> String {
    let volume = stage.folder.join("volume");
    fs::create_dir_all(&volume).expect("a folder");
    for uid in [0, 1000] {
        let file = volume.join(uid.to_string());
        fs::write(&file, "content").expect("a file");
        std::os::unix::fs::chown(&file, Some(uid), Some(uid)).expect("owned");
    }
    fs::set_permissions(&volume, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("changed");
    volume.display().to_string()
}

fn add(config: &mut Value, source: &str, options: &[&str], mapping: Option<(u32, u32, u32)>) {
    let mut mount = crate::bundle::mount("/volume", "bind", source, options);
    if let Some((inside, outside, size)) = mapping {
        for field in ["uidMappings", "gidMappings"] {
            mount[field] = json!([{ "containerID": inside, "hostID": outside, "size": size }]);
        }
    }
    config["mounts"].as_array_mut().expect("an array").push(mount);
}

const SHOW: &str = "stat -c '%n %u:%g' /volume/0 /volume/1000; touch /volume/made; stat -c %u:%g /volume/made";

fn owners_are_mapped_without_a_user_namespace() {
    let stage = Stage::new();
    let source = volume(&stage);
    let output = stage.shell(SHOW, |config| {
        add(config, &source, &["rbind", "idmap"], Some((0, 2000, 1500)));
        config["process"]["user"] = json!({ "uid": 2007, "gid": 2008 });
    });
    assert_eq!(output, "/volume/0 2000:2000\n/volume/1000 3000:3000\n2007:2008\n");
    let made = fs::metadata(stage.folder.join("volume/made")).expect("made");
    assert_eq!((made.uid(), made.gid()), (7, 8));
}

fn owners_are_those_of_the_user_namespace() {
    for (options, mapping) in [
        (&["rbind", "idmap"][..], None),
        (&["rbind", "ridmap"], Some((0, FIRST, 65_536))),
        // Any other, which is outside of the container's.
        (&["bind"], Some((0, FIRST, 2000))),
    ] {
        let stage = Stage::new();
        let source = volume(&stage);
        let output = stage.shell(SHOW, |config| {
            users::map(&stage, config);
            add(config, &source, options, mapping);
        });
        assert_eq!(output, "/volume/0 0:0\n/volume/1000 1000:1000\n0:0\n");
        assert_eq!(fs::metadata(stage.folder.join("volume/made")).expect("made").uid(), 0);
        // Without, they are others'.
        let output = stage.shell("stat -c %u:%g /volume/0 /volume/1000", |config| {
            users::map(&stage, config);
            add(config, &source, &["rbind"], None);
        });
        assert_eq!(output, "65534:65534\n65534:65534\n");
    }
}

fn mounts_below_are_mapped_on_request() {
    let stage = Stage::new();
    let source = volume(&stage);
    fs::create_dir(stage.folder.join("volume/below")).expect("a folder");
    // tmpfs has mapped owners since Linux 6.3.
    stage.on_host(&format!("mount --bind {source} {source}/below"));
    let show = "stat -c '%n %u' /volume/0 /volume/below/0";
    for (word, below) in [("idmap", 0), ("ridmap", 2000)] {
        let output = stage.shell(show, |config| add(config, &source, &["rbind", word], Some((0, 2000, 1500))));
        assert_eq!(output, format!("/volume/0 2000\n/volume/below/0 {below}\n"));
    }
}

fn an_added_process_sees_the_same_owners() {
    let stage = Stage::new();
    let source = volume(&stage);
    let mut config = stage.config(&["sleep", "1000"]);
    users::map(&stage, &mut config);
    add(&mut config, &source, &["rbind", "ro", "idmap"], None);
    let _init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    let output = stage.exec_shell("c", "stat -c %u:%g /volume/1000; touch /volume/made 2>&1 | grep -o Read-only", |_| {});
    assert_eq!(output, "1000:1000\nRead-only\n");
}

fn private_folders_are_mapped_too() {
    let stage = Stage::new();
    let source = volume(&stage);
    fs::set_permissions(&source, std::os::unix::fs::PermissionsExt::from_mode(0o700)).expect("changed");
    let output = stage.shell("cat /volume/0", |config| {
        users::map(&stage, config);
        add(config, &source, &["rbind", "idmap"], None);
    });
    assert_eq!(output, "content");
}

fn a_file_system_without_mapped_owners_fails_the_creation() {
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    add(&mut config, "/proc/sys", &["bind", "idmap"], Some((0, 2000, 1500)));
    let error = stage.create("c", &config).err().expect("refused");
    assert_eq!(error, "mount /proc/sys on /volume: map owners: invalid argument");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

fn owners_look_as_with_crun() {
    let stage = Stage::new();
    let source = volume(&stage);
    crate::differences::compare_scripts(&stage, "crun", "stat -c '%n %u:%g' /volume/0 /volume/1000", |config| {
        users::map(&stage, config);
        config["process"]["rlimits"] = json!([]);
        add(config, &source, &["bind", "idmap"], Some((0, FIRST, 2000)));
    });
}
