//! `create`, and the first half of `run`: a container's record, with its spec and its snapshot.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use clap::Args;
use containerd_client::services::v1::Container;
use containerd_client::services::v1::container::Runtime;
use prost_types::Any;

use crate::client::Client;
use crate::error::{Error, IoContext as _, Result};
use crate::spec::{self, ProcessWish, Wish};
use crate::stdio::{self, Folders};
use crate::users::{self, User};
use crate::{containers, image, parse, temporary_mount, transfer};

/// Options of a container.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Keep standard input open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Name of the container [default: twelve random digits]
    #[arg(long, value_parser = parse::name)]
    name: Option<String>,
    /// Run this root file system from disk instead of an image
    #[arg(long, value_name = "FOLDER", value_parser = parse::folder)]
    rootfs: Option<PathBuf>,
    /// Mount a folder or file of the host: SOURCE:TARGET[:ro]
    #[arg(short, long = "volume", value_name = "SOURCE:TARGET", value_parser = parse::volume)]
    volumes: Vec<parse::Volume>,
    /// Mount an empty file system in memory: TARGET[:OPTION,OPTION…]
    #[arg(long, value_name = "TARGET", value_parser = parse::tmpfs)]
    tmpfs: Vec<parse::Tmpfs>,
    /// Set an environment variable: NAME=VALUE, or NAME for xctl's own
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = parse::variable)]
    environment: Vec<String>,
    /// User, by name or number in the container: USER[:GROUP]
    #[arg(short, long)]
    user: Option<String>,
    /// Folder that the program starts in
    #[arg(short, long, value_name = "FOLDER", value_parser = parse::absolute)]
    workdir: Option<PathBuf>,
    /// Limit memory, like 512m
    #[arg(short, long, value_name = "BYTES", value_parser = parse::bytes)]
    memory: Option<i64>,
    /// Limit processor time, like 1.5
    #[arg(long, value_name = "NUMBER", value_parser = parse::cpus)]
    cpus: Option<i64>,
    /// Network: the host's, or none but a loopback device
    #[arg(long, value_enum, default_value_t)]
    network: Network,
    /// Have the daemon restart the container: no, always, unless-stopped, on-failure[:NUMBER]
    #[arg(long, value_name = "POLICY", value_parser = parse::restart)]
    pub(crate) restart: Option<String>,
    /// Run an init of the host as process 1, which reaps orphans and passes signals on
    #[arg(long)]
    init: bool,
    /// Host name in the container [default: the host's]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Program to run instead of the image's entry point
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Label the container
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = parse::label)]
    labels: Vec<(String, String)>,
    /// Signal that `xctl stop` sends [default: the image's, or TERM]
    #[arg(long, value_name = "SIGNAL", value_parser = parse::signal)]
    stop_signal: Option<u32>,
    /// Make the root file system read-only
    #[arg(long)]
    read_only: bool,
    /// Cgroup below which the container's is made [default: /NAMESPACE]
    #[arg(long, value_name = "PATH", value_parser = parse::absolute)]
    cgroup_parent: Option<PathBuf>,
    /// Shim
    #[arg(long, value_name = "NAME", default_value = RUNTIME)]
    runtime: String,
    /// Whether to pull the image first; a registry that needs a login is for `xctl pull`
    #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
    pull: When,
    /// Pull over HTTP without TLS
    #[arg(long)]
    plain_http: bool,
    /// Snapshotter that the image is unpacked in
    #[arg(long, value_name = "NAME", default_value = "overlayfs")]
    snapshotter: String,
    /// File that a detached container writes to [default: NAMESPACE/NAME.log in the folder of --logs]
    #[arg(long, value_name = "FILE", value_parser = parse::absolute)]
    log_file: Option<PathBuf>,
    /// Image, then the program and its arguments; with --rootfs the program and its arguments alone
    #[arg(value_name = "IMAGE [COMMAND]", trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

/// On which network a container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum Network {
    /// The host's
    Host,
    /// One of its own, with nothing but a loopback device
    #[default]
    None,
}

/// When the image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum When {
    /// If it is not in the daemon's store
    #[default]
    Missing,
    /// Each time, so that it is the registry's newest
    Always,
    /// Not at all
    Never,
}

/// The base of a container's root file system, and what goes with it.
struct Base {
    image: Option<image::Unpacked>,
    command: Vec<String>,
}

/// Prints the id of a new container.
pub(crate) async fn run(client: &Client, folders: &Folders, options: Options) -> Result<u8> {
    let id = create(client, folders, &options).await?;
    crate::output::print(&format!("{id}\n"))?;
    Ok(0)
}

