//! A connection to systemd's manager, and the calls on it.
use std::future::poll_fn;
use std::pin::pin;

use tokio::time::timeout;
use x_engine::plan::{Property, Unit};
use zbus::export::futures_core::Stream;
use zbus::message::Type;
use zbus::zvariant::{DynamicType, OwnedObjectPath, OwnedValue, Value};
use zbus::{Connection, MatchRule, Message, MessageStream, connection};

use super::value::convert;
use super::{ANSWER_WITHIN, CONNECT_WITHIN, Error, JOB_WITHIN};

/// A connection.
#[derive(Debug)]
pub(crate) struct Manager {
    connection: Connection,
    is_bus: bool,
    /// Of systemd.
    version: u16,
}

/// Where a manager is reached: an address of D-Bus, and whether a bus is between: tests play the manager without one.
type Address = (String, bool);

impl Manager {
    /// Connects to the system bus.
    pub(crate) async fn connect() -> Result<Self, Error> {
        let named = std::env::var(ADDRESS).ok().filter(|address| !address.is_empty());
        Self::connect_to(&[(named.unwrap_or_else(|| SYSTEM_BUS.to_owned()), true)]).await
    }

    pub(super) async fn connect_to(addresses: &[Address]) -> Result<Self, Error> {
        let mut tried = Vec::new();
        for (address, is_bus) in addresses {
            let why = match timeout(CONNECT_WITHIN, Self::connect_to_one(address, *is_bus)).await {
                Ok(Ok(manager)) => return Ok(manager),
                Ok(Err(error)) => crate::chain::chain(&error),
                Err(_) => format!("no answer within {} s", CONNECT_WITHIN.as_secs()),
            };
            tried.push(format!("{address} ({why})"));
        }
        Err(Error::Unreachable { tried: tried.join(", ") })
    }

    async fn connect_to_one(address: &str, is_bus: bool) -> zbus::Result<Self> {
        let builder = connection::Builder::address(address)?.method_timeout(ANSWER_WITHIN);
        let connection = if is_bus { builder.build().await? } else { builder.p2p().build().await? };
        let mut manager = Self { connection, is_bus, version: 0 };
        let version = manager.property(MANAGER_PATH, MANAGER, "Version").await?;
        manager.version = number_of(&String::try_from(version)?);
        Ok(manager)
    }

