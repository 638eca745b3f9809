mod fast;

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;

use super::*;
use crate::handover::Output;
use crate::saved::{Reader, Saved as _, Writer};

/// Streams with their loop, and a folder for fifos that goes with them.
struct Bench {
    poll: Poll,
    streams: Streams,
    folder: scratch::Folder,
    /// Operations that were answered.
    drained: Vec<(Cause, Step)>,
    /// The kernel does not report readers.
    is_unreported: bool,
}

impl Bench {
    fn new(name: &str) -> Self {
        let folder = scratch::Folder::new(name);
        let poll = Poll::new().expect("an epoll set");
        let streams = Streams::default();
        Self { poll, streams, folder, drained: Vec::new(), is_unreported: false }
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.folder.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
        path.display().to_string()
    }

    fn stdio(&self, key: &str, stdin: bool, spill_bytes: u64) -> Stdio {
        let (stdin, stdout) = (stdin.then(|| self.fifo("stdin")), Output::Fifo(self.fifo("stdout")));
        Stdio { key: key.into(), stdin, stdout, spill_bytes, ..self.stdio_without_fifos() }
    }

    fn stdio_without_fifos(&self) -> Stdio {
        Stdio {
            key: "c".into(),
            stdin: None,
            stdout: Output::None,
            stderr: Output::None,
            terminal: false,
            uid: 0,
            gid: 0,
            spill_bytes: 0,
            spill_folder: self.folder.display().to_string(),
        }
    }

    fn open(&mut self, stdio: Stdio) {
        self.streams.open(stdio, &mut self.poll).expect("streams");
    }

    fn process_end(&mut self, stream: Stream) -> File {
        self.streams.take_process_end("c", stream).expect("an end for the process").into()
    }

    fn reader(&self) -> File {
        OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(self.folder.join("stdout")).expect("the fifo's reader")
    }

    /// Hands the streams over to themselves, in a new loop.
    fn re_exec(&mut self) {
        let mut writer = Writer::new();
        self.streams.save(&mut writer);
        let (bytes, kept) = writer.finish();
        // The descriptors stay open, for those who take them over.
        std::mem::forget(std::mem::take(&mut self.streams));
        self.poll = Poll::new().expect("an epoll set");
        self.streams = Streams::load(&mut Reader::new(&bytes, false)).expect("the whole state");
        self.streams.resume(&mut self.poll).expect("descriptors that can be watched");
        assert!(!kept.is_empty());
    }

    /// Turns the loop until `done` or, as a failure, a minute.
    fn until(&mut self, what: &str, mut done: impl FnMut(&Streams) -> bool) {
        let limit = Instant::now() + Duration::from_secs(60);
        while !done(&self.streams) {
            assert!(Instant::now() < limit, "{what}: not within a minute; streams: {:?}", self.streams.snapshot());
            let deadline = self.streams.deadline().unwrap_or(limit).min(Instant::now() + Duration::from_millis(20));
            for source in self.poll.wait(Some(deadline)).expect("a wait") {
                match source {
                    Source::Stream(id) => self.streams.turn(id, Instant::now(), &mut self.poll),
                    Source::Fifos if !self.is_unreported => self.streams.fifos_touched(&mut self.poll),
                    _ => {}
                }
            }
            self.drained.extend(self.streams.tick(Instant::now(), &mut self.poll));
        }
    }
}

fn outputs(streams: &Streams) -> impl Iterator<Item = &Outgoing> {
    streams.processes.values().flat_map(|entry| &entry.pumps).filter_map(|pump| match pump {
        Some(Pump::Out(out)) => Some(out),
        _ => None,
    })
}

/// Reads the available bytes; `None` at the end.
fn read_some(file: &mut File, into: &mut Vec<u8>) -> Option<usize> {
    let mut buffer = [0; 65536];
    match file.read(&mut buffer) {
        Ok(0) => None,
        Ok(count) => {
            into.extend_from_slice(&buffer[..count]);
            Some(count)
        }
        Err(_) => Some(0),
    }
}

#[test]
fn output_arrives_whole_and_then_ends() {
    let mut bench = Bench::new("whole");
    let stdio = bench.stdio("c", false, 0);
    bench.open(stdio);
    let mut reader = bench.reader();
    let mut process = bench.process_end(Stream::Stdout);
    let sent: Vec<u8> = (0..(1 << 20) + 1).map(|n: u32| (n % 251) as u8).collect();
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || process.write_all(&sent)
    });
    let mut got = Vec::new();
    bench.until("the end of the output", |_| read_some(&mut reader, &mut got).is_none() && !got.is_empty());
    writer.join().expect("the writer").expect("all written");
    assert!(got == sent, "{} of {} bytes, or in another order", got.len(), sent.len());
    assert_eq!(bench.streams.bytes_moved, sent.len() as u64);
}

