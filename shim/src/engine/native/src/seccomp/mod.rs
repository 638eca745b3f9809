//! Compiles seccomp profiles.
use oci_spec::runtime::LinuxSeccomp;

use crate::Refused;
use crate::plan::Filter;

pub(crate) fn compile(_profile: &LinuxSeccomp) -> Result<Option<Filter>, Refused> {
    Err(Refused::unsupported("linux.seccomp"))
}
