//! The references for peerbus: a plain tokio TCP echo, and the bare `zeromq` crate.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use zeromq::{DealerSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

use super::stats::Samples;

/// Serves one TCP connection after the other; reports its address by `ready`.
pub(crate) async fn serve_tcp(size: usize, ready: impl FnOnce(String)) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    ready(listener.local_addr()?.to_string());
    loop {
        let (mut stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let mut buffer = vec![0; size];
        while stream.read_exact(&mut buffer).await.is_ok() {
            stream.write_all(&buffer).await?;
        }
    }
}

pub(crate) struct TcpClient {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl TcpClient {
    pub(crate) async fn connect(address: &str, size: usize) -> anyhow::Result<Self> {
        let stream =
            TcpStream::connect(address).await.context("the echo server can't be reached")?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: vec![7; size] })
    }

    pub(crate) async fn round(&mut self, count: usize) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        for _ in 0..count {
            let begun = Instant::now();
            self.stream.write_all(&self.buffer).await?;
            self.stream.read_exact(&mut self.buffer).await?;
            samples.add(begun.elapsed());
        }
        Ok(samples)
    }
}

/// Serves with a ROUTER, on a Unix socket if a path is given, else on TCP.
pub(crate) async fn serve_zeromq(
    path: Option<PathBuf>,
    ready: impl FnOnce(String),
) -> anyhow::Result<()> {
    let mut router = RouterSocket::new();
    let endpoint = match path {
        Some(path) => format!("ipc://{}", path.display()),
        None => "tcp://127.0.0.1:0".to_owned(),
    };
    let bound = router.bind(&endpoint).await?;
    ready(bound.to_string());
    loop {
        let message = router.recv().await?;
        router.send(message).await?;
    }
}

pub(crate) struct ZeromqClient {
    dealer: DealerSocket,
    body: Vec<u8>,
}

impl ZeromqClient {
    pub(crate) async fn connect(endpoint: &str, size: usize) -> anyhow::Result<Self> {
        let mut dealer = DealerSocket::new();
        dealer.connect(endpoint).await.context("the ROUTER can't be reached")?;
        Ok(Self { dealer, body: vec![7; size] })
    }

    pub(crate) async fn round(&mut self, count: usize) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        for _ in 0..count {
            let begun = Instant::now();
            self.dealer.send(ZmqMessage::from(self.body.clone())).await?;
            self.dealer.recv().await?;
            samples.add(begun.elapsed());
        }
        Ok(samples)
    }
}
