//! Decoding allocates nothing, neither in Rust nor inside zstd: both end in `malloc`, which this program counts.
#![cfg(target_env = "gnu")]

mod planes;

use std::cell::Cell;
use std::ffi::c_void;

use compress::{
    ChunkView, ChunkWriter, Codec, Compression, Decoder, Dtype, Encoder, PlaneCodec, plane_index,
};
use planes::Planes;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

unsafe extern "C" {
    fn __libc_malloc(bytes: usize) -> *mut c_void;
    fn __libc_calloc(count: usize, bytes: usize) -> *mut c_void;
    fn __libc_realloc(old: *mut c_void, bytes: usize) -> *mut c_void;
    fn __libc_memalign(align: usize, bytes: usize) -> *mut c_void;
}

fn count() {
    ALLOCATIONS.with(|allocations| allocations.set(allocations.get() + 1));
}

// SAFETY: takes the place of the C library's function of that name, and does what that one does.
#[unsafe(no_mangle)]
extern "C" fn malloc(bytes: usize) -> *mut c_void {
    count();
    // SAFETY: the C library's own allocator, with its arguments.
    unsafe { __libc_malloc(bytes) }
}

// SAFETY: as `malloc`.
#[unsafe(no_mangle)]
extern "C" fn calloc(number: usize, bytes: usize) -> *mut c_void {
    count();
    // SAFETY: as in `malloc`.
    unsafe { __libc_calloc(number, bytes) }
}

// SAFETY: as `malloc`.
#[unsafe(no_mangle)]
unsafe extern "C" fn realloc(old: *mut c_void, bytes: usize) -> *mut c_void {
    count();
    // SAFETY: as in `malloc`; the caller hands in what the allocator gave.
    unsafe { __libc_realloc(old, bytes) }
}

// SAFETY: as `malloc`.
#[unsafe(no_mangle)]
extern "C" fn aligned_alloc(align: usize, bytes: usize) -> *mut c_void {
    count();
    // SAFETY: as in `malloc`.
    unsafe { __libc_memalign(align, bytes) }
}

fn allocations() -> usize {
    ALLOCATIONS.with(Cell::get)
}

#[test]
fn a_plane_is_parsed_and_decoded_without_allocating() {
    let planes = Planes::synthetic(1, 2, 64, 256);
    let shape = planes.shape;
    for (codec, compression) in
        Codec::ALL.into_iter().flat_map(|codec| Compression::ALL.map(|with| (codec, with)))
    {
        let mut chunk = Vec::new();
        let plane_codec = PlaneCodec { compression, ..codec.into() };
        let plane = |layer, side| planes.bytes[plane_index(layer, side)].as_slice();
        Encoder::new(plane_codec, 1).encode_chunk(&[0; 32], &shape, plane, &mut chunk).unwrap();
        let before_new = allocations();
        let mut decoder = Decoder::new(shape.plane_bytes());
        assert!(allocations() > before_new, "the counter works");
        let mut out = vec![0; shape.plane_bytes()];
        let before = allocations();
        for _ in 0..3 {
            for entry in ChunkView::parse(&chunk).unwrap().planes() {
                let start = usize::try_from(entry.offset).unwrap();
                let encoded = &chunk[start..][..usize::try_from(entry.bytes).unwrap()];
                for out_dtype in [Dtype::Bf16, Dtype::F16] {
                    let decoded =
                        decoder.decode_segments(&shape, &entry, encoded.chunks(1000), out_dtype, &mut out);
                    assert_eq!(decoded.is_ok(), out_dtype == Dtype::Bf16 || !codec.is_exact());
                    let decoded = decoder.decode(&shape, &entry, encoded, out_dtype, &mut out);
                    assert_eq!(decoded.is_ok(), out_dtype == Dtype::Bf16 || !codec.is_exact());
                    // Errors don't allocate either.
                    assert!(decoder.decode(&shape, &entry, &encoded[1..], out_dtype, &mut out).is_err());
                }
            }
        }
        assert_eq!(allocations(), before, "{codec}, {compression}");
    }
}

#[test]
fn the_second_chunk_is_written_without_allocating() {
    let planes = Planes::synthetic(2, 2, 64, 256);
    for codec in Codec::ALL {
        let mut encoder = Encoder::new(codec, 1);
        let mut writer = ChunkWriter::new(2 * planes.bytes.len() * planes.shape.plane_bytes());
        let mut write = || {
            writer.begin(&[0; 32], &planes.shape).unwrap();
            while let Some(index) = writer.next_plane() {
                writer.add_plane(&mut encoder, &planes.bytes[index]).unwrap();
            }
            assert!(writer.is_whole());
        };
        write();
        let before = allocations();
        write();
        assert_eq!(allocations(), before, "{codec}");
    }
}
