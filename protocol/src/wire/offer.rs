//! The two messages of a PUT: OFFER and OFFER_REPLY. The rest of it is PULL, DATA and ERROR with the ends changed: see
//! [`super::message`].

use super::message::{COMMON_BYTES, MAGIC, SEGMENT_ALIGN, VERSION};
use super::{le16, le32, le64, take};
use crate::key::Key;
use crate::reason::DropReason;

/// Type of an OFFER.
pub const OFFER: u8 = 8;
/// Type of an OFFER_REPLY.
pub const OFFER_REPLY: u8 = 9;
/// Bytes of an OFFER.
pub const OFFER_BYTES: usize = 72;
/// Bytes of an OFFER_REPLY.
pub const OFFER_REPLY_BYTES: usize = 32;

/// I have this chunk: take it if you want it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The data plane's name for the chunk while it is offered: the handle that PULLs for it use.
    pub offer: u32,
    /// Bytes of the chunk header with its plane table, at the chunk's start.
    pub header_bytes: u32,
    /// The data plane's epoch: offers are valid within it.
    pub epoch: u64,
    /// Bytes of the whole encoded chunk.
    pub chunk_bytes: u64,
    /// The chunk's name.
    pub key: Key,
    /// How long the data plane will go on offering it, in milliseconds: the store need not try for longer.
    pub patience_ms: u32,
    /// Largest segment that the data plane can send, a positive multiple of [`SEGMENT_ALIGN`].
    pub segment_bytes: u16,
}

/// What a store says to an OFFER.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum OfferStatus {
    /// It is being pulled, or checked.
    UnderWay = 1,
    /// It has been checked and is stored: lookups find it.
    Stored = 2,
    /// It was stored before.
    AlreadyStored = 3,
    /// Not now: offer it again after the time given.
    Busy = 4,
    /// There is no room, and none can be made: what is stored is pinned.
    Full = 5,
    /// Larger than this store takes.
    TooLarge = 6,
    /// It failed its checksums each time it was pulled.
    Corrupt = 7,
    /// Its header is intact and contradicts the format, the OFFER or its key.
    BadChunk = 8,
    /// This store takes no chunks.
    Closed = 9,
}

impl OfferStatus {
    fn from_u8(status: u8) -> Option<OfferStatus> {
        use OfferStatus::{AlreadyStored, BadChunk, Busy, Closed, Corrupt, Full, Stored, TooLarge, UnderWay};
        [UnderWay, Stored, AlreadyStored, Busy, Full, TooLarge, Corrupt, BadChunk, Closed]
            .into_iter()
            .find(|known| *known as u8 == status)
    }
}

/// A store's answer to an OFFER; also sent, once, when what was under way has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OfferReply {
    /// The OFFER's name for the chunk.
    pub offer: u32,
    /// What becomes of it.
    pub status: OfferStatus,
    /// With [`OfferStatus::Busy`], after how many milliseconds to offer again; else zero.
    pub retry_ms: u16,
    /// The OFFER's epoch.
    pub epoch: u64,
    /// The store's epoch.
    pub store_epoch: u64,
}

/// The type of a payload that begins as one of our messages does; what it holds is not looked at.
#[inline]
pub fn message_type(payload: &[u8]) -> Option<u8> {
    let header = payload.first_chunk::<COMMON_BYTES>()?;
    (header[0..4] == MAGIC && header[4] == VERSION).then_some(header[5])
}

const fn common(kind: u8) -> [u8; COMMON_BYTES] {
    [MAGIC[0], MAGIC[1], MAGIC[2], MAGIC[3], VERSION, kind, 0, 0]
}

/// The fixed layout of a message of `kind`, if `payload` is one.
fn fixed<const N: usize>(payload: &[u8], kind: u8) -> Result<&[u8; N], DropReason> {
    let header = payload.first_chunk::<COMMON_BYTES>().ok_or(DropReason::Truncated)?;
    if header[0..4] != MAGIC {
        return Err(DropReason::BadMagic);
    }
    if header[4] != VERSION {
        return Err(DropReason::BadVersion);
    }
    if header[5] != kind {
        return Err(DropReason::BadType);
    }
    if header[6..8] != [0, 0] {
        return Err(DropReason::BadFlags);
    }
    payload.try_into().map_err(|_| DropReason::BadLength)
}

/// Reads an OFFER. That its sizes make sense is for the store to judge.
pub fn read_offer(payload: &[u8]) -> Result<Offer, DropReason> {
    let bytes = fixed::<OFFER_BYTES>(payload, OFFER)?;
    if le16(bytes, 70) != 0 {
        return Err(DropReason::BadFlags);
    }
    let segment_bytes = le16(bytes, 68);
    if segment_bytes == 0 || !segment_bytes.is_multiple_of(SEGMENT_ALIGN) {
        return Err(DropReason::BadField);
    }
    Ok(Offer {
        offer: le32(bytes, 8),
        header_bytes: le32(bytes, 12),
        epoch: le64(bytes, 16),
        chunk_bytes: le64(bytes, 24),
        key: Key(take(bytes, 32)),
        patience_ms: le32(bytes, 64),
        segment_bytes,
    })
}

