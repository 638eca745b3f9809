//! Tests with a real cgroup of the host's version. They need root.
use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use containerd_shim_protos::{cgroups, cgroups_v2};

use super::*;

/// A cgroup that an engine might have made.
struct Made {
    folders: Vec<PathBuf>,
    children: Vec<Child>,
}

impl Made {
    fn new() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let name = format!("x-test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let top = Path::new("/sys/fs/cgroup");
        let folders: Vec<PathBuf> = if hierarchy::is_unified() {
            vec![top.join(name)]
        } else {
            top.read_dir()
                .expect("hierarchies")
                .flatten()
                // a folder that is no hierarchy: the mount point of one that was unmounted
                .filter(|entry| entry.path().join("cgroup.procs").is_file())
                .map(|entry| entry.path().join(&name))
                .collect()
        };
        for folder in &folders {
            if let Err(error) = fs::create_dir(folder) {
                eprintln!("skipped: cannot make {}: {error}", folder.display());
                return None;
            }
            // A v1 cpuset accepts no process before its cpus and mems are set.
            for file in ["cpuset.cpus", "cpuset.mems"].into_iter().filter(|file| folder.join(file).exists() && !hierarchy::is_unified()) {
                let above = fs::read_to_string(folder.parent().expect("a hierarchy").join(file)).expect("a cpuset");
                fs::write(folder.join(file), above).expect("a cpuset");
            }
        }
        Some(Self { folders, children: Vec::new() })
    }

