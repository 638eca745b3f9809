//! The command line.

use std::path::PathBuf;

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use clap_complete::Shell;

use crate::client::Client;
use crate::error::{Error, IoContext as _, Result};
use crate::output::{self, Format};
use crate::stdio::Folders;
use crate::{
    copy, create, events, examples, exec, export, images, import, inspect, logs, parse, processes, prune, ps, remove, run, start, stats,
    stop, transfer, upgrade,
};

/// What was asked for.
#[derive(Debug, Parser)]
#[command(name = "xctl", version, propagate_version = true, about = "Run and look after containers on x-manager or containerd")]
#[command(
    after_help = "Errors of xctl itself have the exit status 1, or 125 where the status is the container's (127: its program is not there; 126: it cannot be executed); those of the command line 2."
)]
pub(crate) struct Line {
    #[command(flatten)]
    flags: Flags,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
struct Flags {
    /// Socket of the daemon [default: x-manager's if it exists, else /run/containerd/containerd.sock]
    #[arg(long, global = true, env = "CONTAINERD_ADDRESS", value_name = "PATH", hide_env_values = true)]
    address: Option<PathBuf>,
    /// Namespace of the containers
    #[arg(long, global = true, env = "CONTAINERD_NAMESPACE", value_name = "NAME", default_value = "default", hide_env_values = true, value_parser = parse::name)]
    namespace: String,
    /// How lists are printed
    #[arg(long, global = true, value_enum, default_value_t)]
    format: Format,
    /// Folder for the fifos of containers
    #[arg(long, global = true, env = "XCTL_STATE", value_name = "FOLDER", default_value = "/run/xctl", hide_env_values = true, value_parser = parse::absolute)]
    state: PathBuf,
    /// Folder for the output of detached containers
    #[arg(long, global = true, env = "XCTL_LOGS", value_name = "FOLDER", default_value = "/var/log/xctl", hide_env_values = true, value_parser = parse::absolute)]
    logs: PathBuf,
}

/// A command.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a program in a new container
    Run(Box<run::RunArgs>),
    /// Create a container without starting it
    Create(Box<create::Options>),
    /// Start containers again
    Start(start::StartArgs),
    /// Run another program in a container
    Exec(exec::ExecArgs),
    /// Show the output of a running container, and pass input on
    Attach(start::AttachArgs),
    /// List containers
    Ps(ps::PsArgs),
    /// Print everything about containers or images, as JSON
    Inspect(inspect::InspectArgs),
    /// Ask containers to exit, and kill those that do not
    Stop(stop::StopArgs),
    /// Send a signal to containers
    Kill(stop::KillArgs),
    /// Remove containers
    Rm(remove::RmArgs),
    /// List the processes of a container
    Top(processes::TopArgs),
    /// Show what containers use
    Stats(stats::StatsArgs),
    /// Show what a detached container has written
    Logs(logs::LogsArgs),
    /// Show what happens, until interrupted
    Events(events::EventsArgs),
    /// Fetch an image from a registry
    Pull(transfer::PullArgs),
    /// Send an image to a registry
    Push(transfer::PushArgs),
    /// List images
    Images(images::ImagesArgs),
    /// Give an image another name
    Tag(images::TagArgs),
    /// Remove images
    Rmi(images::RmiArgs),
    /// Read images from an archive
    Import(import::ImportArgs),
    /// Write images to an archive
    Export(export::ExportArgs),
    /// Copy files between the host and a container
    Cp(copy::CpArgs),
    /// Remove containers that have exited, and images
    Prune(prune::PruneArgs),
    /// Show what containers, images and logs hold on disk
    Df(prune::DfArgs),
    /// Replace a running x-manager with the installed program, without downtime
    Upgrade(upgrade::UpgradeArgs),
    /// Print the completions of a shell
    Completion {
        /// Shell
        shell: Shell,
    },
    /// Write the manual pages, one a command
    Man {
        /// Folder; it must exist
        #[arg(value_parser = parse::folder)]
        folder: PathBuf,
    },
}

