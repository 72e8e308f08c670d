//! The encoded chunks that a store holds: hugepage memory, and an index from key to place.
//!
//! Chunks are encoded once, at start, on every CPU the process may use; afterwards both memory and index are only
//! read, so the serving lcores share them without a lock.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use compress::{ChunkHeader, EncodeError, Encoder, PlaneCodec, Side};
use hugepages::{Arena, ArenaConfig, ArenaError, PageChoice, PageSize, Slot, Slots, SlotsError};
use protocol::key::{Key, Namespace, chain};
use protocol::{ChunkInfo, ChunkSource};

use crate::kv_file::{KvFile, KvFileError};

/// Why the chunks could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// a file could not be read
    #[error(transparent)]
    File(#[from] KvFileError),
    /// a chunk could not be encoded
    #[error("chunk {chunk} of {path}: {source}", path = .path.display())]
    Encode {
        /// the file
        path: PathBuf,
        /// the chunk within it
        chunk: usize,
        /// what the encoder said
        source: EncodeError,
    },
    /// the encoded chunks exceed the memory budget
    #[error(
        "the encoded chunks need {needed_bytes} bytes, more than --memory-mib allows ({budget_bytes} bytes)"
    )]
    Budget {
        /// bytes needed so far
        needed_bytes: usize,
        /// bytes allowed
        budget_bytes: usize,
    },
    /// the memory could not be had
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// the memory could not be made private
    #[error(transparent)]
    Slots(#[from] SlotsError),
}

/// What to load and how to encode it.
#[derive(Debug, Clone)]
pub struct LoadConfig {
    /// The files.
    pub files: Vec<PathBuf>,
    /// What the keys are derived from, beside the tokens.
    pub namespace: Namespace,
    /// How planes are encoded.
    pub codec: PlaneCodec,
    /// zstd level.
    pub level: i32,
    /// Most bytes that the encoded chunks may take.
    pub memory_bytes: usize,
    /// Pages that hold them.
    pub pages: PageChoice,
}

/// One chunk's place in the arena.
struct Stored {
    offset: usize,
    bytes: usize,
}

/// The chunks of a store.
pub struct ChunkStore {
    /// All of them, one after another.
    memory: Slot,
    page_size: PageSize,
    /// By handle.
    stored: Vec<Stored>,
    index: HashMap<Key, ChunkInfo>,
    raw_bytes: usize,
}

impl ChunkStore {
    /// Reads and encodes the files of `config`. A chunk that several files share is stored once.
    ///
    /// # Errors
    /// When a file cannot be read or encoded, or memory or budget does not suffice.
    pub fn load(config: &LoadConfig) -> Result<Self, LoadError> {
        let files = config.files.iter().map(|path| KvFile::open(path)).collect::<Result<Vec<_>, _>>()?;
        let mut jobs = Vec::new();
        for (file, path) in files.iter().zip(&config.files) {
            for (chunk, key) in chain(&config.namespace, file.tokens()).into_iter().enumerate() {
                jobs.push(Job { file, path, chunk, key });
            }
        }
        let encoded = encode_all(&jobs, config)?;
        let raw_bytes = encoded.iter().map(|chunk| chunk.raw_bytes).sum();
        Self::keep(encoded, raw_bytes, config)
    }

    fn keep(encoded: Vec<Encoded>, raw_bytes: usize, config: &LoadConfig) -> Result<Self, LoadError> {
        let total: usize = encoded.iter().map(|chunk| chunk.bytes.len().next_multiple_of(64)).sum();
        let arena = Arena::new(ArenaConfig {
            name: "chunks",
            bytes: total.max(1),
            page: config.pages,
            numa_node: None,
        })?;
        let page_size = arena.page_size();
        let bytes = arena.bytes();
        let mut memory =
            Slots::new(arena, bytes)?.take().pop().expect("an arena is one slot of its own size");
        let (mut stored, mut index, mut offset) = (Vec::new(), HashMap::new(), 0);
        for chunk in encoded {
            let handle = u32::try_from(stored.len()).expect("fewer than 4 Gi chunks fit in memory");
            memory.as_mut_slice()[offset..offset + chunk.bytes.len()].copy_from_slice(&chunk.bytes);
            stored.push(Stored { offset, bytes: chunk.bytes.len() });
            index.insert(chunk.key, chunk_info(&chunk.bytes, handle));
            offset += chunk.bytes.len().next_multiple_of(64);
        }
        Ok(Self { memory, page_size, stored, index, raw_bytes })
    }

