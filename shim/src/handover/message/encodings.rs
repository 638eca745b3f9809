//! How the messages look on the socket.
use super::*;
use crate::handover::{Malformed, Reader, Writer};

impl ToWorker {
    /// Encodes the message with its frame.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w;
        match self {
            Self::Welcome { version, keeper_pid, life } => {
                w = Writer::message(1);
                w.u16(*version).u32(*keeper_pid).u32(*life);
            }
            Self::State { key, value } => {
                w = Writer::message(2);
                w.str(key).bytes(value);
            }
            Self::Request { cause, age_nanos, origin, payload } => {
                w = Writer::message(3);
                w.u64(*cause).u64(*age_nanos).u8(match origin {
                    Origin::Client => 0,
                    Origin::Control => 1,
                });
                w.bytes(payload);
            }
            Self::Exit { cause, exit } => {
                w = Writer::message(4);
                w.u64(*cause).str(&exit.key).u32(exit.pid).u32(exit.status).i64(exit.at_nanos);
            }
            Self::CaughtUp => w = Writer::message(5),
            Self::Done { cause, step, outcome } => {
                w = Writer::message(6);
                w.u64(*cause).u32(*step);
                outcome.write(&mut w);
            }
            Self::Try { key, value } => {
                w = Writer::message(7);
                w.str(key).bytes(value);
            }
            Self::Tried => w = Writer::message(8),
            Self::Ping { number } => {
                w = Writer::message(9);
                w.u32(*number);
            }
            Self::MayRest => w = Writer::message(10),
        }
        w.finish()
    }

    /// Decodes a message without the length of its frame.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        Ok(match r.u8()? {
            1 => Self::Welcome { version: r.u16()?, keeper_pid: r.u32()?, life: r.u32()? },
            2 => Self::State { key: r.string()?, value: r.bytes()? },
            3 => Self::Request {
                cause: r.u64()?,
                age_nanos: r.u64()?,
                origin: match r.u8()? {
                    0 => Origin::Client,
                    1 => Origin::Control,
                    _ => return Err(Malformed { what: "an origin" }),
                },
                payload: r.bytes()?,
            },
            4 => {
                Self::Exit { cause: r.u64()?, exit: ProcessExit { key: r.string()?, pid: r.u32()?, status: r.u32()?, at_nanos: r.i64()? } }
            }
            5 => Self::CaughtUp,
            6 => Self::Done { cause: r.u64()?, step: r.u32()?, outcome: Outcome::read(&mut r)? },
            7 => Self::Try { key: r.string()?, value: r.bytes()? },
            8 => Self::Tried,
            9 => Self::Ping { number: r.u32()? },
            10 => Self::MayRest,
            _ => return Err(Malformed { what: "a message for a worker" }),
        })
    }
}

impl ToKeeper {
    /// Encodes the message with its frame.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w;
        match self {
            Self::Hello { versions, build } => {
                w = Writer::message(1);
                w.u16(versions.newest).str(build).u16(versions.oldest);
            }
            Self::Operation { cause, step, op } => {
                w = Writer::message(2);
                w.u64(*cause).u32(*step);
                op.write(&mut w);
            }
            Self::Commit(commit) => {
                w = Writer::message(3);
                commit.write(&mut w);
            }
            Self::Fit { refusal } => {
                w = Writer::message(4);
                w.option(refusal.as_ref(), |w, why| {
                    w.str(why);
                });
            }
            Self::Pong { number } => {
                w = Writer::message(5);
                w.u32(*number);
            }
            Self::Watch => w = Writer::message(6),
            Self::Rest { may } => {
                w = Writer::message(7);
                w.bool(*may);
            }
        }
        w.finish()
    }

    /// Decodes a message without the length of its frame.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        Ok(match r.u8()? {
            1 => {
                let (newest, build) = (r.u16()?, r.string()?);
                Self::Hello { versions: Versions { oldest: r.u16()?, newest }, build }
            }
            2 => Self::Operation { cause: r.u64()?, step: r.u32()?, op: Op::read(&mut r)? },
            3 => Self::Commit(Commit::read(&mut r)?),
            4 => Self::Fit { refusal: r.option(Reader::string)? },
            5 => Self::Pong { number: r.u32()? },
            6 => Self::Watch,
            7 => Self::Rest { may: r.bool()? },
            _ => return Err(Malformed { what: "a message for a keeper" }),
        })
    }
}

