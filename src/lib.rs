//! peerbus
mod address;
mod config;
mod discovery;
mod engine;
mod link;
mod message;
mod node;
mod peer;
mod report;
mod tunnel;
mod wire;

pub use address::*;
pub use config::Config;
pub use message::*;
pub use node::*;
pub use peer::*;
pub use report::*;
