//! Where the tokens of a chunk go in pages: the arithmetic against a twin that goes element by element.

use std::collections::BTreeMap;

use control::{
    DeviceUuid, ElementType, GpuAllocation, GpuMemoryError, IpcHandle, LayerBase, PageStrides, PagedKv,
    PlaneBase,
};
use gpu_dma::paged::{by_page, plane_bytes, runs, segments, slot_order};
use gpu_dma::{Run, SlotOrder};
use proptest::prelude::*;

/// How engines lay out their caches, by the names of their index orders.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// `[2, pages, tokens, heads, dim]`, a tensor per layer
    TwoNhd,
    /// `[pages, 2, tokens, heads, dim]`, a tensor per layer
    PagesNhd,
    /// `[pages, 2, heads, tokens, dim]`, a tensor per layer
    PagesHnd,
    /// `[pages, layers, 2, tokens, heads, dim]`, one tensor
    CrossLayerNhd,
    /// `[pages, heads, layers, 2, tokens, dim]`, one tensor
    CrossLayerHnd,
    /// `[pages, tokens, heads, 2, dim]`, a tensor per layer: K and V of a head side by side
    Interleaved,
}

const KINDS: [Kind; 6] = [
    Kind::TwoNhd,
    Kind::PagesNhd,
    Kind::PagesHnd,
    Kind::CrossLayerNhd,
    Kind::CrossLayerHnd,
    Kind::Interleaved,
];

#[derive(Clone, Copy, Debug)]
struct Sizes {
    layers: u16,
    pages: u32,
    page_tokens: u16,
    kv_heads: u16,
    head_dim: u16,
    element: ElementType,
}

fn cache(kind: Kind, sizes: Sizes) -> PagedKv {
    let Sizes { layers, pages, page_tokens, kv_heads, head_dim, element } = sizes;
    let d = u64::from(head_dim) * element.bytes();
    let (h, t, p, l) = (u64::from(kv_heads), u64::from(page_tokens), u64::from(pages), u64::from(layers));
    let (strides, side, layer, one_tensor) = match kind {
        Kind::TwoNhd => (PageStrides { page: t * h * d, token: h * d, head: d }, p * t * h * d, 0, false),
        Kind::PagesNhd => (PageStrides { page: 2 * t * h * d, token: h * d, head: d }, t * h * d, 0, false),
        Kind::PagesHnd => (PageStrides { page: 2 * t * h * d, token: d, head: t * d }, h * t * d, 0, false),
        Kind::CrossLayerNhd => {
            (PageStrides { page: l * 2 * t * h * d, token: h * d, head: d }, t * h * d, 2 * t * h * d, true)
        }
        Kind::CrossLayerHnd => {
            (PageStrides { page: h * l * 2 * t * d, token: d, head: l * 2 * t * d }, t * d, 2 * t * d, true)
        }
        Kind::Interleaved => {
            (PageStrides { page: t * h * 2 * d, token: h * 2 * d, head: 2 * d }, d, 0, false)
        }
    };
    let bytes = 2 * p * t * h * d * if one_tensor { l } else { 1 };
    let count = if one_tensor { 1 } else { layers };
    let allocation = |n: u16| if one_tensor { 0 } else { n };
    PagedKv {
        device: DeviceUuid([1; 16]),
        allocations: (0..count).map(|_| GpuAllocation { handle: IpcHandle::new([0; 64]), bytes }).collect(),
        element,
        page_tokens,
        pages,
        kv_heads,
        head_dim,
        k: strides,
        v: strides,
        layers: (0..layers)
            .map(|n| {
                let offset = u64::from(n) * layer;
                let base = |offset| PlaneBase::new(allocation(n), offset);
                LayerBase { k: base(offset), v: base(offset + side) }
            })
            .collect(),
    }
}

fn sizes(page_tokens: std::ops::Range<u16>) -> impl Strategy<Value = Sizes> {
    let element = prop_oneof![Just(ElementType::Bf16), Just(ElementType::Fp8E4m3)];
    (1..3u16, 1..9u32, page_tokens, 1..4u16, 1..4u16, element).prop_map(
        |(layers, pages, page_tokens, kv_heads, head_dim, element)| Sizes {
            layers,
            pages,
            page_tokens,
            kv_heads,
            head_dim,
            element,
        },
    )
}

/// A page table without repetitions, a first token in it and as many tokens as there are, at most `most`.
fn places(pages: u32, page_tokens: u16, most: u64) -> impl Strategy<Value = (Vec<u32>, u64, u16)> {
    let table = Just((0..pages).collect::<Vec<_>>()).prop_shuffle();
    (table, 1..=pages).prop_flat_map(move |(table, used)| {
        let table = table[..used as usize].to_vec();
        let room = u64::from(used) * u64::from(page_tokens);
        (Just(table), 0..room).prop_flat_map(move |(table, first)| {
            let most = (room - first).min(most);
            (Just(table), Just(first), (1..=most).prop_map(|tokens| u16::try_from(tokens).unwrap()))
        })
    })
}

