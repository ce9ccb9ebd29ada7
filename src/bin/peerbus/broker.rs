//! `peerbus broker`

use std::net::SocketAddr;

use clap::Args;
use peerbus::EmbeddedBroker;
use serde_json::json;

use crate::options::interrupted;
use crate::output;

/// A broker to try and measure broker mode without installing anything. Its delivery is best
/// effort: it stores nothing and authenticates nobody, so it listens on loopback only.
#[derive(Args)]
pub(crate) struct BrokerCommand {
    /// Address to listen on, port 0 for a free one
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:4333")]
    listen: SocketAddr,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
}

impl BrokerCommand {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let broker = EmbeddedBroker::start(self.listen).await?;
        let url = broker.url();
        output::line(self.json, &json!({ "event": "listening", "url": url }), || {
            format!("listening; nodes reach it with --broker {url}")
        })?;
        let _signal = interrupted().await;
        let report = broker.report();
        let value = json!({
            "event": "stopped", "nodes": report.nodes, "received": report.received,
            "sent": report.sent, "dropped": report.dropped, "refused": report.refused,
        });
        output::line(self.json, &value, || report.to_string())?;
        broker.stop().await;
        Ok(())
    }
}
