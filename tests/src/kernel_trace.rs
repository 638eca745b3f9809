//! Program executions and system calls of processes, as the kernel reports them in tracefs.
//!
//! ```text
//! follow ─▶ an instance of tracefs of its own, which follows what the calling thread starts, and all descendants of that
//! take   ─▶ what has happened since the last take, by process and program          drop: the instance is removed
//! ```
//! tracefs knows processes by the pids of the host's namespace, and a run has a namespace of its own: the calling thread finds its pid there
//! by a marker that it writes.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::eventually::SOON;
use crate::isolation;
use crate::runner::skip;

const ROOT: &str = "/sys/kernel/tracing";
/// Prefix of the names of instances. A run's name follows: it ends in the pid of its outer process.
const PREFIX: &str = "x-trace-";
/// The size of the buffer of each processor, in KiB: some 100,000 system calls.
const BUFFER_KIB: &str = "8192";
/// A bit of clone(2)'s flags.
const CLONE_THREAD: u64 = 0x1_0000;

/// A trace of the processes that one thread starts.
#[derive(Debug)]
pub struct KernelTrace {
    // dropped in this order: an instance with an open file is busy
    pipe: File,
    instance: Instance,
    /// The bytes of a line whose end was not read yet.
    begun: Vec<u8>,
    processes: Processes,
    markers: u32,
}

impl KernelTrace {
    /// Follows the processes that the calling thread starts from now on.
    ///
    /// Errors: a skip, where tracefs is missing or cannot be written.
    pub fn follow() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let instances = Path::new(ROOT).join("instances");
        if !instances.is_dir() {
            return skip(format!("tracefs is not mounted at {ROOT}"));
        }
        remove_of_the_dead(&instances);
        let folder = instances.join(format!("{PREFIX}{}-{}", isolation::cgroup(), NEXT.fetch_add(1, Ordering::Relaxed)));
        if let Err(error) = fs::create_dir(&folder) {
            return skip(format!("no instance of tracefs can be made: {error}"));
        }
        let instance = Instance(folder);
        let pipe = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(instance.0.join("trace_pipe"))?;
        let mut trace = Self { pipe, instance, begun: Vec::new(), processes: Processes::default(), markers: 0 };
        trace.begin()?;
        Ok(trace)
    }

    fn begin(&mut self) -> Result<()> {
        self.write("buffer_size_kb", BUFFER_KIB)?;
        let own = self.own_pid()?;
        self.processes.root = own;
        self.write("options/event-fork", "1")?;
        // what this thread does itself is of no interest
        self.write("events/raw_syscalls/sys_enter/filter", &format!("common_pid != {own}"))?;
        self.write("set_event_pid", &own.to_string())?;
        for event in ["sched/sched_process_exec", "task/task_newtask", "raw_syscalls/sys_enter"] {
            self.write(&format!("events/{event}/enable"), "1")?;
        }
        Ok(())
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.instance.0.join(file);
        fs::write(&path, text).with_context(|| format!("write {text:?} to {}", path.display()))
    }

    /// The pid of the calling thread as tracefs knows it.
    fn own_pid(&mut self) -> Result<i32> {
        let lines = self.until_marker()?;
        let marker = lines.last().context("the marker was read")?;
        Ok(Line::read(marker).with_context(|| format!("no line of a trace: {marker:?}"))?.pid)
    }

    /// What has happened since the last call, or since the beginning: one entry for each process and program.
    ///
    /// Errors: the kernel's buffer was too small for it.
    pub fn take(&mut self) -> Result<Activity> {
        for text in self.until_marker()? {
            self.processes.note(&text)?;
        }
        Ok(self.processes.take())
    }

    /// Reads everything up to a marker that is written now.
    fn until_marker(&mut self) -> Result<Vec<String>> {
        self.markers += 1;
        let marker = format!("x-marker-{}.", self.markers);
        self.write("trace_marker", &marker)?;
        let (begin, mut lines, mut buffer) = (Instant::now(), Vec::new(), vec![0; 1 << 16]);
        loop {
            match self.pipe.read(&mut buffer) {
                Ok(read) => self.begun.extend_from_slice(&buffer[..read]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(1)), // the polling interval
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("read trace_pipe"),
            }
            while let Some(end) = self.begun.iter().position(|byte| *byte == b'\n') {
                let line = self.begun.drain(..=end).collect::<Vec<_>>();
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                ensure!(!line.contains(" EVENTS]"), "the buffer of tracefs is too small: {line}");
                let is_last = line.ends_with(&marker);
                lines.push(line);
                if is_last {
                    return Ok(lines);
                }
            }
            ensure!(begin.elapsed() < SOON, "the marker does not arrive in the trace");
        }
    }
}

