//! Listening and connected sockets of either kind, TCP or Unix.

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
    /// Accepts the next connection; returns its remote address, if it is TCP. Cancel safe.
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

    /// Listens on a Unix socket at `path`, which must not exist. The file is removed on drop.
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
    io::Error::new(io::ErrorKind::Unsupported, "Unix sockets are not supported on this system")
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

    /// Returns true if the process at the other end runs as this process's user, by `SO_PEERCRED`
    /// (unix(7)) or its equivalent. On the dialling side the credentials are those of the process
    /// that bound the socket.
    pub(in crate::tunnel) fn is_same_user(stream: &UnixStream) -> io::Result<bool> {
        Ok(stream.peer_cred()?.uid() == rustix::process::geteuid().as_raw())
    }
}
