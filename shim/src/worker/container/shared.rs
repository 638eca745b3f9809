//! What the handlers of all requests and exits share.
use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;

use x_engine::Host;

use super::registry::Registry;
use crate::journal_body::ProcessIdentity;
use crate::settings::Settings;
use crate::worker::error::Error;
use crate::worker::link::Link;
use crate::worker::pod::Pod;
use crate::worker::starts::Starts;

/// See the module.
#[derive(Debug)]
pub(in crate::worker) struct Shared {
    pub(in crate::worker) settings: Settings,
    pub(in crate::worker) link: Rc<Link>,
    pub(in crate::worker) registry: Registry,
    pub(in crate::worker) starts: Starts,
    /// The pod that the shim is, if it is one.
    pub(in crate::worker) pod: RefCell<Option<Rc<Pod>>>,
    /// What Create of a pod plans with, read while the client connects. None once it has been used.
    pub(in crate::worker) cgroups: RefCell<Option<Host>>,
    /// Unknown until the keeper's Welcome.
    pub(in crate::worker) keeper: Cell<ProcessIdentity>,
    /// The version of the messages, agreed on with it.
    pub(in crate::worker) version: Cell<u16>,
    /// What plans of execs depend on: it never changes, and most containers have no execs.
    host: OnceCell<Host>,
}

impl Shared {
    pub(in crate::worker) fn new(settings: Settings, link: Rc<Link>) -> Self {
        Self {
            settings,
            link,
            registry: Registry::default(),
            starts: Starts::new(),
            pod: RefCell::default(),
            cgroups: RefCell::default(),
            keeper: Cell::default(),
            version: Cell::default(),
            host: OnceCell::new(),
        }
    }

    /// The host, without its cgroups.
    pub(in crate::worker) fn blocking_host(&self) -> Result<&Host, Error> {
        if let Some(host) = self.host.get() {
            return Ok(host);
        }
        let host = Host::read_without_cgroups().map_err(|source| Error::Io { op: "read", path: "/proc".into(), source })?;
        Ok(self.host.get_or_init(|| host))
    }
}
