//! Layouts against a slow, obvious twin that enumerates every element.

use std::collections::HashSet;

use gpu_dma::{ChunkShape, Dimension, ELEMENT_BYTES, HeadOrder, Layout, LayoutError, Placement};
use proptest::prelude::*;

/// Destination of every element, as (plane, element of the decoded plane, offset of its first byte): straight from the
/// formula in `Layout`'s documentation, in numbers that cannot overflow.
fn elements(layout: &Layout, shape: &ChunkShape, base: u64) -> Vec<(u32, u64, u128)> {
    let mut elements = Vec::new();
    for layer in 0..shape.layers {
        for side in 0..2u16 {
            let mut element = 0;
            for token in 0..shape.tokens {
                for head in 0..shape.kv_heads {
                    for i in 0..shape.head_dim {
                        let offset = u128::from(base)
                            + u128::from(layer) * u128::from(layout.layer)
                            + u128::from(side) * u128::from(layout.side)
                            + u128::from(token) * u128::from(layout.token)
                            + u128::from(head) * u128::from(layout.head)
                            + 2 * u128::from(i);
                        elements.push((u32::from(layer) * 2 + u32::from(side), element, offset));
                        element += 1;
                    }
                }
            }
        }
    }
    elements
}

fn disjoint(elements: &[(u32, u64, u128)]) -> bool {
    let mut bytes = HashSet::new();
    elements.iter().all(|&(_, _, offset)| bytes.insert(offset) && bytes.insert(offset + 1))
}

fn shapes() -> impl Strategy<Value = ChunkShape> {
    (1..4u16, 1..6u16, 1..4u16, 1..5u16).prop_map(|(layers, tokens, kv_heads, head_dim)| ChunkShape {
        layers,
        tokens,
        kv_heads,
        head_dim,
    })
}

/// Strides that often are right, often nearly right, and sometimes absurd.
fn strides() -> impl Strategy<Value = u64> {
    prop_oneof![20 => 0..130u64, 20 => (0..65u64).prop_map(|n| n * 2), 1 => any::<u64>(), 1 => Just(u64::MAX)]
}

fn layouts() -> impl Strategy<Value = Layout> {
    let free = (strides(), strides(), strides(), strides());
    free.prop_map(|(layer, side, token, head)| Layout { layer, side, token, head })
}

/// Dimensions in any order, each stepping over the smaller ones, with gaps: always to be accepted.
fn nested_layouts() -> impl Strategy<Value = (ChunkShape, Layout)> {
    let order = Just([0usize, 1, 2, 3]).prop_shuffle();
    (shapes(), order, prop::array::uniform4(0..3u64)).prop_map(|(shape, order, gaps)| {
        let counts = [u64::from(shape.layers), 2, u64::from(shape.tokens), u64::from(shape.kv_heads)];
        let (mut strides, mut reach) = ([0; 4], shape.head_bytes());
        for dimension in order {
            strides[dimension] = reach + gaps[dimension] * ELEMENT_BYTES;
            reach += strides[dimension] * (counts[dimension] - 1);
        }
        let [layer, side, token, head] = strides;
        (shape, Layout { layer, side, token, head })
    })
}