#[test]
fn the_tail_is_kept_for_a_reader_that_opens_after_the_exit() {
    let mut bench = Bench::new("tail");
    let stdio = bench.stdio("c", false, 0);
    bench.open(stdio);
    bench.process_end(Stream::Stdout).write_all(b"last words").expect("room in the pipe");
    bench.streams.exited("c", &mut bench.poll);
    bench.until("draining", |streams| outputs(streams).any(|out| out.is_narrowed));
    let mut reader = bench.reader();
    let mut got = Vec::new();
    bench.until("the end", |_| read_some(&mut reader, &mut got).is_none());
    assert_eq!(got, b"last words");
}

#[test]
fn an_output_that_was_read_before_its_reader_died_still_ends_for_the_next_reader() {
    let mut bench = Bench::new("next");
    let stdio = bench.stdio("c", false, 0);
    bench.open(stdio);
    let mut first = bench.reader();
    let mut process = bench.process_end(Stream::Stdout);
    process.write_all(b"early").expect("room in the pipe");
    let mut got = Vec::new();
    bench.until("the first bytes", |_| read_some(&mut first, &mut got).is_some() && got == b"early");
    drop((first, process));
    bench.streams.exited("c", &mut bench.poll);
    bench.until("draining", |streams| outputs(streams).any(|out| out.is_narrowed));
    let mut second = bench.reader();
    bench.until("the end", |_| read_some(&mut second, &mut got).is_none());
}

#[test]
fn a_drain_waits_for_a_descendant_that_holds_the_output() {
    let mut bench = Bench::new("descendant");
    bench.open(bench.stdio("c", false, 0));
    let mut reader = bench.reader();
    let mut descendant = bench.process_end(Stream::Stdout);
    bench.streams.exited("c", &mut bench.poll);
    bench.streams.drain("c", (7, 1), Instant::now(), &mut bench.poll);
    let mut got = Vec::new();
    for part in ["one ", "two "] {
        descendant.write_all(part.as_bytes()).expect("room in the pipe");
        bench.until(part, |_| read_some(&mut reader, &mut got).is_some() && got.ends_with(part.as_bytes()));
    }
    assert!(bench.drained.is_empty(), "a writer is left");
    drop(descendant);
    bench.until("the end", |_| read_some(&mut reader, &mut got).is_none());
    assert_eq!((got.as_slice(), bench.drained.as_slice()), (b"one two ".as_slice(), [(7, 1)].as_slice()));
    bench.streams.release("c", Instant::now(), &mut bench.poll);
    assert!(bench.streams.is_drained());
}

#[test]
fn a_drain_waits_for_a_reader_that_pauses() {
    let mut bench = Bench::new("pauses");
    bench.open(bench.stdio("c", false, 0));
    let mut reader = bench.reader();
    bench.process_end(Stream::Stdout).write_all(b"unread").expect("room in the pipe");
    bench.streams.exited("c", &mut bench.poll);
    bench.streams.drain("c", (7, 1), Instant::now(), &mut bench.poll);
    bench.until("the fifo to hold it", |streams| streams.snapshot().iter().any(|stream| stream.waiting_bytes == 6));
    assert!(bench.drained.is_empty(), "it is not taken");
    let mut got = Vec::new();
    bench.until("the end", |_| read_some(&mut reader, &mut got).is_none());
    assert_eq!((got.as_slice(), bench.drained.as_slice()), (b"unread".as_slice(), [(7, 1)].as_slice()));
}

