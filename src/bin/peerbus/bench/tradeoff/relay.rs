//! A TCP relay between two processes that can be cut.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Relays connections until it is cut.
pub(super) struct Relay {
    addr: SocketAddr,
    open: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Relay {
    /// Starts a relay to `target`, a host and port.
    pub(super) async fn start(target: String) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let (open, opened) = watch::channel(true);
        let task = tokio::spawn(accept(listener, Arc::from(target), opened));
        Ok(Self { addr, open, task })
    }

    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Cuts all connections, and refuses new ones.
    pub(super) fn cut(&self) {
        self.open.send_replace(false);
    }

    pub(super) fn restore(&self) {
        self.open.send_replace(true);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, target: Arc<str>, open: watch::Receiver<bool>) {
    while let Ok((mut near, _)) = listener.accept().await {
        let (target, mut open) = (target.clone(), open.clone());
        tokio::spawn(async move {
            if !*open.borrow() {
                return;
            }
            let Ok(mut far) = TcpStream::connect(&*target).await else { return };
            let _no_delay = (near.set_nodelay(true), far.set_nodelay(true));
            tokio::select! {
                _ = copy_bidirectional(&mut near, &mut far) => {}
                _ = open.wait_for(|open| !*open) => {}
            }
        });
    }
}
