//! Listening sockets and connected ones, whatever kind they are of.

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use tokio::net::{TcpListener, TcpStream};

/// A connected stream.
pub(super) enum Socket {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(tokio::net::UnixStream),
}

/// A listening socket.
pub(super) enum Listener {
    Tcp(TcpListener),
    #[cfg(unix)]
    Unix(unix::Listener),
}

impl Listener {
    /// Accepts the next connection, and where it comes from over a network. Cancel safe.
    pub(super) async fn accept(&self) -> io::Result<(Socket, Option<SocketAddr>)> {
        match self {
            Self::Tcp(listener) => {
                let (tcp, addr) = listener.accept().await?;
                Ok((Socket::Tcp(tcp), Some(addr)))
            }
            #[cfg(unix)]
            Self::Unix(listener) => Ok((Socket::Unix(listener.accept().await?), None)),
        }
    }

    /// Listens on a Unix socket at `path`, which must not exist. The file goes with the listener.
    #[cfg(unix)]
    pub(super) fn bind_local(path: &Path) -> io::Result<Self> {
        Ok(Self::Unix(unix::Listener::bind(path)?))
    }

    #[cfg(not(unix))]
    pub(super) fn bind_local(_: &Path) -> io::Result<Self> {
        Err(no_unix_sockets())
    }
}

impl Socket {
    #[cfg(unix)]
    pub(super) async fn connect_local(path: &Path) -> io::Result<Self> {
        Ok(Self::Unix(tokio::net::UnixStream::connect(path).await?))
    }

    #[cfg(not(unix))]
    pub(super) async fn connect_local(_: &Path) -> io::Result<Self> {
        Err(no_unix_sockets())
    }
}

#[cfg(not(unix))]
fn no_unix_sockets() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "there are no Unix sockets here")
}

#[cfg(unix)]
pub(super) mod unix {
    use std::fs;
    use std::io;
    use std::path::{Path, PathBuf};

    use tokio::net::{UnixListener, UnixStream};

    pub(in crate::tunnel) struct Listener {
        listener: UnixListener,
        path: PathBuf,
    }

    impl Listener {
        pub(super) fn bind(path: &Path) -> io::Result<Self> {
            Ok(Self { listener: UnixListener::bind(path)?, path: path.to_owned() })
        }

        pub(super) async fn accept(&self) -> io::Result<UnixStream> {
            Ok(self.listener.accept().await?.0)
        }
    }

    impl Drop for Listener {
        fn drop(&mut self) {
            let _gone_already = fs::remove_file(&self.path);
        }
    }

    /// Whether the process at the other end runs as the user of this one: `SO_PEERCRED`
    /// (unix(7)), or what other systems have in its place. Of a listener it tells who bound it.
    pub(in crate::tunnel) fn is_same_user(stream: &UnixStream) -> io::Result<bool> {
        Ok(stream.peer_cred()?.uid() == rustix::process::geteuid().as_raw())
    }
}