#[test]
fn a_drain_that_was_handed_over_notices_a_reader_that_the_kernel_does_not_report_and_ends_in_time() {
    for is_read in [true, false] {
        let mut bench = Bench::new(if is_read { "handed-over-read" } else { "handed-over" });
        bench.open(bench.stdio("c", false, 0));
        let mut reader = bench.reader();
        bench.process_end(Stream::Stdout).write_all(b"unread").expect("room in the pipe");
        bench.streams.exited("c", &mut bench.poll);
        let long_ago = Instant::now().checked_sub(DRAIN_WITHIN - CHECK_EVERY).expect("a machine that is up for a while");
        bench.streams.drain("c", (7, 1), if is_read { Instant::now() } else { long_ago }, &mut bench.poll);
        bench.re_exec();
        bench.is_unreported = true;
        bench.until("the fifo to be watched again", |streams| outputs(streams).any(|out| out.watch.is_some()));
        while !bench.poll.wait(Some(Instant::now())).expect("a wait").is_empty() {}
        let mut got = Vec::new();
        bench.until("the end", |streams| {
            if is_read {
                read_some(&mut reader, &mut got);
            }
            streams.snapshot().is_empty()
        });
        assert_eq!((got.as_slice(), bench.drained.as_slice()), (if is_read { b"unread".as_slice() } else { b"" }, [(7, 1)].as_slice()));
    }
}

#[test]
fn a_reader_that_leaves_without_reading_ends_a_drain() {
    let drained = |is_held: bool| {
        let mut bench = Bench::new(if is_held { "gone-held" } else { "gone" });
        bench.open(bench.stdio("c", false, 0));
        let reader = bench.reader();
        let mut process = bench.process_end(Stream::Stdout);
        process.write_all(b"unread").expect("room in the pipe");
        let held = is_held.then_some(process);
        bench.streams.exited("c", &mut bench.poll);
        bench.streams.drain("c", (7, 1), Instant::now(), &mut bench.poll);
        bench.until("the fifo to hold it", |streams| streams.snapshot().iter().any(|stream| stream.waiting_bytes == 6));
        let since = Instant::now();
        drop(reader);
        bench.until("the end", |streams| streams.snapshot().is_empty());
        let took = since.elapsed();
        assert_eq!((bench.drained.as_slice(), bench.streams.bytes_lost), ([(7, 1)].as_slice(), 6));
        drop(held);
        took
    };
    for is_held in [false, true] {
        // more than once: on a busy machine it may take as long by chance
        assert!((0..5).any(|_| drained(is_held) < CHECK_EVERY), "only a look at the fifo has shown it");
    }
}

#[test]
fn a_drain_of_streams_that_are_finished_or_gone_is_answered_at_once() {
    let mut bench = Bench::new("at-once");
    bench.open(bench.stdio("c", false, 0));
    let _reader = bench.reader();
    drop(bench.process_end(Stream::Stdout));
    bench.streams.exited("c", &mut bench.poll);
    for (cause, key) in [(1, "c"), (2, "c"), (3, "another")] {
        bench.streams.drain(key, (cause, 1), Instant::now(), &mut bench.poll);
    }
    assert_eq!(bench.streams.tick(Instant::now(), &mut bench.poll), [(1, 1), (2, 1), (3, 1)]);
}

#[test]
fn a_drain_is_answered_when_its_time_is_over() {
    let mut bench = Bench::new("over");
    bench.open(bench.stdio("c", false, 0));
    let _reader = bench.reader();
    let mut held = bench.process_end(Stream::Stdout);
    bench.streams.exited("c", &mut bench.poll);
    let long_ago = Instant::now().checked_sub(DRAIN_WITHIN).expect("a machine that is up for a while");
    bench.streams.drain("c", (7, 1), long_ago, &mut bench.poll);
    assert_eq!(bench.streams.tick(Instant::now(), &mut bench.poll), [(7, 1)]);
    assert!(held.write_all(b"late").is_err(), "its reader is gone");
}

#[test]
fn a_drain_waits_for_the_last_writer_of_a_pipe_that_is_read_elsewhere() {
    let mut bench = Bench::new("lent");
    let stdio = Stdio { stdout: Output::Pipe, ..bench.stdio("c", false, 0) };
    bench.open(stdio);
    let held = bench.process_end(Stream::Stdout);
    bench.streams.exited("c", &mut bench.poll);
    bench.streams.drain("c", (7, 1), Instant::now(), &mut bench.poll);
    assert!(bench.streams.tick(Instant::now(), &mut bench.poll).is_empty());
    assert!(bench.streams.read_end("c", Stream::Stdout).is_ok(), "the next worker needs it");
    drop(held);
    bench.until("the end", |streams| streams.processes.values().all(|process| process.is_finished()));
    assert_eq!(bench.drained, [(7, 1)]);
}

