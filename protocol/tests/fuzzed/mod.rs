//! What the fuzz targets of this crate run, and what their corpora are replayed with: frames and messages that anybody can send, to the readers and to
//! the engines of both ends. Any violation panics.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sizes of the tests are small, and each target uses a part of what it shares with others"
)]

#[path = "../network/chunks.rs"]
mod chunks;
mod fetch;
#[path = "../../../fuzz/input.rs"]
mod input;
mod put;
#[path = "../network/random.rs"]
mod random;
mod serve;
mod wire;

use std::net::{IpAddr, Ipv4Addr};

use protocol::wire::message::{MAGIC, VERSION};
use protocol::{Peer, ServeConfig};

pub(crate) use fetch::fetch;
pub(crate) use put::put;
pub(crate) use serve::serve;
pub(crate) use wire::wire;

fn peer(port: u8) -> Peer {
    Peer { mac: [2; 6], ip: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 1000 + u16::from(port & 3) }
}

/// A store's limits that are soon met, and tables that are soon made.
fn small(epoch: u64) -> ServeConfig {
    ServeConfig {
        epoch,
        max_pending_pulls: 16,
        max_pending_bytes: 1 << 20,
        max_pending_replies: 8,
        max_requesters: 3,
        ..ServeConfig::default()
    }
}

/// A message of type `kind & 7` around `rest`, or `rest` as it is where bit 3 is set.
fn message(kind: u8, rest: &[u8]) -> Vec<u8> {
    if kind & 8 != 0 {
        return rest.to_vec();
    }
    [&MAGIC[..], &[VERSION, kind & 7, 0, 0], rest].concat()
}