/// Records a new container, and returns its id. Nothing is left when that fails.
pub(crate) async fn create(client: &Client, folders: &Folders, options: &Options) -> Result<String> {
    let lease_id = format!("xctl-{}", random()?);
    let id = match &options.name {
        Some(name) => name.clone(),
        None => random()?,
    };
    let base = base(client, options).await?;
    let Some(unpacked) = &base.image else {
        let container = record(client, folders, options, &id, &base).await?;
        containers::create(client, container).await?;
        return Ok(id);
    };
    let leased = image::lease(client, &lease_id).await?;
    let created = async {
        let container = record(&leased, folders, options, &id, &base).await?;
        image::prepare(&leased, &options.snapshotter, &id, &unpacked.chain).await?;
        let created = containers::create(&leased, container).await;
        if created.is_err() {
            // the snapshot was made here, so that it is no other container's
            let _ = image::remove_snapshot(&leased, &options.snapshotter, &id).await;
        }
        created
    }
    .await;
    // it expires by itself if this fails
    let _ = image::end_lease(client, &lease_id).await;
    created.map(|()| id)
}

async fn base(client: &Client, options: &Options) -> Result<Base> {
    if options.rootfs.is_some() {
        return Ok(Base { image: None, command: options.words.clone() });
    }
    let Some((name, command)) = options.words.split_first() else {
        return Err(Error::refused("no image given; name one, or a root file system on disk with --rootfs FOLDER"));
    };
    let pulls = match options.pull {
        When::Missing => image::lookup(client, name).await?.is_none(),
        When::Always => true,
        When::Never => false,
    };
    if pulls {
        transfer::pull_for_run(client, &image::full_name(name), &options.snapshotter, options.plain_http).await?;
    }
    Ok(Base { image: Some(image::find(client, name, &options.snapshotter).await?), command: command.to_vec() })
}

async fn record(client: &Client, folders: &Folders, options: &Options, id: &str, base: &Base) -> Result<Container> {
    let config = base.image.as_ref().and_then(|image| image.configuration.config().as_ref());
    let args = spec::args(config, options.entrypoint.as_deref(), &base.command)
        .ok_or_else(|| Error::refused("no program given, and the image names none; write it after the image"))?;
    let of_image = config.and_then(|config| config.user().as_deref()).filter(|user| !user.is_empty());
    let user = match options.user.as_deref().or(of_image) {
        Some(text) => user(client, folders, options, base, text).await?,
        None => User::default(),
    };
    let folder = config.and_then(|config| config.working_dir().as_deref()).filter(|folder| folder.starts_with('/')).map(PathBuf::from);
    let variables = config.and_then(|config| config.env().clone()).unwrap_or_default();
    let parent = options.cgroup_parent.clone().unwrap_or_else(|| Path::new("/").join(client.namespace()));
    let wish = Wish {
        root: options.rootfs.clone().unwrap_or_else(|| PathBuf::from("rootfs")),
        process: ProcessWish {
            args,
            environment: spec::environment(&variables, options.tty, &options.environment),
            user,
            folder: options.workdir.clone().or(folder).unwrap_or_else(|| PathBuf::from("/")),
            is_terminal: options.tty,
        },
        volumes: options.volumes.clone(),
        tmpfs: options.tmpfs.clone(),
        is_on_host_network: options.network == Network::Host,
        hostname: options.hostname.clone(),
        memory_bytes: options.memory,
        cpu_quota: options.cpus,
        cgroup: parent.join(id).to_string_lossy().into_owned(),
        init: if options.init { Some(host_init()?) } else { None },
        is_read_only: options.read_only,
    };
    let json = serde_json::to_vec(&spec::spec(&wish)?).map_err(|error| Error::unreadable("the spec that was made", error))?;
    let snapshot = base.image.as_ref().map(|_| (options.snapshotter.clone(), id.to_owned()));
    let (snapshotter, snapshot_key) = snapshot.unwrap_or_default();
    Ok(Container {
        id: id.to_owned(),
        image: base.image.as_ref().map(|image| image.name.clone()).unwrap_or_default(),
        labels: labels(folders, client.namespace(), options, id, base)?,
        runtime: Some(Runtime { name: options.runtime.clone(), options: None }),
        spec: Some(Any { type_url: SPEC.to_owned(), value: json }),
        snapshotter,
        snapshot_key,
        ..Container::default()
    })
}

