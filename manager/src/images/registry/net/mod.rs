//! Connections: names, proxies, TLS. It knows no registry.

mod connect;
mod dns;
mod proxy;
mod tls;

pub(super) use connect::{ConnectError, Connected, Connector, Stream};
pub(crate) use dns::Resolver;
pub(crate) use proxy::Proxies;
