//! What a lookup found.

use pyo3::prelude::*;

/// The longest stored prefix of a token sequence. Empty (`not prefix`) when nothing is stored.
#[pyclass(frozen, module = "shadowserve")]
pub(crate) struct Prefix(pub(crate) client::Prefix);

#[pymethods]
impl Prefix {
    /// Tokens of the sequence that are stored, from its start.
    #[getter]
    fn tokens(&self) -> u32 {
        self.0.tokens
    }

    /// Tokens of each stored chunk: 256, fewer only in a sequence's last chunk.
    #[getter]
    fn chunk_tokens(&self) -> Vec<u16> {
        self.0.chunks.iter().map(|chunk| chunk.tokens).collect()
    }

    /// Whether all of the sequence is stored.
    #[getter]
    fn is_whole(&self) -> bool {
        self.0.is_whole()
    }

    /// What the link will carry for it, bytes.
    #[getter]
    fn encoded_bytes(&self) -> u64 {
        self.0.encoded_bytes
    }

    /// What a region must hold for it as two tensors (`Client.fetch`), bytes; 0 if it is empty.
    #[getter]
    fn sequence_bytes(&self) -> usize {
        self.0.sequence_bytes().unwrap_or(0)
    }

    /// `(layers, kv_heads, head_dim)`, or `None` if it is empty.
    #[getter]
    fn shape(&self) -> Option<(u16, u16, u16)> {
        self.0.shape.map(|shape| (shape.layers, shape.kv_heads, shape.head_dim))
    }

    /// Element type as stored, `"bf16"` or `"f16"`, or `None` if it is empty.
    #[getter]
    fn dtype(&self) -> Option<String> {
        self.0.shape.map(|shape| shape.dtype.to_string())
    }

    fn __bool__(&self) -> bool {
        !self.0.is_empty()
    }

    fn __repr__(&self) -> String {
        let (chunks, asked) = (self.0.chunks.len(), self.0.asked_chunks);
        format!("Prefix({} tokens, {chunks} of {asked} chunks)", self.0.tokens)
    }
}