/// An instance of tracefs, removed with this.
#[derive(Debug)]
struct Instance(PathBuf);

impl Drop for Instance {
    fn drop(&mut self) {
        let _nothing_is_recorded_any_more = fs::write(self.0.join("events/enable"), "0");
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Removes the instances of runs that were killed.
fn remove_of_the_dead(instances: &Path) {
    for entry in fs::read_dir(instances).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let run = name.strip_prefix(PREFIX).and_then(|name| name.rsplit_once('-')).map(|(run, _)| run.to_owned());
        if run.is_some_and(|run| run != isolation::cgroup() && crate::cgroups::folders(&run).is_empty()) {
            let _used_by_another = fs::remove_dir(entry.path());
        }
    }
}

/// A line of a trace: `comm-PID [CPU] FLAGS TIME: EVENT: FIELDS`.
struct Line<'a> {
    pid: i32,
    event: &'a str,
    fields: &'a str,
}

impl<'a> Line<'a> {
    fn read(text: &'a str) -> Option<Self> {
        // a comm may have any characters, also those that follow it
        let is_processor = |at: usize| text.get(at + 2..at + 6).is_some_and(|text| text.ends_with(']') && text[..3].parse::<u16>().is_ok());
        let (processor, _) = text.match_indices(" [").find(|(at, _)| is_processor(*at))?;
        let pid = text[..processor].trim_end().rsplit_once('-')?.1.parse().ok()?;
        let (_time, rest) = text[processor..].split_once(": ")?;
        let (event, fields) = rest.split_once(": ")?;
        Some(Self { pid, event, fields })
    }

    /// The value of `NAME=VALUE`.
    fn field(&self, name: &str) -> Result<&'a str> {
        let found = self.fields.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        found.with_context(|| format!("{} has no {name}: {}", self.event, self.fields))
    }
}

/// What one process did while it ran one program.
#[derive(Debug, Clone)]
pub struct Span {
    /// Its pid in the host's namespace.
    pub process: i32,
    /// Which generation of descendants it is: 1 for what the followed thread has started itself.
    pub generation: u32,
    /// The program that it executed last, as it was named in the execution; none if it is a fork that has executed nothing.
    pub program: Option<String>,
    /// Whether it executed that program since the last [`KernelTrace::take`].
    pub executed: bool,
    /// How often it made each system call, by number.
    pub calls: BTreeMap<i64, u64>,
}

impl Span {
    /// How many system calls it made.
    pub fn count(&self) -> u64 {
        self.calls.values().sum()
    }
}

/// What has happened, in the order of its beginning.
#[derive(Debug, Clone, Default)]
pub struct Activity(pub Vec<Span>);

impl Activity {
    /// The programs that were executed, in order.
    pub fn executions(&self) -> Vec<&str> {
        self.0.iter().filter(|span| span.executed).filter_map(|span| span.program.as_deref()).collect()
    }

    /// The number of system calls of the spans that `wanted` chooses.
    pub fn calls(&self, wanted: impl Fn(&Span) -> bool) -> u64 {
        self.0.iter().filter(|span| wanted(span)).map(Span::count).sum()
    }
}

#[derive(Debug, Default)]
struct Processes {
    /// The thread that is followed, which stands for all threads of its process.
    root: i32,
    /// Of each thread, its process.
    threads: BTreeMap<i32, i32>,
    /// Of each process, its [`Span::generation`].
    generations: BTreeMap<i32, u32>,
    /// Of each process, what it executed last.
    programs: BTreeMap<i32, String>,
    spans: Vec<Span>,
}

