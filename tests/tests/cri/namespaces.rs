//! The namespaces and files that the containers of a pod share.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use shim_tests::context::Context;
use shim_tests::cri::{ContainerSpec, Cri, HOST_IDS, Namespace, Pod, PodSpec, READY, Sandboxer, Setup};
use shim_tests::eventually::{SOON, eventually};
use shim_tests::proc;
use shim_tests::runner::skip;

const SLEEP: [&str; 2] = ["sleep", "100000"];

/// The namespace of a process, as its link in /proc names it.
pub(crate) fn namespace(pid: i32, name: &str) -> Result<String> {
    let link = format!("/proc/{pid}/ns/{name}");
    Ok(fs::read_link(&link).with_context(|| link)?.display().to_string())
}

async fn two(cri: &Cri, pod: &Pod) -> Result<[String; 2]> {
    Ok([cri.run(pod, "one", &SLEEP).await?, cri.run(pod, "two", &SLEEP).await?])
}

pub(crate) async fn containers_of_a_pod_share_its_network_ipc_and_host_name(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    let cri = Cri::start_as(&cx, sandboxer).await?;
    let spec = PodSpec::new("pod").network(Namespace::Pod).hostname("a-pod").dns("10.1.2.3", "example.org", "ndots:3");
    let pod = cri.run_pod_of(&spec.sysctl("net.ipv4.ip_local_port_range", "20000 30000").sysctl("kernel.shm_rmid_forced", "1")).await?;
    let status = cri.pod_status(&pod).await?;
    ensure!(status.state == READY && status.ip.starts_with("10.88."), "{status:?}");
    ensure!(status.created_at > 0, "{status:?}");
    let containers = two(&cri, &pod).await?;
    let mut inits = Vec::new();
    for id in &containers {
        inits.push(cri.init_of(id).await?);
    }
    let own = std::process::id().cast_signed();
    for name in ["net", "ipc", "uts"] {
        let found = [namespace(inits[0], name)?, namespace(inits[1], name)?, namespace(own, name)?];
        ensure!(found[0] == found[1] && found[0] != found[2], "{name}: {found:?}");
    }
    for name in ["mnt", "pid"] {
        let found = [namespace(inits[0], name)?, namespace(inits[1], name)?, namespace(own, name)?];
        ensure!(found[0] != found[1] && found[0] != found[2] && found[1] != found[2], "{name}: {found:?}");
    }
    for id in &containers {
        ensure!(cri.sh(id, "hostname").await? == "a-pod");
        ensure!(cri.sh(id, "cat /etc/hostname").await? == "a-pod");
        let hosts = cri.sh(id, "cat /etc/hosts").await?;
        ensure!(hosts == fs::read_to_string("/etc/hosts")?.trim_end(), "{hosts:?}");
        let resolver = cri.sh(id, "cat /etc/resolv.conf").await?;
        let lines: Vec<_> = resolver.lines().collect();
        ensure!(lines == ["search example.org", "nameserver 10.1.2.3", "options ndots:3"], "{lines:?}");
        let addresses = cri.sh(id, "ip -4 -o addr").await?;
        ensure!(addresses.contains(&status.ip) && addresses.contains("127.0.0.1"), "{addresses}");
        for (path, value) in [
            ("net/ipv4/ip_local_port_range", "20000\t30000"),
            ("kernel/shm_rmid_forced", "1"),
            // containerd's own, of every pod
            ("net/ipv4/ip_unprivileged_port_start", "0"),
            ("net/ipv4/ping_group_range", "0\t2147483647"),
        ] {
            let found = cri.sh(id, &format!("cat /proc/sys/{path}")).await?;
            ensure!(found == value, "{path}: {found:?}");
        }
    }
    cri.sh(&containers[0], "echo shared > /dev/shm/file").await?;
    ensure!(cri.sh(&containers[1], "cat /dev/shm/file").await? == "shared");
    let size = cri.sh(&containers[0], "df -k /dev/shm | tail -1 | awk '{print $2}'").await?;
    ensure!(size == "65536", "{size} KiB");
    // the other end of its network is reached
    cri.sh(&containers[0], "ping -c 1 -W 5 10.88.0.1 >/dev/null").await?;
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

pub(crate) async fn a_pod_with_one_pid_namespace_reaps_orphans(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    let cri = Cri::start_as(&cx, sandboxer).await?;
    let pod = cri.run_pod_of(&PodSpec::new("pod").network(Namespace::Pod).pid(Namespace::Pod)).await?;
    let containers = two(&cri, &pod).await?;
    let inits = [cri.init_of(&containers[0]).await?, cri.init_of(&containers[1]).await?];
    ensure!(namespace(inits[0], "pid")? == namespace(inits[1], "pid")?);
    ensure!(namespace(inits[0], "pid")? != namespace(1, "pid")?);
    // once both have executed it
    eventually("one sees the processes of the other", SOON, async || {
        let list = cri.sh(&containers[0], "ps -o args").await?;
        ensure!(list.lines().filter(|line| line.starts_with("sleep 100000")).count() == 2, "{list}");
        Ok(())
    })
    .await?;
    if sandboxer == Sandboxer::Shim {
        // the image of the pause containers here, `sleep`, does not
        cri.sh(&containers[1], "(sleep 0.1 & ) ; :").await?;
        eventually("no process is left unreaped", SOON, async || {
            let left = cri.sh(&containers[0], "ps -o stat,args").await?;
            ensure!(!left.lines().any(|line| line.starts_with('Z') || line.contains("sleep 0.1")), "{left}");
            Ok(())
        })
        .await?;
    }
    // the first process of the namespace cannot be killed from within
    cri.sh(&containers[0], "kill -9 1; :").await?;
    ensure!(cri.pod_status(&pod).await?.state == READY);
    // the end of one container leaves the other
    cri.stop(&containers[0], 0).await?;
    cri.ended(&containers[0]).await?;
    cri.sh(&containers[1], "true").await?;
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

pub(crate) async fn a_pod_shares_the_pids_and_the_ipc_of_the_host(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    let cri = Cri::start_as(&cx, sandboxer).await?;
    let spec = PodSpec::new("pod").network(Namespace::Pod).pid(Namespace::Node).ipc(Namespace::Node);
    let pod = cri.run_pod_of(&spec).await?;
    let id = cri.run(&pod, "app", &SLEEP).await?;
    let (init, own) = (cri.init_of(&id).await?, std::process::id().cast_signed());
    for name in ["pid", "ipc"] {
        ensure!(namespace(init, name)? == namespace(own, name)?, "{name} is not the host's");
    }
    ensure!(namespace(init, "net")? != namespace(own, "net")?);
    // its own host name, although the network's is the pod's
    ensure!(namespace(init, "uts")? != namespace(own, "uts")?);
    // the host's, whatever is in it
    let device = |path: &str| -> Result<u64> { Ok(std::os::unix::fs::MetadataExt::dev(&fs::metadata(path)?)) };
    ensure!(device(&format!("/proc/{init}/root/dev/shm"))? == device("/dev/shm")?, "another /dev/shm than the host's");
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

/// As `kubectl debug --target` does.
pub(crate) async fn a_container_joins_the_pids_of_another(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    let cri = Cri::start_as(&cx, sandboxer).await?;
    let pod = cri.run_pod_of(&PodSpec::new("pod").network(Namespace::Pod)).await?;
    let [one, two] = two(&cri, &pod).await?;
    let debugger = cri.run_of(&pod, &ContainerSpec::new("debugger", &SLEEP).pid_of(&one)).await?;
    let (first, second, third) = (cri.init_of(&one).await?, cri.init_of(&two).await?, cri.init_of(&debugger).await?);
    ensure!(namespace(first, "pid")? == namespace(third, "pid")? && namespace(first, "pid")? != namespace(second, "pid")?);
    eventually("it sees the processes of its target", SOON, async || {
        let list = cri.sh(&debugger, "ps -o pid,args").await?;
        ensure!(list.lines().any(|line| line.trim().starts_with("1 sleep")), "{list}");
        Ok(())
    })
    .await?;
    // it ends with its target
    cri.stop(&one, 0).await?;
    ensure!(cri.ended(&debugger).await?.exit_code == 137);
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

pub(crate) async fn a_pod_has_a_user_namespace(cx: Context, sandboxer: Sandboxer) -> Result<()> {
    let cri = Cri::start_with(&cx, &Setup { sandboxer, without_options: true, ..Setup::default() }).await?;
    let pod = cri.run_pod_of(&PodSpec::new("pod").network(Namespace::Pod).user_namespace()).await?;
    let containers = two(&cri, &pod).await?;
    let inits = [cri.init_of(&containers[0]).await?, cri.init_of(&containers[1]).await?];
    for name in ["user", "net", "ipc", "uts"] {
        ensure!(namespace(inits[0], name)? == namespace(inits[1], name)?, "{name} is not shared");
        ensure!(namespace(inits[0], name)? != namespace(std::process::id().cast_signed(), name)?, "{name} is the host's");
    }
    for (id, init) in containers.iter().zip(inits) {
        let map: Vec<_> = cri.sh(id, "cat /proc/self/uid_map").await?.split_whitespace().map(str::to_owned).collect();
        ensure!(map == ["0".to_owned(), HOST_IDS.0.to_string(), HOST_IDS.1.to_string()], "{map:?}");
        let uid = proc::status_field(init, "Uid")?;
        ensure!(uid.split_whitespace().all(|uid| uid == HOST_IDS.0.to_string()), "{uid}");
        // root of the pod owns its network and its host name
        cri.sh(id, "ip link set lo up").await?;
    }
    cri.sh(&containers[0], "echo shared > /dev/shm/file").await?;
    ensure!(cri.sh(&containers[1], "cat /dev/shm/file").await? == "shared");
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

pub(crate) async fn a_pod_is_one_process_besides_its_containers(cx: Context) -> Result<()> {
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let pod = cri.run_pod("pod").await?;
    let keeper = cri.keeper(&pod)?;
    let own = || proc::children(keeper.pid).into_iter().filter(|child| !child.command.contains(" worker")).collect::<Vec<_>>();
    ensure!(own().is_empty(), "{:?}", own());
    // the process whose namespaces containers join is the keeper
    let info = cri.pod_info(&pod).await?;
    ensure!(info.values().any(|text| text.contains(&keeper.pid.to_string())), "{info:?}");
    let id = cri.run(&pod, "app", &SLEEP).await?;
    let inits = own();
    ensure!(inits.len() == 1 && inits[0].pid == cri.init_of(&id).await?, "{inits:?}");
    for name in ["net", "ipc", "uts"] {
        ensure!(namespace(keeper.pid, name)? == namespace(inits[0].pid, name)?, "{name}");
    }
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

/// There would be no namespace to join but the host's.
pub(crate) async fn a_shared_pid_namespace_is_refused_in_a_pod_without_one(cx: Context) -> Result<()> {
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let pod = cri.run_pod("pod").await?;
    let made = cri.run_of(&pod, &ContainerSpec::new("app", &SLEEP).pid(Namespace::Pod)).await;
    let error = made.err().context("it has the pids of the host")?;
    ensure!(format!("{error:#}").contains("pid"), "{error:#}");
    let id = cri.run(&pod, "other", &["sh", "-c", "exit 4"]).await?;
    ensure!(cri.ended(&id).await?.exit_code == 4);
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

/// The process that holds the pid namespace of a pod. `init`: of a container in it.
pub(crate) fn holder_of(cri: &Cri, pod: &Pod, init: i32) -> Result<proc::Process> {
    let shared = namespace(init, "pid")?;
    let is_holder = |child: &proc::Process| child.pid != init && namespace(child.pid, "pid").is_ok_and(|its| its == shared);
    proc::children(cri.keeper(pod)?.pid).into_iter().find(is_holder).context("no process holds the pid namespace")
}

pub(crate) async fn the_process_that_holds_a_pid_namespace_shows_its_containers_nothing(cx: Context) -> Result<()> {
    let cri = Cri::start_as(&cx, Sandboxer::Shim).await?;
    let pod = cri.run_pod_of(&PodSpec::new("pod").pid(Namespace::Pod)).await?;
    let id = cri.run(&pod, "app", &SLEEP).await?;
    let command = cri.sh(&id, "tr '\\0' ' ' < /proc/1/cmdline").await?;
    let folder = cri.daemon().folder().display().to_string();
    ensure!(!command.contains(&folder) && !command.contains(&pod.id) && !command.contains('/'), "{command:?}");
    for file in ["environ", "exe", "root", "cwd", "fd", "mem", "maps"] {
        let (code, out) = cri.exec(&id, &["sh", "-c", &format!("cat /proc/1/{file} 2>/dev/null || ls -A /proc/1/{file}/")]).await?;
        ensure!(code != 0 || out.trim().is_empty(), "{file}: {code} {out:?}");
    }
    // nor does it have anything of the host mounted
    let holder = holder_of(&cri, &pod, cri.init_of(&id).await?)?;
    let root = fs::read_dir(format!("/proc/{}/root", holder.pid))?.count();
    ensure!(root == 0, "{root} entries in its root");
    let open = proc::open_files(holder.pid)?;
    ensure!(open.values().all(|target| !target.starts_with("/") || target == Path::new("/dev/null")), "{open:?}");
    cri.end_pod(&pod).await?;
    cri.leaves_nothing().await
}

/// Directly on the shim it is tested: `sandboxes`, and the chapter on sandboxes of the conformance suite.
pub(crate) async fn a_pod_on_the_hosts_network_is_for_later_versions(_cx: Context) -> Result<()> {
    skip("containerd 2.0 to 2.2 panics on a pod on the host's network whose namespaces a shim holds; fixed in 2.3.0")
}
