//! The references for peerbus: plain tokio echoes, and the bare `zeromq` crate.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use zeromq::{DealerSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

/// A connected stream of either kind.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Serves one connection after the other, on a Unix socket if a path is given, else on TCP; reports
/// its address by `ready`.
pub(crate) async fn serve_echo(
    size: usize,
    path: Option<PathBuf>,
    ready: impl FnOnce(String),
) -> anyhow::Result<()> {
    match path {
        #[cfg(unix)]
        Some(path) => {
            let listener = tokio::net::UnixListener::bind(&path)?;
            ready(path.display().to_string());
            loop {
                echo(listener.accept().await?.0, size).await?;
            }
        }
        _ => {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            ready(listener.local_addr()?.to_string());
            loop {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                echo(stream, size).await?;
            }
        }
    }
}

async fn echo(mut stream: impl Stream, size: usize) -> anyhow::Result<()> {
    let mut buffer = vec![0; size];
    while stream.read_exact(&mut buffer).await.is_ok() {
        stream.write_all(&buffer).await?;
    }
    Ok(())
}

pub(crate) struct EchoClient {
    stream: Box<dyn Stream>,
    buffer: Vec<u8>,
}

impl EchoClient {
    pub(crate) async fn connect(address: &str, size: usize) -> anyhow::Result<Self> {
        let context = "the echo server can't be reached";
        let stream: Box<dyn Stream> = match address.parse::<SocketAddr>() {
            Ok(address) => {
                let stream = TcpStream::connect(address).await.context(context)?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
            #[cfg(unix)]
            Err(_) => Box::new(tokio::net::UnixStream::connect(address).await.context(context)?),
            #[cfg(not(unix))]
            Err(error) => return Err(error.into()),
        };
        Ok(Self { stream, buffer: vec![7; size] })
    }

    pub(crate) async fn trip(&mut self) -> anyhow::Result<()> {
        self.stream.write_all(&self.buffer).await?;
        self.stream.read_exact(&mut self.buffer).await?;
        Ok(())
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

    pub(crate) async fn trip(&mut self) -> anyhow::Result<()> {
        self.dealer.send(ZmqMessage::from(self.body.clone())).await?;
        self.dealer.recv().await?;
        Ok(())
    }
}
