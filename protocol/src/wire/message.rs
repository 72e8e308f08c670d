//! Our messages, each one UDP payload; little-endian, headers a multiple of 8 bytes. docs/PROTOCOL.md is the
//! specification; the constants here are its numbers.

use super::{le16, le32, le64, take};
use crate::chunk::ChunkInfo;
use crate::key::{CHUNK_TOKENS, Key};
use crate::reason::DropReason;

/// First four bytes of every message: "SKVP".
pub const MAGIC: [u8; 4] = *b"SKVP";
/// Version of this protocol.
pub const VERSION: u8 = 1;
/// Bytes of the header that all messages begin with: magic, version, type, flags.
pub const COMMON_BYTES: usize = 8;
/// Bytes of a LOOKUP before its keys.
pub const LOOKUP_HEADER_BYTES: usize = 16;
/// Bytes of a LOOKUP_REPLY before its entries.
pub const LOOKUP_REPLY_HEADER_BYTES: usize = 24;
/// Bytes of an entry of a LOOKUP_REPLY.
pub const REPLY_ENTRY_BYTES: usize = 32;
/// Bytes of a PULL before its runs.
pub const PULL_HEADER_BYTES: usize = 48;
/// Bytes of a run of a PULL.
pub const RUN_BYTES: usize = 8;
/// Bytes of a DATA message before its payload.
pub const DATA_HEADER_BYTES: usize = 32;
/// Bytes of an ERROR.
pub const ERROR_BYTES: usize = 32;
/// Bytes of a PROBE or PROBE_REPLY before its padding.
pub const PROBE_HEADER_BYTES: usize = 24;
/// Most keys of a LOOKUP.
pub const MAX_LOOKUP_KEYS: usize = 40;
/// Most runs of a PULL.
pub const MAX_PULL_RUNS: usize = 64;
/// Segments are a multiple of this many bytes, so that 32-byte vectors never straddle two.
pub const SEGMENT_ALIGN: u16 = 32;
/// Bytes of the largest LOOKUP_REPLY.
pub const MAX_REPLY_BYTES: usize = LOOKUP_REPLY_HEADER_BYTES + MAX_LOOKUP_KEYS * REPLY_ENTRY_BYTES;
/// Bytes of the largest message other than DATA: give `poll_transmit` at least this much room.
pub const MAX_CONTROL_BYTES: usize = MAX_REPLY_BYTES;

/// Message types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum MessageType {
    /// Data plane to store: which of these keys are held?
    Lookup = 1,
    /// Store to data plane: what is known of each key.
    LookupReply = 2,
    /// Data plane to store: send these segments.
    Pull = 3,
    /// Store to data plane: one segment.
    Data = 4,
    /// Store to data plane: a request that cannot be served, or not now.
    Error = 5,
    /// Data plane to store: does a message of this size arrive?
    Probe = 6,
    /// Store to data plane: it did, and this one has the same size.
    ProbeReply = 7,
}

/// Why a store does not serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ErrorCode {
    /// The PULL names another epoch: the store has restarted since the lookup.
    StaleEpoch = 1,
    /// No chunk has this handle, or no longer.
    UnknownHandle = 2,
    /// The range reaches beyond the chunk.
    OutOfRange = 3,
    /// The PULL contradicts the specification or the store's limits.
    BadRequest = 4,
    /// The store's queues are full: ask again after [`Refusal::retry_us`]. The only code that a LOOKUP can get.
    Busy = 5,
}

impl ErrorCode {
    fn from_u8(code: u8) -> Option<ErrorCode> {
        Some(match code {
            1 => ErrorCode::StaleEpoch,
            2 => ErrorCode::UnknownHandle,
            3 => ErrorCode::OutOfRange,
            4 => ErrorCode::BadRequest,
            5 => ErrorCode::Busy,
            _ => return None,
        })
    }
}

