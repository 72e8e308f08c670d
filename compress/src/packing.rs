//! How codes lie in bytes: the part that compression shrinks, packed so that zstd has few symbols to decode, and the
//! low bits, which hardly any compression shrinks, apart.
//!
//! Everything is packed head row by head row, so a row can be unpacked alone.

use crate::Codec;

/// How the codes of a plane lie in a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// 4-bit codes, two to a byte, all of them compressed.
    Nibbles,
    /// 8-bit codes: the high four bits compressed, two to a byte; the low four bits plain, likewise.
    NibblesAndNibbles,
    /// 5-bit codes: the high four bits compressed, two to a byte; the lowest bit plain, eight to a byte.
    NibblesAndBits,
    /// 3-bit codes: the high two bits compressed, four to a byte; the lowest bit plain, eight to a byte.
    CrumbsAndBits,
}

impl Packing {
    /// How `codec` packs codes from 0 to `largest_code`; `None` for the exact codecs, which have none.
    pub(crate) const fn new(codec: Codec, largest_code: u8) -> Option<Self> {
        match codec {
            Codec::Raw | Codec::Lossless => None,
            Codec::Int8 => Some(Self::NibblesAndNibbles),
            Codec::Int5 => Some(Self::NibblesAndBits),
            Codec::Int4 => Some(Self::Nibbles),
            Codec::Int3 => Some(Self::CrumbsAndBits),
            Codec::CacheGen => Some(match largest_code {
                0..=15 => Self::Nibbles,
                16..=31 => Self::NibblesAndBits,
                _ => Self::NibblesAndNibbles,
            }),
        }
    }

    /// The largest code that there are bits for.
    pub(crate) const fn largest_code(self) -> u8 {
        match self {
            Self::Nibbles => 15,
            Self::NibblesAndNibbles => 255,
            Self::NibblesAndBits => 31,
            Self::CrumbsAndBits => 7,
        }
    }

    /// What the head dimension must be a multiple of.
    pub(crate) const fn dims_multiple(self) -> u16 {
        match self {
            Self::Nibbles | Self::NibblesAndNibbles => 2,
            Self::NibblesAndBits | Self::CrumbsAndBits => 8,
        }
    }

    /// Bytes of the compressed part, for so many elements.
    pub(crate) const fn section_bytes(self, elements: usize) -> usize {
        match self {
            Self::Nibbles | Self::NibblesAndNibbles | Self::NibblesAndBits => elements / 2,
            Self::CrumbsAndBits => elements / 4,
        }
    }

    /// Bytes of the plain part, for so many elements.
    pub(crate) const fn plain_bytes(self, elements: usize) -> usize {
        match self {
            Self::Nibbles => 0,
            Self::NibblesAndNibbles => elements / 2,
            Self::NibblesAndBits | Self::CrumbsAndBits => elements / 8,
        }
    }

    /// Appends the plain part of `codes` to `plain` and the part to be compressed to `section`. `head_dim` is a
    /// multiple of [`dims_multiple`](Self::dims_multiple), and there are whole head rows of codes.
    pub(crate) fn pack(self, codes: &[u8], head_dim: usize, plain: &mut Vec<u8>, section: &mut Vec<u8>) {
        let (plain_at, section_at) = (plain.len(), section.len());
        plain.resize(plain_at + self.plain_bytes(codes.len()), 0);
        section.resize(section_at + self.section_bytes(codes.len()), 0);
        let (mut plain, mut section) = (&mut plain[plain_at..], &mut section[section_at..]);
        for row in codes.chunks_exact(head_dim) {
            let (plain_row, section_row) = self.rows(head_dim, &mut plain, &mut section);
            self.pack_row(row, plain_row, section_row);
        }
    }

    /// Takes what one head row fills from the front of both parts.
    #[inline(always)]
    pub(crate) fn rows<'p, 's>(
        self,
        head_dim: usize,
        plain: &mut &'p mut [u8],
        section: &mut &'s mut [u8],
    ) -> (&'p mut [u8], &'s mut [u8]) {
        let parts = (
            plain.split_off_mut(..self.plain_bytes(head_dim)),
            section.split_off_mut(..self.section_bytes(head_dim)),
        );
        let (Some(plain), Some(section)) = parts else { unreachable!("parts have room for every row") };
        (plain, section)
    }

