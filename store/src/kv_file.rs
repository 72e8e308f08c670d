//! KV caches in `.safetensors` files: tensors `k` and `v` of shape `[layers, tokens, kv_heads, head_dim]` in BF16
//! or F16, and `tokens`, the I32 token ids that they belong to.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use compress::{CHUNK_TOKENS, Dtype, Shape, Side};
use safetensors::Dtype as FileDtype;
use safetensors::tensor::{Metadata, TensorInfo, TensorView};

/// Why a file could not be read as a KV cache.
#[derive(Debug, thiserror::Error)]
pub enum KvFileError {
    /// reading failed
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// the file
        path: PathBuf,
        /// what the system said
        source: std::io::Error,
    },
    /// the header is not that of a safetensors file
    #[error("{path} is not a safetensors file: {source}", path = .path.display())]
    Header {
        /// the file
        path: PathBuf,
        /// what is wrong with it
        source: safetensors::SafeTensorError,
    },
    /// the tensors are not those of a KV cache
    #[error("{path} holds no KV cache: {fault}", path = .path.display())]
    Content {
        /// the file
        path: PathBuf,
        /// what is wrong and what is expected
        fault: String,
    },
}

/// An open KV cache; planes are read from the file when they are asked for.
#[derive(Debug)]
pub struct KvFile {
    path: PathBuf,
    file: File,
    /// Where the tensors' bytes begin in the file, for K and for V.
    tensor_offset: [u64; 2],
    shape: SequenceShape,
    tokens: Vec<i32>,
}

/// The shape of a whole sequence's KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceShape {
    /// Transformer layers.
    pub layers: u16,
    /// Tokens in the sequence.
    pub tokens: usize,
    /// Key-value heads per layer.
    pub kv_heads: u16,
    /// Elements per head.
    pub head_dim: u16,
    /// Element type of K and V.
    pub dtype: Dtype,
}

impl SequenceShape {
    /// Bytes of one token in one plane.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        usize::from(self.kv_heads) * usize::from(self.head_dim) * 2
    }

    /// Bytes of the K tensor, which are also the bytes of the V tensor.
    #[must_use]
    pub fn tensor_bytes(&self) -> usize {
        usize::from(self.layers) * self.tokens * self.row_bytes()
    }

    /// Chunks that the sequence is cut into; the last may be shorter than [`CHUNK_TOKENS`].
    #[must_use]
    pub fn chunks(&self) -> usize {
        self.tokens.div_ceil(CHUNK_TOKENS)
    }

    /// The shape of chunk `chunk`.
    ///
    /// # Panics
    /// When the sequence has no such chunk.
    #[must_use]
    pub fn chunk(&self, chunk: usize) -> Shape {
        let rest = self.tokens.checked_sub(chunk * CHUNK_TOKENS).filter(|&rest| rest > 0);
        let tokens = rest.expect("the sequence has this chunk").min(CHUNK_TOKENS);
        Shape {
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            tokens: u16::try_from(tokens).expect("a chunk's tokens fit in 16 bits"),
            dtype: self.dtype,
        }
    }
}

impl KvFile {
    /// Opens `path` and checks its header.
    ///
    /// # Errors
    /// When the file cannot be read, is no safetensors file, or its tensors are not those of a KV cache.
    pub fn open(path: &Path) -> Result<Self, KvFileError> {
        let io = |source| KvFileError::Io { path: path.into(), source };
        let content = |fault: String| KvFileError::Content { path: path.into(), fault };
        let file = File::open(path).map_err(io)?;
        let file_bytes = file.metadata().map_err(io)?.len();
        let (data_offset, metadata) = read_header(path, &file, file_bytes)?;

        let tensor = |name: &str| {
            metadata.info(name).ok_or_else(|| {
                content(format!("tensor `{name}` is missing; `k`, `v` and `tokens` are needed"))
            })
        };
        let (k, v) = (tensor("k")?, tensor("v")?);
        let shape = sequence_shape(k, v).map_err(content)?;
        let tokens = token_ids(path, &file, data_offset, &metadata)?;
        if tokens.len() != shape.tokens {
            return Err(content(format!(
                "`tokens` has {} ids but `k` has {} tokens; one id per token is expected",
                tokens.len(),
                shape.tokens
            )));
        }
        let start = |tensor: &TensorInfo| data_offset + tensor.data_offsets.0 as u64;
        Ok(Self { path: path.into(), tensor_offset: [start(k), start(v)], file, shape, tokens })
    }

    /// The shape of the whole sequence.
    #[must_use]
    pub fn shape(&self) -> SequenceShape {
        self.shape
    }