/// A checked message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// See [`Lookup`].
    Lookup(Lookup<'a>),
    /// See [`LookupReply`].
    LookupReply(LookupReply<'a>),
    /// See [`Pull`].
    Pull(Pull<'a>),
    /// See [`Data`].
    Data(Data<'a>),
    /// See [`Refusal`].
    Error(Refusal),
    /// See [`Probe`].
    Probe(Probe),
    /// See [`Probe`].
    ProbeReply(Probe),
}

/// Which of these keys are held?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup<'a> {
    /// Chosen by the data plane and repeated in the reply.
    pub request: u32,
    keys: &'a [u8],
}

impl<'a> Lookup<'a> {
    /// The keys, 1 to [`MAX_LOOKUP_KEYS`].
    pub fn keys(&self) -> impl ExactSizeIterator<Item = Key> + 'a {
        self.keys.chunks_exact(Key::BYTES).map(|key| Key(take(key, 0)))
    }
}

/// What is known of each key of a LOOKUP, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LookupReply<'a> {
    /// The LOOKUP's request id.
    pub request: u32,
    /// The store's epoch: handles are valid within it.
    pub epoch: u64,
    entries: &'a [u8],
}

impl<'a> LookupReply<'a> {
    /// One entry per key; `None` where the store does not hold it.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = Option<ChunkInfo>> + 'a {
        self.entries.chunks_exact(REPLY_ENTRY_BYTES).map(read_entry)
    }
}

fn read_entry(entry: &[u8]) -> Option<ChunkInfo> {
    (entry[26] == 1).then(|| ChunkInfo {
        handle: le32(entry, 0),
        header_bytes: le32(entry, 4),
        chunk_bytes: le64(entry, 8),
        tokens: le16(entry, 16),
        layers: le16(entry, 18),
        kv_heads: le16(entry, 20),
        head_dim: le16(entry, 22),
        dtype: entry[24],
        codec: entry[25],
    })
}

/// Consecutive segments of a PULL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// First segment.
    pub first: u32,
    /// How many, at least 1.
    pub count: u16,
}

/// Send these segments of a byte range of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pull<'a> {
    /// The range and how it is cut.
    pub range: PullRange,
    /// Fastest that the store is to send to the port that asked, in Mbit/s of segments; 0 for as fast as it can.
    pub pace_mbps: u32,
    /// The data plane's number of this PULL, repeated in every DATA and ERROR that answers it.
    pub sequence: u32,
    runs: &'a [u8],
}

/// The byte range that a tag stands for, and how it is cut into segments. The same in every PULL of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PullRange {
    /// Chosen by the data plane and repeated in every DATA.
    pub tag: u32,
    /// The chunk, as named by the store in a LOOKUP_REPLY.
    pub handle: u32,
    /// The store's epoch at that time.
    pub epoch: u64,
    /// Where the range begins, in bytes from the chunk's start.
    pub offset: u64,
    /// Bytes of the range.
    pub bytes: u32,
    /// Bytes of each segment but the last, a multiple of [`SEGMENT_ALIGN`].
    pub segment_bytes: u16,
}

impl<'a> Pull<'a> {
    /// The runs, 1 to [`MAX_PULL_RUNS`].
    pub fn runs(&self) -> impl ExactSizeIterator<Item = Run> + 'a {
        self.runs.chunks_exact(RUN_BYTES).map(|run| Run { first: le32(run, 0), count: le16(run, 4) })
    }
}

/// One segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data<'a> {
    /// The PULL's tag.
    pub tag: u32,
    /// Which segment of the range.
    pub segment: u32,
    /// The store's epoch.
    pub epoch: u64,
    /// The number of the PULL that this segment answers.
    pub sequence: u32,
    /// How long that PULL had waited in the store when this segment was sent, in nanoseconds, at most `u32::MAX`; 0 if
    /// the store does not measure it.
    pub waited_ns: u32,
    /// The segment's bytes.
    pub payload: &'a [u8],
}

/// What an ERROR is the answer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Subject {
    /// The PULLs of a tag.
    Pull = 0,
    /// The LOOKUP of a request id.
    Lookup = 1,
}

/// A request that cannot be served, or not now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The PULL's tag, or the LOOKUP's request id.
    pub tag: u32,
    /// Which of the two.
    pub subject: Subject,
    /// Why.
    pub code: ErrorCode,
    /// The store's epoch.
    pub epoch: u64,
    /// The number of the PULL; 0 for a LOOKUP.
    pub sequence: u32,
    /// With [`ErrorCode::Busy`]: microseconds after which asking again is worth it. Otherwise 0.
    pub retry_us: u32,
}

