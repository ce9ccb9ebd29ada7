//! `peerbus bridge`

use anyhow::ensure;
use clap::Args;
use peerbus::{Bridge, Crossed, Event, Events, NodeId, Pattern, ServiceName};
use serde_json::json;

use crate::options::{DRAIN, NodeOptions, interrupted};
use crate::output;

/// Joins a mesh to the broker that --broker names, until Ctrl-C: chosen topics and services of each
/// are available on the other. With --outbox, guaranteed messages cross as well, each stored on the
/// far side before it counts as processed on the near one.
#[derive(Args)]
pub(crate) struct BridgeCommand {
    /// Topics of the mesh to publish at the broker; repeatable
    #[arg(long, value_name = "PATTERN")]
    export: Vec<Pattern>,
    /// Topics of the broker to publish in the mesh; repeatable
    #[arg(long, value_name = "PATTERN")]
    import: Vec<Pattern>,
    /// Service of the mesh to serve at the broker; repeatable
    #[arg(long, value_name = "SERVICE")]
    export_service: Vec<ServiceName>,
    /// Service of the broker to serve in the mesh; repeatable
    #[arg(long, value_name = "SERVICE")]
    import_service: Vec<ServiceName>,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    node: NodeOptions,
}

impl BridgeCommand {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let chosen = self.export.len() + self.import.len();
        ensure!(
            chosen + self.export_service.len() + self.import_service.len() > 0,
            "nothing to bridge; choose topics or services by --export, --import, \
             --export-service or --import-service"
        );
        let (mesh, broker) = self.node.start_both().await?;
        let (mut mesh_events, mut broker_events) = (mesh.events(), broker.events());
        let mut bridge = Bridge::between(&mesh, &broker).guaranteed(self.node.outbox.is_some());
        bridge = self.export.into_iter().fold(bridge, |bridge, it| bridge.export(it));
        bridge = self.import.into_iter().fold(bridge, |bridge, it| bridge.import(it));
        let services = self.export_service.into_iter();
        bridge = services.fold(bridge, |bridge, it| bridge.export_service(it));
        let services = self.import_service.into_iter();
        bridge = services.fold(bridge, |bridge, it| bridge.import_service(it));
        let bridge = bridge.start()?;
        let value = json!({
            "event": "started", "id": mesh.id(), "name": mesh.name(),
            "listening": mesh.listening(),
        });
        output::line(self.json, &value, || {
            format!("{} is a bridge, as {}", mesh.name(), mesh.id())
        })?;
        let mut end = std::pin::pin!(interrupted());
        loop {
            let event = tokio::select! {
                _ = &mut end => break,
                Some(event) = next(&mut mesh_events) => event,
                Some(event) = next(&mut broker_events) => event,
            };
            let (value, text) = output::event(&event);
            output::line(self.json, &value, || text)?;
        }
        let (exported, imported) = (bridge.exported(), bridge.imported());
        bridge.close().await;
        broker.shutdown_within(DRAIN).await;
        let kept = mesh.shutdown_within(DRAIN).await.pending;
        let told = |it: Crossed| json!({ "passed": it.passed, "echoes": it.echoes, "dropped": it.dropped });
        let value = json!({
            "event": "stopped", "exported": told(exported), "imported": told(imported), "kept": kept,
        });
        output::line(self.json, &value, || {
            let kept = match kept {
                0 => String::new(),
                kept => format!("; {kept} kept in the outbox"),
            };
            format!(
                "stopped; {} exported, {} imported, {} dropped{kept}",
                exported.passed,
                imported.passed,
                exported.dropped + imported.dropped
            )
        })?;
        Ok(())
    }
}

/// The next event that concerns the bridge; peers of the mesh that come and go are skipped.
async fn next(events: &mut Events) -> Option<Event> {
    loop {
        match events.recv().await? {
            Event::PeerUp(peer) if peer.id != NodeId::BROKER => {}
            Event::PeerDown { id, .. } if id != NodeId::BROKER => {}
            event => return Some(event),
        }
    }
}
