//! What is known of workers, on its way to another image. The worker itself has ended by then.
use super::Supervisor;
use crate::handover::Versions;
use crate::keeper::image::{Error, Loader, Saver};
use crate::keeper::life::Executable;
use crate::settings::Settings;

impl Supervisor {
    pub(crate) fn save(&self, s: &mut Saver) {
        s.u32(self.lives).u32(self.last_number).u32(self.fruitless);
        s.optional_instant(self.retry_at);
        s.str(self.last_end.as_deref().unwrap_or_default());
        s.record(|s| self.executable.save(s));
        s.bool(self.previous.is_some());
        if let Some((previous, until)) = &self.previous {
            s.record(|s| previous.save(s));
            s.instant(*until);
        }
    }

    pub(crate) fn load(l: &mut Loader<'_, '_>, settings: &Settings) -> Result<Self, Error> {
        let mut supervisor = Self::new(settings)?;
        (supervisor.lives, supervisor.last_number, supervisor.fruitless) = (l.u32()?, l.u32()?, l.u32()?);
        supervisor.retry_at = l.optional_instant()?;
        supervisor.last_end = Some(l.string()?).filter(|text| !text.is_empty());
        supervisor.executable = l.record(|l| Executable::load(l))?;
        if l.bool()? {
            supervisor.previous = Some((l.record(|l| Executable::load(l))?, l.instant()?));
        }
        Ok(supervisor)
    }
}

impl Executable {
    pub(crate) fn save(&self, s: &mut Saver) {
        s.fd(&self.file);
        s.str(&self.path).str(&self.build);
        s.option(self.versions.as_ref(), |w, versions| {
            w.u16(versions.oldest).u16(versions.newest);
        });
    }

    pub(crate) fn load(l: &mut Loader<'_, '_>) -> Result<Self, Error> {
        Ok(Self {
            file: l.fd()?,
            path: l.string()?,
            build: l.string()?,
            versions: l.option(|r| Ok(Versions { oldest: r.u16()?, newest: r.u16()? }))?,
        })
    }
}
