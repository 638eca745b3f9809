//! How containerd's CRI plugin is configured: as docs/kubernetes.md says, with what a test adds to it; and the network plugin.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{HANDLER, IMAGE};
use crate::context::Context;
use crate::runner::skip;
use crate::suite::{Runtime, STOCK_TYPE, Shim, Suite};

/// The configuration in the documentation.
const GUIDE: &str = include_str!("../../../docs/kubernetes.md");
/// Where Debian's package containernetworking-plugins has its programs.
const PLUGINS: &str = "/usr/lib/cni";

/// What holds the namespaces of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sandboxer {
    /// A container with the pause image: containerd's `podsandbox`.
    #[default]
    Pause,
    /// The shim, whose Sandbox service containerd calls: `shim`.
    Shim,
}

/// What makes the network of a pod that is not on the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Plugin {
    /// Debian's bridge plugin.
    #[default]
    Bridge,
    /// A plugin that does nothing, for measurements.
    Nothing,
}

/// What a test changes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Setup<'a> {
    /// What holds the namespaces of pods.
    pub sandboxer: Sandboxer,
    /// What makes their networks.
    pub plugin: Plugin,
    /// One more line of docs/kubernetes.md among the options of the runtime.
    pub option: &'a str,
    /// One more line of docs/kubernetes.md in the plugin's own table.
    pub setting: &'a str,
    /// Another shim than the test's.
    pub shim: Option<&'a Shim>,
    /// An OCI runtime in the place of the test's.
    pub runtime: Option<&'a Path>,
    /// Leaves the options of the runtime out, so that the shim chooses its own engine. containerd 2.1 refuses containers in a user namespace for a
    /// runtime that has options and is not runc's.
    pub without_options: bool,
    /// The cgroup that shims put themselves into.
    pub shim_cgroup: Option<&'a str>,
    /// More environment of the daemon, which its shims inherit.
    pub environment: &'a [(&'a str, &'a str)],
}