/// Applies the pieces of every plane to (plane, element) numbers and compares with the twin.
fn pieces_agree(placement: &Placement, twin: &[(u32, u64, u128)]) -> Result<(), TestCaseError> {
    let mut copied = Vec::new();
    for plane in 0..placement.shape().planes() {
        let pieces: Vec<_> = placement.pieces(plane).unwrap().collect();
        prop_assert_eq!(pieces.len(), placement.pieces(plane).unwrap().len());
        for pair in pieces.windows(2) {
            let merged =
                pair[0].to + pair[0].bytes == pair[1].to && pair[0].from + pair[0].bytes == pair[1].from;
            // Two heads of different tokens can touch by accident where runs within a token do not.
            prop_assert!(!merged || placement.layout().head != placement.shape().head_bytes(), "{:?}", pair);
        }
        prop_assert_eq!(placement.contiguous(plane), (pieces.len() == 1).then(|| pieces[0]));
        for piece in pieces {
            for byte in (0..piece.bytes).step_by(2) {
                copied.push((plane, (piece.from + byte) / 2, u128::from(piece.to + byte)));
            }
        }
    }
    copied.sort_unstable();
    let mut twin = twin.to_vec();
    twin.sort_unstable();
    prop_assert_eq!(copied, twin);
    prop_assert!(placement.pieces(placement.shape().planes()).is_none());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn what_is_accepted_is_in_range_and_disjoint(
        shape in shapes(), layout in layouts(), base in strides(), region_bytes in 0..4096u64,
    ) {
        let twin = elements(&layout, &shape, base);
        let end = twin.iter().map(|&(_, _, offset)| offset + 2).max().unwrap();
        match Placement::new(layout, shape, base, region_bytes) {
            Ok(placement) => {
                prop_assert!(disjoint(&twin) && end <= u128::from(region_bytes));
                pieces_agree(&placement, &twin)?;
            }
            Err(LayoutError::OutOfRange { end: reported, .. }) => {
                prop_assert!(end == u128::from(reported) && reported > region_bytes);
            }
            Err(LayoutError::Overflow) => prop_assert!(end > u128::from(u64::MAX)),
            Err(LayoutError::Misaligned(number)) => prop_assert!(number % 2 == 1),
            Err(LayoutError::Overlap { stride, needs, .. }) => prop_assert!(stride < needs),
            Err(LayoutError::EmptyShape) => prop_assert!(false, "{:?}", shape),
        }
    }

    #[test]
    fn nested_dimensions_are_accepted_to_the_last_byte(
        (shape, layout) in nested_layouts(), base in (0..100u64).prop_map(|n| n * 2),
    ) {
        let twin = elements(&layout, &shape, base);
        let end = u64::try_from(twin.iter().map(|&(_, _, offset)| offset + 2).max().unwrap()).unwrap();
        prop_assert!(disjoint(&twin));
        let refused = Placement::new(layout, shape, base, end - 1);
        prop_assert_eq!(refused, Err(LayoutError::OutOfRange { end, region_bytes: end - 1 }));
        pieces_agree(&Placement::new(layout, shape, base, end).unwrap(), &twin)?;
    }

    /// Chunks of a sequence, the last one short, fill two whole tensors: every byte once, each where plain indexing of
    /// the tensor has it.
    #[test]
    fn two_tensors_are_filled_by_their_chunks(
        shape in shapes(), chunks in 1..4u32, last_tokens in 1..6u16, hnd in any::<bool>(),
    ) {
        let order = if hnd { HeadOrder::Hnd } else { HeadOrder::Nhd };
        let last = ChunkShape { tokens: last_tokens, ..shape };
        let full_tokens = u32::from(shape.tokens);
        let total = full_tokens * (chunks - 1) + u32::from(last_tokens);
        let layout = Layout::two_tensors(&shape, total, order).unwrap();
        let tensor_bytes = u64::from(shape.layers) * u64::from(total) * shape.token_bytes();
        let mut filled = HashSet::new();
        for chunk in 0..chunks {
            let shape = if chunk + 1 == chunks { last } else { shape };
            let first_token = chunk * full_tokens;
            let base = layout.token_base(first_token).unwrap();
            let placement = Placement::new(layout, shape, base, 2 * tensor_bytes).unwrap();
            for (plane, element, offset) in elements(&layout, &shape, base) {
                let (dim, heads) = (u64::from(shape.head_dim), u64::from(shape.kv_heads));
                let (i, head, token) = (element % dim, element / dim % heads, element / dim / heads);
                let token = token + u64::from(first_token);
                let row = match order {
                    HeadOrder::Nhd => token * heads + head,
                    HeadOrder::Hnd => head * u64::from(total) + token,
                };
                let index = (u64::from(plane / 2) * u64::from(total) * heads + row) * dim + i;
                prop_assert_eq!(offset, u128::from(u64::from(plane % 2) * tensor_bytes + index * 2));
                prop_assert!(filled.insert(offset));
            }
            pieces_agree(&placement, &elements(&layout, &shape, base))?;
        }
        prop_assert_eq!(u64::try_from(filled.len()).unwrap() * 2, 2 * tensor_bytes);
    }
}

const LLAMA_8B: ChunkShape = ChunkShape { layers: 32, tokens: 256, kv_heads: 8, head_dim: 128 };

