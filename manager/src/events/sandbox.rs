//! containerd's events about sandboxes: messages that no crate on the registry has for prost.

use prost::Name;
use prost_types::Timestamp;

/// A sandbox's shim has created it.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SandboxCreate {
    #[prost(string, tag = "1")]
    pub(crate) sandbox_id: String,
}

/// A sandbox's shim has started it.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SandboxStart {
    #[prost(string, tag = "1")]
    pub(crate) sandbox_id: String,
}

/// A sandbox has ended.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SandboxExit {
    #[prost(string, tag = "1")]
    pub(crate) sandbox_id: String,
    #[prost(uint32, tag = "2")]
    pub(crate) exit_status: u32,
    #[prost(message, optional, tag = "3")]
    pub(crate) exited_at: Option<Timestamp>,
}

macro_rules! named {
    ($($event:ident),*) => {
        $(impl Name for $event {
            const PACKAGE: &'static str = "containerd.events";
            const NAME: &'static str = stringify!($event);
        })*
    };
}

named!(SandboxCreate, SandboxStart, SandboxExit);
