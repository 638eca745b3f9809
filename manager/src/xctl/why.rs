//! `why`: what keeps a blob or a snapshot from being collected.

use std::collections::BTreeSet;

use clap::Args;
use containerd_client::services::v1::sandbox::StoreListRequest;
use containerd_client::services::v1::snapshots::ListSnapshotsRequest;
use containerd_client::services::v1::{ListContentRequest, ListRequest, ListResourcesRequest, PluginsRequest};
use serde_json::json;
use tonic::Code;

use crate::client::{Client, call};
use crate::error::{Error, Result};
use crate::output::{self, Format};
use crate::references::{Kept, Node, References};
use crate::{containers, image, images};

/// Arguments of `why`.
#[derive(Debug, Clone, Args)]
pub(crate) struct WhyArgs {
    /// An image, a digest or its beginning, or a snapshot's key
    #[arg(value_name = "NAME|DIGEST|KEY")]
    what: String,
}

/// Prints what keeps it, and by what way; 1 when nothing does.
pub(crate) async fn run(client: &Client, format: Format, args: WhyArgs) -> Result<u8> {
    let all = read(client).await?;
    let what = &args.what;
    // the kubelet's daemon has images that are called as their configurations
    let mut nodes = if what.contains(':') { all.called(what) } else { Vec::new() };
    if nodes.is_empty() {
        nodes = match image::lookup(client, what).await?.and_then(|image| image.target) {
            Some(target) => vec![Node::new("content", target.digest)],
            None => all.called(what),
        };
    }
    if nodes.is_empty() {
        let namespace = client.namespace();
        return Err(Error::refused(format!(
            "there is no image, blob or snapshot {what} in namespace {namespace}; `xctl images` lists images"
        )));
    }
    let ids: BTreeSet<_> = nodes.iter().map(|node| node.id.as_str()).collect();
    if ids.len() > 1 {
        return Err(Error::refused(format!("{what} is the beginning of {} digests or keys; give more of it", ids.len())));
    }
    let found: Vec<_> = nodes.iter().map(|node| (node, all.keep(node))).collect();
    let is_kept = found.iter().all(|(_node, kept)| !kept.is_empty());
    match format {
        Format::Json => {
            let way =
                |kept: &Kept| kept.way.iter().map(|(by, node)| json!({ "by": by, "kind": node.kind, "id": node.id })).collect::<Vec<_>>();
            let kept = |kept: &Kept| json!({ "kind": kept.root.kind, "id": kept.root.id, "way": way(kept) });
            let one = |(node, all): &(&Node, Vec<Kept>)| json!({ "kind": node.kind, "id": node.id, "kept_by": all.iter().map(kept).collect::<Vec<_>>() });
            output::print_json(&found.iter().map(one).collect::<Vec<_>>())?;
        }
        Format::Table => found.iter().try_for_each(|(node, kept)| output::print(&text(node, kept)))?,
    }
    Ok(u8::from(!is_kept))
}

/// For people.
fn text(node: &Node, kept: &[Kept]) -> String {
    let mut text = format!("{}\n", output::printable(&shown(node)));
    if kept.is_empty() {
        text.push_str("  nothing keeps it: the next collection removes it\n");
    }
    for Kept { root, way } in kept {
        let is_itself = way.is_empty();
        let by = if is_itself { "its label containerd.io/gc.root".to_owned() } else { shown(root) };
        text.push_str(&format!("  kept by {}\n", output::printable(&by)));
        for (by, node) in way {
            text.push_str(&format!(
                "    {} → {}\n",
                output::printable(by.trim_start_matches("containerd.io/")),
                output::printable(&shown(node))
            ));
        }
    }
    text
}

fn shown(Node { kind, id }: &Node) -> String {
    let kind = match kind.as_str() {
        "images" => "image",
        "containers" => "container",
        "leases" => "lease",
        "sandboxes" => "sandbox",
        other => match other.strip_prefix("snapshots/") {
            Some(snapshotter) => return format!("snapshot {id} ({snapshotter})"),
            None => other,
        },
    };
    format!("{kind} {id}")
}

/// Everything that there is in the namespace. What comes and goes meanwhile is there, or not.
async fn read(client: &Client) -> Result<References> {
    let mut all = References::default();
    for image in images::all(client).await? {
        let node = Node::new("images", image.name);
        all.add(&node, true, &image.labels);
        if let Some(target) = image.target {
            all.lead(&node, "target", Node::new("content", target.digest));
        }
    }
    for container in containers::list(client).await? {
        let node = Node::new("containers", container.id);
        all.add(&node, true, &container.labels);
        if !container.snapshot_key.is_empty() {
            all.lead(&node, "snapshot", Node::new(format!("snapshots/{}", container.snapshotter), container.snapshot_key));
        }
    }
    let leases = call("list leases", client.api().leases().list(client.request(ListRequest { filters: Vec::new() }))).await?.leases;
    for lease in leases {
        let node = Node::new("leases", lease.id.clone());
        let request = client.request(ListResourcesRequest { id: lease.id.clone() });
        let resources = match call(format!("list what lease {} holds", lease.id), client.api().leases().list_resources(request)).await {
            // it has ended meanwhile
            Err(error) if error.code() == Some(Code::NotFound) => continue,
            resources => resources?.resources,
        };
        all.add(&node, true, &lease.labels);
        for resource in resources {
            all.lead(&node, "resource", Node::new(resource.r#type, resource.id));
        }
    }
    // containerd has them from 1.7 on
    match call("list sandboxes", client.api().sandbox_store().list(client.request(StoreListRequest::default()))).await {
        Err(error) if error.code() == Some(Code::Unimplemented) => {}
        sandboxes => {
            for sandbox in sandboxes?.list {
                all.add(&Node::new("sandboxes", sandbox.sandbox_id), true, &sandbox.labels);
            }
        }
    }
    let doing = "list content";
    let ended = |doing: &str| {
        let doing = doing.to_owned();
        move |status| Error::Call { doing, status }
    };
    let mut pages = call(doing, client.content().list(client.request(ListContentRequest::default()))).await?;
    while let Some(page) = pages.message().await.map_err(ended(doing))? {
        page.info.iter().for_each(|info| all.add(&Node::new("content", &info.digest), false, &info.labels));
    }
    for snapshotter in snapshotters(client).await? {
        let doing = format!("list the snapshots of {snapshotter}");
        let request = client.request(ListSnapshotsRequest { snapshotter: snapshotter.clone(), filters: Vec::new() });
        let mut pages = call(&doing, client.api().snapshots().list(request)).await?;
        while let Some(page) = pages.message().await.map_err(ended(&doing))? {
            for info in page.info {
                let node = Node::new(format!("snapshots/{snapshotter}"), info.name);
                all.add(&node, false, &info.labels);
                if !info.parent.is_empty() {
                    all.lead(&node, "parent", Node::new(&*node.kind, info.parent));
                }
            }
        }
    }
    Ok(all)
}

/// Those that work here.
async fn snapshotters(client: &Client) -> Result<Vec<String>> {
    let request = PluginsRequest { filters: vec!["type==io.containerd.snapshotter.v1".to_owned()] };
    let plugins = call("list snapshotters", client.api().introspection().plugins(client.request(request))).await?.plugins;
    Ok(plugins.into_iter().filter(|plugin| plugin.init_err.is_none()).map(|plugin| plugin.id).collect())
}
