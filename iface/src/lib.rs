//! A port of DPDK as the protocol sees it: datagrams in and out of one queue, and the loop that polls it.
//!
//! The data plane and the store share this crate. In the order that a packet meets it: [`config`] says which
//! device and addresses, [`open`] makes one [`Link`] per queue, a lcore ([`lcore`]) polls the stage that owns the link,
//! [`Link::receive`] hands over what is for us, and [`Link::send`] and [`Link::flush`] answer.
#![forbid(unsafe_code)]

pub mod clock;
pub mod config;
pub mod counter;
pub mod direct;
pub mod lcore;
pub mod link;
pub mod steer;

pub use clock::Clock;
pub use config::{IfaceConfig, IpPrefix};
pub use counter::Counter;
pub use direct::{Direct, DirectDatagram, DirectError};
pub use lcore::{LcoreControl, LcoreCounters, Stage, StopOnDrop};
pub use link::{Datagram, Link, LinkCounters, NextHop, OpenError, Opened, Outgoing, open, open_direct};
