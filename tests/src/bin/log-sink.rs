//! A logger for `binary://` URIs: copies stdout and stderr of the container into files.
//!
//! `binary:///path/to/log-sink?folder=/where` writes `/where/stdout`, `/where/stderr` and its environment to
//! `/where/environment`. With `dies=ready` it exits before it reports that it is ready, with `dies=later` at the first byte. With
//! `ready=byte` it reports so as `binary-v2://` requires: with a byte.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;
use std::process::ExitCode;
use std::thread;

use nix::sys::signal::{SigSet, Signal};

fn main() -> io::Result<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    // containerd passes the query as alternating keys and values
    let query: BTreeMap<_, _> = words.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
    let folder = Path::new(query.get("folder").map_or("/", String::as_str));
    let dies = query.get("dies").map_or("", String::as_str);
    if dies == "ready" {
        return Ok(ExitCode::FAILURE);
    }
    // the stock shim sends SIGTERM as soon as the container is gone; loggers continue until their pipes end
    let mut termination = SigSet::empty();
    termination.add(Signal::SIGTERM);
    termination.thread_block()?;
    let environment: Vec<String> = std::env::vars().map(|(key, value)| format!("{key}={value}\n")).collect();
    fs::write(folder.join("environment"), environment.concat())?;
    // opened by path, so that no inherited descriptor number is assumed to be the right file
    let mut out = File::open("/proc/self/fd/3")?;
    let mut err = File::open("/proc/self/fd/4")?;
    let (mut out_file, mut err_file) = (File::create(folder.join("stdout"))?, File::create(folder.join("stderr"))?);
    if query.get("ready").is_some_and(|how| how == "byte") {
        fs::write("/proc/self/fd/5", [0])?;
    }
    close_ready_pipe();
    if dies == "later" {
        // not at once: that would look like a crash before it was ready
        out.read_exact(&mut [0])?;
        return Ok(ExitCode::FAILURE);
    }
    let copy_err = thread::spawn(move || io::copy(&mut err, &mut err_file));
    io::copy(&mut out, &mut out_file)?;
    let _already_printed_by_the_harness = copy_err.join();
    fs::write(folder.join("done"), "")?;
    Ok(ExitCode::SUCCESS)
}

/// Reports that it is ready: by closing descriptor 5.
fn close_ready_pipe() {
    let _nothing_to_do_about_it = nix::unistd::close(5);
}
