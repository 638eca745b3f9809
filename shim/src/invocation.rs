//! The command line.
//!
//! Owns its parsing: `argv` becomes one [`Invocation`], or one error message. Flags are written as Go
//! writes them (see `flag`), since containerd is the caller.
//!
//! **Invariant:** parsing depends on the arguments alone and has no effect.
use std::ffi::OsString;
use std::path::PathBuf;

use crate::flag::{self, FlagError};
use crate::settings::Settings;

/// One way to run this binary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Invocation {
    /// containerd: start a shim for the bundle in the working directory, or join the group's.
    Start(Flags),
    /// containerd: clean up after a container, whether its shim runs or not.
    Delete(Flags),
    /// containerd: describe the runtime; options on standard input.
    Info,
    Version,
    Help,
    /// `start`: become the keeper. Descriptor 3 listens for clients, 4 for commands; 5 is the mount of the executable.
    Keeper {
        settings: Settings,
        /// The path of the executable.
        program: Option<String>,
        /// Why the executable is not on a read-only mount.
        unprotected: Option<String>,
    },
    /// A keeper: resume after a re-exec. Descriptor `state` holds the saved state, `before` the previous executable; none when going back
    /// to that.
    Resume {
        settings: Settings,
        state: i32,
        before: Option<i32>,
    },
    /// A keeper: check whether this executable could resume from the state in descriptor 4. Descriptor 3 leads to the keeper.
    Rehearse(Settings),
    /// The keeper: become a worker. Descriptor 3 leads to the keeper.
    Worker(Settings),
    /// An operator: list the shims of this host.
    Ps(Query),
    /// An operator: upgrade the program of running shims.
    Upgrade(UpgradeOrder),
    /// An operator: show everything about a container.
    Inspect {
        id: String,
        query: Query,
    },
}

/// The flags that containerd passes to `start` and `delete`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// containerd's gRPC socket.
    pub(crate) address: String,
    /// The bundle; absent where it is the working directory.
    pub(crate) bundle: Option<PathBuf>,
    pub(crate) debug: bool,
}

/// Which shims to show, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Query {
    pub(crate) json: bool,
    /// Absent: all namespaces.
    pub(crate) namespace: Option<String>,
    /// The bundle whose journal to read if the shim is dead.
    pub(crate) bundle: Option<PathBuf>,
}

/// Which shims to upgrade, and to which program.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct UpgradeOrder {
    /// Ids of containers or groups; with `all`, none.
    pub(crate) ids: Vec<String>,
    pub(crate) all: bool,
    /// Absent: this program.
    pub(crate) to: Option<PathBuf>,
    pub(crate) worker_only: bool,
    /// The number of shims to upgrade at once.
    pub(crate) at_once: Option<usize>,
    pub(crate) query: Query,
}

