//! Connections: names, proxies, TLS. It knows no registry.

mod connect;
mod dns;
mod proxy;
mod tls;

#[cfg(test)]
pub(super) use connect::Stream;
pub(super) use connect::{ConnectError, Connector};
pub(crate) use dns::Resolver;
#[cfg(any(test, fuzzing))]
pub(super) use dns::fuzz;
pub(crate) use proxy::Proxies;