    /// The token ids.
    #[must_use]
    pub fn tokens(&self) -> &[i32] {
        &self.tokens
    }

    /// Reads one plane of chunk `chunk`, `[tokens, kv_heads, head_dim]`, into `out`.
    ///
    /// # Errors
    /// When the file cannot be read.
    ///
    /// # Panics
    /// When the sequence has no such chunk or layer.
    pub fn read_plane(
        &self,
        chunk: usize,
        layer: u16,
        side: Side,
        out: &mut Vec<u8>,
    ) -> Result<(), KvFileError> {
        assert!(layer < self.shape.layers, "the model has this layer");
        let row = self.shape.row_bytes();
        let first_row = usize::from(layer) * self.shape.tokens + chunk * CHUNK_TOKENS;
        out.resize(usize::from(self.shape.chunk(chunk).tokens) * row, 0);
        let tensor = match side {
            Side::K => self.tensor_offset[0],
            Side::V => self.tensor_offset[1],
        };
        self.file
            .read_exact_at(out, tensor + (first_row * row) as u64)
            .map_err(|source| KvFileError::Io { path: self.path.clone(), source })
    }
}

/// Reads the token ids of a file that need not hold anything else.
///
/// # Errors
/// When the file cannot be read, is no safetensors file, or has no I32 tensor `tokens`.
pub fn read_tokens(path: &Path) -> Result<Vec<i32>, KvFileError> {
    let io = |source| KvFileError::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    let file_bytes = file.metadata().map_err(io)?.len();
    let (data_offset, metadata) = read_header(path, &file, file_bytes)?;
    token_ids(path, &file, data_offset, &metadata)
}

fn token_ids(
    path: &Path,
    file: &File,
    data_offset: u64,
    metadata: &Metadata,
) -> Result<Vec<i32>, KvFileError> {
    let content = |fault: String| KvFileError::Content { path: path.into(), fault };
    let ids = metadata.info("tokens").ok_or_else(|| content("tensor `tokens` is missing".into()))?;
    let &[count] = ids.shape.as_slice() else {
        return Err(content(format!("`tokens` has shape {:?}; [tokens] is expected", ids.shape)));
    };
    if ids.dtype != FileDtype::I32 {
        return Err(content(format!("`tokens` is {:?}; I32 is expected", ids.dtype)));
    }
    let mut bytes = vec![0; count * 4];
    let read = file.read_exact_at(&mut bytes, data_offset + ids.data_offsets.0 as u64);
    read.map_err(|source| KvFileError::Io { path: path.into(), source })?;
    Ok(bytes.chunks_exact(4).map(|id| i32::from_le_bytes([id[0], id[1], id[2], id[3]])).collect())
}

/// Longest safetensors header read: the format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The header and where the data after it begins.
fn read_header(path: &Path, file: &File, file_bytes: u64) -> Result<(u64, Metadata), KvFileError> {
    let io = |source| KvFileError::Io { path: path.into(), source };
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).map_err(io)?;
    let header_bytes = u64::from_le_bytes(length);
    let data_offset = header_bytes.saturating_add(8);
    if header_bytes > MAX_HEADER_BYTES || data_offset > file_bytes {
        let source = safetensors::SafeTensorError::InvalidHeaderLength;
        return Err(KvFileError::Header { path: path.into(), source });
    }
    let mut header = vec![0; usize::try_from(header_bytes).expect("a bounded header fits in memory")];
    file.read_exact_at(&mut header, 8).map_err(io)?;
    let fault = |source| KvFileError::Header { path: path.into(), source };
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|source| fault(safetensors::SafeTensorError::InvalidHeaderDeserialization(source)))?;
    for name in metadata.offset_keys() {
        let Some(tensor) = metadata.info(&name) else { continue };
        if !fits(tensor, file_bytes - data_offset) {
            return Err(fault(safetensors::SafeTensorError::InvalidOffset(name)));
        }
    }
    Ok((data_offset, metadata))
}

/// Whether a tensor lies within the file's data and has as many bytes as its shape says.
fn fits(tensor: &TensorInfo, data_bytes: u64) -> bool {
    let (start, end) = tensor.data_offsets;
    let elements = tensor.shape.iter().try_fold(1_usize, |product, &extent| product.checked_mul(extent));
    let bits = elements.and_then(|elements| elements.checked_mul(tensor.dtype.bitsize()));
    start <= end && end as u64 <= data_bytes && bits == (end - start).checked_mul(8)
}

