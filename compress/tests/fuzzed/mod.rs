//! What the fuzz targets of this crate run, and what their corpora are replayed with: bytes that somebody else wrote are parsed and decoded, and whatever
//! they are, the result is an error that is named or what the reference says, and nothing is written outside the destination. Any violation panics.

mod header;
#[path = "../../../fuzz/input.rs"]
mod input;
mod mixed;
mod plane;
mod profile;

pub(crate) use header::chunk;
pub(crate) use mixed::mixed;
pub(crate) use plane::plane;
pub(crate) use profile::profile;
