//! `peerbus peers`

use clap::Args;
use peerbus::text::Line;
use serde_json::json;

use crate::options::NodeOptions;
use crate::output;

/// Joins the mesh, waits, and prints the peers that it found.
#[derive(Args)]
pub(crate) struct Peers {
    /// Time to wait for peers
    #[arg(long, value_name = "TIME", default_value = "2s")]
    wait: humantime::Duration,
    /// End as soon as this many peers are found
    #[arg(long, value_name = "N")]
    count: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    node: NodeOptions,
}

impl Peers {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let node = self.node.start().await?;
        let found = node.wait_for_peers(self.count.unwrap_or(usize::MAX), *self.wait).await;
        let (mut peers, unreachable) = (node.peers(), node.unreachable());
        node.shutdown().await;
        peers.sort_by(|a, b| a.name.cmp(&b.name));
        let listed: Vec<_> = peers
            .iter()
            .map(|peer| {
                let services: Vec<_> = peer.services.iter().map(|info| info.name.to_string()).collect();
                let patterns: Vec<_> = peer.patterns.iter().map(ToString::to_string).collect();
                json!({
                    "id": peer.id, "name": peer.name, "found_by": peer.source, "address": peer.address,
                    "services": services, "subscriptions": patterns,
                })
            })
            .collect();
        let failed: Vec<_> = unreachable
            .iter()
            .map(|known| {
                json!({
                    "address": known.address, "found_by": known.source, "failures": known.failures,
                    "last_error": known.last_error,
                })
            })
            .collect();
        let value = json!({ "peers": listed, "unreachable": failed });
        output::line(self.json, &value, || {
            let mut text = match peers.len() {
                0 => "no peers".to_owned(),
                1 => "1 peer".to_owned(),
                n => format!("{n} peers"),
            };
            for peer in &peers {
                let services: Vec<_> =
                    peer.services.iter().map(|info| info.name.as_str()).collect();
                let patterns: Vec<_> =
                    peer.patterns.iter().map(|pattern| pattern.as_str()).collect();
                text += &format!(
                    "\n  {:<20} {}  found by {}",
                    Line(&peer.name).to_string(),
                    peer.id.short(),
                    peer.source
                );
                if !services.is_empty() {
                    text += &format!("; serves {}", services.join(", "));
                }
                if !patterns.is_empty() {
                    text += &format!("; subscribes to {}", patterns.join(", "));
                }
            }
            for known in &unreachable {
                text += &format!("\n  can't reach {}: {}", known.address, Line(&known.last_error));
            }
            text
        })?;
        if let (true, Some(hint)) = (peers.is_empty(), self.node.hint()) {
            output::note(hint);
        }
        match self.count {
            Some(count) if found.is_err() => {
                anyhow::bail!("found {} of {count} peers", peers.len())
            }
            _ => Ok(()),
        }
    }
}
