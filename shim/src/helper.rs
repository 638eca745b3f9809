//! Helpers: runtimes and loggers, started for a Spawn operation, and the pipes that collect their output.
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::capture::Capture;
use crate::handover::{Fd, LOG_ARGUMENT, Spawn};
use crate::saved::saved;
use crate::sys::spawn::{Command, Started, spawn};

/// The pipes of a helper.
#[derive(Debug, Default)]
pub(crate) struct Pipes {
    /// The pipe behind [`LOG_ARGUMENT`], both ends: the program opens it by its path here.
    log: Option<(Capture, OwnedFd)>,
    output: Option<Capture>,
    /// Until the helper is ready.
    pub(crate) ready: Option<Capture>,
}

saved!(Pipes { log, output, ready });

/// Starts a helper. `end_of`: the descriptor for the end of a stream. `namespaces`: those that it joins first.
pub(crate) fn start(
    order: &Spawn,
    namespaces: Vec<BorrowedFd<'_>>,
    end_of: impl FnMut(&Fd) -> io::Result<Option<OwnedFd>>,
) -> io::Result<(Started, Pipes)> {
    let pipe_if = |is_used: bool| Ok::<_, io::Error>(is_used.then(Capture::new).transpose()?.unzip());
    let (log, log_end) = pipe_if(order.argv.iter().any(|argument| argument == LOG_ARGUMENT))?;
    let (output, output_end) = pipe_if(order.fds.contains(&Fd::Output))?;
    let (ready, ready_end) = pipe_if(order.fds.contains(&Fd::Ready))?;
    // Opened by path, so that nothing is inherited.
    let log_path = log_end.as_ref().map(|end: &OwnedFd| format!("/proc/{}/fd/{}", std::process::id(), end.as_raw_fd()));
    let argv = order.argv.iter().map(|argument| match &log_path {
        Some(path) if argument == LOG_ARGUMENT => CString::new(path.as_str()),
        _ => CString::new(argument.as_slice()),
    });
    let argv = argv.collect::<Result<Vec<_>, _>>()?;
    let ends = order.fds.iter().map(end_of).collect::<io::Result<Vec<_>>>()?;
    let descriptors = order.fds.iter().zip(&ends).map(|(fd, end)| match fd {
        Fd::Output => output_end.as_ref(),
        Fd::Ready => ready_end.as_ref(),
        _ => end.as_ref(),
    });
    let started = spawn(&Command {
        program: argv.first().cloned().ok_or(io::ErrorKind::InvalidInput)?,
        argv,
        env: order.env.iter().map(|entry| CString::new(entry.as_slice())).collect::<Result<_, _>>()?,
        cwd: CString::new(order.cwd.as_str())?,
        descriptors: descriptors.map(|end| end.map(AsFd::as_fd)).collect(),
        // A runtime must not outlive the keeper, which would claim its container; a logger has to read to the end.
        dies_with_parent: order.reports_pid,
        namespaces,
    })?;
    Ok((started, Pipes { log: log.zip(log_end), output, ready }))
}

impl Pipes {
    /// Those of a process of which nothing but its output is read.
    pub(crate) fn of_output(output: Capture) -> Self {
        Self { log: None, output: Some(output), ready: None }
    }

    pub(crate) fn captures(&self) -> impl Iterator<Item = &Capture> {
        [self.log.as_ref().map(|(log, _)| log), self.output.as_ref(), self.ready.as_ref()].into_iter().flatten()
    }

    /// Reads the helper's output. Returns whether there may be more.
    pub(crate) fn read(&mut self) -> bool {
        let captures = [self.log.as_mut().map(|(log, _)| log), self.output.as_mut(), self.ready.as_mut()];
        captures.into_iter().flatten().fold(false, |more, capture| more | capture.read())
    }

    /// The output so far.
    pub(crate) fn output(&self) -> &[u8] {
        self.output.as_ref().map_or(&[], Capture::bytes)
    }

    /// The log and the output of a helper that has exited.
    pub(crate) fn finish(self) -> (Vec<u8>, Vec<u8>) {
        let log = self.log.map(|(log, _end)| log.finish());
        (log.unwrap_or_default(), self.output.map(Capture::finish).unwrap_or_default())
    }
}
