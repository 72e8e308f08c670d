//! What the fuzz target `places` runs, and what its corpus is replayed with: descriptions of memory that a client lends, and of where planes go in it.

#[path = "../../../fuzz/input.rs"]
mod input;

use std::collections::HashSet;

use control::{
    ChunkPlace, Command, DeviceUuid, Dtype, ElementType, GpuAllocation, GpuMemory, IpcHandle, LayerBase,
    PageStrides, PagedKv, PlaneBase, RegionView, RingKv, Scale, Shape, Target,
};
use gpu_dma::paged::{self, SlotOrder};
use gpu_dma::{ChunkShape, Layout, Placement};

use input::Input;

/// Heads times tokens up to which pieces are walked through, and bytes up to which they are marked one by one.
const MOST_PIECES: u64 = 1 << 10;
const MOST_BYTES: u64 = 1 << 14;

/// A layout of host memory, a paged cache with a page table, or a ring, as the first byte says. What the checks let through lies within the memory that was
/// described, piece by piece, each byte of a plane in one place and no two in the same.
pub(crate) fn places(data: &[u8]) {
    let mut input = Input(data);
    match input.byte() & 3 {
        0 => host(&mut input),
        1 => ring(&mut input),
        _ => pages(&mut input),
    }
}

fn small(input: &mut Input<'_>) -> u16 {
    match input.byte() {
        number @ 0..=0xef => u16::from(number & 15),
        _ => input.u16(),
    }
}

/// The bytes that pieces cover.
#[derive(Default)]
struct Covered {
    bytes: u64,
    seen: HashSet<u64>,
}

impl Covered {
    fn add(&mut self, first: u64, bytes: u64, end: u64) {
        assert!(
            first.checked_add(bytes).is_some_and(|last| last <= end),
            "{bytes} bytes at {first} of {end}"
        );
        self.bytes += bytes;
        if self.bytes <= MOST_BYTES {
            assert!((first..first + bytes).all(|byte| self.seen.insert(byte)), "two bytes in one place");
        }
    }
}

fn host(input: &mut Input<'_>) {
    let shape = ChunkShape {
        layers: small(input),
        tokens: small(input),
        kv_heads: small(input),
        head_dim: small(input),
    };
    let strides = if input.byte() & 1 == 0 {
        Layout { layer: input.number(), side: input.number(), token: input.number(), head: input.number() }
    } else {
        let Ok(tight) = Layout::contiguous(&shape, Default::default()) else { return };
        let Layout { layer, side, token, head } = tight;
        let wider = |stride: u64, by: u64| stride.wrapping_add(by);
        Layout { layer: wider(layer, input.number()), side: wider(side, input.number()), token, head }
    };
    let (base, region_bytes) = (input.number(), input.number());
    let told = control::Layout {
        layer: strides.layer,
        side: strides.side,
        token: strides.token,
        head: strides.head,
    };
    let told_shape =
        Shape { layers: shape.layers, kv_heads: shape.kv_heads, head_dim: shape.head_dim, dtype: Dtype::F16 };
    // Both ends judge the same strides, by rules of their own.
    let extent = told.extent_bytes(&told_shape, shape.tokens);
    let Ok(placement) = Placement::new(strides, shape, base, region_bytes) else { return };
    let extent = extent.expect("the client's check is no stricter");
    assert!(base + extent <= region_bytes);
    let mut covered = Covered::default();
    let last = shape.planes() - 1;
    for plane in [0, 1, last].into_iter().take(if last > 1 { 3 } else { 2 }) {
        let pieces = placement.pieces(plane).expect("a plane of the chunk");
        if pieces.len() as u64 > MOST_PIECES {
            continue;
        }
        let mut of_plane = Covered::default();
        for piece in pieces {
            covered.add(piece.to, piece.bytes, region_bytes);
            of_plane.add(piece.from, piece.bytes, shape.plane_bytes());
        }
        assert_eq!(of_plane.bytes, shape.plane_bytes());
    }
    assert!(placement.pieces(shape.planes()).is_none());
}

fn allocation(input: &mut Input<'_>) -> GpuAllocation {
    GpuAllocation { handle: IpcHandle::from_halves([[0; 32]; 2]), bytes: input.number() }
}

fn element(input: &mut Input<'_>) -> ElementType {
    [ElementType::Bf16, ElementType::F16, ElementType::Fp8E4m3][input.below(3)]
}

