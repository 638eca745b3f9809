//! A registry on loopback that serves images of the benchmark from their files.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, Result, bail};

use crate::image::{self, Codec, Size};

/// It serves until the process ends.
pub(crate) struct Registry {
    port: u16,
}

impl Registry {
    pub(crate) fn start(folder: &Path) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let folder = folder.to_owned();
        thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let folder = folder.clone();
                // a client that disconnects is no failure of the registry
                thread::spawn(move || while serve(&socket, &folder).is_ok() {});
            }
        });
        Ok(Self { port })
    }

    pub(crate) fn image(&self, codec: Codec, size: Size) -> String {
        format!("127.0.0.1:{}/{}:1", self.port, image::name(codec, size))
    }
}

/// The type of its first record.
const TLS_HANDSHAKE: u8 = 22;

fn serve(socket: &TcpStream, folder: &Path) -> Result<()> {
    let (mut reader, mut writer) = (BufReader::new(socket), socket);
    if reader.fill_buf()?.first() == Some(&TLS_HANDSHAKE) {
        // as HTTP servers do: dockerd tries TLS first
        writer.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
        bail!("TLS on a port without it");
    }
    let (mut line, mut header) = (String::new(), String::new());
    reader.read_line(&mut line)?;
    let (method, rest) = line.split_once(' ').context("a method")?;
    let path = rest.split([' ', '?']).next().context("a path")?;
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    let Some((kind, file, digest)) = find(folder, path) else {
        return Ok(writer.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?);
    };
    let mut file = File::open(file)?;
    let length = file.metadata()?.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nContent-Type: {kind}\r\nDocker-Content-Digest: {digest}\r\n\r\n");
    writer.write_all(head.as_bytes())?;
    if method != "HEAD" {
        io::copy(&mut file, &mut writer)?;
    }
    Ok(())
}

/// Media type, file and digest of what is asked for.
fn find(folder: &Path, path: &str) -> Option<(&'static str, PathBuf, String)> {
    let mut parts = path.strip_prefix("/v2/")?.split('/');
    let (image, what, which) = (folder.join(parts.next()?), parts.next()?, parts.next()?);
    let digest = if which.starts_with("sha256:") { which.to_owned() } else { std::fs::read_to_string(image.join("manifest")).ok()? };
    let kind = if what == "manifests" { "application/vnd.oci.image.manifest.v1+json" } else { "application/octet-stream" };
    let file = image.join("blobs/sha256").join(digest.strip_prefix("sha256:")?);
    file.is_file().then_some((kind, file, digest))
}
