//! What a client is told at its start.

use std::time::Duration;

use protocol::key::Namespace;

/// How to connect, and whose chunks to name.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// What this client's keys stand for: model, layout, codec, rank and salt. Must equal what the chunks were
    /// stored under, or nothing is ever found.
    pub namespace: Namespace,
    /// What the client calls itself in the data plane's log.
    pub name: String,
    /// How long [`crate::Client::connect`] and [`crate::Client::register`] wait for the data plane.
    pub timeout: Duration,
    /// For how long the data plane's heartbeat word may stand still before the session counts as lost. The data
    /// plane writes it every 100 ms.
    pub heartbeat_limit: Duration,
    /// For how long [`crate::Fetch::wait`] polls the completions itself before it sleeps. Saves the two
    /// wake-ups of a sleeping waiter, some tens of microseconds, and costs a core for as long.
    pub spin: Duration,
    /// How long dropping an unfinished [`crate::Fetch`] waits for the cancelled fetch's end.
    pub drop_wait: Duration,
}

impl ClientConfig {
    /// The defaults: wait 2 s for answers, 700 ms for a heartbeat, no spinning, 2 s for a dropped fetch to end.
    #[must_use]
    pub fn new(namespace: Namespace) -> Self {
        Self {
            namespace,
            name: format!("client {}", std::process::id()),
            timeout: Duration::from_secs(2),
            heartbeat_limit: Duration::from_millis(700),
            spin: Duration::ZERO,
            drop_wait: Duration::from_secs(2),
        }
    }
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self::new(Namespace::default())
    }
}
