//! peerbus
mod address;
mod engine;
mod message;
mod peer;
mod report;
mod wire;