fn sequence_shape(k: &TensorInfo, v: &TensorInfo) -> Result<SequenceShape, String> {
    if k.shape != v.shape || k.dtype != v.dtype {
        return Err(format!("`k` is {:?} {:?} but `v` is {:?} {:?}", k.dtype, k.shape, v.dtype, v.shape));
    }
    let dtype = match k.dtype {
        FileDtype::BF16 => Dtype::Bf16,
        FileDtype::F16 => Dtype::F16,
        other => return Err(format!("`k` is {other:?}; BF16 or F16 is expected")),
    };
    let &[layers, tokens, kv_heads, head_dim] = k.shape.as_slice() else {
        return Err(format!("`k` has shape {:?}; [layers, tokens, kv_heads, head_dim] is expected", k.shape));
    };
    let small = |name: &str, count: usize| {
        u16::try_from(count)
            .ok()
            .filter(|&count| count > 0)
            .ok_or_else(|| format!("`k` has {count} {name}; 1 to 65535 is expected"))
    };
    if tokens == 0 {
        return Err("`k` has no tokens".into());
    }
    Ok(SequenceShape {
        layers: small("layers", layers)?,
        tokens,
        kv_heads: small("heads", kv_heads)?,
        head_dim: small("elements per head", head_dim)?,
        dtype,
    })
}

/// Writes a KV cache: `k` and `v` as `shape` says, and the tokens they belong to.
///
/// # Errors
/// When the file cannot be written.
///
/// # Panics
/// When the lengths of `k`, `v` or `tokens` are not those of `shape`.
pub fn write(
    path: &Path,
    shape: SequenceShape,
    k: &[u8],
    v: &[u8],
    tokens: &[i32],
) -> Result<(), KvFileError> {
    let dtype = match shape.dtype {
        Dtype::Bf16 => FileDtype::BF16,
        Dtype::F16 => FileDtype::F16,
    };
    let dims = vec![
        usize::from(shape.layers),
        shape.tokens,
        usize::from(shape.kv_heads),
        usize::from(shape.head_dim),
    ];
    let ids: Vec<u8> = tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
    let view = |dtype, dims, bytes| TensorView::new(dtype, dims, bytes).expect("the lengths agree");
    let tensors = [
        ("k", view(dtype, dims.clone(), k)),
        ("v", view(dtype, dims, v)),
        ("tokens", view(FileDtype::I32, vec![shape.tokens], &ids)),
    ];
    safetensors::serialize_to_file(tensors, None, path)
        .map_err(|source| KvFileError::Header { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: SequenceShape =
        SequenceShape { layers: 2, tokens: 300, kv_heads: 3, head_dim: 4, dtype: Dtype::Bf16 };

    fn pattern(seed: u8) -> Vec<u8> {
        (0..SHAPE.tensor_bytes()).map(|i| u8::try_from(i % 251).unwrap() ^ seed).collect()
    }

    #[test]
    fn planes_come_back_as_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kv.safetensors");
        let (k, v) = (pattern(0), pattern(0x55));
        let tokens: Vec<i32> = (0..300).collect();
        write(&path, SHAPE, &k, &v, &tokens).unwrap();

        let file = KvFile::open(&path).unwrap();
        assert_eq!((file.shape(), file.tokens()), (SHAPE, tokens.as_slice()));
        assert_eq!((SHAPE.chunks(), SHAPE.chunk(0).tokens, SHAPE.chunk(1).tokens), (2, 256, 44));
        let mut plane = Vec::new();
        file.read_plane(1, 1, Side::V, &mut plane).unwrap();
        let row = SHAPE.row_bytes();
        assert_eq!(plane, v[(300 + 256) * row..600 * row]);
        file.read_plane(0, 1, Side::K, &mut plane).unwrap();
        assert_eq!(plane, k[300 * row..(300 + 256) * row]);
    }

    #[test]
    fn refusals_name_the_fault() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kv.safetensors");
        let refuse = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            KvFile::open(&path).unwrap_err().to_string()
        };
        assert!(refuse(b"short").contains("kv.safetensors"));
        assert!(refuse(&[0xff; 64]).contains("not a safetensors file"));
        let header = br#"{"k":{"dtype":"F32","shape":[1,1,1,1],"data_offsets":[0,4]},"v":{"dtype":"F32","shape":[1,1,1,1],"data_offsets":[4,8]},"tokens":{"dtype":"I32","shape":[1],"data_offsets":[8,12]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header);
        bytes.extend_from_slice(&[0; 12]);
        assert!(refuse(&bytes).contains("BF16 or F16 is expected"));
        bytes.truncate(bytes.len() - 1);
        assert!(refuse(&bytes).contains("not a safetensors file"));
    }
}