impl Refusal {
    /// A PULL that cannot be served.
    pub const fn of_pull(tag: u32, sequence: u32, code: ErrorCode, epoch: u64) -> Refusal {
        Refusal { tag, subject: Subject::Pull, code, epoch, sequence, retry_us: 0 }
    }
}

/// A message that is there for its size: zeros behind a short header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Chosen by the data plane and repeated in the reply.
    pub id: u32,
    /// Bytes of the whole message, at least [`PROBE_HEADER_BYTES`].
    pub bytes: u16,
    /// The store's epoch; 0 in a PROBE.
    pub epoch: u64,
}

impl<'a> Message<'a> {
    /// Reads a UDP payload.
    pub fn new_checked(payload: &'a [u8]) -> Result<Message<'a>, DropReason> {
        let Some((common, _)) = payload.split_first_chunk::<COMMON_BYTES>() else {
            return Err(DropReason::Truncated);
        };
        if common[0..4] != MAGIC {
            return Err(DropReason::BadMagic);
        }
        if common[4] != VERSION {
            return Err(DropReason::BadVersion);
        }
        if common[6..8] != [0, 0] {
            return Err(DropReason::BadFlags);
        }
        match common[5] {
            1 => read_lookup(payload).map(Message::Lookup),
            2 => read_lookup_reply(payload).map(Message::LookupReply),
            3 => read_pull(payload).map(Message::Pull),
            4 => read_data(payload).map(Message::Data),
            5 => read_error(payload).map(Message::Error),
            6 => read_probe(payload).map(Message::Probe),
            7 => read_probe(payload).map(Message::ProbeReply),
            _ => Err(DropReason::BadType),
        }
    }
}

/// The fast path of [`Message::new_checked`] for the one message that comes by the million: `None` if `payload` is not
/// a well-formed DATA message.
#[inline]
pub fn data(payload: &[u8]) -> Option<Data<'_>> {
    let (header, _) = payload.split_first_chunk::<DATA_HEADER_BYTES>()?;
    if header[0..COMMON_BYTES] != common(MessageType::Data) {
        return None;
    }
    read_data(payload).ok()
}

/// The DATA message whose header is `header`, all of it, and whose segment lies where it cannot be read; `None` if it is no such header.
#[inline]
pub fn data_header(header: &[u8]) -> Option<Data<'_>> {
    let header: &[u8; DATA_HEADER_BYTES] = header.try_into().ok()?;
    (header[0..COMMON_BYTES] == common(MessageType::Data)).then(|| data_of(header, &[]))
}

/// What an ICMP error's quote of a message that we sent to a store names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quoted {
    /// A LOOKUP.
    Lookup {
        /// Its request id.
        request: u32,
        /// The first of its keys.
        key: Key,
    },
    /// A PULL.
    Pull {
        /// Its tag.
        tag: u32,
        /// The store's epoch.
        epoch: u64,
        /// Its number.
        sequence: u32,
    },
}

/// Reads the first [`super::icmp::QUOTE_BYTES`] of a LOOKUP or PULL; `None` if it is something else, or too little was quoted.
pub fn quoted(quote: &[u8]) -> Option<Quoted> {
    let quote = quote.first_chunk::<{ super::icmp::QUOTE_BYTES }>()?;
    let kind = &quote[..COMMON_BYTES];
    if kind == common(MessageType::Lookup) {
        let key = Key(take(quote, LOOKUP_HEADER_BYTES));
        return Some(Quoted::Lookup { request: le32(quote, 8), key });
    }
    (kind == common(MessageType::Pull)).then(|| Quoted::Pull {
        tag: le32(quote, 8),
        epoch: le64(quote, 16),
        sequence: le32(quote, 44),
    })
}

/// Whether a payload says that it is a DATA message.
#[inline]
pub fn is_data(payload: &[u8]) -> bool {
    payload.get(5) == Some(&(MessageType::Data as u8))
}

#[inline(always)]
const fn common(kind: MessageType) -> [u8; COMMON_BYTES] {
    [MAGIC[0], MAGIC[1], MAGIC[2], MAGIC[3], VERSION, kind as u8, 0, 0]
}

