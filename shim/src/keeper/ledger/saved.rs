//! What is committed and open, on its way to another image.
use super::{Asker, Ledger, Open, READY_AFTER, What};
use crate::handover::{Malformed, Outcome, ProcessExit, Ready};
use crate::keeper::image::{Error, Loader, Saver};
use crate::keeper::relay::Caller;

impl Ledger {
    pub(crate) fn save(&self, s: &mut Saver) {
        s.u64(self.last_cause).bool(self.leave);
        s.each(self.causes.iter(), |s, (cause, open)| {
            s.u64(*cause);
            match &open.what {
                What::Request { asker, payload, arrived } => {
                    s.u8(1);
                    save_asker(s, *asker);
                    s.bytes(payload);
                    s.instant(*arrived);
                }
                What::Exit(exit) => {
                    s.u8(2).str(&exit.key).u32(exit.pid).u32(exit.status).i64(exit.at_nanos);
                }
            }
            s.each(open.operations.iter(), |s, (step, outcome)| {
                s.u32(*step).option(outcome.as_ref(), |w, outcome| outcome.write(w));
            });
            s.bool(self.naming.contains(cause)).bool(self.ready_due.contains_key(cause));
        });
        s.each(self.state.iter(), |s, (key, value)| {
            s.str(key).bytes(value);
        });
        s.each(self.parked.iter(), |s, (key, askers)| {
            s.str(key);
            s.u32(askers.len() as u32);
            for asker in askers {
                save_asker(s, *asker);
            }
        });
        s.each(self.ready.values(), |s, ready| {
            s.str(&ready.key).str(&ready.service).str(&ready.method).bytes(&ready.payload).bytes(&ready.answer);
        });
        s.each(self.reservations.iter(), |s, (id, until)| {
            s.str(id);
            s.instant(*until);
        });
    }

    pub(crate) fn load(l: &mut Loader<'_, '_>) -> Result<Self, Error> {
        let mut ledger = Self { last_cause: l.u64()?, leave: l.bool()?, ..Self::default() };
        l.each(|l| {
            let cause = l.u64()?;
            let what = match l.u8()? {
                1 => What::Request { asker: load_asker(l)?, payload: l.bytes()?, arrived: l.instant()? },
                2 => What::Exit(ProcessExit { key: l.string()?, pid: l.u32()?, status: l.u32()?, at_nanos: l.i64()? }),
                _ => return Err(Malformed { what: "a cause" }.into()),
            };
            let operations = l.each(|l| Ok((l.u32()?, l.option(Outcome::read)?)))?;
            if l.bool()? {
                ledger.naming.insert(cause);
            }
            match &what {
                What::Request { arrived, .. } if l.bool()? => {
                    ledger.ready_due.insert(cause, *arrived + READY_AFTER);
                }
                What::Request { .. } => {}
                What::Exit(_) => {
                    ledger.exits.insert(cause);
                }
            }
            ledger.causes.insert(cause, Open { what, operations });
            Ok(())
        })?;
        ledger.state = l.each(|l| Ok((l.string()?, l.bytes()?)))?.into_iter().collect();
        let parked = l.each(|l| {
            let key = l.string()?;
            let count = l.u32()?;
            let askers = (0..count).map(|_| load_asker(l)).collect::<Result<Vec<_>, _>>()?;
            Ok((key, askers))
        })?;
        ledger.parked = parked.into_iter().collect();
        let ready =
            l.each(|l| Ok(Ready { key: l.string()?, service: l.string()?, method: l.string()?, payload: l.bytes()?, answer: l.bytes()? }))?;
        for ready in ready {
            ledger.add_ready(ready);
        }
        ledger.reservations = l.each(|l| Ok((l.string()?, l.instant()?)))?.into_iter().collect();
        ledger.begin_life();
        Ok(ledger)
    }
}

fn save_asker(s: &mut Saver, asker: Asker) {
    match asker {
        Asker::Client(Caller { client, stream }) => s.u8(1).u32(client).u32(stream),
        Asker::Commander(id) => s.u8(2).u32(id),
    };
}

fn load_asker(l: &mut Loader<'_, '_>) -> Result<Asker, Error> {
    match l.u8()? {
        1 => Ok(Asker::Client(Caller { client: l.u32()?, stream: l.u32()? })),
        2 => Ok(Asker::Commander(l.u32()?)),
        _ => Err(Malformed { what: "an asker" }.into()),
    }
}
