//! Programs that a test creates: copies and scripts.
//!
//! **Invariant:** a program is written by a process of its own, never by this one. Another thread may fork while a file is open for
//! writing here; its child holds that file open until it executes its own program, and meanwhile no process can execute the file ("Text
//! file busy").

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// Copies a program. An existing file is replaced atomically, as operators do: running processes keep theirs.
pub fn copy(program: &Path, path: &Path) -> Result<()> {
    write(path, program, b"")
}

/// Copies a program and appends `tail`, which the kernel does not look at.
pub fn copy_with(program: &Path, path: &Path, tail: &[u8]) -> Result<()> {
    write(path, program, tail)
}

/// Makes the script `name` in `folder`, whose first line names its interpreter. An existing file is replaced atomically.
pub fn script(folder: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    write(&path, Path::new("/dev/null"), text.as_bytes())?;
    Ok(path)
}

fn write(path: &Path, head: &Path, tail: &[u8]) -> Result<()> {
    const WRITE: &str = "cat \"$1\" - > \"$2.new\" && chmod 755 \"$2.new\" && mv -f \"$2.new\" \"$2\"";
    let about = || format!("make the program {}", path.display());
    let mut command = Command::new("/bin/sh");
    command.args(["-c", WRITE, "sh"]).arg(head).arg(path).env("PATH", "/usr/bin:/bin").stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(about)?;
    // it may have failed without reading: then its output has the reason
    let fed = child.stdin.take().context("it was asked for")?.write_all(tail);
    let output = child.wait_with_output().with_context(about)?;
    ensure!(output.status.success(), "{}: {}", about(), String::from_utf8_lossy(&output.stderr).trim());
    fed.with_context(about)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::{env, fs, thread};

    use super::*;

    #[test]
    fn a_program_can_be_executed_at_once_while_other_threads_fork() {
        let folder = env::temp_dir().join(format!("x-programs-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        let program = folder.join("true");
        let enough = AtomicBool::new(false);
        let made = thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !enough.load(Ordering::Relaxed) {
                        let _anything = Command::new("/bin/true").status();
                    }
                });
            }
            let made = (0..50).try_for_each(|_| {
                copy(Path::new("/bin/true"), &program)?;
                ensure!(Command::new(&program).status()?.success());
                let script = script(&folder, "script", "#!/bin/sh\nexit 0\n")?;
                ensure!(Command::new(script).status()?.success());
                Ok(())
            });
            enough.store(true, Ordering::Relaxed);
            made
        });
        let _anything = fs::remove_dir_all(&folder);
        made.expect("programs that can be executed");
    }

    #[test]
    fn a_copy_is_whole_executable_and_replaces_what_is_in_use() {
        let folder = env::temp_dir().join(format!("x-programs-whole-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        let path = folder.join("program");
        copy_with(Path::new("/bin/cat"), &path, b"tail").expect("a copy");
        let expected = [fs::read("/bin/cat").expect("the original").as_slice(), b"tail"].concat();
        assert!(fs::read(&path).expect("the copy") == expected);
        assert_eq!(fs::metadata(&path).expect("the copy").permissions().mode() & 0o777, 0o755);
        let mut running = Command::new(&path).stdin(Stdio::piped()).spawn().expect("it runs");
        copy(Path::new("/bin/true"), &path).expect("another copy in its place");
        drop(running.stdin.take());
        assert!(running.wait().expect("it ends").success());
        let error = copy(&folder.join("nothing"), &path).expect_err("nothing to copy").to_string();
        assert!(error.contains("nothing: No such file"), "{error}");
        let _anything = fs::remove_dir_all(&folder);
    }
}
