//! Black-box tests of a containerd shim, any shim: they start real daemons, speak containerd's gRPC API to them,
//! and look at the kernel. Nothing here links the shim or the supervisor.
//!
//! | module | owns |
//! | --- | --- |
//! | [`runner`] | the matrix of containerd version × runtime, skips, deadlines |
//! | [`isolation`] | the pid and mount namespaces of a whole run, and the role of init there |
//! | [`kernel_trace`] | program executions and system calls, from tracefs |
//! | [`cgroups`] | which cgroups a run sees, and its own folders in them |
//! | [`suite`] | where the daemons and runtimes of each Debian suite are |
//! | [`network`] | a network namespace of a test's own |
//! | [`daemon`] | one containerd in a folder of its own, killed and restarted at will |
//! | [`client`] | containerd's gRPC API, every call with a deadline |
//! | [`container`] | a container under test: spec, stdio, task, execs |
//! | [`context`] | the daemon, namespace and folder of one test |
//! | [`cri`] | the kubelet's side of a daemon with its CRI plugin |
//! | [`controller`] | a sandbox that a shim holds, through containerd's controller |
//! | [`image`] | images whose layers a test knows file by file |
//! | [`import`] | a client that imports and unpacks images step by step |
//! | [`stored`] | a daemon's rows beside its files |
//! | [`power`] | disks as power cuts leave them |
//! | [`dice`] | numbers by a seed |
//! | [`operator`] | an operator's actions with x-manager: upgrades, files, a service manager |
//! | [`docker`] | a dockerd on top of a daemon |
//! | [`registry`] | a registry on loopback, whose blobs can be held |
//! | [`transfers`] | images made blob by blob, and the calls that move them |
//! | [`events`] | the daemon's events, collected |
//! | [`stdio`] | fifos owned by the test |
//! | [`gate`] | an OCI runtime that blocks, fails or floods stderr on demand |
//! | [`direct`] | the runner of cases that drive a shim without a daemon |
//! | [`stand`] | the test bed of such a case: a shim between a client and a fake containerd |
//! | [`builds`] | other builds of our shim, and upgrades to them |
//! | [`bundle`] | bundles, `start` and `delete`, and containers created from them |
//! | [`sandbox`] | sandboxes, and containers in them |
//! | [`pod_config`] | the kubelet's description of a pod |
//! | [`workloads`] | workloads that several suites share |
//! | [`refusals`] | requests that a shim refuses, and its answers |
//! | [`witness`] | a container that must keep running while its shim is under test |
//! | [`ttrpc`] | frames, valid and invalid, and calls |
//! | [`task`] | containerd's task service |
//! | [`fake_containerd`] | the receiver of events: it accepts, refuses, does not answer or disconnects |
//! | [`image_tools`] | a registry, skopeo and umoci |
//! | [`audit`] | leftovers |
//! | [`conformance`] | the clauses of the protocol and the cases that prove them |
//! | [`times`] | how often repeated tests repeat |
//! | [`trace`] | the calls, answers and events of a case, line by line |
//!
//! **Invariant:** every wait has a name and a deadline. A test that hangs is a bug of the test.

pub mod audit;
pub mod beside;
pub mod builds;
pub mod bundle;
pub mod cgroups;
pub mod client;
pub mod conformance;
pub mod container;
pub mod context;
pub mod controller;
pub mod cri;
pub mod daemon;
pub mod dice;
pub mod direct;
pub mod docker;
pub mod events;
pub mod eventually;
pub mod fake_containerd;
pub mod gate;
pub mod image;
pub mod image_tools;
pub mod import;
pub mod isolation;
pub mod kernel_trace;
pub mod messages;
pub mod network;
pub mod operator;
pub mod pod_config;
pub mod power;
pub mod proc;
pub mod programs;
pub mod refusals;
pub mod registry;
pub mod rootfs;
pub mod runner;
pub mod sandbox;
pub mod spec;
pub mod stand;
pub mod stdio;
pub mod stored;
pub mod suite;
pub mod task;
pub mod times;
pub mod trace;
pub mod transfers;
pub mod ttrpc;
pub mod upload;
pub mod witness;
pub mod workloads;
