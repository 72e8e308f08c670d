//! What a serving process links: look up a prompt's stored prefix, fetch its KV cache, wait or poll, cancel.
//!
//! A [`Client`] is one session with the data plane on this machine. It holds no DPDK and copies no KV: planes
//! are written by the data plane into a [`Region`], memory that both processes map. `docs/CLIENT.md` tells how
//! a serving process uses all this.
//!
//! ```no_run
//! use std::time::Duration;
//! use client::{Client, ClientConfig, FetchRequest, Namespace, Outcome};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let namespace = Namespace { model: "llama-8b".into(), codec: "int4".into(), ..Default::default() };
//! let client = Client::connect("/run/shadowserve.sock", &ClientConfig::new(namespace))?;
//!
//! let tokens: Vec<i32> = (0..1000).collect();
//! let prefix = client.lookup(&tokens, Duration::from_millis(50))?;
//! if let Some(bytes) = prefix.sequence_bytes() {
//!     let region = client.register(bytes)?;
//!     let mut fetch = client.fetch(&FetchRequest::sequence(&prefix, &region)?)?;
//!     let report = fetch.wait(Duration::from_secs(2))?;
//!     if report.outcome == Outcome::Done {
//!         let mut first_head = vec![0; 256];
//!         region.copy_out(0, &mut first_head)?;
//!     }
//! }
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod client;
mod config;
mod dispatch;
mod fetch;
mod lost;
mod prefix;
mod region;
mod shared;

pub use crate::client::{Client, ConnectError, LookupError, StatsError};
pub use config::ClientConfig;
pub use control::{
    ChunkPlace, Codec, CommandError, Dtype, Layout, LayoutError, Missing, MissingReason, Outcome, Shape,
};
pub use fetch::{Fetch, FetchError, FetchReport, FetchRequest, Progress, RequestError};
pub use lost::Lost;
pub use prefix::{Prefix, PrefixChunk};
pub use protocol::key::{Key, Namespace};
pub use region::{Region, RegisterError};
