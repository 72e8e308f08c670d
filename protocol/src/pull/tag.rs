//! Tags and request ids: a slot and the generation of its use, so that what is late finds nobody.

/// The tag of `slot` in its `generation`th use.
#[inline]
pub(crate) const fn tag_of(slot: u16, generation: u16) -> u32 {
    (generation as u32) << 16 | slot as u32
}

/// The slot that a tag names.
#[inline]
pub(crate) const fn slot_of(tag: u32) -> u16 {
    let bytes = tag.to_le_bytes();
    u16::from_le_bytes([bytes[0], bytes[1]])
}

/// The tag of the same slot's next use.
#[inline]
pub(crate) const fn next(tag: u32) -> u32 {
    tag.wrapping_add(1 << 16)
}

/// The tag before a slot's first use, spread by the configured seed.
pub(crate) const fn first(slot: u16, seed: u32) -> u32 {
    let mixed = (seed ^ slot as u32).wrapping_mul(0x9e37_79b1).to_le_bytes();
    tag_of(slot, u16::from_le_bytes([mixed[2], mixed[3]]))
}