    /// [`Packing::pack`] of one head row. Plain loops, without the adapters of iterators, whose code would not be
    /// compiled for the caller's instruction set.
    #[inline(always)]
    pub(crate) fn pack_row(self, row: &[u8], plain: &mut [u8], section: &mut [u8]) {
        match self {
            Self::Nibbles => nibbles(row, 0, section),
            Self::NibblesAndNibbles => {
                nibbles(row, 0, plain);
                nibbles(row, 4, section);
            }
            Self::NibblesAndBits => {
                bits(row, plain);
                nibbles(row, 1, section);
            }
            Self::CrumbsAndBits => {
                bits(row, plain);
                crumbs(row, 1, section);
            }
        }
    }
}

/// Four bits of each code from bit `shift` up: byte `j` has dimension `j` in its low and `j + dim / 2` in its high bits.
#[inline(always)]
fn nibbles(row: &[u8], shift: u32, out: &mut [u8]) {
    let (low, high) = row.split_at(row.len() / 2);
    for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
        *out = ((low >> shift) & 0x0f) | ((high >> shift) << 4);
    }
}

/// Two bits of each code from bit `shift` up: byte `j` has dimensions `j`, `j + dim / 4`, `j + dim / 2` and
/// `j + dim / 4 * 3`, from the lowest bits to the highest.
#[inline(always)]
fn crumbs(row: &[u8], shift: u32, out: &mut [u8]) {
    let (low, high) = row.split_at(row.len() / 2);
    let ((first, second), (third, fourth)) = (low.split_at(low.len() / 2), high.split_at(high.len() / 2));
    let rows = first.iter().zip(second).zip(third.iter().zip(fourth));
    for (out, ((first, second), (third, fourth))) in out.iter_mut().zip(rows) {
        let (low, high) = (
            first >> shift & 3 | (second >> shift & 3) << 2,
            third >> shift & 3 | (fourth >> shift & 3) << 2,
        );
        *out = low | high << 4;
    }
}

/// The lowest bit of each code: bit `i` of byte `j` is that of dimension `8 * j + i`.
#[inline(always)]
fn bits(row: &[u8], out: &mut [u8]) {
    for (out, codes) in out.iter_mut().zip(row.as_chunks::<8>().0) {
        // The product moves bit 8 * i to bit 56 + i, and no two bits to one place.
        let lowest = u64::from_le_bytes(*codes) & 0x0101_0101_0101_0101;
        let [.., byte] = lowest.wrapping_mul(0x0102_0408_1020_4080).to_le_bytes();
        *out = byte;
    }
}

impl Packing {
    /// The codes of one head row, from its bytes of both parts.
    pub(crate) fn unpack_row(self, plain: &[u8], section: &[u8], codes: &mut [u8]) {
        codes.fill(0);
        match self {
            Self::Nibbles => add_nibbles(section, 0, codes),
            Self::NibblesAndNibbles => {
                add_nibbles(plain, 0, codes);
                add_nibbles(section, 4, codes);
            }
            Self::NibblesAndBits => {
                add_bits(plain, codes);
                add_nibbles(section, 1, codes);
            }
            Self::CrumbsAndBits => {
                add_bits(plain, codes);
                add_crumbs(section, 1, codes);
            }
        }
    }
}

fn add_nibbles(bytes: &[u8], shift: u32, codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(bytes.len());
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        *low |= (byte & 0x0f) << shift;
        *high |= byte >> 4 << shift;
    }
}

fn add_crumbs(bytes: &[u8], shift: u32, codes: &mut [u8]) {
    for (part, codes) in codes.chunks_exact_mut(bytes.len()).enumerate() {
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code |= (byte >> (2 * part) & 3) << shift;
        }
    }
}

fn add_bits(bytes: &[u8], codes: &mut [u8]) {
    for (codes, byte) in codes.chunks_exact_mut(8).zip(bytes) {
        for (bit, code) in codes.iter_mut().enumerate() {
            *code |= byte >> bit & 1;
        }
    }
}