    /// Chunks held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.stored.len()
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.stored.is_empty()
    }

    /// Bytes of the encoded chunks, headers included.
    #[must_use]
    pub fn encoded_bytes(&self) -> usize {
        self.stored.iter().map(|chunk| chunk.bytes).sum()
    }

    /// Bytes of the same chunks before they were encoded.
    #[must_use]
    pub fn raw_bytes(&self) -> usize {
        self.raw_bytes
    }

    /// The pages that the chunks lie in.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }
}

impl ChunkStore {
    /// The encoded bytes of the chunk with this handle.
    #[must_use]
    pub fn bytes(&self, handle: u32) -> Option<&[u8]> {
        let chunk = self.stored.get(usize::try_from(handle).ok()?)?;
        self.memory.as_slice().get(chunk.offset..chunk.offset + chunk.bytes)
    }
}

impl ChunkSource for ChunkStore {
    fn find(&self, key: &Key) -> Option<ChunkInfo> {
        self.index.get(key).copied()
    }

    fn chunk_bytes(&self, handle: u32) -> Option<u64> {
        self.bytes(handle).map(|bytes| bytes.len() as u64)
    }
}

struct Job<'a> {
    file: &'a KvFile,
    path: &'a PathBuf,
    chunk: usize,
    key: Key,
}

struct Encoded {
    key: Key,
    bytes: Vec<u8>,
    raw_bytes: usize,
}

/// Encodes every distinct chunk, on as many threads as the process has CPUs, in the order of `jobs`.
fn encode_all(jobs: &[Job<'_>], config: &LoadConfig) -> Result<Vec<Encoded>, LoadError> {
    let mut first = HashMap::new();
    for (index, job) in jobs.iter().enumerate() {
        first.entry(job.key).or_insert(index);
    }
    let next = AtomicUsize::new(0);
    let done = Mutex::new((Vec::new(), 0_usize));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len().max(1));
    let work = || -> Result<(), LoadError> {
        let mut encoder = Encoder::new(config.codec, config.level);
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(index) else { return Ok(()) };
            if first[&job.key] != index {
                continue;
            }
            let encoded = encode(&mut encoder, job)?;
            let mut done = done.lock().expect("no thread panics with the lock held");
            done.1 += encoded.bytes.len().next_multiple_of(64);
            if done.1 > config.memory_bytes {
                return Err(LoadError::Budget { needed_bytes: done.1, budget_bytes: config.memory_bytes });
            }
            done.0.push((index, encoded));
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("encoding does not panic"))
    })?;
    let (mut chunks, _) = done.into_inner().expect("no thread panicked");
    chunks.sort_by_key(|&(index, _)| index);
    Ok(chunks.into_iter().map(|(_, chunk)| chunk).collect())
}

fn encode(encoder: &mut Encoder, job: &Job<'_>) -> Result<Encoded, LoadError> {
    let shape = job.file.shape().chunk(job.chunk);
    let mut planes = vec![Vec::new(); usize::from(shape.layers) * 2];
    for layer in 0..shape.layers {
        for (plane, side) in planes[usize::from(layer) * 2..].iter_mut().zip([Side::K, Side::V]) {
            job.file.read_plane(job.chunk, layer, side, plane)?;
        }
    }
    let mut bytes = Vec::new();
    let plane =
        |layer: u16, side: Side| planes[usize::from(layer) * 2 + usize::from(side == Side::V)].as_slice();
    encoder.encode_chunk(&job.key.0, &shape, plane, &mut bytes).map_err(|source| LoadError::Encode {
        path: job.path.clone(),
        chunk: job.chunk,
        source,
    })?;
    Ok(Encoded { key: job.key, bytes, raw_bytes: planes.iter().map(Vec::len).sum() })
}

/// What lookups are told of an encoded chunk.
fn chunk_info(bytes: &[u8], handle: u32) -> ChunkInfo {
    let header = ChunkHeader::parse(bytes).expect("what was just encoded can be parsed");
    let shape = header.shape;
    let codec = header.planes.first().map_or(0, |plane| plane.codec.wire());
    ChunkInfo {
        handle,
        header_bytes: u32::try_from(compress::header_bytes(header.planes.len())).expect("headers are small"),
        chunk_bytes: bytes.len() as u64,
        tokens: shape.tokens,
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        dtype: shape.dtype.wire(),
        codec,
    }
}