impl Setup<'_> {
    /// The shim that makes its pods, by the name under which containerd starts it.
    pub(super) fn shim(&self, cx: &Context) -> Shim {
        let shim = self.shim.unwrap_or_else(|| cx.shim()).clone();
        // to containers of a pod whose namespaces a shim holds, containerd 2.1 can give options of runc's shim alone
        let is_renamed = self.sandboxer == Sandboxer::Shim && self.has_options(cx);
        if is_renamed { Shim { runtime_type: STOCK_TYPE.to_owned(), ..shim } } else { shim }
    }

    /// Whether the runtime has options. The engine that the shim chooses by itself needs none.
    fn has_options(&self, cx: &Context) -> bool {
        let is_chosen = self.runtime.is_some() || cx.runtime() != Runtime::Native || !self.option.is_empty() || self.shim_cgroup.is_some();
        is_chosen || self.sandboxer == Sandboxer::Pause && !self.without_options
    }

    /// The configuration in docs/kubernetes.md for this version of containerd, with what the test adds. `folder` is the daemon's.
    ///
    /// Errors: a skip, if there are no network plugins.
    pub(super) fn configuration(&self, cx: &Context, folder: &Path) -> Result<String> {
        let is_new = cx.suite() == Suite::Forky;
        let sandboxer = if self.sandboxer == Sandboxer::Shim { "sandboxer = \"shim\"" } else { "" };
        for line in [self.option, self.setting, sandboxer] {
            ensure!(GUIDE.lines().any(|other| other.trim() == line), "docs/kubernetes.md does not have {line:?}");
        }
        let version = if is_new { "version = 3" } else { "version = 2" };
        let mut blocks = GUIDE.split("```toml\n").skip(1).filter_map(|rest| rest.split_once("```")).map(|(block, _)| block);
        let block =
            blocks.find(|block| block.starts_with(version)).with_context(|| format!("docs/kubernetes.md has nothing for {version}"))?;
        let block = block.trim_start_matches(version).replace("io.containerd.x.v2", &self.shim(cx).runtime_type);
        let plugin = if is_new { "io.containerd.cri.v1.runtime" } else { "io.containerd.grpc.v1.cri" };
        let (own, others) = match is_new {
            true => (
                String::new(),
                // its socket would be the host's own
                format!(
                    "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\n  sandbox = \"{IMAGE}\"\n\
                     [plugins.\"io.containerd.nri.v1.nri\"]\n  disable = true\n"
                ),
            ),
            false => (format!("  sandbox_image = \"{IMAGE}\"\n"), String::new()),
        };
        let internal_loopback = if self.plugin == Plugin::Nothing { "use_internal_loopback = true" } else { "" };
        // whose they are can be seen then
        let own_networks = if self.plugin == Plugin::Nothing { "netns_mounts_under_state_dir = true" } else { "" };
        let network = self.network(folder, is_new)?;
        Ok(format!(
            "[plugins.\"{plugin}\"]\n  restrict_oom_score_adj = true\n  {own_networks}\n  {setting}\n{own}{block}\n  {sandboxer}\n\
             [plugins.\"{plugin}\".containerd.runtimes.{HANDLER}.options]\n  {options}\n\
             [plugins.\"{plugin}\".cni]\n  {internal_loopback}\n  {network}\n{others}",
            setting = self.setting,
            options = self.options(cx)?,
        ))
    }

    fn options(&self, cx: &Context) -> Result<String> {
        let usual = || if self.shim.is_none_or(Shim::is_ours) { cx.runtime_binary() } else { cx.runtime_program() };
        let runtime = self.runtime.map_or_else(usual, Path::to_owned);
        let cgroup = self.shim_cgroup.map(|path| format!("ShimCgroup = \"{path}\"")).unwrap_or_default();
        if !self.has_options(cx) {
            return Ok(String::new());
        }
        let options = format!("BinaryName = \"{}\"\n  {}\n  {cgroup}", runtime.display(), self.option);
        if cx.suite() != Suite::Bookworm {
            return Ok(options);
        }
        // all that this one hands on, as docs/kubernetes.md has it
        let file = cx.folder().join("x.toml");
        fs::write(&file, options)?;
        Ok(format!("ConfigPath = \"{}\"", file.display()))
    }

    /// Writes the configuration of the network plugin, and returns the lines that name it.
    fn network(&self, folder: &Path, is_new: bool) -> Result<String> {
        let (programs, networks) = (folder.join("cni/bin"), folder.join("cni/net.d"));
        fs::create_dir_all(&programs)?;
        fs::create_dir_all(&networks)?;
        let plugin = match self.plugin {
            Plugin::Bridge => {
                if self.sandboxer == Sandboxer::Shim && !Path::new(PLUGINS).join("bridge").exists() {
                    return skip("there are no CNI plugins: install containernetworking-plugins");
                }
                json!({
                    "type": "bridge", "bridge": "pods", "isGateway": true,
                    "ipam": {
                        "type": "host-local", "dataDir": folder.join("cni/addresses"),
                        "ranges": [[{ "subnet": "10.88.0.0/16" }]], "routes": [{ "dst": "0.0.0.0/0" }],
                    },
                })
            }
            Plugin::Nothing => {
                let program = programs.join("nothing");
                fs::write(&program, NOTHING)?;
                fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
                json!({ "type": "nothing" })
            }
        };
        let list = json!({ "cniVersion": "0.4.0", "name": "pods", "plugins": [plugin] });
        fs::write(networks.join("10-pods.conflist"), list.to_string())?;
        let (programs, networks) = (programs.display(), networks.display());
        // 1.6 and 1.7 take one folder
        let programs = match (is_new, self.plugin) {
            (true, _) => format!("bin_dirs = [\"{programs}\", \"{PLUGINS}\"]"),
            (false, Plugin::Bridge) => format!("bin_dir = \"{PLUGINS}\""),
            (false, Plugin::Nothing) => format!("bin_dir = \"{programs}\""),
        };
        Ok(format!("{programs}\n  conf_dir = \"{networks}\""))
    }
}

/// A network plugin that makes nothing, and reports an address, without which containerd refuses the pod.
const NOTHING: &str = r#"#!/bin/sh
[ "$CNI_COMMAND" = ADD ] || exit 0
printf '{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","sandbox":"%s"}],' "$CNI_NETNS"
printf '"ips":[{"version":"4","interface":0,"address":"10.88.0.2/16"}],"dns":{}}'
"#;
