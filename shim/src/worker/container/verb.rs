//! Running a verb of a container's engine.
use super::Record;
use crate::engine::{CommandEngine, Engine, Verb};
use crate::handover::{Exited, Spawn, Step};
use crate::worker::cause::Cause;
use crate::worker::error::Error;

/// Runs a verb to its end.
///
/// Errors: what the engine complains of; that its program is gone, if that is why it could not be started.
pub(super) async fn run_verb(cause: &Cause, at: Step, engine: &CommandEngine, verb: Verb, spawn: Spawn) -> Result<Exited, Error> {
    let exited = match cause.run(at, spawn).await {
        Ok(exited) => exited,
        Err(error @ Error::Keeper { .. }) => return Err(engine.blocking_explain(verb).map_or(error, Error::from)),
        Err(error) => return Err(error),
    };
    engine.interpret(verb, &exited)?;
    Ok(exited)
}

/// Whether the engine keeps a container of this id.
pub(super) fn blocking_is_kept(record: &Record) -> bool {
    record.engine.state_of(record.id.as_str()).symlink_metadata().is_ok()
}
