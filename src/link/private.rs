//! The socket on which the ROUTER listens: a Unix socket in a private directory; on Windows, TCP
//! on loopback.

use std::io;
use std::path::Path;

use zeromq::{RouterSocket, Socket, ZmqError};

fn to_io(error: ZmqError) -> io::Error {
    match error {
        ZmqError::Network(error) => error,
        other => io::Error::other(other.to_string()),
    }
}

#[cfg(unix)]
mod platform {
    use super::{Path, RouterSocket, Socket, io, to_io};
    use std::path::PathBuf;

    pub(crate) type PrivateStream = tokio::net::UnixStream;

    pub(crate) struct PrivateSocket {
        path: PathBuf,
    }

    impl PrivateSocket {
        pub(crate) async fn bind(router: &mut RouterSocket, path: &Path) -> io::Result<Self> {
            router.bind(&Self::endpoint(path)).await.map_err(to_io)?;
            Ok(Self { path: path.into() })
        }

        pub(crate) fn endpoint(path: &Path) -> String {
            format!("ipc://{}", path.display())
        }

        pub(crate) async fn connect(&self) -> io::Result<PrivateStream> {
            PrivateStream::connect(&self.path).await
        }

        pub(crate) fn remove(&self) {
            let _gone_already = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(not(unix))]
mod platform {
    use super::{Path, RouterSocket, Socket, io, to_io};
    use std::net::SocketAddr;

    pub(crate) type PrivateStream = tokio::net::TcpStream;

    pub(crate) struct PrivateSocket {
        addr: SocketAddr,
    }

    impl PrivateSocket {
        pub(crate) async fn bind(router: &mut RouterSocket, _: &Path) -> io::Result<Self> {
            let endpoint = router
                .bind("tcp://127.0.0.1:0")
                .await
                .map_err(to_io)?
                .to_string();
            let addr = endpoint
                .trim_start_matches("tcp://")
                .parse()
                .map_err(io::Error::other)?;
            Ok(Self { addr })
        }

        pub(crate) fn endpoint(path: &Path) -> String {
            format!("ipc://{}", path.display())
        }

        pub(crate) async fn connect(&self) -> io::Result<PrivateStream> {
            PrivateStream::connect(self.addr).await
        }

        pub(crate) fn remove(&self) {}
    }
}

pub(super) use platform::PrivateSocket;
pub(crate) use platform::PrivateStream;
