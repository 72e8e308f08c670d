//! Where the tokens of a chunk lie in a paged KV cache: pure arithmetic on a description that [`PagedKv::check`] found
//! sound and a page table that was checked against it.

use control::{PageStrides, PagedKv};

use crate::copies::Run;

/// How a decoded plane lies in its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SlotOrder {
    /// `[tokens, kv_heads, head_dim]`, as planes are decoded.
    #[default]
    Tokens,
    /// The tokens that share a page together, each such group `[kv_heads, tokens, head_dim]`: what pages whose heads vary
    /// slower than their tokens want, since then a whole page is one run. [`by_page`] makes it.
    Pages,
}

/// Tokens of a chunk that lie in one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first of them, counted from the chunk's first.
    pub first: u64,
    /// How many there are.
    pub tokens: u64,
    /// Which entry of the page table.
    pub entry: u64,
    /// Which token of the page the first is.
    pub in_page: u64,
}

/// Cuts a chunk, whose first token is token `first_token` of a page table, where pages end.
pub fn segments(first_token: u64, tokens: u64, page_tokens: u64) -> impl Iterator<Item = Segment> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == tokens {
            return None;
        }
        let at = first_token + done;
        let (entry, in_page) = (at / page_tokens, at % page_tokens);
        let segment =
            Segment { first: done, tokens: (page_tokens - in_page).min(tokens - done), entry, in_page };
        done += segment.tokens;
        Some(segment)
    })
}

/// The order in which slots spare the copy engine most.
#[must_use]
pub fn slot_order(kv: &PagedKv) -> SlotOrder {
    let head_bytes = kv.head_bytes();
    let by_head = |strides: &PageStrides| strides.token == head_bytes && strides.head != head_bytes;
    if kv.kv_heads > 1 && by_head(&kv.k) && by_head(&kv.v) { SlotOrder::Pages } else { SlotOrder::Tokens }
}

/// Bytes of a decoded plane of `tokens` tokens, in the cache's element type.
#[must_use]
pub fn plane_bytes(kv: &PagedKv, tokens: u16) -> u64 {
    u64::from(tokens) * u64::from(kv.kv_heads) * kv.head_bytes()
}

/// Rearranges a plane from [`SlotOrder::Tokens`] in `plane` to [`SlotOrder::Pages`] in `out`; both have its bytes.
pub fn by_page(kv: &PagedKv, first_token: u64, tokens: u16, plane: &[u8], out: &mut [u8]) {
    let small = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let (heads, head_bytes) = (usize::from(kv.kv_heads), small(kv.head_bytes()));
    let token_bytes = heads * head_bytes;
    for segment in segments(first_token, tokens.into(), kv.page_tokens.into()) {
        let (first, count) = (small(segment.first), small(segment.tokens));
        let bytes = first * token_bytes..(first + count) * token_bytes;
        let (Some(from), Some(to)) = (plane.get(bytes.clone()), out.get_mut(bytes)) else { return };
        for (head, to) in to.chunks_exact_mut(count * head_bytes).enumerate() {
            let from = from.chunks_exact(token_bytes);
            for (to, from) in to.chunks_exact_mut(head_bytes).zip(from) {
                to.copy_from_slice(&from[head * head_bytes..][..head_bytes]);
            }
        }
    }
}

/// The copies that put plane `plane` (`layer * 2`, plus 1 for V) of a chunk into its pages, in the order of the chunk's
/// tokens. Destinations are offsets in the plane's allocation, sources offsets in the slot; all lie within the
/// allocation, and within the plane's bytes.
///
/// `table` is the page table and `first_token` the chunk's place in it, checked: it covers every token of the chunk, and
/// names pages that the cache has.
///
/// # Panics
/// If `table` was not checked, or there is no such plane.
pub fn runs(
    kv: &PagedKv,
    plane: u32,
    table: &[u32],
    first_token: u64,
    tokens: u16,
    order: SlotOrder,
    mut each: impl FnMut(Run),
) {
    let layer = &kv.layers[plane as usize / 2];
    let (base, strides) = if plane.is_multiple_of(2) { (layer.k, &kv.k) } else { (layer.v, &kv.v) };
    let (heads, head_bytes) = (u64::from(kv.kv_heads), kv.head_bytes());
    let token_bytes = heads * head_bytes;
    for segment in segments(first_token, tokens.into(), kv.page_tokens.into()) {
        let page = u64::from(table[usize::try_from(segment.entry).expect("a table fits memory")]);
        let slot = match order {
            SlotOrder::Tokens => Axes { token: token_bytes, head: head_bytes },
            SlotOrder::Pages => Axes { token: head_bytes, head: segment.tokens * head_bytes },
        };
        let block = Block {
            to: base.offset + page * strides.page + segment.in_page * strides.token,
            from: segment.first * token_bytes,
            page: Axes { token: strides.token, head: strides.head },
            slot,
            tokens: segment.tokens,
            heads,
            head_bytes,
        };
        block.runs(&mut each);
    }
}

/// Strides of tokens and heads.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Axes {
    token: u64,
    head: u64,
}

/// Tokens times heads of one page.
struct Block {
    to: u64,
    from: u64,
    page: Axes,
    slot: Axes,
    tokens: u64,
    heads: u64,
    head_bytes: u64,
}

impl Block {
    fn runs(&self, each: &mut impl FnMut(Run)) {
        let &Self { to, from, page, slot, tokens, heads, head_bytes } = self;
        // The inner axis is one that is without gaps on both sides, or else the longer one.
        let dense = |axis: fn(&Axes) -> u64, count: u64| {
            count == 1 || (axis(&page) == head_bytes && axis(&slot) == head_bytes)
        };
        let token: fn(&Axes) -> u64 = |axes| axes.token;
        let head: fn(&Axes) -> u64 = |axes| axes.head;
        if dense(head, heads) {
            self.emit(Run::row(to, from, heads * head_bytes), (token, tokens), each);
        } else if dense(token, tokens) {
            self.emit(Run::row(to, from, tokens * head_bytes), (head, heads), each);
        } else {
            let (outer, outer_count, inner, inner_count) =
                if tokens >= heads { (head, heads, token, tokens) } else { (token, tokens, head, heads) };
            for index in 0..outer_count {
                let row = Run::row(to + index * outer(&page), from + index * outer(&slot), head_bytes);
                self.emit(row, (inner, inner_count), each);
            }
        }
    }

    /// `rows` times `row`; one run if they follow each other without gaps.
    fn emit(&self, row: Run, (axis, rows): (fn(&Axes) -> u64, u64), each: &mut impl FnMut(Run)) {
        let (to_pitch, from_pitch) = (axis(&self.page), axis(&self.slot));
        if rows == 1 {
            each(row);
        } else if to_pitch == row.bytes && from_pitch == row.bytes {
            each(Run::row(row.to, row.from, row.bytes * rows));
        } else {
            each(Run { rows, to_pitch, from_pitch, ..row });
        }
    }
}
