//! Decoding in steps, so that something else than the decoder can decompress: a device, while the core goes on.
//!
//! 1. [`Decoder::check_segments`](crate::Decoder::check_segments): length and CRC32C of the encoded plane where it lies.
//! 2. [`PlaneEntry::section`](crate::PlaneEntry::section): what of it is compressed, and how.
//! 3. An [`Offload`] decompresses that.
//! 4. [`Decoder::decode_decompressed`](crate::Decoder::decode_decompressed): the rest of the plane and the decompressed bytes become elements.

use crate::Compression;

/// The compressed part of an encoded plane. It ends where the plane ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section {
    /// How it is compressed.
    pub compression: Compression,
    /// Where it starts, in bytes from the start of the encoded plane.
    pub start: usize,
    /// Its compressed bytes.
    pub compressed_bytes: usize,
    /// Bytes that it must give.
    pub bytes: usize,
}

/// Decompresses sections, at once or later and in any order. `J` is a plane with all that it needs; it is the offload's from [`Offload::submit`]
/// until [`Offload::finish`].
///
/// Call [`Offload::takes`] first, [`Offload::submit`] only while [`Offload::has_room`], then [`Offload::flush`] after the last of a burst; call
/// [`Offload::finish`] while [`Offload::in_flight`] is not 0. None of them waits.
pub trait Offload<J> {
    /// Whether it can decompress such a section at all.
    ///
    /// # Errors
    /// Why not.
    fn takes(&self, section: &Section) -> Result<(), Untaken>;

    /// Whether it can take one more plane now.
    fn has_room(&self) -> bool;

    /// Takes a plane whose checksum is right.
    ///
    /// # Errors
    /// Gives it back, unchanged.
    fn submit(&mut self, plane: J, section: &Section) -> Result<(), J>;

    /// Hands on what was submitted since the last time, as far as it is taken; the rest at the next call.
    fn flush(&mut self);

    /// Planes that it has.
    fn in_flight(&self) -> usize;

    /// Gives one plane that is done to `done`, with the section's bytes, or `None` if they could not be decompressed. False if none is done yet.
    fn finish(&mut self, done: impl FnOnce(J, Option<&[u8]>)) -> bool;
}

/// Why an [`Offload`] does not take a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Untaken {
    /// It does not know the compression.
    Compression,
    /// The section is too large, before or after.
    TooLarge,
}