/// An invalid command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UsageError {
    #[error("argument {position} is not valid UTF-8")]
    NotText { position: usize },
    #[error(transparent)]
    Flag(#[from] FlagError),
    #[error("{action} does not take {argument:?}")]
    Surplus { action: &'static str, argument: String },
    #[error("inspect needs the id of a container")]
    NothingToInspect,
    #[error("unknown command {action:?}")]
    UnknownAction { action: String },
    #[error("upgrade needs ids of containers, or --all")]
    NothingToUpgrade,
    #[error("upgrade takes either ids of containers or --all")]
    AllAndSome,
    #[error("no command was given")]
    NoAction,
}

impl UsageError {
    /// Whether only a value is refused: then the help would hide the message.
    pub(crate) fn is_of_a_value(&self) -> bool {
        matches!(self, Self::Flag(FlagError::BadValue { .. } | FlagError::NotTruth { .. }))
    }
}

/// What `--help` prints, and `stderr` gets after a [`UsageError`].
pub(crate) const HELP: &str = "\
containerd-shim-x-v2: containerd shim whose containers survive crashes and upgrades of the shim.

containerd starts it for containers with the runtime io.containerd.x.v2:

    ctr run --runtime io.containerd.x.v2 docker.io/library/busybox:latest c1 sh

Commands for operators:

    containerd-shim-x-v2 ps [--json] [--namespace NAME]
        list the shims of this host with their containers and memory
    containerd-shim-x-v2 inspect ID [--json] [--namespace NAME]
        show the state, processes, streams and open requests of a container; works without a running worker
    containerd-shim-x-v2 inspect ID --bundle PATH [--json]
        show the journal in the bundle of a dead shim
    containerd-shim-x-v2 upgrade ID... | --all [--to PATH] [--worker-only] [--at-once N] [--json] [--namespace NAME]
        replace the program of running shims by the one at PATH, or by this one, without stopping containers. A new program
        that fails is refused or rolled back, and the reason is shown. Exit status: 0 if all shims run the program now, else 1.
        Downgrades work in the same way. The keeper is replaced too, unless --worker-only. --at-once: shims to upgrade at a
        time; default: the number of processors, at most 8
    containerd-shim-x-v2 -v
        print the version
    containerd-shim-x-v2 --help
        print this text

For containerd:

    containerd-shim-x-v2 -namespace NAME -id ID -address SOCKET [-bundle PATH] [-debug] start
    containerd-shim-x-v2 -namespace NAME -id ID [-address SOCKET] [-bundle PATH] [-debug] delete
    containerd-shim-x-v2 -info
";

/// Longest id, namespace or group that is accepted, in bytes: they become names of files.
pub(crate) const MAX_NAME_BYTES: usize = 255;

impl Invocation {
    /// Reads the arguments, without the program's own name.
    pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, UsageError> {
        let arguments = texts(arguments)?;
        let mut raw = Raw::default();
        let mut rest = arguments.iter();
        let mut action = None;
        while let Some(argument) = rest.next() {
            if flag::is_flag(argument) {
                raw.take(argument, &mut rest)?;
            } else {
                action = Some(argument.as_str());
                break;
            }
        }
        if raw.help {
            return Ok(Self::Help);
        }
        if raw.version {
            return Ok(Self::Version);
        }
        if raw.info {
            return Ok(Self::Info);
        }
        match action.ok_or(UsageError::NoAction)? {
            // What follows the action of a daemon is ignored, as Go's shims do: daemons have been seen to append.
            "start" => Ok(Self::Start(raw.flags("start", &["id", "namespace"])?)),
            "delete" => Ok(Self::Delete(raw.flags("delete", &["id", "namespace"])?)),
            "keeper" => {
                let settings = Settings::from_arguments(&arguments[..arguments.len() - 1 - rest.len()])?;
                let words: Vec<&str> = rest.map(String::as_str).collect();
                let number =
                    |word: &str| word.parse::<i32>().map_err(|_| UsageError::Surplus { action: "keeper", argument: word.to_owned() });
                Ok(match words[..] {
                    ["resume", state] => Self::Resume { settings, state: number(state)?, before: None },
                    ["resume", state, before] => Self::Resume { settings, state: number(state)?, before: Some(number(before)?) },
                    ["rehearse"] => Self::Rehearse(settings),
                    [program, "unprotected", why] => {
                        Self::Keeper { settings, program: Some(program.to_owned()), unprotected: Some(why.to_owned()) }
                    }
                    [program, ..] => Self::Keeper { settings, program: Some(program.to_owned()), unprotected: None },
                    [] => Self::Keeper { settings, program: None, unprotected: None },
                })
            }
            "worker" => Ok(Self::Worker(Settings::from_arguments(&arguments[..arguments.len() - 1 - rest.len()])?)),
            "help" => Ok(Self::Help),
            "version" => Ok(Self::Version),
            "ps" => {
                let words = raw.take_rest(rest)?;
                match words.into_iter().next() {
                    _ if raw.help => Ok(Self::Help),
                    None => Ok(Self::Ps(raw.query())),
                    Some(argument) => Err(UsageError::Surplus { action: "ps", argument }),
                }
            }
            "upgrade" => {
                let ids = raw.take_rest(rest)?;
                match (raw.all, ids.is_empty()) {
                    _ if raw.help => Ok(Self::Help),
                    (false, true) => Err(UsageError::NothingToUpgrade),
                    (true, false) => Err(UsageError::AllAndSome),
                    (all, _) => {
                        let (to, worker_only, at_once) = (raw.to.clone().map(PathBuf::from), raw.worker_only, raw.at_once);
                        Ok(Self::Upgrade(UpgradeOrder { ids, all, to, worker_only, at_once, query: raw.query() }))
                    }
                }
            }
            "inspect" => {
                let mut words = raw.take_rest(rest)?.into_iter();
                match (words.next(), words.next()) {
                    _ if raw.help => Ok(Self::Help),
                    (None, _) => Err(UsageError::NothingToInspect),
                    (Some(id), None) => Ok(Self::Inspect { id, query: raw.query() }),
                    (_, Some(argument)) => Err(UsageError::Surplus { action: "inspect", argument }),
                }
            }
            other => Err(UsageError::UnknownAction { action: other.to_owned() }),
        }
    }
}

/// Whether `name` is a valid file name: an id or a namespace becomes one.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME_BYTES && name != "." && name != ".." && !name.contains(['/', '\0'])
}

/// Every flag of any command, before the command is known.
#[derive(Debug, Default)]
struct Raw {
    help: bool,
    version: bool,
    info: bool,
    json: bool,
    debug: bool,
    all: bool,
    worker_only: bool,
    at_once: Option<usize>,
    to: Option<String>,
    namespace: Option<String>,
    id: Option<String>,
    address: Option<String>,
    bundle: Option<String>,
}

