//! An OCI runtime that starts processes without namespaces, root file system or cgroups. It takes a millisecond where a real one takes
//! thirty, so that thousands of processes can start and exit within a test.
//!
//! It understands the arguments of runc for create, start, exec, kill and delete. `--root` holds a folder for each container with
//! its pid and, until Start, the fifo on which init waits.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo, setsid};

/// Flags that take a value.
const WITH_VALUE: [&str; 8] = ["--root", "--log", "--log-format", "--bundle", "--pid-file", "--process", "--console-socket", "--criu"];

pub(super) fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|verb| verb == "wait-and-execute") {
        return wait_and_execute(&arguments[1..]);
    }
    let call = Call::read(&arguments);
    match call.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let entry = serde_json::json!({ "level": "error", "msg": error.to_string() });
            let log = call.flag("--log").and_then(|log| File::options().append(true).open(log).ok());
            if let Some(mut log) = log {
                let _its_reader_is_gone = writeln!(log, "{entry}");
            }
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// A command line.
struct Call {
    flags: Vec<(String, String)>,
    words: Vec<String>,
}

impl Call {
    fn read(arguments: &[String]) -> Self {
        let (mut flags, mut words) = (Vec::new(), Vec::new());
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            if WITH_VALUE.contains(&argument.as_str()) {
                flags.push((argument.clone(), rest.next().cloned().unwrap_or_default()));
            } else if !argument.starts_with('-') {
                words.push(argument.clone());
            }
        }
        Self { flags, words }
    }

    fn flag(&self, name: &str) -> Option<&str> {
        self.flags.iter().find(|(flag, _)| flag == name).map(|(_, value)| value.as_str())
    }

    fn word(&self, index: usize) -> &str {
        self.words.get(index).map_or("", String::as_str)
    }

    fn folder(&self) -> PathBuf {
        Path::new(self.flag("--root").unwrap_or("/run/instant")).join(self.word(1))
    }

    fn run(&self) -> io::Result<()> {
        match self.word(0) {
            "create" => self.create(),
            "start" => self.start(),
            "exec" => self.exec(),
            "kill" => self.kill(),
            "delete" => self.delete(),
            verb => Err(io::Error::other(format!("no verb {verb:?}"))),
        }
    }

    fn create(&self) -> io::Result<()> {
        let folder = self.folder();
        fs::create_dir_all(&folder)?;
        let fifo = folder.join("go");
        mkfifo(&fifo, Mode::S_IRWXU)?;
        let config = Path::new(self.flag("--bundle").unwrap_or(".")).join("config.json");
        let config: serde_json::Value = serde_json::from_slice(&fs::read(config)?)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("wait-and-execute").arg(&fifo);
        let pid = self.begin(command, &config["process"])?;
        fs::write(folder.join("pid"), pid.to_string())
    }

    fn start(&self) -> io::Result<()> {
        let folder = self.existing()?;
        let mut go = loop {
            match File::options().write(true).custom_flags_nonblock().open(folder.join("go")) {
                Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENXIO as i32) => {
                    let pid = self.pid()?;
                    kill(pid, None).map_err(|_| io::Error::other("container has stopped"))?;
                    thread::sleep(Duration::from_millis(1)); // init is on its way to the fifo
                }
                result => break result?,
            }
        };
        go.write_all(b"!")
    }

    fn exec(&self) -> io::Result<()> {
        self.existing()?;
        let process: serde_json::Value = serde_json::from_slice(&fs::read(self.flag("--process").unwrap_or_default())?)?;
        let program = process["args"][0].as_str().unwrap_or_default().to_owned();
        let mut command = Command::new(&program);
        for argument in process["args"].as_array().into_iter().flatten().skip(1) {
            command.arg(argument.as_str().unwrap_or_default());
        }
        self.begin(command, &serde_json::Value::Null).map(drop)
    }

    /// Starts a process that outlives this program, and writes its pid down.
    fn begin(&self, mut command: Command, process: &serde_json::Value) -> io::Result<u32> {
        for argument in process["args"].as_array().into_iter().flatten() {
            command.arg(argument.as_str().unwrap_or_default());
        }
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let child = command.spawn()?;
        if let Some(file) = self.flag("--pid-file") {
            fs::write(file, child.id().to_string())?;
        }
        Ok(child.id())
    }

    fn kill(&self) -> io::Result<()> {
        self.existing()?;
        let number = self.word(2).parse().unwrap_or(15);
        let signal = Signal::try_from(number).map_err(io::Error::from)?;
        kill(self.pid()?, signal).map_err(|_| io::Error::other("container not running"))
    }

    fn delete(&self) -> io::Result<()> {
        let folder = self.existing()?;
        if let Ok(pid) = self.pid() {
            let _dead_already = kill(pid, Signal::SIGKILL);
        }
        fs::remove_dir_all(folder)
    }

    fn existing(&self) -> io::Result<PathBuf> {
        let folder = self.folder();
        if folder.is_dir() { Ok(folder) } else { Err(io::Error::other("container does not exist")) }
    }

    fn pid(&self) -> io::Result<Pid> {
        let text = fs::read_to_string(self.folder().join("pid"))?;
        text.trim().parse().map(Pid::from_raw).map_err(io::Error::other)
    }
}

trait Nonblocking {
    fn custom_flags_nonblock(&mut self) -> &mut Self;
}

impl Nonblocking for fs::OpenOptions {
    fn custom_flags_nonblock(&mut self) -> &mut Self {
        use std::os::unix::fs::OpenOptionsExt as _;
        self.custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
    }
}

/// Init before Start: waits on the fifo, then executes the program.
fn wait_and_execute(arguments: &[String]) -> ExitCode {
    let [fifo, program, rest @ ..] = arguments else { return ExitCode::from(125) };
    let _a_leader_already = setsid();
    let waited = File::open(fifo).and_then(|mut fifo| fifo.read_exact(&mut [0]));
    if waited.is_err() {
        return ExitCode::from(125);
    }
    let error = Command::new(program).args(rest).exec();
    eprintln!("{program}: {error}");
    ExitCode::from(127)
}