/// Users by name are those of the container's own files.
async fn user(client: &Client, folders: &Folders, options: &Options, base: &Base, text: &str) -> Result<User> {
    if let Some(root) = &options.rootfs {
        return users::look_up(root, text);
    }
    let Some(image) = base.image.as_ref().filter(|_| !users::is_numeric(text)) else {
        return users::look_up(Path::new("/nonexistent"), text);
    };
    let key = format!("xctl-view-{}", random()?);
    let mounts = image::view(client, &options.snapshotter, &key, &image.chain).await?;
    let found = temporary_mount::with(&folders.place_of_mounts(), &mounts, |root| users::look_up(root, text));
    image::remove_snapshot(client, &options.snapshotter, &key).await?;
    found
}

fn labels(folders: &Folders, namespace: &str, options: &Options, id: &str, base: &Base) -> Result<HashMap<String, String>> {
    let config = base.image.as_ref().and_then(|image| image.configuration.config().as_ref());
    let of_image = config.and_then(|config| config.labels().clone()).unwrap_or_default();
    // the daemon refuses longer ones
    let mut labels: HashMap<_, _> = of_image.into_iter().filter(|(key, value)| key.len() + value.len() <= LONGEST_LABEL).collect();
    labels.extend(options.labels.iter().cloned());
    let signal = options.stop_signal.map(|number| number.to_string());
    if let Some(signal) = signal.or_else(|| config.and_then(|config| config.stop_signal().clone())) {
        labels.insert(containers::STOP_SIGNAL.to_owned(), signal);
    }
    let log = options.log_file.clone().unwrap_or_else(|| folders.log(namespace, id));
    let log = stdio::file_uri(&log)?;
    if let Some(policy) = options.restart.as_ref().filter(|policy| *policy != "no") {
        // the status is set when it runs: a restart monitor would start it before
        labels.insert(containers::RESTART_POLICY.to_owned(), policy.clone());
        labels.insert(containers::RESTART_LOG_URI.to_owned(), log.clone());
    }
    labels.insert(containers::LOG_URI.to_owned(), log);
    if options.interactive {
        labels.insert(containers::INTERACTIVE.to_owned(), "true".to_owned());
    }
    Ok(labels)
}

/// An init for containers, statically linked: any other needs libraries that a container may not have.
fn host_init() -> Result<PathBuf> {
    let found = INITS.iter().map(Path::new).find(|path| is_static(path));
    found.map(Path::to_owned).ok_or_else(|| {
        Error::refused(format!(
            "--init needs a statically linked init on the host, and there is none of {}; install the package tini or catatonit",
            INITS.join(", ")
        ))
    })
}

/// Whether a file is an ELF program that asks for no interpreter.
fn is_static(path: &Path) -> bool {
    let mut bytes = Vec::new();
    let Ok(file) = File::open(path) else { return false };
    if file.take(64 << 10).read_to_end(&mut bytes).is_err() || !bytes.starts_with(b"\x7fELF\x02\x01") {
        return false;
    }
    let number = |at: usize, length: usize| {
        let field = bytes.get(at..at + length)?;
        Some(field.iter().rev().fold(0_usize, |value, byte| value << 8 | usize::from(*byte)))
    };
    let (Some(table), Some(size), Some(count)) = (number(32, 8), number(54, 2), number(56, 2)) else { return false };
    (0..count).all(|index| {
        index
            .checked_mul(size)
            .and_then(|offset| offset.checked_add(table))
            .and_then(|at| number(at, 4))
            .is_some_and(|kind| kind != PT_INTERP)
    })
}

/// Twelve hexadecimal digits.
pub(crate) fn random() -> Result<String> {
    let mut bytes = [0; 6];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).on("read", "/dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The shim of this project.
const RUNTIME: &str = "io.containerd.x.v2";
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// Key and value together.
const LONGEST_LABEL: usize = 4096;
const INITS: [&str; 5] =
    ["/usr/bin/tini-static", "/usr/bin/docker-init", "/usr/libexec/docker/docker-init", "/usr/bin/catatonit", "/usr/bin/tini"];
const PT_INTERP: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_init_for_containers_needs_no_libraries() {
        let own = std::env::current_exe().expect("a program");
        assert!(is_static(&own), "it is built so");
        for other in ["/bin/sh", "/etc/passwd", "/etc", "/nonexistent"] {
            assert!(!is_static(Path::new(other)), "{other}");
        }
    }

    #[test]
    fn ids_are_random() {
        let (one, other) = (random().expect("the kernel has enough"), random().expect("the kernel has enough"));
        assert!(one != other && one.len() == 12 && parse::name(&one).is_ok(), "{one} {other}");
    }
}