impl Raw {
    /// Takes one flag, and its value from `rest` where it has one.
    fn take<'a>(&mut self, argument: &str, rest: &mut impl Iterator<Item = &'a String>) -> Result<(), FlagError> {
        let (name, given) = flag::split(argument);
        let mut text = |name: &'static str| flag::value_of(name, given, rest);
        match name {
            "namespace" | "n" => self.namespace = Some(text("namespace")?),
            "id" => self.id = Some(text("id")?),
            "address" => self.address = Some(text("address")?),
            "bundle" => self.bundle = Some(text("bundle")?),
            // Accepted and not used: events go over ttrpc, sockets are handed down, and there is no debug socket.
            "publish-binary" => drop(text("publish-binary")?),
            "socket" => drop(text("socket")?),
            "debug-socket" => drop(text("debug-socket")?),
            // These two are the keeper's: `Settings` reads them.
            "ttrpc-address" => drop(text("ttrpc-address")?),
            "control" => drop(text("control")?),
            "log-level" => drop(text("log-level")?),
            "debug" => self.debug = flag::truth_of("debug", given)?,
            "all" => self.all = flag::truth_of("all", given)?,
            "worker-only" => self.worker_only = flag::truth_of("worker-only", given)?,
            "to" => self.to = Some(text("to")?),
            "at-once" => {
                let value = text("at-once")?;
                let why = "must be a number from 1 to 256";
                let refused = || FlagError::BadValue { name: "at-once", value: shorten(&value), why };
                self.at_once = Some(value.parse().ok().filter(|count| (1..=256).contains(count)).ok_or_else(refused)?);
            }
            "json" => self.json = flag::truth_of("json", given)?,
            "info" => self.info = flag::truth_of("info", given)?,
            "v" | "version" => self.version = flag::truth_of("v", given)?,
            "h" | "help" => self.help = flag::truth_of("help", given)?,
            _ => return Err(FlagError::Unknown { flag: argument.to_owned() }),
        }
        Ok(())
    }

    /// Parses flags and arguments in any order; returns the arguments.
    fn take_rest<'a>(&mut self, mut rest: impl Iterator<Item = &'a String>) -> Result<Vec<String>, FlagError> {
        let mut words = Vec::new();
        while let Some(argument) = rest.next() {
            if flag::is_flag(argument) {
                self.take(argument, &mut rest)?;
            } else {
                words.push(argument.clone());
            }
        }
        Ok(words)
    }

    fn query(&self) -> Query {
        Query { json: self.json, namespace: self.namespace.clone(), bundle: self.bundle.clone().map(PathBuf::from) }
    }

    fn flags(self, action: &'static str, needed: &[&'static str]) -> Result<Flags, FlagError> {
        for name in needed {
            let value = match *name {
                "id" => &self.id,
                _ => &self.namespace,
            };
            match value {
                None => return Err(FlagError::Missing { action, name }),
                Some(value) if !is_name(value) => {
                    let why = "must be a name of 1 to 255 bytes without a slash";
                    return Err(FlagError::BadValue { name, value: shorten(value), why });
                }
                Some(_) => {}
            }
        }
        Ok(Flags {
            namespace: self.namespace.unwrap_or_default(),
            id: self.id.unwrap_or_default(),
            address: self.address.unwrap_or_default(),
            bundle: self.bundle.filter(|path| !path.is_empty()).map(PathBuf::from),
            debug: self.debug,
        })
    }
}

/// Converts arguments to text.
pub(crate) fn texts(arguments: impl IntoIterator<Item = OsString>) -> Result<Vec<String>, UsageError> {
    let numbered = arguments.into_iter().enumerate();
    numbered.map(|(index, argument)| argument.into_string().map_err(|_| UsageError::NotText { position: index + 1 })).collect()
}

