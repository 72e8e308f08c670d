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

/// Logarithm of the descriptors of a ring unless the arguments say otherwise.
const DEFAULT_LOG2_DESCRIPTORS: u32 = 10;

/// The value of `key` in `role=client,socket=/run/memif.sock`.
fn value<'a>(arguments: &'a str, key: &str) -> Option<&'a str> {
    arguments.split(',').filter_map(|pair| pair.split_once('=')).find(|pair| pair.0 == key).map(|pair| pair.1)
}

/// Whether this side connects, which is the driver's default; the other listens.
pub(crate) fn is_client(arguments: &str) -> bool {
    !matches!(value(arguments, "role"), Some("server" | "master"))
}

/// Whether this side's mbufs are the shared memory. The driver overlooks it in a server's arguments.
pub(crate) fn is_zero_copy(arguments: &str) -> bool {
    is_client(arguments) && value(arguments, "zero-copy") == Some("yes")
}

/// What follows the driver's name and a number in a device's description, if it is such a port.
fn arguments_of(device: &str) -> Option<&str> {
    if !device.starts_with(DRIVER) {
        return None;
    }
    Some(device.split_once(',').map_or("", |(_, arguments)| arguments))
}

/// Whether a description (`net_memif0,role=client,zero-copy=yes,..`) is of a port whose own mbufs are the shared memory, so that all that the
/// EAL has in one piece must be in one file.
pub(crate) fn shares_mbufs(device: &str) -> bool {
    arguments_of(device).is_some_and(is_zero_copy)
}

/// Mbufs that lie in each ring, either way, of a shared-memory port with this description, if its mbufs are the shared memory (`zero-copy=yes`):
/// the driver overlooks what a port is set up with.
#[must_use]
pub fn lent_mbufs(device: &str) -> Option<u16> {
    let arguments = arguments_of(device).filter(|arguments| is_zero_copy(arguments))?;
    let log2 = value(arguments, "rsize").and_then(|log2| log2.parse().ok());
    1_u16.checked_shl(log2.unwrap_or(DEFAULT_LOG2_DESCRIPTORS))
}

/// Bytes of a shared buffer.
pub(crate) fn bsize(arguments: &str) -> u32 {
    value(arguments, "bsize").and_then(|bsize| bsize.parse().ok()).unwrap_or(DEFAULT_BSIZE)
}

/// Removes the socket file of a server that was killed, over which a new one would stumble. One that somebody listens on stays.
pub(crate) fn remove_stale_socket(device: &str) {
    let Some(arguments) = arguments_of(device) else { return };
    let in_file_system = value(arguments, "socket-abstract") == Some("no");
    if is_client(arguments) || !in_file_system {
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
                && is_client("")
                && !is_client("role=server")
        );
        assert_eq!((bsize("role=client,bsize=9216"), bsize("bsize=x"), bsize("")), (9216, 2048, 2048));
    }

    #[test]
    fn zero_copy_is_the_clients() {
        assert!(is_zero_copy("zero-copy=yes,role=client") && is_zero_copy("zero-copy=yes"));
        assert!(!is_zero_copy("role=server,zero-copy=yes") && !is_zero_copy("role=client,zero-copy=no"));
        assert!(shares_mbufs("net_memif3,zero-copy=yes") && !shares_mbufs("net_tap0,zero-copy=yes"));
    }

    #[test]
    fn rings_hold_a_power_of_two() {
        assert_eq!(lent_mbufs("net_memif0,zero-copy=yes,rsize=11"), Some(2048));
        assert_eq!(lent_mbufs("net_memif0,zero-copy=yes"), Some(1024));
        assert_eq!(lent_mbufs("net_memif0,zero-copy=yes,rsize=99"), None, "the driver says what is wrong");
        assert_eq!(lent_mbufs("net_memif0,rsize=11"), None);
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
