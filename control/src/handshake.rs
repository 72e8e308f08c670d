//! What goes over the socket: making the session, registering regions.
//!
//! ```text
//! client                                data plane
//! Hello                            ->
//!                                  <-   Welcome  + memory, doorbell line
//! Attached  (memory is mapped)     ->            commands are taken from here on
//! Register  + region's memory      ->
//! RegisterGpu (+ ring's memory)    ->
//!                                  <-   Registered | RegionRefused
//! ```
//!
//! One datagram of a `SOCK_SEQPACKET` socket is one message. Its first eight bytes never change between
//! versions: `"SHSV"`, the version (u16), the kind (u16), little-endian. Kind 0 is followed by a message in
//! postcard, which only the same version can read. Kind 1 is followed by plain text, the reason why the sender
//! ends the session. The data plane sends one to a client of another version too, which learns the version from it.

use serde::{Deserialize, Serialize};

use crate::VERSION;
use crate::codec::encode;
use crate::gpu::GpuMemory;
use crate::message::cut_text;

/// Most bytes of one socket message.
pub const MAX_SOCKET_BYTES: usize = 64 * 1024;
const MAGIC: [u8; 4] = *b"SHSV";
const HEADER_BYTES: usize = 8;
const KIND_MESSAGE: u16 = 0;
const KIND_REFUSAL: u16 = 1;

/// From the client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromClient {
    /// Opens the session.
    Hello {
        /// What the client calls itself, for logs.
        name: String,
    },
    /// The session's memory is mapped: it may be closed to others, and used.
    Attached,
    /// Registers the memory whose descriptor comes with this message.
    Register {
        /// Returned with the answer.
        token: u64,
        /// Size of the memory, bytes.
        bytes: u64,
    },
    /// Registers GPU memory. With a ring comes the descriptor of its host memory.
    RegisterGpu {
        /// Returned with the answer.
        token: u64,
        /// What is lent.
        memory: GpuMemory,
    },
}

/// From the data plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromDataPlane {
    /// The session's memory and the client's end of the doorbell line come with this message, in this order.
    Welcome {
        /// What the data plane calls itself, for logs.
        name: String,
    },
    /// The region can receive fetches.
    Registered {
        /// Of the request.
        token: u64,
        /// The region's number: never reused within a session.
        region: u32,
    },
    /// The region cannot be used; the session goes on.
    RegionRefused {
        /// Of the request.
        token: u64,
        /// What was wrong and what to do.
        reason: String,
    },
}

/// Descriptors that come with a [`FromDataPlane::Welcome`].
pub const WELCOME_FDS: usize = 2;

/// Why bytes from the socket are no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Something else speaks on this socket.
    #[error("what answers on the socket does not speak ShadowServe's protocol: check the socket's path")]
    Foreign,
    /// The other side is of another release.
    #[error(
        "this side speaks version {VERSION} of the control protocol and the other side version {theirs}: \
         use a client and a data plane of the same release"
    )]
    Version {
        /// The peer's version.
        theirs: u16,
    },
    /// The other side gave a reason and ended the session.
    #[error("the other side refused: {0}")]
    Refused(String),
    /// The right version, but no message of it.
    #[error("a malformed socket message: {0}")]
    Malformed(postcard::Error),
}

fn header(kind: u16) -> [u8; HEADER_BYTES] {
    let [v0, v1] = VERSION.to_le_bytes();
    let [k0, k1] = kind.to_le_bytes();
    let [m0, m1, m2, m3] = MAGIC;
    [m0, m1, m2, m3, v0, v1, k0, k1]
}

/// The datagram of a message.
#[must_use]
pub fn datagram<T: Serialize>(message: &T) -> Vec<u8> {
    let mut body = Vec::new();
    encode(message, &mut body);
    [header(KIND_MESSAGE).as_slice(), &body].concat()
}

/// The datagram that ends a session, readable by every version.
#[must_use]
pub fn refusal(reason: &str) -> Vec<u8> {
    let mut reason = reason.to_owned();
    cut_text(&mut reason);
    [header(KIND_REFUSAL).as_slice(), reason.as_bytes()].concat()
}

/// Reads a datagram.
///
/// # Errors
/// When it is no message of this version; a refusal comes as [`HandshakeError::Refused`].
pub fn parse<'a, T: Deserialize<'a>>(datagram: &'a [u8]) -> Result<T, HandshakeError> {
    let (header, body) = datagram.split_at_checked(HEADER_BYTES).ok_or(HandshakeError::Foreign)?;
    let &[m0, m1, m2, m3, v0, v1, k0, k1] = header else { return Err(HandshakeError::Foreign) };
    if [m0, m1, m2, m3] != MAGIC {
        return Err(HandshakeError::Foreign);
    }
    let (theirs, kind) = (u16::from_le_bytes([v0, v1]), u16::from_le_bytes([k0, k1]));
    if kind == KIND_REFUSAL && theirs == VERSION {
        return Err(HandshakeError::Refused(String::from_utf8_lossy(body).into_owned()));
    }
    if theirs != VERSION {
        return Err(HandshakeError::Version { theirs });
    }
    if kind != KIND_MESSAGE {
        return Err(HandshakeError::Malformed(postcard::Error::DeserializeBadEncoding));
    }
    match postcard::take_from_bytes(body).map_err(HandshakeError::Malformed)? {
        (message, []) => Ok(message),
        (_, _) => Err(HandshakeError::Malformed(postcard::Error::DeserializeBadEncoding)),
    }
}