impl Command {
    /// Whether the exit status is a process' own.
    pub(crate) fn has_status_of_process(&self) -> bool {
        match self {
            Self::Run(args) => !args.detach,
            Self::Start(args) => args.attach,
            Self::Exec(_) | Self::Attach(_) => true,
            _ => false,
        }
    }
}

/// Reads the command line; ends this process with 2 if it makes no sense.
pub(crate) fn parse() -> Line {
    let line = command().try_get_matches().and_then(|matches| Line::from_arg_matches(&matches));
    line.unwrap_or_else(|error| error.format(&mut command()).exit())
}

/// The command line with its examples.
pub(crate) fn command() -> clap::Command {
    examples::append(Line::command())
}

/// Does what was asked for, and returns the exit status.
pub(crate) async fn run(line: Line) -> Result<u8> {
    let Line { flags, command } = line;
    match &command {
        Command::Completion { shell } => {
            // not straight to standard output: its reader may be gone
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut self::command(), "xctl", &mut text);
            output::print_bytes(&text)?;
            return Ok(0);
        }
        Command::Man { folder } => {
            clap_mangen::generate_to(self::command(), folder).on("write manual pages to", folder)?;
            return Ok(0);
        }
        Command::Upgrade(args) => return upgrade::run(args),
        _ => {}
    }
    let folders = Folders { state: flags.state, logs: flags.logs };
    let client = Client::connect(flags.address.as_deref(), &flags.namespace).await?;
    let (client, folders, format) = (&client, &folders, flags.format);
    match command {
        Command::Run(args) => run::run(client, folders, *args).await,
        Command::Create(args) => create::run(client, folders, *args).await,
        Command::Start(args) => start::start(client, folders, args).await,
        Command::Exec(args) => exec::run(client, folders, args).await,
        Command::Attach(args) => start::attach(client, args).await,
        Command::Ps(args) => ps::run(client, format, args).await,
        Command::Inspect(args) => inspect::run(client, args).await,
        Command::Stop(args) => stop::stop(client, args).await,
        Command::Kill(args) => stop::kill(client, args).await,
        Command::Rm(args) => remove::run(client, folders, args).await,
        Command::Top(args) => processes::run(client, format, args).await,
        Command::Stats(args) => stats::run(client, format, args).await,
        Command::Logs(args) => logs::run(client, args).await,
        Command::Events(args) => events::run(client, format, args).await,
        Command::Pull(args) => transfer::pull(client, args).await,
        Command::Push(args) => transfer::push(client, args).await,
        Command::Images(args) => images::list(client, format, args).await,
        Command::Tag(args) => images::tag(client, args).await,
        Command::Rmi(args) => images::remove(client, args).await,
        Command::Import(args) => import::run(client, args).await,
        Command::Export(args) => export::run(client, args).await,
        Command::Cp(args) => copy::run(client, folders, args).await,
        Command::Prune(args) => prune::run(client, folders, args).await,
        Command::Df(args) => prune::df(client, folders, format, args).await,
        Command::Completion { .. } | Command::Man { .. } | Command::Upgrade(_) => Err(Error::refused("this command needs no daemon")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parses(line: &str) -> bool {
        Line::try_parse_from(line.split_whitespace()).is_ok()
    }

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn what_follows_an_image_is_the_containers() {
        for line in [
            "xctl run -it --rm -v /tmp:/data:ro -e A=1 --memory 64m --cpus 1.5 image sh -c x --rm",
            "xctl --namespace k8s.io ps --all --format json",
            "xctl exec -it c ls -l",
            "xctl run --rootfs /tmp --network host sh",
            "xctl kill -s HUP c",
            "xctl stats",
        ] {
            assert!(parses(line), "{line}");
        }
        for line in [
            "xctl",
            "xctl rm",
            "xctl exec c",
            "xctl run --detach --rm image",
            "xctl run --memory lots image",
            "xctl run --network other image",
            "xctl exec -d -t c sh",
            "xctl stop --time soon c",
            "xctl stats --every 0",
        ] {
            assert!(!parses(line), "{line}");
        }
    }
}
