//! Black-box tests of a containerd shim, any shim: they start real daemons, speak containerd's gRPC API to them,
//! and look at the kernel. Nothing here links the shim or the supervisor.
//!
//! | module | owns |
//! | --- | --- |
//! | [`runner`] | the matrix of containerd version × runtime, skips, deadlines |
//! | [`isolation`] | the pid and mount namespaces of a whole run, and the role of init there |
//! | [`cgroups`] | which cgroups a run sees, and its own folders in them |
//! | [`suite`] | where the daemons and runtimes of each Debian suite are |
//! | [`daemon`] | one containerd in a folder of its own, killed and restarted at will |
//! | [`client`] | containerd's gRPC API, every call with a deadline |
//! | [`container`] | a container under test: spec, stdio, task, execs |
//! | [`context`] | what a test is given |
//! | [`cri`] | the kubelet's side of a daemon with its CRI plugin |
//! | [`operator`] | what an operator does with x-manager: upgrades, files, a service manager |
//! | [`docker`] | a dockerd on top of a daemon |
//! | [`events`] | the daemon's events, collected |
//! | [`stdio`] | fifos owned by the test |
//! | [`gate`] | a runtime that blocks, fails or shouts on demand |
//! | [`direct`] | the runner of cases that drive a shim without a daemon |
//! | [`stand`] | such a case's surroundings |
//! | [`builds`] | other builds of our shim, and upgrades to them |
//! | [`bundle`] | bundles, `start` and `delete`, and containers made of them |
//! | [`workloads`] | what several suites put a shim through |
//! | [`refusals`] | requests that a shim refuses, and its answers |
//! | [`witness`] | a container that has to go on whatever is done to its shim |
//! | [`ttrpc`] | frames, broken ones too, and calls |
//! | [`task`] | containerd's task service |
//! | [`fake_containerd`] | the taker of events, who may refuse, stay silent or vanish |
//! | [`audit`] | what is left behind |
//! | [`conformance`] | the clauses of the protocol and the cases that prove them |
//! | [`times`] | how often what is proved by repetition is repeated |
//! | [`trace`] | what happened in a case, line by line |
//!
//! **Invariant:** every wait has a name and a deadline. A test that hangs is a bug of the test.

pub mod audit;
pub mod builds;
pub mod bundle;
pub mod cgroups;
pub mod client;
pub mod conformance;
pub mod container;
pub mod context;
pub mod cri;
pub mod daemon;
pub mod direct;
pub mod docker;
pub mod events;
pub mod eventually;
pub mod fake_containerd;
pub mod gate;
pub mod isolation;
pub mod messages;
pub mod operator;
pub mod proc;
pub mod programs;
pub mod refusals;
pub mod rootfs;
pub mod runner;
pub mod spec;
pub mod stand;
pub mod stdio;
pub mod suite;
pub mod task;
pub mod times;
pub mod trace;
pub mod ttrpc;
pub mod witness;
pub mod workloads;