fn ring(input: &mut Input<'_>) {
    let ring = RingKv {
        device: DeviceUuid([0; 16]),
        allocation: allocation(input),
        element: element(input),
        offset: input.number(),
        entry_bytes: input.number(),
        entries: input.u32(),
        generation: input.number(),
    };
    let shape = Shape { layers: 1, kv_heads: small(input), head_dim: small(input), dtype: Dtype::Bf16 };
    if GpuMemory::Ring(ring.clone()).check().is_err() {
        return;
    }
    let last = ring.offset + u64::from(ring.entries - 1) * ring.entry_bytes;
    assert!(last + ring.entry_bytes <= ring.allocation.bytes && ring.entry_bytes > 0);
    let tokens = small(input);
    let command = fetch(Target::Ring, shape, tokens, 0);
    if command.check(|_| Some(RegionView::Ring(&ring))).is_ok() {
        let elements = u64::from(tokens) * u64::from(shape.kv_heads) * u64::from(shape.head_dim);
        assert!(elements * ring.element.bytes() <= ring.entry_bytes);
    }
}

fn fetch(to: Target, shape: Shape, tokens: u16, offset: u64) -> Command {
    let chunks = vec![ChunkPlace { key: [0; 32], tokens, offset }];
    Command::Fetch { id: 1, timeout_ms: 1000, region: 1, to, shape, chunks, progress: false }
}

fn strides(
    input: &mut Input<'_>,
    page_tokens: u16,
    kv_heads: u16,
    head_dim: u16,
    element: ElementType,
) -> PageStrides {
    let mut strides = match input.byte() & 3 {
        0 => return PageStrides { page: input.number(), token: input.number(), head: input.number() },
        1 | 2 => PageStrides::nhd(page_tokens, kv_heads, head_dim, element),
        _ => PageStrides::hnd(page_tokens, kv_heads, head_dim, element),
    };
    strides.page = strides.page.wrapping_add(input.number());
    strides
}

fn pages(input: &mut Input<'_>) {
    let (element, page_tokens) = (element(input), [16, 32, 256, small(input)][input.below(4)]);
    let (kv_heads, head_dim) = (small(input), small(input));
    let (k, v) = (
        strides(input, page_tokens, kv_heads, head_dim, element),
        strides(input, page_tokens, kv_heads, head_dim, element),
    );
    let allocations: Vec<GpuAllocation> = (0..input.below(4)).map(|_| allocation(input)).collect();
    let mut base = || {
        let scale = if element == ElementType::Fp8E4m3 { f32::from_bits(input.u32()) } else { 1.0 };
        PlaneBase {
            allocation: u16::from(input.byte() & 3),
            offset: input.number(),
            scale: Scale::new(scale),
        }
    };
    let layers = vec![LayerBase { k: base(), v: base() }, LayerBase { k: base(), v: base() }];
    let pages = u32::try_from(input.number() & u64::from(u32::MAX)).expect("32 bits");
    let kv = PagedKv {
        device: DeviceUuid([0; 16]),
        allocations,
        element,
        page_tokens,
        pages,
        kv_heads,
        head_dim,
        k,
        v,
        layers,
    };
    if GpuMemory::Pages(kv.clone()).check().is_err() {
        return;
    }
    // Entries below the number of pages, and now and then one that is not.
    let beyond = input.byte() == 0;
    let table: Vec<u32> = (0..1 + input.below(20))
        .map(|_| match input.byte() {
            0xff if beyond => pages,
            0xfe => pages - 1,
            page => u32::from(page) % pages,
        })
        .collect();
    let (tokens, first_token) = (1 + u16::from(input.byte()), input.number());
    let shape = Shape { layers: 2, kv_heads, head_dim, dtype: Dtype::Bf16 };
    let command = fetch(Target::Pages { table: table.clone() }, shape, tokens, first_token);
    if command.check(|_| Some(RegionView::Pages(&kv))).is_err() {
        return;
    }
    if u64::from(kv_heads) * u64::from(tokens) <= MOST_PIECES {
        check_runs(&kv, &table, first_token, tokens);
    }
}

fn check_runs(kv: &PagedKv, table: &[u32], first_token: u64, tokens: u16) {
    let distinct = table.iter().collect::<HashSet<_>>().len() == table.len();
    let plane_bytes = paged::plane_bytes(kv, tokens);
    for (plane, base) in kv.layers.iter().flat_map(|layer| [layer.k, layer.v]).enumerate() {
        for order in [SlotOrder::Tokens, SlotOrder::Pages, paged::slot_order(kv)] {
            let (mut to, mut from) = (Covered::default(), Covered::default());
            let end = kv.allocations[usize::from(base.allocation)].bytes;
            let plane = u32::try_from(plane).expect("four");
            paged::runs(kv, plane, table, first_token, tokens, order, |run| {
                for row in 0..run.rows {
                    from.add(run.from + row * run.from_pitch, run.bytes, plane_bytes);
                    let first = run.to + row * run.to_pitch;
                    assert!(first.checked_add(run.bytes).is_some_and(|last| last <= end), "{run:?} of {end}");
                    if distinct {
                        to.add(first, run.bytes, end);
                    }
                }
            });
            assert_eq!(from.bytes, plane_bytes);
        }
    }
}
