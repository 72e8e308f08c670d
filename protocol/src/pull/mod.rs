//! What both pull: a data plane that fetches, and a store that takes in what is put.
//!
//! A [`Puller`] has byte ranges being pulled (*spans*) along *paths*, each to a peer that sends what it is asked for, in the order
//! of the asking. Its owner says what is to be pulled, from whom and in which order, and keeps the bytes; the puller says
//! how much may be asked for now, writes the PULLs, takes in which segments arrive, and finds what is lost.
//!
//! Credit, from the outside in: the link's (`link.rs`: what it holds and a burst), spaced in time (`pace.rs`); each path's
//! window (`window.rs`: congestion control by delay, marks and overflow). Memory is the owner's affair.
//!
//! Loss: what was asked for before something that has arrived is lost once it is late (`rack.rs`); if nothing arrives at
//! all, the last segment is asked for again, then everything (by the estimates of `rtt.rs`). Each PULL has a record (`asks.rs`).
mod arrive;
mod asks;
pub(crate) mod bits;
mod index;
mod link;
mod loss;
mod pace;
mod path;
mod puller;
mod rack;
mod rtt;
mod segments;
mod span;
pub(crate) mod tag;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "numbers of the test are small")]
mod twin;
mod window;

pub(crate) use index::{Index, PathIndex, SpanIndex, index};
pub(crate) use path::Path;
pub(crate) use puller::{Arrival, Budgets, Puller, TimedOut, Worth};
pub(crate) use rtt::Rtt;
pub(crate) use span::Span;