#[test]
fn a_release_in_the_middle_of_a_drain_leaves_nothing_to_check() {
    for is_lent in [true, false] {
        let mut bench = Bench::new(if is_lent { "released-lent" } else { "released" });
        let stdio = bench.stdio("c", false, 0);
        bench.open(if is_lent { Stdio { stdout: Output::Pipe, ..stdio } } else { stdio });
        let _held = bench.process_end(Stream::Stdout);
        let reader = (!is_lent).then(|| bench.reader());
        bench.streams.drain("c", (7, 1), Instant::now(), &mut bench.poll);
        assert!(bench.streams.tick(Instant::now(), &mut bench.poll).is_empty(), "a writer is left");
        bench.streams.release("c", Instant::now(), &mut bench.poll);
        drop(reader);
        bench.until("nothing is left to check", |streams| streams.is_drained() && streams.deadline().is_none());
        assert_eq!(bench.drained, [(7, 1)]);
    }
}

#[test]
fn a_terminal_whose_logger_dies_first_is_emptied_and_leaves_no_pipe() {
    let mut bench = Bench::new("terminal");
    let stdio = Stdio { stdout: Output::Pipe, terminal: true, ..bench.stdio("c", false, 0) };
    bench.open(stdio);
    let pty = nix::pty::openpty(None, None).expect("a terminal");
    assert!(bench.streams.attach("c", pty.master, &mut bench.poll));
    bench.streams.reader_gone("c", Stream::Stdout, &mut bench.poll);
    let mut process = File::from(pty.slave);
    let writer = std::thread::spawn(move || process.write_all(&[b'x'; 1 << 20]));
    bench.until("the process to be done without its logger", |_| writer.is_finished());
    writer.join().expect("the writer").expect("all written");
    bench.streams.exited("c", &mut bench.poll);
    bench.until("the end", |streams| streams.snapshot().is_empty());
    assert!(bench.streams.bytes_lost >= 1 << 19, "{}", bench.streams.bytes_lost);
    bench.streams.release("c", Instant::now(), &mut bench.poll);
    assert!(bench.streams.is_drained());
}

#[test]
fn unread_outputs_of_ended_processes_cost_a_turn_nothing() {
    let mut bench = Bench::new("unread");
    for number in 0..50 {
        let key = format!("c/{number}");
        let stdout = Output::Fifo(bench.fifo(&key.replace('/', "-")));
        bench.open(Stdio { key: key.clone(), stdout, ..bench.stdio_without_fifos() });
        let mut process = File::from(bench.streams.take_process_end(&key, Stream::Stdout).expect("an end for the process"));
        process.write_all(b"unread").expect("room in the pipe");
        drop(process);
        bench.streams.exited(&key, &mut bench.poll);
    }
    bench.until("all wait for readers", |streams| outputs(streams).filter(|out| out.watch.is_some()).count() == 50);
    bench.until("nothing is left to look at", |streams| streams.deadline().is_none());
    while !bench.poll.wait(Some(Instant::now())).expect("a wait").is_empty() {}
    // Spoilt behind their backs: a turn would finish them.
    for entry in bench.streams.processes.values_mut() {
        entry.drain_until = Some(Instant::now());
    }
    bench.streams.tick(Instant::now(), &mut bench.poll);
    assert_eq!(outputs(&bench.streams).count(), 50, "only what is due gets a turn");
}

#[test]
fn a_reader_that_leaves_is_no_error_for_the_process() {
    let mut bench = Bench::new("leaves");
    let stdio = bench.stdio("c", false, 0);
    bench.open(stdio);
    drop(bench.reader());
    let mut process = bench.process_end(Stream::Stdout);
    process.write_all(b"to nobody").expect("the write does not fail");
    bench.until("the fifo to hold it", |streams| streams.snapshot().iter().any(|stream| stream.waiting_bytes == 9));
}

#[test]
fn without_a_reader_delete_drops_what_is_left_and_counts_it() {
    let mut bench = Bench::new("delete");
    let stdio = bench.stdio("c", false, 0);
    bench.open(stdio);
    bench.process_end(Stream::Stdout).write_all(b"unread").expect("room in the pipe");
    bench.streams.exited("c", &mut bench.poll);
    bench.streams.release("c", Instant::now(), &mut bench.poll);
    bench.until("everything to go", Streams::is_drained);
    assert_eq!(bench.streams.bytes_lost, 6);
}

