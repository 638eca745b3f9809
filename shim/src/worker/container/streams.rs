//! The streams of a process about to start: those that the keeper opens, and the loggers that read from them.
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Record, Shared, Streams};
use crate::handover::{Fd, Op, Output, Spawn, Stdio, Step, Stream};
use crate::stdio_uri::{Logger, StdioUri};
use crate::worker::cause::{Cause, Started, step};
use crate::worker::error::Error;
use crate::worker::id::ProcessKey;
use crate::worker::pump;

/// The streams of a process, read and checked.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    key: ProcessKey,
    stdin: Option<PathBuf>,
    stdout: StdioUri,
    stderr: StdioUri,
    terminal: bool,
    /// It gets the null device then, without having been asked to.
    is_empty: bool,
    /// The container's.
    bundle: PathBuf,
    owner: (u32, u32),
    spill_bytes: u64,
}

/// A logger, and which outputs it reads.
struct Hired {
    logger: Logger,
    stdout: bool,
    stderr: bool,
}

impl Plan {
    /// Parses the client's URIs.
    pub(super) fn read(key: &ProcessKey, streams: &Streams, record: &Record) -> Result<Self, Error> {
        Ok(Self {
            key: key.clone(),
            stdin: StdioUri::parse_stdin(&streams.stdin)?,
            stdout: StdioUri::parse("stdout", &streams.stdout)?,
            // Both outputs of a terminal are one.
            stderr: if streams.terminal { StdioUri::None } else { StdioUri::parse("stderr", &streams.stderr)? },
            terminal: streams.terminal,
            is_empty: streams.are_none(),
            bundle: record.bundle.clone(),
            owner: (record.options.io_uid, record.options.io_gid),
            spill_bytes: record.options.spill_bytes,
        })
    }

    /// Parses the client's URIs, and refuses a logger that must not run.
    pub(super) fn blocking_read(key: &ProcessKey, streams: &Streams, record: &Record) -> Result<Self, Error> {
        let plan = Self::read(key, streams, record)?;
        for hired in plan.loggers() {
            hired.logger.blocking_admit(&record.options.loggers)?;
        }
        Ok(plan)
    }

    pub(super) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// The outputs that go into files, with their paths.
    pub(super) fn files(&self) -> Vec<(Stream, PathBuf)> {
        let file = |stream, uri: &StdioUri| match uri {
            StdioUri::File(path) => Some((stream, path.clone())),
            StdioUri::None | StdioUri::Fifo(_) | StdioUri::Binary(_) => None,
        };
        file(Stream::Stdout, &self.stdout).into_iter().chain(file(Stream::Stderr, &self.stderr)).collect()
    }

    fn loggers(&self) -> Vec<Hired> {
        match (&self.stdout, &self.stderr) {
            (StdioUri::Binary(logger), StdioUri::Binary(other)) if logger == other => {
                vec![Hired { logger: logger.clone(), stdout: true, stderr: true }]
            }
            (stdout, stderr) => {
                let hired = |uri: &StdioUri, is_stdout: bool| match uri {
                    StdioUri::Binary(logger) => Some(Hired { logger: logger.clone(), stdout: is_stdout, stderr: !is_stdout }),
                    StdioUri::None | StdioUri::Fifo(_) | StdioUri::File(_) => None,
                };
                hired(stdout, true).into_iter().chain(hired(stderr, false)).collect()
            }
        }
    }

    /// Has the keeper open the streams and start the loggers. After an error the caller releases the key.
    pub(super) async fn open(&self, shared: &Shared, cause: &Cause) -> Result<(), Error> {
        if self.is_empty {
            return Ok(());
        }
        for (_, path) in self.files() {
            let file = path.clone();
            let opened = tokio::task::spawn_blocking(move || pump::blocking_open(&file).map(drop)).await;
            opened.map_err(std::io::Error::other).flatten().map_err(|source| Error::Io { op: "open", path, source })?;
        }
        cause.perform(step::OPEN_STDIO, Op::OpenStdio(self.stdio())).await?;
        for (number, hired) in (0..).zip(self.loggers()) {
            if let Err(error) = self.hire(shared, cause, step::LOGGERS + number, hired).await {
                // A logger that is not ready would wait for output that never comes.
                if let Err(error) = cause.perform(step::END_HELPERS, Op::EndHelpers { key: self.key.to_string() }).await {
                    log::warn!(container:% = self.key, error:% = error.chain(); "cannot kill a logger");
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn stdio(&self) -> Stdio {
        let output = |uri: &StdioUri| match uri {
            StdioUri::None => Output::None,
            StdioUri::Fifo(path) => Output::Fifo(text(path)),
            StdioUri::File(_) | StdioUri::Binary(_) => Output::Pipe,
        };
        Stdio {
            key: self.key.to_string(),
            stdin: self.stdin.as_deref().map(text),
            stdout: output(&self.stdout),
            stderr: output(&self.stderr),
            terminal: self.terminal,
            uid: self.owner.0,
            gid: self.owner.1,
            spill_bytes: self.spill_bytes,
            spill_folder: text(&self.bundle),
        }
    }

    async fn hire(&self, shared: &Shared, cause: &Cause, at: Step, hired: Hired) -> Result<(), Error> {
        let Hired { logger, stdout, stderr } = hired;
        let key = self.key.to_string();
        let read = |wanted, stream| if wanted { Fd::ReadEnd(key.clone(), stream) } else { Fd::Null };
        // As the stock shim does: for an exec, the exec's own id.
        let id = self.key.exec.as_ref().map_or_else(|| self.key.container.to_string(), ToString::to_string);
        let own = [("CONTAINER_ID", id.as_str()), ("CONTAINER_NAMESPACE", shared.settings.namespace.as_str())];
        let environment = own.into_iter().chain(logger.environment.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        let spawn = Spawn {
            key: key.clone(),
            argv: [text(&logger.path)].iter().chain(&logger.arguments).map(|argument| argument.clone().into_bytes()).collect(),
            env: environment.map(|(name, value)| format!("{name}={value}").into_bytes()).collect(),
            cwd: text(&self.bundle),
            fds: vec![Fd::Null, Fd::Null, Fd::Null, read(stdout, Stream::Stdout), read(stderr, Stream::Stderr), Fd::Ready],
            reports_pid: false,
            console_socket: None,
        };
        let path = logger.path.clone();
        let ready = tokio::time::timeout(LOGGER_WITHIN, cause.start(at, spawn)).await.map_err(|_| Error::TimedOut {
            waiting_for: format!("readiness of logger {}", path.display()),
            seconds: LOGGER_WITHIN.as_secs(),
        })??;
        match ready {
            Started::Ready { byte } if byte || !logger.ready_by_byte => Ok(()),
            Started::Ready { .. } => Err(Error::LoggerSilent { path }),
            Started::Ended { status } => Err(Error::LoggerEnded { path, status }),
        }
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

const LOGGER_WITHIN: Duration = Duration::from_secs(60);
