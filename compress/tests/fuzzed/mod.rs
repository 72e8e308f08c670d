//! What the fuzz targets `chunk`, `plane_none`, `plane_zstd`, `plane_deflate` and `plane_sliced` run, and what the corpora are replayed with: bytes that somebody else
//! wrote are parsed and decoded, and whatever they are, the result is an error that is named or what the reference says, and nothing is written
//! outside the destination. Any violation panics.

use std::cell::RefCell;

use compress::{
    ChunkHeader, ChunkView, Codec, Compression, DecodeError, Decoder, Dtype, ENTRY_BYTES, FIXED_HEADER_BYTES,
    FORMAT_VERSION, MAGIC, OutDtype, PlaneEntry, Quantizer, Shape, crc32c, reference,
};

const CANARY: u8 = 0xa5;
const GUARD_BYTES: usize = 64;

/// Takes numbers from the front of the input; 0 when it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    /// `n` bytes, those that are left over and over again.
    fn bytes(&self, n: usize) -> Vec<u8> {
        if self.0.is_empty() { vec![0; n] } else { self.0.iter().copied().cycle().take(n).collect() }
    }
}

/// The header of a chunk. The first byte says what of it is put right, so that what lies behind the checks is reached: bit 0 the magic number, the
/// version and the size of an entry, bit 1 the number of planes and the header's size, bit 2 the sizes and places of planes, bit 3 the checksum.
pub(crate) fn chunk(data: &[u8]) {
    let Some((&mend, rest)) = data.split_first() else { return };
    let mut header = rest.to_vec();
    mend_header(&mut header, mend);
    let Ok(announced) = ChunkView::announced_header_bytes(&header) else {
        assert!(ChunkView::parse(&header).is_err(), "a header that announces nothing, but parses");
        return;
    };
    let Ok(view) = ChunkView::parse(&header) else {
        assert!(ChunkHeader::parse(&header).is_err(), "the copy parses where the view does not");
        return;
    };
    let copy = ChunkHeader::parse(&header).expect("what the view parses");
    assert_eq!((view.header_bytes(), &copy.shape, &copy.key), (announced, view.shape(), view.key()));
    let shape = *view.shape();
    assert!(shape.check().is_ok() && copy.planes.len() == shape.planes());
    let mut end = announced as u64;
    for (index, entry) in view.planes().enumerate() {
        assert_eq!((Some(entry), copy.planes[index]), (view.plane(index), entry));
        assert!(entry.offset >= end, "plane {index} overlaps what is before it");
        end = entry.offset.checked_add(u64::from(entry.bytes)).expect("no plane wraps around");
        let section = entry.section(&shape).expect("what the table says was checked with it");
        if let Some(section) = section {
            let bytes = usize::try_from(entry.bytes).expect("32 bits");
            assert_eq!(section.start + section.compressed_bytes, bytes);
            assert!(section.compressed_bytes < section.bytes && section.bytes <= shape.plane_bytes());
        }
    }
    assert_eq!((end, view.plane(shape.planes())), (view.chunk_bytes(), None));
}