/// Destination of every byte of a plane, by its place in a plane `[tokens, heads, dim]`: the formula in the documentation
/// of `PageStrides`, and nothing else.
fn twin(kv: &PagedKv, plane: u32, table: &[u32], first: u64, tokens: u16) -> BTreeMap<u64, u64> {
    let layer = &kv.layers[plane as usize / 2];
    let (base, strides) = if plane.is_multiple_of(2) { (layer.k, kv.k) } else { (layer.v, kv.v) };
    let mut map = BTreeMap::new();
    let mut from = 0;
    for token in 0..u64::from(tokens) {
        let at = first + token;
        let page = u64::from(table[usize::try_from(at / u64::from(kv.page_tokens)).unwrap()]);
        for head in 0..u64::from(kv.kv_heads) {
            for byte in 0..kv.head_bytes() {
                let in_page = at % u64::from(kv.page_tokens);
                let to =
                    base.offset + page * strides.page + in_page * strides.token + head * strides.head + byte;
                assert!(map.insert(to, from).is_none(), "two elements in one place");
                from += 1;
            }
        }
    }
    map
}

fn expand(run: &Run) -> impl Iterator<Item = (u64, u64)> {
    let run = *run;
    (0..run.rows).flat_map(move |row| {
        (0..run.bytes).map(move |at| (run.to + row * run.to_pitch + at, run.from + row * run.from_pitch + at))
    })
}

proptest! {
    #[test]
    fn runs_agree_with_the_formula(
        kind in prop::sample::select(&KINDS),
        (sizes, (table, first, tokens)) in sizes(1..7).prop_flat_map(|s| (Just(s), places(s.pages, s.page_tokens, 256))),
        plane in 0..2u32,
    ) {
        let kv = cache(kind, sizes);
        let plane = plane + 2 * u32::from(sizes.layers - 1);
        let twin = twin(&kv, plane, &table, first, tokens);
        let total = plane_bytes(&kv, tokens);
        prop_assert_eq!(twin.len() as u64, total);

        let mut map = BTreeMap::new();
        runs(&kv, plane, &table, first, tokens, SlotOrder::Tokens, |run| {
            for (to, from) in expand(&run) {
                assert!(map.insert(to, from).is_none(), "a byte is copied twice");
            }
        });
        prop_assert_eq!(&map, &twin);

        // Through a slot ordered by pages the same bytes get to the same places.
        let plane_of = |bytes: u64| (0..bytes).map(|n| (n % 251).to_le_bytes()[0]).collect::<Vec<u8>>();
        let decoded = plane_of(total);
        let mut slot = vec![0; decoded.len()];
        by_page(&kv, first, tokens, &decoded, &mut slot);
        let mut map = BTreeMap::new();
        runs(&kv, plane, &table, first, tokens, SlotOrder::Pages, |run| {
            map.extend(expand(&run).map(|(to, from)| (to, slot[usize::try_from(from).unwrap()])));
        });
        let expected: BTreeMap<u64, u8> =
            twin.iter().map(|(&to, &from)| (to, decoded[usize::try_from(from).unwrap()])).collect();
        prop_assert_eq!(map, expected);
    }

    /// Whatever a table that passes the check names lies within the allocations as described.
    #[test]
    fn checked_caches_keep_runs_inside(
        kind in prop::sample::select(&KINDS),
        (sizes, (table, first, tokens)) in sizes(16..40).prop_flat_map(|s| (Just(s), places(s.pages, s.page_tokens, 64))),
        offset in 0..64u64, lacking in 0..64u64,
    ) {
        let mut kv = cache(kind, sizes);
        prop_assert_eq!(kv.check(), Ok(()));
        kv.layers.iter_mut().for_each(|layer| {
            layer.k.offset += offset;
            layer.v.offset += offset;
        });
        let bytes = kv.allocations[0].bytes + offset - lacking.min(offset);
        kv.allocations.iter_mut().for_each(|allocation| allocation.bytes = bytes);
        let fits = kv.check();
        if fits.is_err() {
            prop_assert!(lacking > 0 || offset % 2 == 1, "{:?}", fits);
            return Ok(());
        }
        for plane in 0..2 * u32::from(sizes.layers) {
            for order in [SlotOrder::Tokens, SlotOrder::Pages] {
                runs(&kv, plane, &table, first, tokens, order, |run| {
                    let end = run.to + (run.rows - 1) * run.to_pitch + run.bytes;
                    let source = run.from + (run.rows - 1) * run.from_pitch + run.bytes;
                    assert!(end <= bytes && source <= plane_bytes(&kv, tokens));
                });
            }
        }
    }

    #[test]
    fn segments_cover_the_tokens(first in 0..1000u64, tokens in 0..600u64, page_tokens in 1..300u64) {
        let mut next = 0;
        for segment in segments(first, tokens, page_tokens) {
            prop_assert_eq!((segment.first, segment.entry), (next, (first + next) / page_tokens));
            prop_assert_eq!(segment.in_page, (first + next) % page_tokens);
            prop_assert!(segment.tokens > 0 && segment.in_page + segment.tokens <= page_tokens);
            next += segment.tokens;
        }
        prop_assert_eq!(next, tokens);
    }
}

