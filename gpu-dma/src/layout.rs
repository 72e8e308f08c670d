//! How decoded planes lie in the destination.

use std::fmt;

use crate::shape::{ChunkShape, ELEMENT_BYTES};

/// Strides, in bytes, of a chunk's planes in the destination. A head's vector always is one run of bytes.
///
/// The element at (layer, side, token, head, i), where side is 0 for K and 1 for V, lies at
/// `base + layer * self.layer + side * self.side + token * self.token + head * self.head + 2 * i`
/// of the region, where `base` is the chunk's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// From a layer to the next.
    pub layer: u64,
    /// From a layer's K to its V.
    pub side: u64,
    /// From a token to the next.
    pub token: u64,
    /// From a head to the next.
    pub head: u64,
}

/// Which of tokens and heads varies slower, named as vLLM and FlashInfer do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HeadOrder {
    /// `[tokens, kv_heads, head_dim]`, as planes are decoded.
    #[default]
    Nhd,
    /// `[kv_heads, tokens, head_dim]`.
    Hnd,
}

/// An index of the destination that has a stride.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dimension {
    /// Layers.
    Layer,
    /// K and V.
    Side,
    /// Tokens.
    Token,
    /// Heads.
    Head,
}

impl fmt::Display for Dimension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Layer => "layer",
            Self::Side => "side",
            Self::Token => "token",
            Self::Head => "head",
        })
    }
}

/// Why a chunk cannot be placed by a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// An extent of the shape is zero.
    #[error("the shape has no elements: layers, tokens, KV heads and head dimension must each be at least 1")]
    EmptyShape,
    /// Offsets do not fit 64 bits.
    #[error("the layout's offsets exceed 64 bits")]
    Overflow,
    /// A stride or the base is odd.
    #[error("the layout's strides and base must be multiples of the element's 2 bytes, and {0} is not")]
    Misaligned(u64),
    /// Elements would share bytes, or runs interleave in a way that cannot be told from that by strides alone.
    #[error(
        "the {dimension} stride is {stride} bytes, but must be at least {needs} to step over what lies within it"
    )]
    Overlap {
        /// The stride that is too small.
        dimension: Dimension,
        /// What it is, in bytes.
        stride: u64,
        /// What it has to be at least, in bytes.
        needs: u64,
    },
    /// The chunk does not end within the region.
    #[error("the chunk would end at byte {end} of a region of {region_bytes} bytes")]
    OutOfRange {
        /// One past the last byte that the chunk would take.
        end: u64,
        /// Bytes in the region.
        region_bytes: u64,
    },
}

fn product(factors: &[u64]) -> Result<u64, LayoutError> {
    factors.iter().try_fold(1u64, |product, &factor| product.checked_mul(factor)).ok_or(LayoutError::Overflow)
}

impl Layout {
    /// Each chunk by itself: `[layers, 2, tokens, kv_heads, head_dim]`, or with tokens and heads exchanged.
    pub fn contiguous(shape: &ChunkShape, order: HeadOrder) -> Result<Layout, LayoutError> {
        let tokens = u64::from(shape.tokens);
        let (token, head) = token_and_head(shape, tokens, order)?;
        let side = product(&[tokens, shape.token_bytes()])?;
        Ok(Layout { layer: product(&[2, side])?, side, token, head })
    }

    /// A whole sequence of `tokens` tokens as two tensors `[layers, tokens, kv_heads, head_dim]` (or with tokens and
    /// heads exchanged) in one region, first K, then V. Of `shape`, the tokens do not matter.
    ///
    /// The chunk that starts at a token has its base at [`token_base`](Layout::token_base).
    pub fn two_tensors(shape: &ChunkShape, tokens: u32, order: HeadOrder) -> Result<Layout, LayoutError> {
        let tokens = u64::from(tokens);
        let (token, head) = token_and_head(shape, tokens, order)?;
        let layer = product(&[tokens, shape.token_bytes()])?;
        Ok(Layout { layer, side: product(&[u64::from(shape.layers), layer])?, token, head })
    }

    /// The base of a chunk whose first token is token `first_token` of the sequence that the layout describes.
    pub fn token_base(&self, first_token: u32) -> Result<u64, LayoutError> {
        product(&[u64::from(first_token), self.token])
    }

    /// Refuses a chunk that the layout cannot place at `base` of a region of `region_bytes`: see [`LayoutError`].
    ///
    /// What it accepts lies within the region, element by element, without two of them sharing a byte. Of layouts
    /// without overlap it accepts those whose dimensions nest, in whatever order: each stride steps over all that the
    /// smaller strides reach.
    pub fn check(&self, shape: &ChunkShape, base: u64, region_bytes: u64) -> Result<(), LayoutError> {
        if shape.is_empty() {
            return Err(LayoutError::EmptyShape);
        }
        let mut reach = shape.head_bytes();
        let mut dimensions = self.dimensions(shape);
        dimensions.sort_unstable_by_key(|&(_, stride, _)| stride);
        for (dimension, stride, count) in dimensions.into_iter().filter(|&(_, _, count)| count > 1) {
            if stride % ELEMENT_BYTES != 0 {
                return Err(LayoutError::Misaligned(stride));
            }
            if stride < reach {
                return Err(LayoutError::Overlap { dimension, stride, needs: reach });
            }
            let last = stride.checked_mul(count - 1).ok_or(LayoutError::Overflow)?;
            reach = reach.checked_add(last).ok_or(LayoutError::Overflow)?;
        }
        if !base.is_multiple_of(ELEMENT_BYTES) {
            return Err(LayoutError::Misaligned(base));
        }
        let end = base.checked_add(reach).ok_or(LayoutError::Overflow)?;
        if end > region_bytes {
            return Err(LayoutError::OutOfRange { end, region_bytes });
        }
        Ok(())
    }

    fn dimensions(&self, shape: &ChunkShape) -> [(Dimension, u64, u64); 4] {
        [
            (Dimension::Layer, self.layer, u64::from(shape.layers)),
            (Dimension::Side, self.side, 2),
            (Dimension::Token, self.token, u64::from(shape.tokens)),
            (Dimension::Head, self.head, u64::from(shape.kv_heads)),
        ]
    }
}

fn token_and_head(shape: &ChunkShape, tokens: u64, order: HeadOrder) -> Result<(u64, u64), LayoutError> {
    Ok(match order {
        HeadOrder::Nhd => (shape.token_bytes(), shape.head_bytes()),
        HeadOrder::Hnd => (shape.head_bytes(), product(&[tokens, shape.head_bytes()])?),
    })
}
