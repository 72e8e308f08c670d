//! Planes to measure with: synthetic ones that look like KV, or those of a file.
#![allow(dead_code, reason = "each of the programs that share this file uses a part of it")]

pub(crate) mod bare;

use compress::{Dtype, Shape, Side, plane_of};
use safetensors::{Dtype as FileDtype, SafeTensors};

/// The planes of one chunk.
pub(crate) struct Planes {
    /// Where they come from.
    pub(crate) origin: String,
    /// Their shape.
    pub(crate) shape: Shape,
    /// Bytes of each plane, in the order of a chunk.
    pub(crate) bytes: Vec<Vec<u8>>,
}

impl Planes {
    /// Gaussian elements, those of a K channel with a scale and a mean of their own (K has outlier channels), in bf16.
    pub(crate) fn synthetic(layers: u16, kv_heads: u16, head_dim: u16, tokens: u16) -> Self {
        let shape = Shape { layers, kv_heads, head_dim, tokens, dtype: Dtype::Bf16 };
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let bytes = (0..shape.planes())
            .map(|plane| synthetic_plane(&shape, plane_of(plane).1, &mut random))
            .collect();
        Self { origin: "synthetic".into(), shape, bytes }
    }

    /// The chunks of the file named by `SHADOWSERVE_KV`, if it is set.
    pub(crate) fn from_environment() -> Option<Self> {
        let path = std::env::var("SHADOWSERVE_KV").ok()?;
        let file = std::fs::read(&path).unwrap_or_else(|error| panic!("can't read {path}: {error}"));
        Self::from_safetensors(&path, &file).into_iter().next()
    }

    /// Every chunk of a `.safetensors` file; panics on a file that isn't KV.
    pub(crate) fn from_safetensors(origin: &str, file: &[u8]) -> Vec<Self> {
        let tensors = SafeTensors::deserialize(file).unwrap_or_else(|error| panic!("{origin}: {error}"));
        let [k, v] =
            ["k", "v"].map(|name| tensors.tensor(name).unwrap_or_else(|error| panic!("{origin}: {error}")));
        let &[layers, tokens, kv_heads, head_dim] = k.shape() else {
            panic!("{origin}: k needs four dimensions")
        };
        let dtype = if k.dtype() == FileDtype::F16 { Dtype::F16 } else { Dtype::Bf16 };
        let size = |size: usize| u16::try_from(size).expect("a dimension of KV fits 16 bits");
        let token_bytes = kv_heads * head_dim * 2;
        (0..tokens)
            .step_by(compress::CHUNK_TOKENS)
            .map(|first| {
                let count = (tokens - first).min(compress::CHUNK_TOKENS);
                let plane = |(layer, side): (u16, Side)| {
                    let tensor = if side == Side::K { &k } else { &v };
                    let start = (usize::from(layer) * tokens + first) * token_bytes;
                    tensor.data()[start..start + count * token_bytes].to_vec()
                };
                Self {
                    origin: origin.to_owned(),
                    shape: Shape {
                        layers: size(layers),
                        kv_heads: size(kv_heads),
                        head_dim: size(head_dim),
                        tokens: size(count),
                        dtype,
                    },
                    bytes: (0..layers * 2).map(|index| plane(plane_of(index))).collect(),
                }
            })
            .collect()
    }
}

fn synthetic_plane(shape: &Shape, side: Side, random: &mut Random) -> Vec<u8> {
    let channel = |random: &mut Random| match side {
        Side::K => ((random.gaussian() * 0.7).exp(), random.gaussian() * 2.0),
        Side::V => (0.3, 0.0),
    };
    let channels: Vec<(f32, f32)> = (0..shape.channels()).map(|_| channel(random)).collect();
    let elements = (0..shape.elements_per_plane()).map(|element| channels[element % channels.len()]);
    elements
        .flat_map(|(scale, mean)| half::bf16::from_f32(random.gaussian() * scale + mean).to_le_bytes())
        .collect()
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// About normal: the sum of twelve uniform numbers, minus its mean.
    fn gaussian(&mut self) -> f32 {
        (0..12).map(|_| f32::from(u16::try_from(self.next() >> 48).unwrap_or(0)) / 65536.0).sum::<f32>() - 6.0
    }
}
