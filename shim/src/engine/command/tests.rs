use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn engine() -> CommandEngine {
    CommandEngine {
        binary: "/usr/bin/rt".into(),
        root: "/run/rt/ns".into(),
        systemd_cgroup: false,
        no_pivot_root: false,
        no_new_keyring: false,
        debug: false,
        environment: vec!["PATH=/bin".into()],
    }
}

static BUNDLE: std::sync::LazyLock<PathBuf> = std::sync::LazyLock::new(|| "/bundle".into());
fn at() -> Container<'static> {
    Container { id: "c1", bundle: &BUNDLE }
}
const BEGIN: &str = "/usr/bin/rt --root /run/rt/ns --log @log@ --log-format json";

fn line(spawn: &Spawn) -> String {
    let words: Vec<_> = spawn.argv.iter().map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    words.join(" ")
}

#[test]
fn every_verb_has_its_arguments() {
    let e = engine();
    let options = CriuOptions {
        open_tcp: true,
        external_unix_sockets: true,
        terminal: true,
        file_locks: true,
        empty_namespaces: vec!["network".into()],
        cgroups_mode: Some("soft".into()),
    };
    let none = CriuOptions::default();
    let create = Create { pid_file: Path::new("/p"), console_socket: None, stdio_key: "c1" };
    let tty = Create { console_socket: Some(Path::new("/s")), ..create };
    let exec = Exec { process_file: Path::new("/j"), pid_file: Path::new("/p"), console_socket: None, stdio_key: "c1/e" };
    let checkpoint = Checkpoint { image_path: Path::new("/i"), work_path: Path::new("/w"), exit: false, options: &none };
    let restore = Restore {
        image_path: Path::new("/i"),
        work_path: Path::new("/w"),
        pid_file: Path::new("/p"),
        console_socket: None,
        stdio_key: "c1",
        options: &none,
    };
    for (spawn, expected) in [
        (e.create(&at(), &create), "create --bundle /bundle --pid-file /p c1"),
        (e.create(&at(), &tty), "create --bundle /bundle --pid-file /p --console-socket /s c1"),
        (e.start(&at()), "start c1"),
        (e.exec(&at(), &exec), "exec --process /j --detach --pid-file /p c1"),
        (e.delete(&at(), false), "delete c1"),
        (e.delete(&at(), true), "delete --force c1"),
        (e.kill(&at(), 15, false), "kill c1 15"),
        (e.kill(&at(), 9, true), "kill --all c1 9"),
        (e.pause(&at()), "pause c1"),
        (e.resume(&at()), "resume c1"),
        (e.update(&at(), Path::new("/r")), "update --resources /r c1"),
        (e.checkpoint(&at(), &checkpoint), "checkpoint --image-path /i --work-path /w --leave-running c1"),
        (
            e.checkpoint(&at(), &Checkpoint { exit: true, options: &options, ..checkpoint }),
            "checkpoint --image-path /i --work-path /w --tcp-established --ext-unix-sk --shell-job --file-locks --manage-cgroups-mode soft --empty-ns network c1",
        ),
        (e.restore(&at(), &restore), "restore --bundle /bundle --image-path /i --work-path /w --pid-file /p --detach c1"),
        (
            e.restore(&at(), &Restore { console_socket: Some(Path::new("/s")), ..restore }),
            "restore --bundle /bundle --image-path /i --work-path /w --pid-file /p --detach --console-socket /s c1",
        ),
        (e.pids(&at()), "ps --format json c1"),
        (e.state(&at()), "state c1"),
        (e.features(), "features"),
    ] {
        assert_eq!(line(&spawn), format!("{BEGIN} {expected}"));
        assert_eq!(spawn.env, [b"PATH=/bin".to_vec()]);
        assert_eq!(spawn.fds.len(), 3);
    }
}

#[test]
fn options_become_flags() {
    let e = CommandEngine { systemd_cgroup: true, no_pivot_root: true, no_new_keyring: true, debug: true, ..engine() };
    let create = Create { pid_file: Path::new("/p"), console_socket: None, stdio_key: "c1" };
    assert_eq!(
        line(&e.create(&at(), &create)),
        "/usr/bin/rt --root /run/rt/ns --debug --log @log@ --log-format json --systemd-cgroup create --bundle /bundle --pid-file /p --no-pivot --no-new-keyring c1"
    );
}

