//! What a store is started with: files read and encoded, on every CPU the process may use.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use compress::{Codecs, EncodeError, Encoder, ProfileError, Side};
use hugepages::{ArenaError, Heap, PageChoice, SlotsError};
use protocol::key::{Key, Namespace, chain};
use protocol::{Placement, PlacementError, StoreIndex, store_id};

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
    /// a file's KV is not of the profile's model
    #[error("{path}: {source}", path = .path.display())]
    Profile {
        /// the file
        path: PathBuf,
        /// how they differ
        source: ProfileError,
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
    pub codecs: Codecs,
    /// zstd level.
    pub level: i32,
    /// Bytes of memory for chunks, loaded and saved; without, as much as the loaded ones need, and nothing can be saved.
    pub memory_bytes: Option<usize>,
    /// Whether the loaded chunks are never evicted.
    pub pin: bool,
    /// Pages that hold them.
    pub pages: PageChoice,
    /// Which of the chunks to load, if there are other stores for the rest.
    pub share: Option<Share>,
}

/// This store's place among those that share the chunks.
#[derive(Debug, Clone)]
pub struct Share {
    /// All of the stores.
    pub placement: Placement,
    /// Which of them this one is.
    pub store: StoreIndex,
}

impl Share {
    /// The share of the store at `own` among `stores`, each chunk kept by `replicas` of them.
    ///
    /// # Errors
    /// When `own` is not in the list, or the list cannot be.
    pub fn new(stores: &[SocketAddr], own: SocketAddr, replicas: usize) -> Result<Self, ShareError> {
        let ids: Vec<u64> = stores.iter().map(|store| store_id(&store.to_string())).collect();
        let place = stores.iter().position(|store| *store == own).ok_or(ShareError::NotListed(own))?;
        let store = StoreIndex(u16::try_from(place).map_err(|_| PlacementError::Stores(stores.len()))?);
        Ok(Self { placement: Placement::new(&ids, replicas)?, store })
    }
}

/// Why a store cannot have a share.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShareError {
    /// it is not one of the stores
    #[error("this store, {0} by --ip and --udp-port, is not in --stores: list all stores, this one too")]
    NotListed(SocketAddr),
    /// the stores cannot be
    #[error("--stores, --replicas: {0}")]
    Placement(#[from] PlacementError),
}

/// Reads the files of `config` and encodes every distinct chunk in them.
pub(crate) fn encode_files(config: &LoadConfig) -> Result<Vec<Encoded>, LoadError> {
    let files = config.files.iter().map(|path| KvFile::open(path)).collect::<Result<Vec<_>, _>>()?;
    let mut jobs = Vec::new();
    for (file, path) in files.iter().zip(&config.files) {
        let shape = file.shape();
        let checked = config.codecs.check(shape.layers, shape.kv_heads, shape.head_dim);
        checked.map_err(|source| LoadError::Profile { path: path.clone(), source })?;
        for (chunk, key) in chain(&config.namespace, file.tokens()).into_iter().enumerate() {
            if config.share.as_ref().is_none_or(|share| share.placement.holds(share.store, &key)) {
                jobs.push(Job { file, path, chunk, key });
            }
        }
    }
    encode_all(&jobs, config)
}

struct Job<'a> {
    file: &'a KvFile,
    path: &'a PathBuf,
    chunk: usize,
    key: Key,
}

/// One chunk, encoded.
pub(crate) struct Encoded {
    pub(crate) key: Key,
    pub(crate) bytes: Vec<u8>,
    /// Bytes of its planes before they were encoded.
    pub(crate) raw_bytes: usize,
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
        let mut encoder = config.codecs.encoder(config.level);
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(index) else { return Ok(()) };
            if first[&job.key] != index {
                continue;
            }
            let encoded = encode(&mut encoder, job)?;
            let mut done = done.lock().expect("no thread panics with the lock held");
            done.1 += Heap::block_bytes(encoded.bytes.len()).unwrap_or(usize::MAX);
            if let Some(budget_bytes) = config.memory_bytes.filter(|&budget_bytes| done.1 > budget_bytes) {
                return Err(LoadError::Budget { needed_bytes: done.1, budget_bytes });
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