impl Op {
    fn write(&self, w: &mut Writer) {
        match self {
            Self::Spawn(spawn) => spawn.write(w.u8(1)),
            Self::Signal { key, signal } => {
                w.u8(2).str(key).i32(*signal);
            }
            Self::Once => {
                w.u8(3);
            }
            Self::OpenStdio(stdio) => stdio.write(w.u8(4)),
            Self::CloseStdin { key } => {
                w.u8(5).str(key);
            }
            Self::Resize { key, rows, columns } => {
                w.u8(6).str(key).u16(*rows).u16(*columns);
            }
            Self::WriteJournal { path, body } => {
                w.u8(7).str(path).bytes(body);
            }
            Self::ReadEnd { key, stream } => stream.write(w.u8(8).str(key)),
            Self::EndHelpers { key } => {
                w.u8(9).str(key);
            }
            Self::Drain { key } => {
                w.u8(10).str(key);
            }
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match r.u8()? {
            1 => Self::Spawn(Spawn::read(r)?),
            2 => Self::Signal { key: r.string()?, signal: r.i32()? },
            3 => Self::Once,
            4 => Self::OpenStdio(Stdio::read(r)?),
            5 => Self::CloseStdin { key: r.string()? },
            6 => Self::Resize { key: r.string()?, rows: r.u16()?, columns: r.u16()? },
            7 => Self::WriteJournal { path: r.string()?, body: r.bytes()? },
            8 => Self::ReadEnd { key: r.string()?, stream: Stream::read(r)? },
            9 => Self::EndHelpers { key: r.string()? },
            10 => Self::Drain { key: r.string()? },
            _ => return Err(Malformed { what: "an operation" }),
        })
    }
}

impl Spawn {
    fn write(&self, w: &mut Writer) {
        w.str(&self.key)
            .list(&self.argv, |w, a| {
                w.bytes(a);
            })
            .list(&self.env, |w, e| {
                w.bytes(e);
            })
            .str(&self.cwd)
            .list(&self.fds, |w, fd| fd.write(w))
            .bool(self.reports_pid)
            .option(self.console_socket.as_ref(), |w, p| {
                w.str(p);
            });
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            key: r.string()?,
            argv: r.list(Reader::bytes)?,
            env: r.list(Reader::bytes)?,
            cwd: r.string()?,
            fds: r.list(Fd::read)?,
            reports_pid: r.bool()?,
            console_socket: r.option(Reader::string)?,
        })
    }
}

impl Fd {
    fn write(&self, w: &mut Writer) {
        match self {
            Self::Null => {
                w.u8(1);
            }
            Self::Process(key, stream) => stream.write(w.u8(2).str(key)),
            Self::ReadEnd(key, stream) => stream.write(w.u8(3).str(key)),
            Self::Output => {
                w.u8(4);
            }
            Self::Ready => {
                w.u8(5);
            }
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match r.u8()? {
            1 => Self::Null,
            2 => Self::Process(r.string()?, Stream::read(r)?),
            3 => Self::ReadEnd(r.string()?, Stream::read(r)?),
            4 => Self::Output,
            5 => Self::Ready,
            _ => return Err(Malformed { what: "a descriptor's source" }),
        })
    }
}

impl Stream {
    fn write(self, w: &mut Writer) {
        w.u8(match self {
            Self::Stdin => 0,
            Self::Stdout => 1,
            Self::Stderr => 2,
        });
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match r.u8()? {
            0 => Self::Stdin,
            1 => Self::Stdout,
            2 => Self::Stderr,
            _ => return Err(Malformed { what: "a stream" }),
        })
    }
}