impl Processes {
    fn note(&mut self, text: &str) -> Result<()> {
        let line = Line::read(text).with_context(|| format!("no line of a trace: {text:?}"))?;
        let process = self.threads.get(&line.pid).copied().unwrap_or(line.pid);
        match line.event {
            "task_newtask" => {
                let child: i32 = line.field("pid")?.parse()?;
                let flags = u64::from_str_radix(line.field("clone_flags")?, 16)?;
                let is_thread = flags & CLONE_THREAD != 0;
                self.threads.insert(child, if is_thread { process } else { child });
                if !is_thread {
                    self.generations.insert(child, self.generation(process) + 1);
                    // its pid may have been another's
                    self.programs.remove(&child);
                }
            }
            "sched_process_exec" => {
                // the program's name may have spaces, and is followed by two numbers
                let (program, _pids) = line.fields.rsplit_once(" pid=").context("an execution without a pid")?;
                let program = program.strip_prefix("filename=").context("an execution without a program")?;
                self.threads.insert(line.pid, line.pid);
                self.programs.insert(line.pid, program.to_owned());
                self.begin(line.pid).executed = true;
            }
            "sys_enter" => {
                let number = line.fields.strip_prefix("NR ").and_then(|rest| rest.split(' ').next()?.parse().ok());
                let number: i64 = number.with_context(|| format!("a system call without a number: {text}"))?;
                let span = match self.spans.iter().rposition(|span| span.process == process) {
                    Some(at) => &mut self.spans[at],
                    None => self.begin(process),
                };
                *span.calls.entry(number).or_default() += 1;
            }
            _ => {}
        }
        Ok(())
    }

    fn generation(&self, process: i32) -> u32 {
        self.generations.get(&process).copied().unwrap_or(0)
    }

    fn begin(&mut self, process: i32) -> &mut Span {
        let (generation, program) = (self.generation(process), self.programs.get(&process).cloned());
        self.spans.push(Span { process, generation, program, executed: false, calls: BTreeMap::new() });
        self.spans.last_mut().expect("pushed in the line above")
    }

    fn take(&mut self) -> Activity {
        let mut spans = std::mem::take(&mut self.spans);
        spans.retain(|span| span.process != self.root);
        Activity(spans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
      a [0] b-7 [000] .....  1.000001: task_newtask: pid=8 comm=a clone_flags=1200000 oom_score_adj=0
      a [0] b-7 [000] .....  1.000002: task_newtask: pid=9 comm=a clone_flags=3d0f00 oom_score_adj=0
      a [0] b-9 [001] .....  1.000003: sys_enter: NR 0 (3, 1, 2, 3, 4, 5)
            b-8 [001] .....  1.000004: sys_enter: NR 59 (3, 1, 2, 3, 4, 5)
           sh-8 [001] .....  1.000005: sched_process_exec: filename=/bin/a b pid=8 old_pid=8
           sh-8 [001] .....  1.000006: sys_enter: NR 12 (3, 1, 2, 3, 4, 5)
           sh-8 [001] .....  1.000007: task_newtask: pid=10 comm=sh clone_flags=3d0f00 oom_score_adj=0
           sh-10 [001] .....  1.000008: sys_enter: NR 12 (3, 1, 2, 3, 4, 5)
           sh-10 [001] .....  1.000009: task_newtask: pid=11 comm=sh clone_flags=11 oom_score_adj=0
           sh-11 [001] .....  1.000010: sys_enter: NR -1 (3, 1, 2, 3, 4, 5)";

    #[test]
    fn calls_belong_to_the_process_and_program_of_their_thread() {
        let mut processes = Processes { root: 7, ..Processes::default() };
        for line in TRACE.lines() {
            processes.note(line).expect("a line of a trace");
        }
        let activity = processes.take();
        let found: Vec<_> = activity.0.iter().map(|span| (span.process, span.generation, span.program.as_deref(), span.count())).collect();
        assert_eq!(found, [(8, 1, None, 1), (8, 1, Some("/bin/a b"), 2), (11, 2, None, 1)]);
        assert_eq!(activity.executions(), ["/bin/a b"]);
        assert_eq!(activity.calls(|span| span.program.is_some()), 2);
        assert!(processes.take().0.is_empty(), "taken twice");
    }
}
