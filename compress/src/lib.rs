//! Codecs for KV cache planes, and the encoded chunk that a store keeps and the data plane decodes.
//!
//! A chunk holds the K and V of all layers for up to [`CHUNK_TOKENS`] tokens. Each K or V of one layer is a *plane*,
//! `[tokens, kv_heads, head_dim]` row-major in 16-bit floats, and is encoded, checked and decoded alone. The bytes of
//! an encoded chunk are specified in `docs/FORMAT.md`.
//!
//! - [`Encoder`] turns the planes of a chunk into one byte string; [`ChunkWriter`] has it do so plane by plane.
//! - [`ChunkView`] reads the header and the table of planes without allocating; [`ChunkHeader`] is its owned copy.
//! - [`Decoder`] checks, decompresses and dequantizes one plane, without allocating.
//! - [`Offload`] is what decompresses in the decoder's stead: a device.
//! - [`mod@reference`] says the same slowly, as the oracle of tests and of the demo.
//!
//! Arrows: nothing here knows of sockets, packets or DPDK.

mod allocate;
mod cachegen;
mod checksum;
mod codec;
mod decoder;
mod dequantize;
mod dtype;
mod encoder;
mod format;
mod groups;
mod in_place;
mod isa;
mod lossless;
mod offload;
mod packing;
mod payload;
mod plane_codec;
mod profile;
mod quantize;
pub mod reference;
mod section;
mod shape;
mod sliced;
mod view;
mod writer;
mod zeros;

/// Parts of encoding and decoding alone, for measurements and tests.
pub mod kernels {
    pub use crate::dequantize::{Job, dequantize};
    pub use crate::packing::Packing;
    pub use crate::quantize::{Job as QuantizeJob, Scratch as QuantizeScratch, quantize};

    /// The section that compression `sliced` makes of `bytes`: themselves, if it would not be shorter.
    #[must_use]
    pub fn sliced(bytes: &[u8]) -> Vec<u8> {
        let isa = crate::Isa::detect();
        let code = crate::sliced::Code::new(isa, bytes);
        if code.section_bytes() >= bytes.len() {
            return bytes.to_vec();
        }
        let mut section = Vec::new();
        crate::sliced::encode(isa, &code, bytes, &mut crate::sliced::Parts::default(), &mut section);
        section
    }
}

pub use allocate::{Candidate, Goal, allocate};
pub use checksum::crc32c;
pub use codec::{Codec, Compression, DEFAULT_BINS, PlaneCodec, Quantizer, UnknownCodec, UnknownCompression};
pub use decoder::{DecodeError, Decoder};
pub use dtype::{Dtype, OutDtype};
pub use encoder::{DEFAULT_ZSTD_LEVEL, EncodeError, Encoder};
pub use format::{
    ENTRY_BYTES, FIXED_HEADER_BYTES, FORMAT_VERSION, FormatError, MAGIC, MAX_CHUNK_BYTES, MAX_HEADER_BYTES,
    PlaneEntry, header_bytes,
};
pub use isa::Isa;
pub use offload::{Offload, Section, Untaken};
pub use payload::{LayoutError, max_encoded_bytes};
pub use plane_codec::UnknownPlaneCodec;
pub use profile::{Codecs, Profile, ProfileError};
pub use reference::reference_decode;
pub use section::{FrameError, SectionReader};
pub use shape::{
    CHUNK_TOKENS, MAX_LAYERS, MAX_PLANE_BYTES, MAX_PLANES, MIN_QUANTIZED_HEAD_DIM, Shape, ShapeError, Side,
    plane_index, plane_of,
};
pub use sliced::SlicedError;
pub use view::{ChunkHeader, ChunkView, Planes, plane_table};
pub use writer::{ChunkWriter, WriteError};
pub use zeros::write_zeros;
