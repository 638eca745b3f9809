//! Blocking work on a thread of its own.
//!
//! The threads of the daemon's pools may all wait for what a registry sends; what has to happen before it can send must not wait for them.

use std::io;
use std::thread;

use tokio::sync::oneshot;

/// Does a short job, and returns its result. A job whose caller is gone ends all the same.
pub(super) async fn on_thread<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (done, result) = oneshot::channel();
    let run = move || {
        // the caller may be gone
        let _ = done.send(job());
    };
    thread::Builder::new().name("registry".to_owned()).stack_size(STACK_BYTES).spawn(run)?;
    result.await.map_err(|_panicked| io::Error::other("a thread has panicked"))
}

/// Of parsers and PEM files.
const STACK_BYTES: usize = 512 << 10;
