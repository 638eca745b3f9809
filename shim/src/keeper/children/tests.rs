//! What becomes of performers, with real processes in their place.
use std::fs::File;
use std::io::Write;
use std::process::{Child, Command, Stdio};

use x_engine::perform::{Failure, Step as PerformStep};

use super::*;
use crate::handover::Exited;

/// A process in the place of a performer: it exits when its input is closed. The keeper's parts, and the end that it reports to.
struct Stage {
    children: Children,
    streams: Streams,
    poll: Poll,
    process: Child,
    report: File,
}

impl Stage {
    fn new(is_done_by_report: bool) -> Self {
        let process = Command::new("/bin/sh").args(["-c", "read line; exit 9"]).stdin(Stdio::piped()).spawn().expect("a process");
        let (report, theirs) = Capture::new().expect("a pipe");
        let helper = Helper {
            cause: 7,
            step: 5,
            key: "c/e".into(),
            program: "perform exec".into(),
            failure: None,
            pipes: Pipes::of_output(report),
            reported: false,
            console: None,
            reads: Vec::new(),
            terminal: None,
            is_done_by_report,
        };
        let mut children = Children::default();
        children.helpers.insert(process.id(), Box::new(helper));
        Self { children, streams: Streams::default(), poll: Poll::new().expect("an epoll set"), process, report: theirs.into() }
    }

    fn read(&mut self) -> Option<Found> {
        self.children.read(self.process.id(), &mut self.streams, &mut self.poll)
    }

    fn write(&mut self, report: &[u8]) {
        self.report.write_all(report).expect("written");
    }

    fn is_running(&self) -> bool {
        matches!(sys::process::peek(Some(self.process.id())), Ok(None))
    }

    /// Lets the process exit, and reaps it alone: other tests have children too.
    fn end(&mut self) -> Vec<Found> {
        let mut found = Vec::new();
        drop(self.process.stdin.take());
        while self.is_running() {
            std::thread::yield_now();
        }
        let ended = sys::process::peek(Some(self.process.id())).ok().flatten().expect("a zombie");
        self.children.ended(ended, &mut self.streams, &mut self.poll, &mut found);
        found
    }
}

fn encoded(report: &Report) -> Vec<u8> {
    minicbor::to_vec(report).expect("a Vec takes every byte")
}

/// The status and the report of the one outcome.
fn outcome(found: Found) -> (u32, Option<Report>) {
    match found {
        Found::Outcome { cause: 7, step: 5, outcome: Outcome::Exited(Exited { status, output, .. }) } => (status, Report::parse(&output)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_exec_is_done_by_its_report_and_its_performers_exit_adds_nothing() {
    let failed = Report::Failed(Failure { step: PerformStep::Program, what: "exec: \"x\"".into(), errno: 2 });
    for report in [Report::Born { pid: 17 }, failed] {
        let mut stage = Stage::new(true);
        let bytes = encoded(&report);
        let (first, second) = bytes.split_at(1);
        assert!(stage.read().is_none());
        stage.write(first);
        assert!(stage.read().is_none(), "half a report");
        stage.write(second);
        assert_eq!(outcome(stage.read().expect("an outcome")), (0, Some(report)));
        assert!(stage.is_running());
        assert!(stage.read().is_none(), "a second outcome");
        let found = stage.end();
        assert!(found.is_empty(), "{found:?}");
        assert!(stage.children.helpers.is_empty() && stage.children.exits_seen == 1);
    }
}

#[test]
fn an_exec_whose_performer_is_killed_before_its_report_is_done_by_the_exit() {
    let mut stage = Stage::new(true);
    stage.write(&encoded(&Report::Born { pid: 17 })[..1]);
    assert!(stage.read().is_none());
    let [found] = <[Found; 1]>::try_from(stage.end()).expect("one outcome");
    assert_eq!(outcome(found), (9, None));
}

#[test]
fn any_other_plan_is_done_by_its_performers_exit() {
    let mut stage = Stage::new(false);
    stage.write(&encoded(&Report::Born { pid: 17 }));
    assert!(stage.read().is_none());
    let [found] = <[Found; 1]>::try_from(stage.end()).expect("one outcome");
    assert_eq!(outcome(found), (9, Some(Report::Born { pid: 17 })));
}