/// Splits a payload after its fixed header.
#[inline(always)]
fn split<const N: usize>(payload: &[u8]) -> Result<(&[u8; N], &[u8]), DropReason> {
    payload.split_first_chunk().ok_or(DropReason::Truncated)
}

fn read_lookup(payload: &[u8]) -> Result<Lookup<'_>, DropReason> {
    let (header, keys) = split::<LOOKUP_HEADER_BYTES>(payload)?;
    let count = usize::from(le16(header, 12));
    if le16(header, 14) != 0 {
        return Err(DropReason::BadFlags);
    }
    if count == 0 || count > MAX_LOOKUP_KEYS || keys.len() != count * Key::BYTES {
        return Err(DropReason::BadLength);
    }
    Ok(Lookup { request: le32(header, 8), keys })
}

fn read_lookup_reply(payload: &[u8]) -> Result<LookupReply<'_>, DropReason> {
    let (header, entries) = split::<LOOKUP_REPLY_HEADER_BYTES>(payload)?;
    let count = usize::from(le16(header, 12));
    if le16(header, 14) != 0 {
        return Err(DropReason::BadFlags);
    }
    if count == 0 || count > MAX_LOOKUP_KEYS || entries.len() != count * REPLY_ENTRY_BYTES {
        return Err(DropReason::BadLength);
    }
    for entry in entries.chunks_exact(REPLY_ENTRY_BYTES) {
        if entry[27..32] != [0; 5] {
            return Err(DropReason::BadFlags);
        }
        let tokens = usize::from(le16(entry, 16));
        if entry[26] > 1 || (entry[26] == 1 && !(1..=CHUNK_TOKENS).contains(&tokens)) {
            return Err(DropReason::BadField);
        }
    }
    Ok(LookupReply { request: le32(header, 8), epoch: le64(header, 16), entries })
}

fn read_pull(payload: &[u8]) -> Result<Pull<'_>, DropReason> {
    let (header, runs) = split::<PULL_HEADER_BYTES>(payload)?;
    let count = usize::from(le16(header, 38));
    if count == 0 || count > MAX_PULL_RUNS || runs.len() != count * RUN_BYTES {
        return Err(DropReason::BadLength);
    }
    if runs.chunks_exact(RUN_BYTES).any(|run| le16(run, 6) != 0) {
        return Err(DropReason::BadFlags);
    }
    let range = PullRange {
        tag: le32(header, 8),
        handle: le32(header, 12),
        epoch: le64(header, 16),
        offset: le64(header, 24),
        bytes: le32(header, 32),
        segment_bytes: le16(header, 36),
    };
    Ok(Pull { range, pace_mbps: le32(header, 40), sequence: le32(header, 44), runs })
}

#[inline(always)]
fn read_data(payload: &[u8]) -> Result<Data<'_>, DropReason> {
    let (header, payload) = split::<DATA_HEADER_BYTES>(payload)?;
    if payload.is_empty() {
        return Err(DropReason::BadLength);
    }
    Ok(data_of(header, payload))
}

#[inline(always)]
fn data_of<'a>(header: &[u8; DATA_HEADER_BYTES], payload: &'a [u8]) -> Data<'a> {
    Data {
        tag: le32(header, 8),
        segment: le32(header, 12),
        epoch: le64(header, 16),
        sequence: le32(header, 24),
        waited_ns: le32(header, 28),
        payload,
    }
}

fn read_error(payload: &[u8]) -> Result<Refusal, DropReason> {
    let (header, rest) = split::<ERROR_BYTES>(payload)?;
    if !rest.is_empty() {
        return Err(DropReason::BadLength);
    }
    if header[14..16] != [0; 2] {
        return Err(DropReason::BadFlags);
    }
    let code = ErrorCode::from_u8(header[12]).ok_or(DropReason::BadField)?;
    let subject = match header[13] {
        0 => Subject::Pull,
        1 if code == ErrorCode::Busy => Subject::Lookup,
        _ => return Err(DropReason::BadField),
    };
    let retry_us = le32(header, 28);
    if code != ErrorCode::Busy && retry_us != 0 {
        return Err(DropReason::BadFlags);
    }
    let (tag, sequence) = (le32(header, 8), le32(header, 24));
    Ok(Refusal { tag, subject, code, epoch: le64(header, 16), sequence, retry_us })
}

