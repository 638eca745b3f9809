//! Outputs that are so fast that the clock gives them their turns.
use super::*;
use crate::keeper::streams::pace;

/// The stdout of the only process.
const ID: u32 = 1 << 2 | 1;

/// A process whose output has just become fast, and its reader.
struct Fast {
    bench: Bench,
    process: File,
    reader: File,
    now: Instant,
}

impl Fast {
    fn new(name: &str) -> Self {
        let mut bench = Bench::new(name);
        bench.open(bench.stdio("c", false, 0));
        let process = bench.process_end(Stream::Stdout);
        pipes::set_nonblocking(&process.try_clone().expect("a copy").into()).expect("a flag");
        let mut fast = Self { reader: bench.reader(), process, bench, now: Instant::now() };
        for _ in 0..pace::FAST_BYTES / pace::SMALL_BYTES as u64 {
            assert!(!fast.is_timed());
            assert_eq!(fast.write(pace::SMALL_BYTES), pace::SMALL_BYTES);
            fast.bench.streams.turn(ID, fast.now, &mut fast.bench.poll);
            assert_eq!(fast.read(), pace::SMALL_BYTES);
        }
        assert!(fast.is_timed());
        fast.events();
        fast
    }

    fn is_timed(&self) -> bool {
        outputs(&self.bench.streams).all(|out| out.pace.is_timed())
    }

    /// Writes as much as there is room for, up to `bytes`.
    fn write(&mut self, bytes: usize) -> usize {
        let part = vec![b'x'; bytes];
        let mut written = 0;
        while let Ok(count @ 1..) = self.process.write(&part[written..]) {
            written += count;
        }
        written
    }

    /// Reads what there is.
    fn read(&mut self) -> usize {
        let mut got = Vec::new();
        while read_some(&mut self.reader, &mut got).is_some_and(|count| count > 0) {}
        got.len()
    }

    /// Whether the kernel reports something.
    fn events(&mut self) -> bool {
        self.bench.poll.wait(Some(Instant::now())).expect("a wait").contains(&Source::Stream(ID))
    }

    /// The clock goes on to the next turn, if it gives one.
    fn tick(&mut self) {
        self.now = self.bench.streams.deadline().unwrap_or(self.now);
        self.bench.streams.tick(self.now, &mut self.bench.poll);
    }

    fn capacity(&self) -> i32 {
        nix::fcntl::fcntl(&self.reader, nix::fcntl::FcntlArg::F_GETPIPE_SZ).expect("a capacity")
    }
}

#[test]
fn nothing_but_the_clock_gives_a_fast_output_its_turns_until_it_is_slow() {
    let mut fast = Fast::new("by-the-clock");
    for _ in 0..10 {
        let written = fast.write(3 * pace::SMALL_BYTES);
        assert_eq!(written, 3 * pace::SMALL_BYTES, "larger pipes have room for it");
        assert!(!fast.events() && fast.read() == 0, "no write wakes the keeper");
        fast.tick();
        assert_eq!(fast.read(), written);
    }
    for _ in 0..pace::SLOW_TURNS {
        assert!(fast.is_timed());
        fast.tick();
    }
    assert!(!fast.is_timed() && fast.bench.streams.deadline().is_none());
    assert_eq!(fast.capacity(), pace::SMALL_BYTES as i32);
    fast.events();
    fast.write(1);
    assert!(fast.events(), "a write wakes the keeper again");
    fast.bench.streams.turn(ID, fast.now, &mut fast.bench.poll);
    assert_eq!(fast.read(), 1);
}

#[test]
fn the_end_of_a_fast_output_follows_all_its_bytes() {
    let mut fast = Fast::new("fast-end");
    let written = fast.write(3 * pace::SMALL_BYTES);
    let Fast { mut bench, process, mut reader, .. } = fast;
    drop(process);
    let mut got = Vec::new();
    bench.until("the end", |_| read_some(&mut reader, &mut got).is_none());
    assert_eq!(got.len(), written);
    assert!(bench.streams.deadline().is_none());
}

#[test]
fn a_fast_output_whose_reader_stops_waits_for_it_without_the_clock() {
    let mut fast = Fast::new("fast-stop");
    let mut written = 0;
    while fast.is_timed() {
        written += fast.write(1 << 20);
        fast.tick();
    }
    assert!(fast.bench.streams.deadline().is_none());
    written += fast.write(1 << 20);
    fast.events();
    let Fast { mut bench, mut reader, .. } = fast;
    let mut got = Vec::new();
    bench.until("everything", |_| read_some(&mut reader, &mut got).is_some() && got.len() == written);
}

#[test]
fn a_fast_output_that_is_handed_over_goes_on() {
    let mut fast = Fast::new("fast-handed-over");
    let mut written = fast.write(3 * pace::SMALL_BYTES);
    fast.bench.re_exec();
    assert!(!fast.is_timed());
    let mut got = Vec::new();
    for _ in 0..3 {
        fast.bench.until("everything", |_| read_some(&mut fast.reader, &mut got).is_some() && got.len() == written);
        written += fast.write(1);
    }
}

#[test]
fn a_drain_of_a_fast_output_ends_when_its_reader_leaves() {
    let mut fast = Fast::new("fast-drain");
    fast.write(3 * pace::SMALL_BYTES);
    let Fast { mut bench, process, reader, now, .. } = fast;
    bench.streams.exited("c", &mut bench.poll);
    bench.streams.drain("c", (7, 1), now, &mut bench.poll);
    assert!(bench.drained.is_empty() && !outputs(&bench.streams).any(|out| out.pace.is_timed()));
    drop(reader);
    bench.until("the end", |streams| streams.snapshot().is_empty());
    assert_eq!(bench.drained, [(7, 1)]);
    drop(process);
}