const LLAMA_8B: Sizes = Sizes {
    layers: 32,
    pages: 1000,
    page_tokens: 16,
    kv_heads: 8,
    head_dim: 128,
    element: ElementType::Bf16,
};

#[test]
fn llama_pages_are_one_run_each_in_every_order() {
    let table: Vec<u32> = (0..16).map(|n| n * 7).collect();
    for (kind, order) in [
        (Kind::TwoNhd, SlotOrder::Tokens),
        (Kind::PagesNhd, SlotOrder::Tokens),
        (Kind::CrossLayerNhd, SlotOrder::Tokens),
        (Kind::PagesHnd, SlotOrder::Pages),
    ] {
        let kv = cache(kind, LLAMA_8B);
        assert_eq!((slot_order(&kv), kv.check()), (order, Ok(())), "{kind:?}");
        let mut found = Vec::new();
        runs(&kv, 63, &table, 0, 256, order, |run| found.push((run.rows, run.bytes)));
        assert_eq!(found, [(1, 32 << 10); 16], "{kind:?}");
    }
    let kv = cache(Kind::CrossLayerHnd, LLAMA_8B);
    assert_eq!(slot_order(&kv), SlotOrder::Pages);
    let mut found = Vec::new();
    runs(&kv, 0, &table, 0, 256, SlotOrder::Pages, |run| found.push((run.rows, run.bytes)));
    assert_eq!(found, [(8, 4096); 16]);
}

#[test]
fn refusals_name_the_cause() {
    let good = cache(Kind::PagesNhd, LLAMA_8B);
    let check = |change: fn(&mut PagedKv)| {
        let mut kv = good.clone();
        change(&mut kv);
        kv.check().unwrap_err()
    };
    assert_eq!(good.check(), Ok(()));
    let text = check(|kv| kv.layers[3].v.allocation = 32).to_string();
    assert_eq!(text, "layer 3 lies in allocation 32 of 32: number them from 0");
    let error = check(|kv| kv.pages += 1);
    assert!(matches!(error, GpuMemoryError::OutsideAllocation { layer: 0, side: "K" | "V", .. }), "{error}");
    let error = check(|kv| kv.layers[31].v.offset = u64::MAX - 1);
    assert!(matches!(error, GpuMemoryError::OutsideAllocation { layer: 31, side: "V", end: u64::MAX, .. }));
    let error = check(|kv| kv.layers[0].k.offset = 1);
    assert!(matches!(error, GpuMemoryError::Misaligned { layer: 0, side: "K", offset: 1, element_bytes: 2 }));
    assert!(check(|kv| kv.k.page = u64::MAX / 2 - 1).to_string().contains("2^64"));
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY, 0.5] {
        let mut kv = good.clone();
        kv.layers[2].k.scale = control::Scale::new(scale);
        assert!(matches!(kv.check(), Err(GpuMemoryError::Scale { layer: 2, side: "K", .. })), "{scale}");
        kv.element = ElementType::Fp8E4m3;
        assert_eq!(kv.check().is_ok(), scale == 0.5, "{scale}");
    }
    assert!(check(|kv| kv.v.token = 0).to_string().contains("strides of V"));
    for change in [
        (|kv: &mut PagedKv| kv.page_tokens = 8) as fn(&mut PagedKv),
        |kv| kv.page_tokens = 257,
        |kv| kv.pages = 0,
        |kv| kv.kv_heads = 0,
        |kv| kv.head_dim = 0,
        |kv| kv.layers.clear(),
        |kv| kv.allocations.clear(),
        |kv| kv.layers = vec![kv.layers[0]; 513],
        |kv| kv.allocations = vec![kv.allocations[0]; 513],
    ] {
        assert!(matches!(check(change), GpuMemoryError::Count { .. }));
    }
}