/// The name and epoch of an OFFER of which an ICMP error quotes the beginning; `None` if it is something else, or too little.
pub fn quoted(quote: &[u8]) -> Option<(u32, u64)> {
    let quote = quote.first_chunk::<{ super::icmp::QUOTE_BYTES }>()?;
    (quote[..COMMON_BYTES] == common(OFFER)).then(|| (le32(quote, 8), le64(quote, 16)))
}

/// Writes an OFFER; `None` if `out` is too short.
pub fn emit_offer(out: &mut [u8], offer: &Offer) -> Option<usize> {
    let out = out.first_chunk_mut::<OFFER_BYTES>()?;
    out[0..8].copy_from_slice(&common(OFFER));
    out[8..12].copy_from_slice(&offer.offer.to_le_bytes());
    out[12..16].copy_from_slice(&offer.header_bytes.to_le_bytes());
    out[16..24].copy_from_slice(&offer.epoch.to_le_bytes());
    out[24..32].copy_from_slice(&offer.chunk_bytes.to_le_bytes());
    out[32..64].copy_from_slice(&offer.key.0);
    out[64..68].copy_from_slice(&offer.patience_ms.to_le_bytes());
    out[68..70].copy_from_slice(&offer.segment_bytes.to_le_bytes());
    out[70..72].fill(0);
    Some(OFFER_BYTES)
}

/// Reads an OFFER_REPLY.
pub fn read_offer_reply(payload: &[u8]) -> Result<OfferReply, DropReason> {
    let bytes = fixed::<OFFER_REPLY_BYTES>(payload, OFFER_REPLY)?;
    if bytes[13] != 0 {
        return Err(DropReason::BadFlags);
    }
    let status = OfferStatus::from_u8(bytes[12]).ok_or(DropReason::BadField)?;
    Ok(OfferReply {
        offer: le32(bytes, 8),
        status,
        retry_ms: le16(bytes, 14),
        epoch: le64(bytes, 16),
        store_epoch: le64(bytes, 24),
    })
}

/// Writes an OFFER_REPLY; `None` if `out` is too short.
pub fn emit_offer_reply(out: &mut [u8], reply: &OfferReply) -> Option<usize> {
    let out = out.first_chunk_mut::<OFFER_REPLY_BYTES>()?;
    out[0..8].copy_from_slice(&common(OFFER_REPLY));
    out[8..12].copy_from_slice(&reply.offer.to_le_bytes());
    out[12] = reply.status as u8;
    out[13] = 0;
    out[14..16].copy_from_slice(&reply.retry_ms.to_le_bytes());
    out[16..24].copy_from_slice(&reply.epoch.to_le_bytes());
    out[24..32].copy_from_slice(&reply.store_epoch.to_le_bytes());
    Some(OFFER_REPLY_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn offers_survive_the_wire(
            (offer, header_bytes, patience_ms) in any::<(u32, u32, u32)>(), (epoch, chunk_bytes) in any::<(u64, u64)>(),
            key in any::<[u8; 32]>(), units in 1_u16..2047,
        ) {
            let segment_bytes = units * SEGMENT_ALIGN;
            let said = Offer { offer, header_bytes, epoch, chunk_bytes, key: Key(key), patience_ms, segment_bytes };
            let mut out = [0xff; OFFER_BYTES + 1];
            prop_assert_eq!(emit_offer(&mut out, &said), Some(OFFER_BYTES));
            prop_assert_eq!(message_type(&out), Some(OFFER));
            prop_assert_eq!(read_offer(&out[..OFFER_BYTES]), Ok(said));
            prop_assert_eq!(read_offer(&out), Err(DropReason::BadLength));
            prop_assert_eq!(read_offer_reply(&out[..OFFER_BYTES]), Err(DropReason::BadType));
            prop_assert_eq!(emit_offer(&mut out[..OFFER_BYTES - 1], &said), None);
        }

        #[test]
        fn replies_survive_the_wire(offer: u32, status in 0_u8..20, retry_ms: u16, epoch: u64, store_epoch: u64) {
            let Some(status) = OfferStatus::from_u8(status) else { return Ok(()) };
            let said = OfferReply { offer, status, retry_ms, epoch, store_epoch };
            let mut out = [0xff; OFFER_REPLY_BYTES];
            prop_assert_eq!(emit_offer_reply(&mut out, &said), Some(OFFER_REPLY_BYTES));
            prop_assert_eq!(read_offer_reply(&out), Ok(said));
            out[12] = 0;
            prop_assert_eq!(read_offer_reply(&out), Err(DropReason::BadField));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = (read_offer(&bytes), read_offer_reply(&bytes), message_type(&bytes));
        }
    }
}
