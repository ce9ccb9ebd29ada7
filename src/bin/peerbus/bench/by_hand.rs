//! The reference of `durable`: the same work with nothing but files and a TCP connection.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use super::stats::Samples;

/// Appends a body to a file and syncs it, repeatedly.
pub(super) fn store(path: &Path, body: &[u8], millis: u64) -> anyhow::Result<(Samples, Duration)> {
    let mut file = open(path)?;
    again_and_again(millis, || Ok(append(&mut file, body)?))
}

/// Does the same, then sends the body to another process, which does the same and answers.
pub(super) fn store_twice(
    path: &Path,
    far: SocketAddr,
    body: &[u8],
    millis: u64,
) -> anyhow::Result<(Samples, Duration)> {
    let (mut file, mut stream) = (open(path)?, TcpStream::connect(far)?);
    stream.set_nodelay(true)?;
    stream.write_all(&(body.len() as u32).to_be_bytes())?;
    again_and_again(millis, || {
        append(&mut file, body)?;
        stream.write_all(body)?;
        Ok(stream.read_exact(&mut [0])?)
    })
}

/// The remote side of [`store_twice`], one connection after the other.
pub(super) fn answer(listener: &TcpListener, path: &Path) -> anyhow::Result<()> {
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let (mut file, mut length) = (open(path)?, [0; 4]);
        stream.read_exact(&mut length)?;
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        while stream.read_exact(&mut body).is_ok() {
            append(&mut file, &body)?;
            stream.write_all(&[1])?;
        }
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    File::options().create(true).append(true).open(path)
}

fn append(file: &mut File, body: &[u8]) -> std::io::Result<()> {
    file.write_all(body)?;
    file.sync_data()
}

fn again_and_again(
    millis: u64,
    mut act: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<(Samples, Duration)> {
    let (mut samples, begun) = (Samples::default(), Instant::now());
    while begun.elapsed() < Duration::from_millis(millis) {
        let sent = Instant::now();
        act()?;
        samples.add(sent.elapsed());
    }
    Ok((samples, begun.elapsed()))
}