/// The padding is not looked at: only its size matters, and that the datagram arrived whole.
fn read_probe(payload: &[u8]) -> Result<Probe, DropReason> {
    let (header, _) = split::<PROBE_HEADER_BYTES>(payload)?;
    if le16(header, 14) != 0 {
        return Err(DropReason::BadFlags);
    }
    let bytes = le16(header, 12);
    if usize::from(bytes) != payload.len() {
        return Err(DropReason::BadLength);
    }
    Ok(Probe { id: le32(header, 8), bytes, epoch: le64(header, 16) })
}

/// Writes a LOOKUP; returns its length, or `None` if `out` is too short or `keys` are none or too many.
pub fn emit_lookup<'k>(
    out: &mut [u8],
    request: u32,
    keys: impl ExactSizeIterator<Item = &'k Key>,
) -> Option<usize> {
    let count = keys.len();
    if count == 0 || count > MAX_LOOKUP_KEYS {
        return None;
    }
    let bytes = LOOKUP_HEADER_BYTES + count * Key::BYTES;
    let (header, rest) = out.get_mut(..bytes)?.split_first_chunk_mut::<LOOKUP_HEADER_BYTES>()?;
    header[0..8].copy_from_slice(&common(MessageType::Lookup));
    header[8..12].copy_from_slice(&request.to_le_bytes());
    header[12..14].copy_from_slice(&u16::try_from(count).ok()?.to_le_bytes());
    header[14..16].fill(0);
    for (slot, key) in rest.chunks_exact_mut(Key::BYTES).zip(keys) {
        slot.copy_from_slice(&key.0);
    }
    Some(bytes)
}

/// Writes a LOOKUP_REPLY; returns its length, or `None` if `out` is too short or `entries` are none or too many.
pub fn emit_lookup_reply(
    out: &mut [u8],
    request: u32,
    epoch: u64,
    entries: impl ExactSizeIterator<Item = Option<ChunkInfo>>,
) -> Option<usize> {
    let count = entries.len();
    if count == 0 || count > MAX_LOOKUP_KEYS {
        return None;
    }
    let bytes = LOOKUP_REPLY_HEADER_BYTES + count * REPLY_ENTRY_BYTES;
    let (header, rest) = out.get_mut(..bytes)?.split_first_chunk_mut::<LOOKUP_REPLY_HEADER_BYTES>()?;
    header[0..8].copy_from_slice(&common(MessageType::LookupReply));
    header[8..12].copy_from_slice(&request.to_le_bytes());
    header[12..14].copy_from_slice(&u16::try_from(count).ok()?.to_le_bytes());
    header[14..16].fill(0);
    header[16..24].copy_from_slice(&epoch.to_le_bytes());
    for (slot, entry) in rest.chunks_exact_mut(REPLY_ENTRY_BYTES).zip(entries) {
        slot.fill(0);
        if let Some(info) = entry {
            write_entry(slot, &info);
        }
    }
    Some(bytes)
}

fn write_entry(slot: &mut [u8], info: &ChunkInfo) {
    slot[0..4].copy_from_slice(&info.handle.to_le_bytes());
    slot[4..8].copy_from_slice(&info.header_bytes.to_le_bytes());
    slot[8..16].copy_from_slice(&info.chunk_bytes.to_le_bytes());
    slot[16..18].copy_from_slice(&info.tokens.to_le_bytes());
    slot[18..20].copy_from_slice(&info.layers.to_le_bytes());
    slot[20..22].copy_from_slice(&info.kv_heads.to_le_bytes());
    slot[22..24].copy_from_slice(&info.head_dim.to_le_bytes());
    slot[24] = info.dtype;
    slot[25] = info.codec;
    slot[26] = 1;
}