#[test]
fn only_verbs_that_leave_a_process_behind_get_its_streams() {
    let e = engine();
    let create = Create { pid_file: Path::new("/p"), console_socket: None, stdio_key: "c1" };
    let spawn = e.create(&at(), &create);
    assert!(spawn.reports_pid);
    assert_eq!(spawn.fds, [Stream::Stdin, Stream::Stdout, Stream::Stderr].map(|stream| Fd::Process("c1".into(), stream)));
    let spawn = e.create(&at(), &Create { console_socket: Some(Path::new("/s")), ..create });
    assert_eq!((spawn.fds, spawn.console_socket.as_deref()), (vec![Fd::Null, Fd::Output, Fd::Output], Some("/s")));
    let spawn = e.start(&at());
    assert!(!spawn.reports_pid && spawn.fds == [Fd::Null, Fd::Output, Fd::Output]);
}

#[test]
fn process_ids_are_read_from_both_dialects() {
    let read = |output: &str| engine().interpret_pids(&Exited { output: output.into(), ..Exited::default() });
    assert_eq!(read("[1,2]"), Ok(vec![1, 2]));
    assert_eq!(read("[\n  1,\n  2\n]\n"), Ok(vec![1, 2]));
    assert_eq!(read("null\n"), Ok(vec![]));
    assert!(read("PID\n1").is_err());
}

#[test]
fn a_container_of_another_bundle_is_told_from_ours() {
    let folder = scratch::Folder::new("bundle");
    fs::create_dir_all(folder.join("b")).expect("a temporary folder");
    std::os::unix::fs::symlink("b", folder.join("link")).expect("a link");
    let (bundle, link) = (folder.join("b"), folder.join("link"));
    let is_ours = |bundle: &Path, status, output: String| {
        let exited = Exited { status, output: output.into(), ..Exited::default() };
        engine().blocking_is_in_bundle(&Container { id: "c1", bundle }, &exited)
    };
    let state = |bundle: &Path| format!(r#"{{"ociVersion":"1.0.2","id":"c1","status":"created","bundle":"{}"}}"#, bundle.display());
    assert_eq!(is_ours(&bundle, 0, state(&bundle)), Some(true));
    assert_eq!(is_ours(&link, 0, state(&bundle)), Some(true));
    assert_eq!(is_ours(&bundle, 0, state(&folder)), Some(false));
    assert_eq!(is_ours(Path::new("/gone"), 0, state(Path::new("/gone"))), Some(true));
    assert_eq!(is_ours(&bundle, 0, state(Path::new("/gone"))), Some(false));
    assert_eq!(is_ours(&bundle, 1, String::new()), None);
    assert_eq!(is_ours(&bundle, 0, "{}".to_owned()), None);
}

#[test]
fn the_runtime_sees_nothing_of_the_daemon_but_what_is_listed() {
    let folder = scratch::Folder::new("engine");
    fs::write(folder.join("runc"), "").expect("a file");
    fs::set_permissions(folder.join("runc"), fs::Permissions::from_mode(0o755)).expect("its mode");
    let options = RuntimeOptions { criu_path: Some(folder.join("criu")), root: Some("/my/root".into()), ..RuntimeOptions::default() };
    let (engine, _) = CommandEngine::blocking_choose_from(&options, "k8s.io", false, |name| {
        Some(if name == "PATH" { folder.display().to_string() } else { "v".into() })
    })
    .expect("a runtime");
    assert_eq!(engine.root, Path::new("/my/root/k8s.io"));
    let names: Vec<_> = engine.environment.iter().filter_map(|entry| entry.split('=').next()).collect();
    assert_eq!(names, ["PATH", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS"]);
    assert_eq!(engine.environment[0], format!("PATH={0}:{0}", folder.display()));
}

#[test]
fn an_engine_survives_its_record() {
    let before = CommandEngine { systemd_cgroup: true, ..engine() };
    let record = serde_json::to_string(&before).expect("serialisable");
    assert_eq!(serde_json::from_str::<CommandEngine>(&record).expect("readable"), before);
    let older = r#"{"binary":"/b","root":"/r","environment":[],"from_the_future":1}"#;
    assert!(!serde_json::from_str::<CommandEngine>(older).expect("readable").debug);
}
