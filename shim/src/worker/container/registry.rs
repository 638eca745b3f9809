//! The containers of the shim.
//!
//! **Invariant:** an id belongs to one container at a time, from the moment when its creation begins.
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;

use super::Container;
use crate::worker::error::Error;
use crate::worker::id::ContainerId;

/// The containers of this shim.
#[derive(Debug, Default)]
pub(in crate::worker) struct Registry {
    slots: RefCell<BTreeMap<ContainerId, Option<Rc<Container>>>>,
    /// Ids of containers whose records this version cannot read.
    set_aside: RefCell<BTreeSet<String>>,
    /// Notified when a Create has ended.
    created: Notify,
}

/// An id whose container is being created. Dropped without a container, the id is free again.
#[derive(Debug)]
pub(in crate::worker) struct Reservation<'a> {
    registry: &'a Registry,
    id: ContainerId,
}

impl Registry {
    /// Takes an id for a container that is being created.
    pub(in crate::worker) fn reserve(&self, id: &ContainerId) -> Result<Reservation<'_>, Error> {
        let mut slots = self.slots.borrow_mut();
        if slots.contains_key(id) || self.is_set_aside(id.as_str()) {
            return Err(Error::Exists { id: id.clone() });
        }
        slots.insert(id.clone(), None);
        Ok(Reservation { registry: self, id: id.clone() })
    }

    pub(in crate::worker) fn insert(&self, container: &Rc<Container>) {
        self.slots.borrow_mut().insert(container.id.clone(), Some(Rc::clone(container)));
        self.created.notify_waiters();
    }

    pub(in crate::worker) fn remove(&self, id: &ContainerId) {
        self.slots.borrow_mut().remove(id);
    }

    /// Finds a container that exists.
    pub(in crate::worker) fn get(&self, id: &str) -> Result<Rc<Container>, Error> {
        let unknown = || {
            let id = id.to_owned();
            if self.is_set_aside(&id) { Error::SetAside { id } } else { Error::NoContainer { id } }
        };
        self.slots.borrow().get(id).and_then(Clone::clone).ok_or_else(unknown)
    }

    /// Takes the id of a container whose record cannot be read.
    pub(in crate::worker) fn set_aside(&self, id: &str) {
        self.slots.borrow_mut().remove(id);
        self.set_aside.borrow_mut().insert(id.to_owned());
    }

    pub(in crate::worker) fn is_set_aside(&self, id: &str) -> bool {
        self.set_aside.borrow().contains(id)
    }

    /// Whether a container of this id is being created.
    pub(in crate::worker) fn is_being_created(&self, id: &str) -> bool {
        matches!(self.slots.borrow().get(id), Some(None))
    }

    /// Waits at most `within` for the Create of this id to end.
    pub(in crate::worker) async fn until_created(&self, id: &str, within: Duration) {
        let wait = async {
            loop {
                let created = self.created.notified();
                if !self.is_being_created(id) {
                    return;
                }
                created.await;
            }
        };
        if tokio::time::timeout(within, wait).await.is_err() {
            log::warn!(container:% = id; "the Create under way takes long");
        }
    }

    /// The number of containers, with those being created and those whose records cannot be read.
    pub(in crate::worker) fn count(&self) -> usize {
        self.slots.borrow().len() + self.set_aside.borrow().len()
    }

    pub(in crate::worker) fn is_empty(&self) -> bool {
        self.count() == 0
    }

    /// The ids of the containers, with those being created.
    pub(in crate::worker) fn ids(&self) -> Vec<ContainerId> {
        self.slots.borrow().keys().cloned().collect()
    }

    pub(in crate::worker) fn all(&self) -> Vec<Rc<Container>> {
        self.slots.borrow().values().flatten().cloned().collect()
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut slots = self.registry.slots.borrow_mut();
        if matches!(slots.get(&self.id), Some(None)) {
            slots.remove(&self.id);
        }
        drop(slots);
        self.registry.created.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::error::Code;

    #[test]
    fn an_id_that_was_set_aside_is_taken_and_never_not_found() {
        let registry = Registry::default();
        let id = ContainerId::new("c1").expect("a valid id");
        assert_eq!(registry.get("c1").err().map(|error| error.code()), Some(Code::NotFound));
        registry.set_aside("c1");
        assert_eq!(registry.get("c1").err().map(|error| error.code()), Some(Code::Unavailable));
        assert_eq!(registry.reserve(&id).err().map(|error| error.code()), Some(Code::AlreadyExists));
        assert!(!registry.is_empty());
    }
}
