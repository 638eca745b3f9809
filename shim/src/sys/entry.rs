//! The program's entry point, which the C library calls.
//!
//! In place of the one of `std`, which reads the memory map and makes a stack for a handler that reports stack overflows on stderr: a tenth of a
//! millisecond of each start, for a report to `/dev/null`. What else `std` does there is done here.
//!
//! A module of the executable, not of the library: the fuzz targets have entry points of their own.
#![allow(unsafe_code)]
use std::ffi::{c_char, c_int};
use std::process::{self, ExitCode};

use nix::libc;

/// `std` reads the arguments by itself, from where glibc has left them.
#[unsafe(no_mangle)]
extern "C" fn main(_count: c_int, _arguments: *const *const c_char) -> c_int {
    // SAFETY: the calls take integers and a constant text. The program has no thread and no handler yet.
    unsafe {
        // Of a closed one, the next file or socket would get the number, and be taken for standard input or output.
        for number in 0..3 {
            if libc::fcntl(number, libc::F_GETFD) == -1 && libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) == -1 {
                libc::abort();
            }
        }
        // A reader that is gone is an error of a write.
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
    let code = containerd_shim_x::main();
    let number = (0..=u8::MAX).find(|number| ExitCode::from(*number) == code);
    // Not by returning: this flushes standard output.
    process::exit(number.unwrap_or(1).into())
}