fn mend_header(header: &mut [u8], mend: u8) {
    if header.len() < FIXED_HEADER_BYTES {
        return;
    }
    if mend & 1 != 0 {
        header[..8].copy_from_slice(&MAGIC);
        header[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        header[10..12].copy_from_slice(&u16::try_from(ENTRY_BYTES).expect("small").to_le_bytes());
        header[57..60].fill(0);
        header[72..92].fill(0);
    }
    let planes = (header.len() - FIXED_HEADER_BYTES) / ENTRY_BYTES / 2 * 2;
    let header_bytes = FIXED_HEADER_BYTES + planes * ENTRY_BYTES;
    if mend & 2 != 0 {
        let layers = u16::try_from(planes / 2).unwrap_or(u16::MAX);
        header[12..16].copy_from_slice(&u32::try_from(header_bytes).unwrap_or(u32::MAX).to_le_bytes());
        header[48..50].copy_from_slice(&layers.to_le_bytes());
        header[60..64].copy_from_slice(&u32::try_from(planes).unwrap_or(u32::MAX).to_le_bytes());
    }
    if mend & 4 != 0 {
        let mut end = header_bytes as u64;
        for entry in header[FIXED_HEADER_BYTES..].chunks_exact_mut(ENTRY_BYTES).take(planes) {
            let gap = u64::from(entry[0] & 3);
            entry[..8].copy_from_slice(&(end + gap).to_le_bytes());
            end += gap + u64::from(u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]]));
        }
        header[64..72].copy_from_slice(&end.to_le_bytes());
    }
    if mend & 8 != 0 {
        let stated = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
        let covered = usize::try_from(stated).unwrap_or(usize::MAX).clamp(FIXED_HEADER_BYTES, header.len());
        header[92..96].fill(0);
        let crc = crc32c(&header[..covered]);
        header[92..96].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Largest plane that [`plane`] makes.
const MAX_PLANE_BYTES: usize = 2 * 24 * 3 * 64;

thread_local! {
    /// One decoder for all inputs: what one leaves in it must not change what the next gives.
    static DECODER: RefCell<Decoder> = RefCell::new(Decoder::new(MAX_PLANE_BYTES));
}

/// One plane with this compression: the input chooses codec, shape, entry and payload; the section is what the input says, or that compressed, or that
/// compressed and damaged. The checksum is right unless the input wants it wrong.
pub(crate) fn plane(compression: Compression, data: &[u8]) {
    let mut input = Input(data);
    let codec = Codec::ALL[usize::from(input.byte()) % Codec::ALL.len()];
    let choice = input.byte();
    let shape = Shape {
        layers: 1,
        kv_heads: 1 + u16::from(choice >> 6) % 3,
        head_dim: [4, 8, 64, 6, 16, 24, 40, 5][usize::from(input.byte() & 7)],
        tokens: 1 + u16::from(input.byte()) % 24,
        dtype: if choice & 1 == 0 { Dtype::Bf16 } else { Dtype::F16 },
    };
    let quantizer = Quantizer::from_wire(choice >> 1 & 3).expect("2 bits");
    let scale_dtype =
        [None, Some(Dtype::Bf16), Some(Dtype::F16), Some(shape.dtype)][usize::from(choice >> 3 & 3)];
    let bins = input.byte();
    let mode = input.byte();
    let damage = (usize::from(input.u16()), input.byte());
    let scale_bits = input.u32();
    let piece_bytes = 1 + usize::from(input.byte());
    let out_dtype = match mode >> 6 {
        0 => OutDtype::Bf16,
        1 => OutDtype::F16,
        2 => OutDtype::Fp8E4M3 { scale: f32::from_bits(scale_bits) },
        _ => shape.dtype.into(),
    };
    let mut entry =
        PlaneEntry { offset: 0, bytes: 0, crc32c: 0, codec, quantizer, scale_dtype, compression, bins };
    let Some(encoded) = payload(&shape, &entry, &input, mode, damage) else { return };
    entry.bytes = u32::try_from(encoded.len()).expect("small");
    entry.crc32c = crc32c(&encoded) ^ u32::from(mode & 63 == 63);
    check_plane(&shape, &entry, &encoded, piece_bytes, out_dtype);
}

/// The encoded bytes of a plane; `None` if the entry can describe no plane of this shape. `mode`: bits 0 and 1 say what the section is (as it is; as it
/// is, cut; compressed; compressed and damaged), bit 2 whether scales are kept finite.
fn payload(
    shape: &Shape,
    entry: &PlaneEntry,
    input: &Input<'_>,
    mode: u8,
    damage: (usize, u8),
) -> Option<Vec<u8>> {
    // An empty plane is refused with the sizes that there may be.
    let (min_bytes, max_bytes) = match entry.section(shape) {
        Err(DecodeError::EncodedBytes { min_bytes, max_bytes, .. }) => (min_bytes, max_bytes),
        Err(_) => return None,
        Ok(_) => panic!("a plane of no bytes"),
    };
    let cut = damage.0 % (max_bytes + 8);
    let mut encoded = match (entry.codec, mode & 3) {
        (_, 0) => input.0[..input.0.len().min(max_bytes + 8)].to_vec(),
        (_, 1) => input.bytes(cut),
        (Codec::Raw, _) => input.bytes(max_bytes),
        (Codec::Lossless, _) => {
            let half = shape.plane_bytes() / 2;
            let both = input.bytes(2 * half);
            let [high, low] = [&both[..half], &both[half..]].map(|part| compressed(entry.compression, part));
            let length = u32::try_from(high.len()).expect("small").to_le_bytes();
            [&length[..], &high, &low].concat()
        }
        _ => {
            let front = if entry.compression == Compression::None { max_bytes } else { min_bytes - 1 };
            let all = input.bytes(max_bytes);
            [&all[..front], &compressed(entry.compression, &all[front..])].concat()
        }
    };
    if mode & 4 != 0 && !entry.codec.is_exact() {
        // The upper byte of each scale and offset, as far as there are any: below the exponents of infinities.
        let scales = (min_bytes - 1).min(encoded.len());
        encoded[..scales].iter_mut().skip(1).step_by(2).for_each(|byte| *byte &= 0xbb);
    }
    if mode & 3 == 3 && !encoded.is_empty() {
        let at = damage.0 % encoded.len();
        encoded[at] ^= damage.1;
    }
    Some(encoded)
}

/// `bytes` as a writer would have them in a section.
fn compressed(compression: Compression, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0; bytes.len() + 1024];
    let length = match compression {
        Compression::None => return bytes.to_vec(),
        Compression::Zstd => zstd_safe::compress(&mut out[..], bytes, 1).expect("room"),
        Compression::Deflate => libdeflater::Compressor::new(libdeflater::CompressionLvl::fastest())
            .deflate_compress(bytes, &mut out)
            .expect("room"),
        // The encoder's own: no other writes it.
        Compression::Sliced => return compress::kernels::sliced(bytes),
    };
    out.truncate(length);
    if length < bytes.len() { out } else { bytes.to_vec() }
}

