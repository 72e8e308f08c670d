//! How a session ends before its time.

use control::ClientSessionError;
use control::handshake::HandshakeError;

/// Why the session with the data plane is over. Every call on it gives this from then on; connect anew, and
/// register fresh regions.
///
/// After [`Lost::Silent`] the data plane may only have been stopped, and may still write planes of fetches that
/// were under way when it goes on. Drop the regions, do not use their memory for something else.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// It closed the connection: it has ended, or was killed.
    #[error("the data plane has ended: start it again and connect anew")]
    HungUp,
    /// Its heartbeat stands still.
    #[error(
        "the data plane's heartbeat has stood still for {limit_ms} ms: it is stopped or overloaded; look at its \
         log, then connect anew"
    )]
    Silent {
        /// How long is tolerated, milliseconds.
        limit_ms: u128,
    },
    /// It ended the session and said why.
    #[error("the data plane ended the session: {0}")]
    Ended(String),
    /// It broke the protocol.
    #[error("the data plane broke the protocol: {0}; use a client and a data plane of the same release")]
    Broken(String),
    /// The client was dropped.
    #[error("the client was dropped while this was in use: keep it for as long as its fetches and regions")]
    Dropped,
    /// This process is a child of the one that connected.
    #[error("this process was forked from the one that connected: connect after the fork")]
    Forked,
}

impl From<ClientSessionError> for Lost {
    fn from(error: ClientSessionError) -> Self {
        match error {
            ClientSessionError::Socket(control::SocketError::HungUp) => Self::HungUp,
            ClientSessionError::Handshake(HandshakeError::Refused(reason)) => Self::Ended(reason),
            error => Self::Broken(error.to_string()),
        }
    }
}
