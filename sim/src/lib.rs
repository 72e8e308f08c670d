//! A deterministic network simulator around the real engines of both ends.
//!
//! A run is a function of its seed: integer time, one generator, no order that depends on a hash or an address.
//! What goes over the simulated wire are the engines' own bytes; only the payload of segments is named instead of
//! carried, unless a scenario asks for it.
//!
//! - [`random`], [`queue`]: chance and time;
//! - [`packet`], [`link`], [`net`]: what is between hosts, and what goes wrong there;
//! - [`host`], [`plane`], [`store`], [`content`]: the machines, with the invariants that they check at every turn;
//! - [`baseline`]: two other designs, to compare with;
//! - [`world`], [`record`]: a run;
//! - [`scenario`], [`catalogue`]: named measurements, and their figures;
//! - [`seeds`]: random runs, for what nobody thought of.
#![forbid(unsafe_code)]

pub mod baseline;
pub mod catalogue;
pub mod content;
pub mod host;
pub mod intakes;
pub mod link;
pub mod net;
pub mod packet;
pub mod plane;
pub mod queue;
pub mod random;
pub mod record;
pub mod saves;
pub mod scenario;
pub mod seeds;
pub mod store;
pub mod world;