    /// Starts a transient unit with processes in it, and waits until it is started.
    ///
    /// Errors: [`Error::Exists`] if one of the name is active; one that has failed before is replaced.
    pub(crate) async fn start(&self, unit: &Unit, pids: &[u32]) -> Result<(), Error> {
        let name = unit.name.as_str();
        let call = |source| failed(START, name, source);
        let mut properties = self.converted(&unit.properties).map_err(call)?;
        if !pids.is_empty() {
            properties.push(("PIDs", pids.to_vec().into()));
        }
        let none: Vec<(&str, Vec<(&str, Value<'_>)>)> = Vec::new();
        let body = (name, MODE, properties, none);
        let mut started = self.job("start", name, START, &body).await;
        if started.as_ref().is_err_and(|error| is_named(error, UNIT_EXISTS)) {
            self.reset(name).await?;
            started = self.job("start", name, START, &body).await;
        }
        match started {
            Err(error) if is_named(&error, UNIT_EXISTS) => return Err(Error::Exists { unit: name.to_owned() }),
            Err(error) => {
                // What has failed is not to stay.
                if let Err(error) = self.reset(name).await {
                    log::debug!(unit = name, error:%; "cannot reset a unit that was not started");
                }
                return Err(error);
            }
            Ok(()) => {}
        }
        let found = self.control_group(name).await?;
        if found == unit.control_group {
            return Ok(());
        }
        Err(Error::Elsewhere { unit: name.to_owned(), expected: unit.control_group.clone(), found })
    }

    /// Whether the unit of the name that exists has the same description.
    pub(crate) async fn has_description(&self, unit: &Unit) -> bool {
        let Ok(path) = self.path_of(&unit.name).await else { return false };
        let found = self.property(path.as_str(), UNIT, "Description").await.ok().and_then(|value| String::try_from(value).ok());
        found.is_some() && found.as_deref() == unit.description()
    }

    /// Changes properties, until the next boot.
    pub(crate) async fn set(&self, name: &str, properties: &[Property]) -> Result<(), Error> {
        let call = |source| failed(SET, name, source);
        let body = (name, true, self.converted(properties).map_err(call)?);
        self.call(SET, name, &body).await?;
        self.until_written(name).await
    }

    /// systemd writes the files of a unit after its answer, and before it takes another message: waits for the answer to one.
    async fn until_written(&self, name: &str) -> Result<(), Error> {
        let asked = self.property(MANAGER_PATH, MANAGER, "Version").await;
        asked.map(drop).map_err(|source| failed(GET, name, source))
    }

    /// Reads properties as they are, to be set again; those that cannot be read are left out.
    pub(crate) async fn values(&self, name: &str, properties: &[Property]) -> Vec<(String, OwnedValue)> {
        let Ok(path) = self.path_of(name).await else { return Vec::new() };
        let mut values = Vec::new();
        for property in properties.iter().filter(|property| property.since <= self.version) {
            if let Ok(value) = self.property(path.as_str(), interface_of(name), &property.name).await {
                values.push((property.name.clone(), value));
            }
        }
        values
    }

    /// Sets what was read.
    pub(crate) async fn set_back(&self, name: &str, values: &[(String, OwnedValue)]) -> Result<(), Error> {
        let values: Vec<(&str, &Value<'_>)> = values.iter().map(|(name, value)| (name.as_str(), &**value)).collect();
        self.call(SET, name, &(name, true, values)).await?;
        self.until_written(name).await
    }

    /// Stops a unit, and has systemd forget that it has failed, if it has. One that is not there is stopped.
    pub(crate) async fn stop(&self, name: &str) -> Result<(), Error> {
        match self.job("stop", name, STOP, &(name, MODE)).await {
            Err(error) if is_named(&error, NO_SUCH_UNIT) => Ok(()),
            stopped => {
                self.reset(name).await?;
                stopped
            }
        }
    }

    /// Ends the connection.
    pub(crate) async fn close(self) {
        if let Err(error) = self.connection.close().await {
            log::debug!(error:%; "cannot close the connection to systemd");
        }
    }

    async fn reset(&self, name: &str) -> Result<(), Error> {
        match self.call(RESET, name, &name).await {
            Err(error) if !is_named(&error, NO_SUCH_UNIT) => Err(error),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    async fn control_group(&self, name: &str) -> Result<String, Error> {
        let call = |source| failed(GET, name, source);
        let path = self.path_of(name).await?;
        let value = self.property(path.as_str(), interface_of(name), "ControlGroup").await.map_err(call)?;
        String::try_from(value).map_err(|error| call(error.into()))
    }

    async fn path_of(&self, name: &str) -> Result<OwnedObjectPath, Error> {
        let answer = self.call(GET_UNIT, name, &name).await?;
        answer.body().deserialize().map_err(|source| failed(GET_UNIT, name, source))
    }

    /// Calls a method that answers with a job, and waits for the job's end.
    async fn job(
        &self,
        what: &'static str,
        unit: &str,
        method: &'static str,
        body: &(impl serde::Serialize + DynamicType),
    ) -> Result<(), Error> {
        let failed = |source| failed(method, unit, source);
        // Before the call: the job may have ended when its answer is read. Of this unit alone, so that no other's fill the queue.
        let rule = || {
            let rule =
                MatchRule::builder().msg_type(Type::Signal).interface(MANAGER)?.member("JobRemoved")?.path(MANAGER_PATH)?.arg(2, unit)?;
            Ok(rule.build().to_owned())
        };
        let removed = MessageStream::for_match_rule(rule().map_err(failed)?, &self.connection, None).await.map_err(failed)?;
        // Without a subscriber systemd sends no signals to the bus.
        match self.call("Subscribe", unit, &()).await {
            Err(error) if !is_named(&error, ALREADY_SUBSCRIBED) => return Err(error),
            Ok(_) | Err(_) => {}
        }
        let job: OwnedObjectPath = self.call(method, unit, body).await?.body().deserialize().map_err(failed)?;
        let end = async {
            let mut removed = pin!(removed);
            while let Some(message) = poll_fn(|context| removed.as_mut().poll_next(context)).await {
                let (_, of, _, result): (u32, OwnedObjectPath, String, String) =
                    message.and_then(|message| message.body().deserialize()).map_err(failed)?;
                if of == job {
                    return if result == "done" { Ok(()) } else { Err(Error::Job { what, unit: unit.to_owned(), result }) };
                }
            }
            Err(Error::Closed { what, unit: unit.to_owned() })
        };
        timeout(JOB_WITHIN, end).await.unwrap_or_else(|_| Err(Error::Late { what, unit: unit.to_owned() }))
    }

    async fn call(&self, method: &'static str, unit: &str, body: &(impl serde::Serialize + DynamicType)) -> Result<Message, Error> {
        let answer = self.connection.call_method(self.destination(), MANAGER_PATH, Some(MANAGER), method, body).await;
        answer.map_err(|source| failed(method, unit, source))
    }

    async fn property(&self, path: &str, interface: &str, name: &str) -> zbus::Result<OwnedValue> {
        let answer = self.connection.call_method(self.destination(), path, Some(PROPERTIES), GET, &(interface, name)).await?;
        answer.body().deserialize()
    }

    fn destination(&self) -> Option<&'static str> {
        self.is_bus.then_some(DESTINATION)
    }

    /// Those that this version of systemd has.
    fn converted<'a>(&self, properties: &'a [Property]) -> zbus::Result<Vec<(&'a str, Value<'static>)>> {
        let known = properties.iter().filter(|property| property.since <= self.version);
        known.map(|property| Ok((property.name.as_str(), convert(&property.value)?))).collect()
    }
}

/// `252.38-1~deb12u1`, `v245`, `254~rc1`: the first number; 0 if there is none, which is the oldest.
fn number_of(version: &str) -> u16 {
    let digits = version.trim_start_matches(|letter: char| !letter.is_ascii_digit());
    digits.split(|letter: char| !letter.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

fn interface_of(unit: &str) -> &'static str {
    if unit.ends_with(".slice") { "org.freedesktop.systemd1.Slice" } else { "org.freedesktop.systemd1.Scope" }
}

fn failed(method: &'static str, unit: &str, source: zbus::Error) -> Error {
    Error::Call { method, unit: unit.to_owned(), source: Box::new(source) }
}

fn is_named(error: &Error, name: &str) -> bool {
    matches!(error, Error::Call { source, .. } if matches!(&**source, zbus::Error::MethodError(found, ..) if found.as_str() == name))
}

/// As runc and others: the variable that names another bus.
const ADDRESS: &str = "DBUS_SYSTEM_BUS_ADDRESS";
const SYSTEM_BUS: &str = "unix:path=/run/dbus/system_bus_socket";

const DESTINATION: &str = "org.freedesktop.systemd1";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

const START: &str = "StartTransientUnit";
const STOP: &str = "StopUnit";
const SET: &str = "SetUnitProperties";
const RESET: &str = "ResetFailedUnit";
const GET_UNIT: &str = "GetUnit";
const GET: &str = "Get";
/// Of jobs: they replace others of the unit.
const MODE: &str = "replace";

const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
const ALREADY_SUBSCRIBED: &str = "org.freedesktop.systemd1.AlreadySubscribed";

#[cfg(test)]
mod tests {
    use super::number_of;

    #[test]
    fn the_version_is_the_first_number() {
        for (text, number) in [("252.38-1~deb12u1", 252), ("v245", 245), ("254~rc1", 254), ("systemd 219", 219), ("", 0), ("main", 0)] {
            assert_eq!(number_of(text), number, "{text}");
        }
    }
}