impl Stdio {
    fn write(&self, w: &mut Writer) {
        w.str(&self.key).option(self.stdin.as_ref(), |w, p| {
            w.str(p);
        });
        self.stdout.write(w);
        self.stderr.write(w);
        w.bool(self.terminal).u32(self.uid).u32(self.gid).u64(self.spill_bytes).str(&self.spill_folder);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            key: r.string()?,
            stdin: r.option(Reader::string)?,
            stdout: Output::read(r)?,
            stderr: Output::read(r)?,
            terminal: r.bool()?,
            uid: r.u32()?,
            gid: r.u32()?,
            spill_bytes: r.u64()?,
            spill_folder: r.string()?,
        })
    }
}

impl Output {
    fn write(&self, w: &mut Writer) {
        match self {
            Self::None => {
                w.u8(1);
            }
            Self::Fifo(path) => {
                w.u8(2).str(path);
            }
            Self::Pipe => {
                w.u8(3);
            }
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match r.u8()? {
            1 => Self::None,
            2 => Self::Fifo(r.string()?),
            3 => Self::Pipe,
            _ => return Err(Malformed { what: "an output" }),
        })
    }
}

impl Outcome {
    pub(crate) fn write(&self, w: &mut Writer) {
        match self {
            Self::Done => {
                w.u8(1);
            }
            Self::Failed { errno, what } => {
                w.u8(2).i32(*errno).str(what);
            }
            Self::Exited(exited) => {
                w.u8(3).u32(exited.status).bytes(&exited.log).bytes(&exited.output).bool(exited.terminal);
            }
            Self::Ready { byte } => {
                w.u8(4).bool(*byte);
            }
            Self::Descriptor => {
                w.u8(5);
            }
        }
    }

    pub(crate) fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match r.u8()? {
            1 => Self::Done,
            2 => Self::Failed { errno: r.i32()?, what: r.string()? },
            3 => Self::Exited(Exited { status: r.u32()?, log: r.bytes()?, output: r.bytes()?, terminal: r.bool()? }),
            4 => Self::Ready { byte: r.bool()? },
            5 => Self::Descriptor,
            _ => return Err(Malformed { what: "an outcome" }),
        })
    }
}

impl Commit {
    fn write(&self, w: &mut Writer) {
        w.list(&self.state, |w, (key, value)| {
            w.str(key).option(value.as_ref(), |w, v| {
                w.bytes(v);
            });
        })
        .list(&self.claims, |w, c| {
            w.str(&c.key).u32(c.pid).option(c.journal.as_ref(), |w, j| {
                w.str(j);
            });
        })
        .list(&self.events, |w, e| {
            w.bytes(e);
        })
        .list(&self.answers, |w, (cause, answer)| {
            w.u64(*cause).bytes(answer);
        })
        .list(&self.parks, |w, (cause, key)| {
            w.u64(*cause).str(key);
        })
        .list(&self.wakes, |w, (key, answer)| {
            w.str(key).bytes(answer);
        })
        .list(&self.ends, |w, cause| {
            w.u64(*cause);
        })
        .list(&self.releases, |w, key| {
            w.str(key);
        })
        .list(&self.ready, |w, x| {
            w.str(&x.key).str(&x.service).str(&x.method).bytes(&x.payload).bytes(&x.answer);
        })
        .bool(self.leave);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            state: r.list(|r| Ok((r.string()?, r.option(Reader::bytes)?)))?,
            claims: r.list(|r| Ok(Claim { key: r.string()?, pid: r.u32()?, journal: r.option(Reader::string)? }))?,
            events: r.list(Reader::bytes)?,
            answers: r.list(|r| Ok((r.u64()?, r.bytes()?)))?,
            parks: r.list(|r| Ok((r.u64()?, r.string()?)))?,
            wakes: r.list(|r| Ok((r.string()?, r.bytes()?)))?,
            ends: r.list(Reader::u64)?,
            releases: r.list(Reader::string)?,
            ready: r.list(|r| {
                Ok(Ready { key: r.string()?, service: r.string()?, method: r.string()?, payload: r.bytes()?, answer: r.bytes()? })
            })?,
            leave: r.bool()?,
        })
    }
}
