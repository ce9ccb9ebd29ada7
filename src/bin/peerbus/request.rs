//! `peerbus request`

use clap::Args;

use crate::options::{BodyArg, NodeOptions, To};
use crate::output;

/// Prints the reply's body to standard output: unchanged to a file or a pipe, and with escapes for
/// hidden characters to a terminal.
#[derive(Args)]
pub(crate) struct Request {
    #[command(flatten)]
    to: To,
    #[command(flatten)]
    body: BodyArg,
    /// Time to wait for the reply
    #[arg(long, value_name = "TIME", default_value = "5s")]
    deadline: humantime::Duration,
    /// Ordering key: all messages of a key go to the same one of the known instances
    #[arg(long)]
    key: Option<String>,
    /// Print the whole reply as one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    node: NodeOptions,
}

impl Request {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let body = self.body.read()?;
        let node = self.node.start().await?;
        let to = self.to.find(&node).await?;
        let mut request = node.request(to, body).deadline(*self.deadline);
        if let Some(key) = self.key {
            request = request.key(key);
        }
        let reply = request.await;
        node.shutdown().await;
        let reply = reply?;
        if self.json {
            output::line(true, &output::message(&reply), String::new)?;
        } else {
            output::write_body(&reply.body)?;
        }
        Ok(())
    }
}
