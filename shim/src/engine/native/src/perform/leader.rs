//! Makes init in its namespaces.
//!
//! A pid namespace belongs to the user namespace that it was made in, and so do all others; and offsets of a time namespace are taken before its first
//! process only. So init is not the first process of a container in a user namespace:
//!
//! ```text
//!  performer ──clone3(user)──▶ leader ──── Entered ────▶ performer: writes the mappings, or compares those of a joined namespace
//!                              becomes root ── Timed ──▶ performer: writes the offsets
//!                              clone3(pid, mount, …)──▶ init
//!                              ──────────── Led ───────▶ performer: has init's handle
//!                              exits
//! ```
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};

use super::cgroup::Joining;
use super::child::{Child, making, plain, waiting};
use super::namespaces::{self, Named};
use super::sync::{ChildEnd, Message};
use super::{Doing, Failure, Step, ids, init};
use crate::plan::{Create, Kind};
use crate::sys::{self, Born};

/// Makes init in its namespaces. The performer is in its own before and after.
pub(super) fn make_init(
    plan: &Create,
    joining: &Joining,
    live: impl FnOnce(&ChildEnd) -> Result<Infallible, Failure>,
) -> Result<Child, Failure> {
    let named = Named::open(plan)?;
    let own = named.join()?;
    // The cgroup namespace is made once the cgroup is joined, time and user namespaces before.
    let is_late = |kind| matches!(kind, Kind::Cgroup | Kind::Time | Kind::User);
    let new = plan.namespaces.iter().filter(|namespace| namespace.path.is_none() && !is_late(namespace.kind));
    let flags = new.fold(0, |flags, namespace| flags | namespace.kind.flag());
    let live = |performer: &ChildEnd| {
        if let Some(mount) = named.mount() {
            setns(mount, CloneFlags::CLONE_NEWNS).doing(Step::Namespaces, || "join the mount namespace".to_owned())?;
        }
        live(performer)
    };
    let (child, own) = if plan.has(Kind::User) {
        (Leading { plan, flags, user: named.user() }.make(joining, live)?, own)
    } else {
        let own = if plan.makes(Kind::Time) { own.with_new_clocks(&plan.clocks)? } else { own };
        (Child::make(flags, joining, live)?, own)
    };
    own.restore().inspect_err(|_| child.kill())?;
    Ok(child)
}

/// How init is made in a user namespace: by a leader, which enters it first, so that every other new namespace belongs to it.
struct Leading<'a> {
    plan: &'a Create,
    /// Init's new namespaces.
    flags: u64,
    /// The user namespace to join; a new one without.
    user: Option<&'a OwnedFd>,
}

impl Leading<'_> {
    /// Makes the leader, a child of the performer's parent too, and through it init.
    fn make(&self, joining: &Joining, live: impl FnOnce(&ChildEnd) -> Result<Infallible, Failure>) -> Result<Child, Failure> {
        let flags = if self.user.is_none() { Kind::User.flag() } else { 0 };
        let leader = Child::make(flags, joining, |performer| {
            self.lead(performer)?;
            live(performer)
        })?;
        let (pid, handle) = self.attend(&leader, joining).inspect_err(|_| leader.kill())?;
        Ok(Child { pid, handle, messages: leader.messages })
    }

    /// The leader, up to init's birth. Returns in init.
    fn lead(&self, performer: &ChildEnd) -> Result<(), Failure> {
        if let Some(user) = self.user {
            setns(user, CloneFlags::CLONE_NEWUSER).doing(Step::Namespaces, || "join the user namespace".to_owned())?;
        }
        init::report_and_wait(performer, &Message::Entered)?;
        namespaces::become_root()?;
        if self.plan.makes(Kind::Time) {
            unshare(namespaces::TIME).doing(Step::Namespaces, || "make a time namespace".to_owned())?;
            init::report_and_wait(performer, &Message::Timed)?;
        }
        match sys::clone_into(self.flags, None).doing(Step::Namespaces, making)? {
            Born::Child => init::wait_for(performer).map(drop),
            Born::Parent { pidfd, .. } => {
                performer.send_with(&Message::Led, &pidfd).doing(Step::Child, || "report to the performer".to_owned())?;
                sys::exit_now(0)
            }
        }
    }

    /// The performer's part of it. Returns init.
    fn attend(&self, leader: &Child, joining: &Joining) -> Result<(u32, OwnedFd), Failure> {
        loop {
            let received = leader.messages.receive_from(leader.handle.as_fd()).doing(Step::Child, waiting)?;
            match received {
                Some((Message::Entered, _)) => self.map(leader.pid)?,
                Some((Message::Timed, _)) => namespaces::set_clocks(&leader.pid.to_string(), &self.plan.clocks)?,
                Some((Message::Led, Some(init))) => {
                    let pid = sys::pid_of(init.as_fd()).doing(Step::Child, || "find the process of the container".to_owned())?;
                    let _ = leader.messages.go();
                    return Ok((pid, init));
                }
                Some((Message::Failed(failure), _)) => return Err(failure),
                Some(_) | None => return Err(leader.vanished(joining)),
            }
            let _ = leader.messages.go();
        }
    }

    /// Writes the mappings of a new namespace; one that was joined must have those of the plan, if there are any.
    fn map(&self, leader: u32) -> Result<(), Failure> {
        let planned = &self.plan.mappings;
        if self.user.is_none() {
            return ids::write(leader, planned).doing(Step::Namespaces, || "write the mappings of the user namespace".to_owned());
        }
        let found = ids::read(leader).doing(Step::Namespaces, || "read the mappings of the user namespace".to_owned())?;
        if planned.is_empty() || *planned == found {
            return Ok(());
        }
        Err(plain(Step::Namespaces, "linux.uidMappings and linux.gidMappings are not those of the user namespace to join"))
    }
}