#[test]
fn runs_are_as_long_as_the_layout_allows() {
    let runs = |layout: Layout| {
        let placement = Placement::new(layout, LLAMA_8B, 0, 1 << 32).unwrap();
        let pieces = placement.pieces(63).unwrap();
        (pieces.len(), pieces.last().unwrap().bytes)
    };
    let contiguous = |order| Layout::contiguous(&LLAMA_8B, order).unwrap();
    let two_tensors = |order| Layout::two_tensors(&LLAMA_8B, 1000, order).unwrap();
    assert_eq!(runs(contiguous(HeadOrder::Nhd)), (1, 512 << 10));
    assert_eq!(runs(two_tensors(HeadOrder::Nhd)), (1, 512 << 10));
    assert_eq!(runs(contiguous(HeadOrder::Hnd)), (256 * 8, 256));
    assert_eq!(runs(two_tensors(HeadOrder::Hnd)), (256 * 8, 256));
    let padded_tokens = Layout { token: 4096, ..contiguous(HeadOrder::Nhd) };
    assert_eq!(runs(Layout { side: 1 << 20, layer: 2 << 20, ..padded_tokens }), (256, 2048));
}

#[test]
fn one_head_or_one_token_needs_no_stride() {
    let shape = ChunkShape { layers: 1, tokens: 4, kv_heads: 1, head_dim: 8 };
    let layout = Layout { layer: 1, side: 64, token: 16, head: 3 };
    assert_eq!(Placement::new(layout, shape, 0, 128).unwrap().pieces(1).unwrap().len(), 1);
    let shape = ChunkShape { tokens: 1, kv_heads: 4, ..shape };
    let layout = Layout { layer: 1, side: 64, token: 0, head: 16 };
    assert_eq!(Placement::new(layout, shape, 0, 128).unwrap().pieces(1).unwrap().len(), 1);
}

#[test]
fn refusals_name_the_cause() {
    let layout = Layout::contiguous(&LLAMA_8B, HeadOrder::Nhd).unwrap();
    let check = |layout: Layout, base| layout.check(&LLAMA_8B, base, 32 << 20);
    assert_eq!(check(layout, 0), Ok(()));
    assert_eq!(
        check(layout, 2),
        Err(LayoutError::OutOfRange { end: (32 << 20) + 2, region_bytes: 32 << 20 })
    );
    assert_eq!(check(layout, 1), Err(LayoutError::Misaligned(1)));
    assert_eq!(check(layout, u64::MAX - 1), Err(LayoutError::Overflow));
    assert_eq!(check(Layout { layer: u64::MAX - 1, ..layout }, 0), Err(LayoutError::Overflow));
    assert_eq!(check(Layout { token: 2049, ..layout }, 0), Err(LayoutError::Misaligned(2049)));
    let overlap = LayoutError::Overlap { dimension: Dimension::Token, stride: 2046, needs: 2048 };
    assert_eq!(check(Layout { token: 2046, ..layout }, 0), Err(overlap));
    assert_eq!(
        overlap.to_string(),
        "the token stride is 2046 bytes, but must be at least 2048 to step over what lies within it"
    );
    let zero = LayoutError::Overlap { dimension: Dimension::Side, stride: 0, needs: 256 };
    assert_eq!(check(Layout { side: 0, ..layout }, 0), Err(zero));
    for empty in [
        ChunkShape { layers: 0, ..LLAMA_8B },
        ChunkShape { tokens: 0, ..LLAMA_8B },
        ChunkShape { kv_heads: 0, ..LLAMA_8B },
        ChunkShape { head_dim: 0, ..LLAMA_8B },
    ] {
        assert_eq!(layout.check(&empty, 0, u64::MAX), Err(LayoutError::EmptyShape));
    }
}

#[test]
fn sizes_beyond_64_bits_are_refused() {
    let huge = ChunkShape { layers: u16::MAX, tokens: u16::MAX, kv_heads: u16::MAX, head_dim: u16::MAX };
    for order in [HeadOrder::Nhd, HeadOrder::Hnd] {
        assert_eq!(
            Layout::contiguous(&huge, order).map(|l| l.check(&huge, 0, u64::MAX)),
            Ok(Err(LayoutError::Overflow))
        );
        assert_eq!(Layout::two_tensors(&huge, u32::MAX, order), Err(LayoutError::Overflow));
    }
    let layout = Layout { layer: 0, side: 0, token: u64::MAX, head: 0 };
    assert_eq!(layout.token_base(2), Err(LayoutError::Overflow));
    assert_eq!(layout.token_base(1), Ok(u64::MAX));
}
