//! What the fuzz targets of this crate run, and what their corpora are replayed with: what a client or a data plane reads that the other can write. Any
//! violation panics.

#[path = "../../../fuzz/input.rs"]
mod input;
mod message;
mod shared;

pub(crate) use message::message;
pub(crate) use shared::shared;
