//! Shared-memory ports (`net_memif`): what their arguments say, and what a process that was killed leaves of them.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};

/// Name of the driver.
pub(crate) const DRIVER: &str = "net_memif";

/// Bytes of a shared buffer unless the arguments say otherwise.
const DEFAULT_BSIZE: u32 = 2048;

/// The value of `key` in `role=client,socket=/run/memif.sock`.
fn value<'a>(arguments: &'a str, key: &str) -> Option<&'a str> {
    arguments.split(',').filter_map(|pair| pair.split_once('=')).find(|pair| pair.0 == key).map(|pair| pair.1)
}

/// Whether this side connects; the other listens, and is the driver's default.
pub(crate) fn is_client(arguments: &str) -> bool {
    matches!(value(arguments, "role"), Some("client" | "slave"))
}

/// Bytes of a shared buffer.
pub(crate) fn bsize(arguments: &str) -> u32 {
    value(arguments, "bsize").and_then(|bsize| bsize.parse().ok()).unwrap_or(DEFAULT_BSIZE)
}

/// Removes the socket file of a server that was killed, over which a new one would stumble. One that somebody listens on stays.
pub(crate) fn remove_stale_socket(device: &str) {
    let Some((name, arguments)) = device.split_once(',') else { return };
    let in_file_system = value(arguments, "socket-abstract") == Some("no");
    if !name.starts_with(DRIVER) || is_client(arguments) || !in_file_system {
        return;
    }
    let path = value(arguments, "socket").map(Path::new);
    if let Some(path) = path.filter(|path| is_abandoned(path)) {
        // If it cannot be removed, the driver says why it cannot listen.
        let _ = fs::remove_file(path);
    }
}

fn is_abandoned(path: &Path) -> bool {
    if !fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        return false;
    }
    let refused = || -> std::io::Result<()> {
        let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(())
    };
    refused().is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{bind, listen};

    #[test]
    fn arguments_are_read() {
        assert!(
            is_client("socket=/s,role=client")
                && is_client("role=slave")
                && !is_client("role=server")
                && !is_client("")
        );
        assert_eq!((bsize("role=client,bsize=9216"), bsize("bsize=x"), bsize("")), (9216, 2048, 2048));
    }

    #[test]
    fn only_abandoned_sockets_are_removed() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("memif.sock");
        let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).expect("a socket");
        bind(&listener, &SocketAddrUnix::new(&path).expect("short")).expect("bound");
        listen(&listener, 1).expect("listening");
        let device =
            |role: &str| format!("net_memif0,role={role},socket={},socket-abstract=no", path.display());
        remove_stale_socket(&device("server"));
        assert!(path.exists(), "somebody listens");
        drop(listener);
        remove_stale_socket(&device("client"));
        remove_stale_socket(&device("server").replace("=no", "=yes"));
        assert!(path.exists(), "not ours");
        remove_stale_socket(&device("server"));
        assert!(!path.exists());
        fs::write(&path, b"").expect("written");
        remove_stale_socket(&device("server"));
        assert!(path.exists(), "no socket");
    }
}