/// A way to decode the plane in question.
type Decode<'a> = &'a mut dyn FnMut(&mut Decoder, &mut [u8]) -> Result<(), DecodeError>;

fn check_plane(shape: &Shape, entry: &PlaneEntry, encoded: &[u8], piece_bytes: usize, out_dtype: OutDtype) {
    let out_bytes = shape.elements_per_plane() * out_dtype.bytes();
    let slowly = reference::decode_plane(shape, entry, encoded, out_dtype);
    let run = |decode: Decode<'_>| {
        let mut buffer = vec![CANARY; out_bytes + 2 * GUARD_BYTES];
        let out = &mut buffer[GUARD_BYTES..][..out_bytes];
        let decoded = DECODER.with_borrow_mut(|decoder| decode(decoder, out));
        let (front, rest) = buffer.split_at(GUARD_BYTES);
        let (out, back) = rest.split_at(out_bytes);
        assert!(front.iter().chain(back).all(|&byte| byte == CANARY), "written outside the destination");
        match decoded {
            Ok(()) => assert_eq!(slowly.as_deref(), Ok(out), "not what the reference says"),
            Err(error) => {
                assert!(slowly.is_err(), "{error}, where the reference decodes");
                assert!(out.iter().all(|&byte| byte == CANARY), "{error}, but something was written");
                assert!(!error.to_string().is_empty());
            }
        }
    };
    run(&mut |decoder, out| decoder.decode(shape, entry, encoded, out_dtype, out));
    run(&mut |decoder, out| {
        decoder.decode_segments(shape, entry, encoded.chunks(piece_bytes), out_dtype, out)
    });
    let checked = Decoder::check_segments(encoded.chunks(piece_bytes), entry);
    assert_eq!(checked.is_ok(), crc32c(encoded) == entry.crc32c);
    let Ok(Some(section)) = entry.section(shape) else { return };
    if checked.is_ok()
        && let Some(bytes) = decompressed(entry.compression, &encoded[section.start..], section.bytes)
    {
        run(&mut |decoder, out| {
            let pieces = encoded.chunks(piece_bytes);
            decoder.decode_decompressed(shape, entry, pieces, &bytes, out_dtype, out)
        });
    }
}

/// What a device would make of a section that decodes.
fn decompressed(compression: Compression, section: &[u8], bytes: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; bytes];
    let length = match compression {
        Compression::None => return None,
        // A device is asked for one frame that says its size: the decoder's own checks are stricter than the library.
        Compression::Zstd | Compression::Sliced => return None,
        Compression::Deflate => {
            libdeflater::Decompressor::new().deflate_decompress(section, &mut out).ok()?
        }
    };
    (length == bytes).then_some(out)
}