#[test]
fn stdin_survives_reconnecting_clients_and_ends_with_close() {
    let mut bench = Bench::new("stdin");
    let stdio = bench.stdio("c", true, 0);
    bench.open(stdio);
    let mut process = bench.process_end(Stream::Stdin);
    pipes::set_nonblocking(&process.try_clone().expect("a copy").into()).expect("a flag");
    let path = bench.folder.join("stdin");
    let client = || OpenOptions::new().write(true).open(&path).expect("the client's end");
    let mut got = Vec::new();
    client().write_all(b"one ").expect("a write");
    bench.until("the first write", |_| read_some(&mut process, &mut got).is_some() && got == b"one ");
    client().write_all(b"two").expect("a write");
    bench.streams.close_stdin("c", &mut bench.poll);
    bench.streams.close_stdin("c", &mut bench.poll);
    bench.until("the end of stdin", |_| read_some(&mut process, &mut got).is_none());
    assert_eq!(got, b"one two");
}

#[test]
fn with_spill_a_process_does_not_wait_for_its_reader_and_the_order_is_kept() {
    let mut bench = Bench::new("spill");
    let stdio = bench.stdio("c", false, 8 << 20);
    bench.open(stdio);
    let mut process = bench.process_end(Stream::Stdout);
    let sent: Vec<u8> = (0..4 << 20).map(|n: u32| (n % 253) as u8).collect();
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || process.write_all(&sent)
    });
    bench.until("the process to be done without a reader", |_| writer.is_finished());
    let mut reader = bench.reader();
    let mut got = Vec::new();
    bench.until("the end of the output", |_| read_some(&mut reader, &mut got).is_none() && !got.is_empty());
    assert!(got == sent, "{} of {} bytes, or in another order", got.len(), sent.len());
}

#[test]
fn a_spill_that_is_never_empty_holds_little_more_than_its_limit() {
    use std::os::unix::fs::MetadataExt;
    let mut bench = Bench::new("slow");
    let limit = 1 << 20;
    bench.open(bench.stdio("c", false, limit));
    let mut process = bench.process_end(Stream::Stdout);
    let mut reader = bench.reader();
    // Always full, so that the file is filled as fast as it is emptied.
    std::thread::spawn(move || {
        let mut page = [0; 1 << 16];
        for start in (0u64..).step_by(page.len()) {
            page.iter_mut().zip(start..).for_each(|(byte, at)| *byte = (at % 251) as u8);
            if process.write_all(&page).is_err() {
                return;
            }
        }
    });
    let (mut got, mut most) = (0, 0);
    let mut part = [0; 1 << 14];
    bench.until("twenty times the limit to go through", |streams| {
        let spill = outputs(streams).next().and_then(|out| out.spill_file());
        let held = spill.map_or(0, |file| file.metadata().expect("an open file").blocks() * 512);
        most = most.max(held);
        // the writer may have to wait for a processor
        if held > limit / 2 {
            let count = reader.read(&mut part).unwrap_or(0);
            assert!(part[..count].iter().zip(got..).all(|(byte, at)| *byte == (at % 251) as u8), "other bytes after {got}");
            got += count as u64;
        }
        got > 20 * limit
    });
    assert!(most <= limit + (512 << 10), "{most} bytes on the disk");
}

#[test]
fn an_endless_writer_does_not_hold_the_streams_of_a_deleted_container() {
    let mut bench = Bench::new("endless");
    bench.open(bench.stdio("c", false, 0));
    let mut process = bench.process_end(Stream::Stdout);
    let mut reader = bench.reader();
    let reading = std::thread::spawn(move || {
        let mut page = [0; 1 << 16];
        loop {
            match reader.read(&mut page) {
                Ok(0) => return,
                Ok(_) => {}
                Err(_) => std::thread::yield_now(),
            }
        }
    });
    let writing = std::thread::spawn(move || while process.write_all(&[b'x'; 4096]).is_ok() {});
    bench.until("bytes flow", |streams| streams.snapshot().iter().any(|stream| stream.bytes > 0));
    let long_ago = Instant::now().checked_sub(DRAIN_WITHIN).expect("a machine that is up for a while");
    bench.streams.release("c", long_ago, &mut bench.poll);
    bench.until("the streams are given up", Streams::is_drained);
    for thread in [writing, reading] {
        thread.join().expect("ends with its pipe");
    }
}

#[test]
fn streams_that_cannot_all_be_made_leave_nothing_behind() {
    let mut bench = Bench::new("half");
    let stdio = bench.stdio("c", true, 0);
    let hopeless = Stdio { spill_bytes: 1 << 20, spill_folder: "/nowhere".into(), ..stdio.clone() };
    bench.streams.open(hopeless, &mut bench.poll).expect_err("there is no folder for the spill");
    assert!(bench.streams.is_drained(), "{:?}", bench.streams);
    bench.open(stdio);
}