/// Writes a PULL; returns its length, or `None` if `out` is too short or `runs` are none or too many.
///
/// `pace_mbps` and `sequence` are those of [`Pull`].
pub fn emit_pull(
    out: &mut [u8],
    range: &PullRange,
    pace_mbps: u32,
    sequence: u32,
    runs: &[Run],
) -> Option<usize> {
    if runs.is_empty() || runs.len() > MAX_PULL_RUNS {
        return None;
    }
    let bytes = PULL_HEADER_BYTES + runs.len() * RUN_BYTES;
    let (header, rest) = out.get_mut(..bytes)?.split_first_chunk_mut::<PULL_HEADER_BYTES>()?;
    header[0..8].copy_from_slice(&common(MessageType::Pull));
    header[8..12].copy_from_slice(&range.tag.to_le_bytes());
    header[12..16].copy_from_slice(&range.handle.to_le_bytes());
    header[16..24].copy_from_slice(&range.epoch.to_le_bytes());
    header[24..32].copy_from_slice(&range.offset.to_le_bytes());
    header[32..36].copy_from_slice(&range.bytes.to_le_bytes());
    header[36..38].copy_from_slice(&range.segment_bytes.to_le_bytes());
    header[38..40].copy_from_slice(&u16::try_from(runs.len()).ok()?.to_le_bytes());
    header[40..44].copy_from_slice(&pace_mbps.to_le_bytes());
    header[44..48].copy_from_slice(&sequence.to_le_bytes());
    for (slot, run) in rest.chunks_exact_mut(RUN_BYTES).zip(runs) {
        slot[0..4].copy_from_slice(&run.first.to_le_bytes());
        slot[4..6].copy_from_slice(&run.count.to_le_bytes());
        slot[6..8].fill(0);
    }
    Some(bytes)
}

/// Writes the header of a DATA message, behind which the segment follows (the `payload` given is not looked at);
/// `None` if `out` is too short.
#[inline]
pub fn emit_data_header(out: &mut [u8], data: &Data<'_>) -> Option<usize> {
    let header = out.first_chunk_mut::<DATA_HEADER_BYTES>()?;
    header[0..8].copy_from_slice(&common(MessageType::Data));
    header[8..12].copy_from_slice(&data.tag.to_le_bytes());
    header[12..16].copy_from_slice(&data.segment.to_le_bytes());
    header[16..24].copy_from_slice(&data.epoch.to_le_bytes());
    header[24..28].copy_from_slice(&data.sequence.to_le_bytes());
    header[28..32].copy_from_slice(&data.waited_ns.to_le_bytes());
    Some(DATA_HEADER_BYTES)
}

/// Writes an ERROR; `None` if `out` is too short.
pub fn emit_error(out: &mut [u8], refusal: &Refusal) -> Option<usize> {
    let header = out.first_chunk_mut::<ERROR_BYTES>()?;
    header[0..8].copy_from_slice(&common(MessageType::Error));
    header[8..12].copy_from_slice(&refusal.tag.to_le_bytes());
    header[12] = refusal.code as u8;
    header[13] = refusal.subject as u8;
    header[14..16].fill(0);
    header[16..24].copy_from_slice(&refusal.epoch.to_le_bytes());
    header[24..28].copy_from_slice(&refusal.sequence.to_le_bytes());
    header[28..32].copy_from_slice(&refusal.retry_us.to_le_bytes());
    Some(ERROR_BYTES)
}

/// Writes a PROBE, or with `reply` a PROBE_REPLY, padding included; `None` if `out` is shorter than `probe.bytes` or
/// that is less than the header.
pub fn emit_probe(out: &mut [u8], probe: &Probe, reply: bool) -> Option<usize> {
    let bytes = usize::from(probe.bytes);
    let (header, padding) = out.get_mut(..bytes)?.split_first_chunk_mut::<PROBE_HEADER_BYTES>()?;
    let kind = if reply { MessageType::ProbeReply } else { MessageType::Probe };
    header[0..8].copy_from_slice(&common(kind));
    header[8..12].copy_from_slice(&probe.id.to_le_bytes());
    header[12..14].copy_from_slice(&probe.bytes.to_le_bytes());
    header[14..16].fill(0);
    header[16..24].copy_from_slice(&probe.epoch.to_le_bytes());
    padding.fill(0);
    Some(bytes)
}

/// Segments of a range of `bytes` cut into `segment_bytes`, which must not be zero.
#[inline]
pub const fn segments(bytes: u32, segment_bytes: u16) -> u32 {
    bytes.div_ceil(segment_bytes as u32)
}