    /// Starts a shell command in it, in the folder `below`.
    fn start(&mut self, below: &str, command: &str) -> u32 {
        let joins =
            self.folders.iter().map(|folder| format!("echo $$ > {}/cgroup.procs; ", folder.join(below).display())).collect::<String>();
        let child = Command::new("/bin/sh").args(["-c", &format!("{joins} {command}")]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.children.push(child.expect("a shell"));
        let pid = self.children.last().expect("just pushed").id();
        scratch::eventually("the process has joined", || pids_in(&self.folders[self.folders.len() - 1]).contains(&pid));
        pid
    }

    fn write(&self, file: &str, text: &str) {
        let folder = self.folders.iter().find(|folder| folder.join(file).exists()).expect("a controller");
        fs::write(folder.join(file), text).expect("a setting");
    }

    /// Waits until no process is left in `cgroup`.
    fn are_dead(&mut self, cgroup: &Cgroup) {
        let is_empty = || {
            self.children.iter_mut().for_each(|child| drop(child.try_wait()));
            cgroup.pids().is_empty()
        };
        scratch::eventually("all are dead", is_empty);
    }

    fn wait(&mut self) {
        for mut child in self.children.drain(..) {
            child.wait().expect("an end");
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        for folder in &self.folders {
            for pid in files::pids_below(folder) {
                let _ = sys_kill(pid);
            }
            let mut all = Vec::new();
            files::each_below(folder, &mut |folder| all.push(folder.to_owned()));
            for folder in all.iter().rev() {
                scratch::eventually("the cgroup can be removed", || fs::remove_dir(folder).is_ok() || !folder.exists());
            }
        }
    }
}

fn is_frozen_now(cgroup: &Cgroup) -> bool {
    match cgroup {
        Cgroup::None => false,
        Cgroup::V1(folders) => files::read(&folders["freezer"], "freezer.state").is_some_and(|state| state.trim() == "FROZEN"),
        Cgroup::V2(folder) => files::read(folder, "cgroup.events").is_some_and(|text| files::value(&text, "frozen") == 1),
    }
}

fn sys_kill(pid: u32) -> nix::Result<()> {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL)
}

fn pids_in(folder: &Path) -> Vec<u32> {
    files::pids_below(folder)
}

#[test]
fn the_metrics_of_a_real_cgroup_are_of_the_hosts_kind_and_not_empty() {
    let Some(mut made) = Made::new() else { return };
    let pid = made.start("", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; exec sleep 1000");
    let cgroup = Cgroup::of_pid(pid).expect("a cgroup");
    let record = serde_json::to_string(&cgroup).expect("serialisable");
    assert_eq!(serde_json::from_str::<Cgroup>(&record).expect("readable"), cgroup);
    assert_eq!(cgroup.pids(), [pid]);
    assert_eq!(cgroup.oom_kills(), Some(0));
    scratch::eventually("it has counted", || fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sleep"));
    let any = cgroup.metrics();
    if hierarchy::is_unified() {
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let m = cgroups_v2::metrics::Metrics::parse_from_bytes(&any.value).expect("decodable");
        assert!(m.pids.current == 1 && m.cpu.usage_usec > 0 && m.memory.usage > 0 && m.memory_events.is_some(), "{m}");
    } else {
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let m = cgroups::metrics::Metrics::parse_from_bytes(&any.value).expect("decodable");
        assert!(m.pids.current == 1 && m.cpu.usage.total > 0 && m.memory.usage.usage > 0 && m.memory_oom_control.is_some(), "{m}");
        assert!(m.cpu.usage.per_cpu.iter().sum::<u64>() > 0 && m.memory.usage.limit > 0 && m.blkio.is_some() && m.cpu.throttling.is_some());
    }
    let kind = any.type_url;
    made.children.iter_mut().for_each(|child| child.kill().expect("a signal"));
    made.wait();
    assert!(!cgroup.metrics().value.is_empty(), "until it is removed there are metrics");
    drop(made);
    let any = cgroup.metrics();
    assert_eq!((any.type_url, any.value, cgroup.pids(), cgroup.oom_kills()), (kind, vec![], vec![], None));
    cgroup.kill_all().expect("nothing to do");
}

#[test]
fn the_shims_own_cgroup_is_not_a_containers() {
    let cgroup = Cgroup::of_pid(std::process::id()).expect("a process");
    assert_eq!((cgroup.clone(), cgroup.pids()), (Cgroup::None, vec![]));
    cgroup.kill_all().expect("nothing to do, for this process is still here");
    assert!(Cgroup::of_pid(u32::MAX >> 2).is_err());
}

#[test]
fn every_process_is_killed_below_it_and_while_frozen_too() {
    for is_frozen in [false, true] {
        let Some(mut made) = Made::new() else { return };
        let pid = made.start("", "exec sleep 1000");
        let cgroup = Cgroup::of_pid(pid).expect("a cgroup");
        if let Some(folder) = cgroup.processes() {
            fs::create_dir(folder.join("below")).expect("a cgroup below");
        }
        let inner = made.start("", "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; wait");
        scratch::eventually("all have started", || cgroup.pids().len() >= 10);
        fs::write(cgroup.processes().expect("a folder").join("below/cgroup.procs"), inner.to_string()).expect("a move");
        assert_eq!(cgroup.pids().len(), 10);
        if is_frozen {
            let (file, frozen) = if hierarchy::is_unified() { ("cgroup.freeze", "1") } else { ("freezer.state", "FROZEN") };
            made.write(file, frozen);
            scratch::eventually("it is frozen", || is_frozen_now(&cgroup));
        }
        cgroup.kill_all().expect("a kill");
        made.are_dead(&cgroup);
    }
}

#[test]
fn frozen_cgroups_inside_are_killed_too() {
    let Some(mut made) = Made::new() else { return };
    let pid = made.start("", "exec sleep 1000");
    let cgroup = Cgroup::of_pid(pid).expect("a cgroup");
    let (file, frozen) = if hierarchy::is_unified() { ("cgroup.freeze", "1") } else { ("freezer.state", "FROZEN") };
    let top = made.folders.iter().find(|folder| folder.join(file).exists()).expect("a freezer").clone();
    let nested = top.join("below/deeper");
    fs::create_dir_all(&nested).expect("cgroups below");
    let inner = made.start("", "exec sleep 1000");
    fs::write(nested.join("cgroup.procs"), inner.to_string()).expect("a move");
    fs::write(nested.join(file), frozen).expect("a freeze");
    fs::write(top.join("below").join(file), frozen).expect("a freeze");
    cgroup.kill_all().expect("a kill");
    made.are_dead(&cgroup);
}

#[test]
fn one_process_of_a_frozen_cgroup_dies_and_the_others_stay_frozen() {
    let Some(mut made) = Made::new() else { return };
    let stays = made.start("", "exec sleep 1000");
    let dies = made.start("", "exec sleep 1000");
    let cgroup = Cgroup::of_pid(stays).expect("a cgroup");
    let (file, frozen) = if hierarchy::is_unified() { ("cgroup.freeze", "1") } else { ("freezer.state", "FROZEN") };
    made.write(file, frozen);
    scratch::eventually("it is frozen", || is_frozen_now(&cgroup));
    sys_kill(dies).expect("a signal");
    cgroup.let_die(&[dies]);
    scratch::eventually("it is dead", || made.children[1].try_wait().expect("a child").is_some());
    let (is_frozen, left) = (is_frozen_now(&cgroup), cgroup.pids());
    // or it could not be killed
    cgroup.thaw();
    assert!(is_frozen);
    assert_eq!(left, [stays]);
}

#[test]
fn processes_that_fork_all_the_time_are_killed() {
    let Some(mut made) = Made::new() else { return };
    let pid = made.start("", "for i in $(seq 40); do (while :; do : & wait; done) & done; wait");
    let cgroup = Cgroup::of_pid(pid).expect("a cgroup");
    scratch::eventually("it has grown", || cgroup.pids().len() > 30);
    cgroup.kill_all().expect("a kill");
    made.are_dead(&cgroup);
}

#[test]
fn an_oom_kill_wakes_the_watch_and_is_counted() {
    let Some(mut made) = Made::new() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().expect("a runtime");
    let folder = scratch::Folder::new("oom");
    let gate = folder.join("gate");
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    let pid = made.start("", &format!("read line < {}; head -c 200000000 /dev/zero | tail; exec sleep 1000", gate.display()));
    let cgroup = Cgroup::of_pid(pid).expect("a cgroup");
    if hierarchy::is_unified() {
        made.write("memory.max", "20000000");
        made.write("memory.swap.max", "0");
    } else {
        made.write("memory.limit_in_bytes", "20000000");
        made.write("memory.memsw.limit_in_bytes", "20000000");
    }
    runtime.block_on(async {
        let mut watch = cgroup.watch_oom().expect("a watch");
        assert_eq!(cgroup.oom_kills(), Some(0));
        let early = tokio::time::timeout(Duration::from_millis(50), watch.changed()).await;
        assert!(early.is_err(), "nothing has happened yet");
        fs::write(&gate, "\n").expect("a line");
        let deadline = Duration::from_secs(60);
        while cgroup.oom_kills() == Some(0) {
            assert_eq!(tokio::time::timeout(deadline, watch.changed()).await.expect("a wake"), OomWake::Changed);
        }
        assert_eq!(cgroup.oom_kills(), Some(1));
        made.children.iter_mut().for_each(|child| drop(child.kill()));
        drop(made);
        if !hierarchy::is_unified() {
            while tokio::time::timeout(deadline, watch.changed()).await.expect("a wake") == OomWake::Changed {}
        }
        assert_eq!(cgroup.oom_kills(), None);
        assert!(cgroup.watch_oom().is_err());
    });
}

/// An open file whose cgroup has been removed gives ENODEV: every file of a cgroup, of each controller.
#[test]
fn what_is_read_of_a_cgroup_that_vanishes_is_empty_or_what_was_there() {
    use std::io::Read;
    let Some(made) = Made::new() else { return };
    let mut open = Vec::new();
    for folder in &made.folders {
        let entries = folder.read_dir().expect("files").flatten().map(|entry| entry.path()).filter(|path| path.is_file());
        open.extend(entries.filter_map(|path| fs::File::open(&path).ok().map(|file| (path, file))));
    }
    assert!(open.len() > 10, "{open:?}");
    drop(made);
    for (path, mut file) in open {
        let read = file.read_to_string(&mut String::new());
        assert!(
            read.as_ref().is_ok_and(|length| *length == 0) || read.is_err_and(|error| error.raw_os_error() == Some(nix::libc::ENODEV)),
            "{}",
            path.display()
        );
    }

    let Some(mut made) = Made::new() else { return };
    let pid = made.start("", "exec sleep 1000");
    let cgroup = Cgroup::of_pid(pid).expect("a cgroup");
    made.children.iter_mut().for_each(|child| child.kill().expect("a signal"));
    made.wait();
    let is_done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..200 {
                for act in [|path: &Path| fs::remove_dir(path), |path: &Path| fs::create_dir(path)] {
                    made.folders.iter().for_each(|folder| act(folder).expect("no process is in it"));
                }
            }
            is_done.store(true, Ordering::Relaxed);
        });
        while !is_done.load(Ordering::Relaxed) {
            let any = cgroup.metrics();
            if hierarchy::is_unified() {
                cgroups_v2::metrics::Metrics::parse_from_bytes(&any.value).expect("decodable");
            } else {
                cgroups::metrics::Metrics::parse_from_bytes(&any.value).expect("decodable");
            }
            assert_eq!(cgroup.pids(), Vec::<u32>::new());
            assert!(cgroup.oom_kills().is_none_or(|kills| kills == 0));
            cgroup.kill_all().expect("nothing to do");
            cgroup.thaw();
        }
    });
}