/// Shortens a value that an error quotes.
fn shorten(value: &str) -> String {
    match value.char_indices().nth(64) {
        Some((at, _)) => format!("{}…", &value[..at]),
        None => value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Invocation, UsageError> {
        Invocation::parse(line.split_whitespace().map(OsString::from))
    }

    fn c1() -> Flags {
        Flags { namespace: "n1".into(), id: "c1".into(), address: "/run/c.sock".into(), bundle: None, debug: false }
    }

    #[test]
    fn the_lines_of_real_daemons_are_understood() {
        let start = Ok(Invocation::Start(c1()));
        for line in [
            "-namespace n1 -address /run/c.sock -publish-binary /usr/bin/containerd -id c1 start",
            "--namespace n1 --address /run/c.sock --publish-binary /usr/bin/containerd --id c1 start",
            "-namespace=n1 -address=/run/c.sock -publish-binary= -id=c1 -debug=false start",
            "-namespace n1 -address /run/c.sock -id c1 start something new",
        ] {
            assert_eq!(parse(line), start, "{line}");
        }
        let delete = Flags { bundle: Some("/b/c1".into()), debug: true, ..c1() };
        assert_eq!(
            parse("-namespace n1 -address /run/c.sock -publish-binary /c -id c1 -bundle /b/c1 -debug delete"),
            Ok(Invocation::Delete(delete))
        );
        assert_eq!(parse("-info"), Ok(Invocation::Info));
        assert_eq!(parse("-v"), Ok(Invocation::Version));
        assert_eq!(parse("--version"), Ok(Invocation::Version));
    }

    #[test]
    fn operator_commands_accept_flags_anywhere() {
        let query = Query { json: true, namespace: Some("n1".into()), bundle: None };
        assert_eq!(parse("ps"), Ok(Invocation::Ps(Query::default())));
        assert_eq!(parse("ps --json --namespace n1"), Ok(Invocation::Ps(query.clone())));
        assert_eq!(parse("--json -n n1 ps"), Ok(Invocation::Ps(query.clone())));
        for line in ["inspect c1 --json --namespace=n1", "inspect --json -n n1 c1", "-n n1 inspect c1 --json"] {
            assert_eq!(parse(line), Ok(Invocation::Inspect { id: "c1".into(), query: query.clone() }), "{line}");
        }
        let order = UpgradeOrder { ids: vec!["c1".into(), "c2".into()], ..UpgradeOrder::default() };
        assert_eq!(parse("upgrade c1 c2"), Ok(Invocation::Upgrade(order)));
        let order =
            UpgradeOrder { all: true, to: Some("/new".into()), worker_only: true, at_once: Some(9), query, ..UpgradeOrder::default() };
        assert_eq!(parse("upgrade --all --to /new --at-once=9 -n n1 --json --worker-only"), Ok(Invocation::Upgrade(order)));
        for line in ["upgrade --help", "help", "--help", "-h", "ps --help", "inspect -h", "-namespace n1 -help start"] {
            assert_eq!(parse(line), Ok(Invocation::Help), "{line}");
        }
    }

    #[test]
    fn wrong_use_is_named() {
        for (line, sentence) in [
            ("", "no command was given"),
            ("-namespace n1 -id c1", "no command was given"),
            ("frobnicate", "unknown command \"frobnicate\""),
            ("-nonsense start", "unknown flag -nonsense"),
            ("-namespace n1 start", "start needs the flag -id"),
            ("-id c1 delete", "delete needs the flag -namespace"),
            ("-id", "flag -id needs a value"),
            ("-debug=maybe start", "flag -debug must be true or false, not \"maybe\""),
            ("-namespace n1 -id a/b start", "flag -id must be a name of 1 to 255 bytes without a slash: \"a/b\""),
            ("-namespace .. -id c1 start", "flag -namespace must be a name of 1 to 255 bytes without a slash: \"..\""),
            ("-namespace n1 -id= start", "flag -id must be a name of 1 to 255 bytes without a slash: \"\""),
            ("inspect", "inspect needs the id of a container"),
            ("inspect a b", "inspect does not take \"b\""),
            ("upgrade", "upgrade needs ids of containers, or --all"),
            ("upgrade --all c1", "upgrade takes either ids of containers or --all"),
            ("upgrade --all --at-once 0", "flag -at-once must be a number from 1 to 256: \"0\""),
            ("ps a", "ps does not take \"a\""),
            ("-namespace n1 keeper", "keeper needs the flag -id"),
        ] {
            assert_eq!(parse(line).expect_err(line).to_string(), sentence, "{line}");
        }
        let long = format!("-namespace n1 -id {} start", "a".repeat(300));
        let sentence = parse(&long).expect_err("300 characters").to_string();
        assert!(sentence.starts_with("flag -id must be a name") && sentence.len() < 200, "{sentence}");
    }

    #[test]
    fn arguments_that_are_not_text_are_named_by_their_position() {
        use std::os::unix::ffi::OsStringExt;
        let arguments = [OsString::from("-id"), OsString::from_vec(vec![0xff, 0xfe])];
        assert_eq!(Invocation::parse(arguments), Err(UsageError::NotText { position: 2 }));
    }

    #[test]
    fn no_odd_command_line_panics() {
        let words =
            ["-", "--", "-=", "--=x", "-id=", "-id", "start", "ps", "\u{0}", "é", "-é=é", "inspect", "keeper", "worker", "-v=", "="];
        for a in words {
            for b in words {
                for c in words {
                    let _ = Invocation::parse([a, b, c].map(OsString::from));
                }
            }
        }
    }
}
