//! One session with the data plane on this machine.

use std::path::PathBuf;
use std::sync::Arc;

use client::{
    ChunkPlace, ClientConfig, Dtype, FetchRequest, Namespace, PagesRequest, RingRequest, SaveCodec,
    SavePagesRequest, SaveRequest, Shape,
};
use pyo3::prelude::*;

use crate::errors;
use crate::fetch::Fetch;
use crate::gpu::{PagedCache, PagedDescription, Ring, RingDescription};
use crate::prefix::Prefix;
use crate::region::Region;
use crate::save::Save;
use crate::seconds::Seconds;
use crate::under_way::UnderWay;

/// One session with the data plane on this machine. Any number of threads may use it. Connect after a fork.
///
/// `model`, `layout`, `codec`, `rank` and `salt` say whose chunks: they must be what the chunks were stored
/// under, or nothing is ever found. `profile` is a file that `shadowserve encode --make-profile` wrote, to save with: then `codec` is
/// the profile's name, `profile-` and its hash, which `shadowserve encode --profile FILE --json` prints.
#[pyclass(frozen, module = "shadowserve")]
pub(crate) struct Client {
    client: Arc<client::Client>,
    codec: String,
    /// A profile's text.
    profile: Option<String>,
}

#[pymethods]
impl Client {
    #[new]
    #[pyo3(signature = (
        socket=PathBuf::from("/run/shadowserve.sock"), *, model="default".into(), layout="nhd".into(),
        codec="int4".into(), rank=0, salt=String::new(), timeout=Seconds::new(2), spin=Seconds::new(0), profile=None
    ))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    fn new(
        py: Python<'_>,
        socket: PathBuf,
        model: String,
        layout: String,
        codec: String,
        rank: u32,
        salt: String,
        timeout: Seconds,
        spin: Seconds,
        profile: Option<PathBuf>,
    ) -> PyResult<Self> {
        let profile = profile.map(std::fs::read_to_string).transpose()?;
        let namespace = Namespace { model, layout, codec: codec.clone(), rank, salt };
        let config = ClientConfig { timeout: timeout.0, spin: spin.0, ..ClientConfig::new(namespace) };
        let client = py.detach(|| client::Client::connect(socket, &config)).map_err(errors::connect)?;
        Ok(Self { client: Arc::new(client), codec, profile })
    }

    /// Name and version of the data plane.
    #[getter]
    fn data_plane(&self) -> &str {
        self.client.data_plane()
    }

    /// Why the session is over, or `None` while it is not.
    #[getter]
    fn lost(&self) -> Option<String> {
        self.client.lost().map(|lost| lost.to_string())
    }

    /// How much of this token sequence is stored. Waits at most `timeout` seconds.
    #[pyo3(signature = (tokens, timeout=Seconds::new(1)))]
    #[expect(clippy::needless_pass_by_value, reason = "converted from a list of Python's")]
    fn lookup(&self, py: Python<'_>, tokens: Vec<i32>, timeout: Seconds) -> PyResult<Prefix> {
        let found =
            py.detach(|| self.client.lookup(&tokens, timeout.0)).map_err(|error| errors::lookup(&error))?;
        Ok(Prefix(found))
    }

    /// Host memory that fetches may write to, `nbytes` or a little more. Costs milliseconds: do it at start.
    fn register(&self, py: Python<'_>, nbytes: usize) -> PyResult<Region> {
        let region = py.detach(|| self.client.register(nbytes)).map_err(|error| errors::register(&error))?;
        Ok(Region(region))
    }

    /// Starts fetching a whole prefix into a region of host memory as two tensors, all of K and then all of V, each
    /// `[layers, tokens, kv_heads, head_dim]` with `prefix.tokens` tokens. It ends within `timeout` seconds.
    #[pyo3(signature = (prefix, region, timeout=Seconds::new(5)))]
    fn fetch(&self, prefix: &Prefix, region: &Bound<'_, Region>, timeout: Seconds) -> PyResult<Fetch> {
        let target = region.clone().into_any().unbind();
        let region = &region.get().0;
        let mut request = FetchRequest::sequence(&prefix.0, region).map_err(errors::value)?;
        request.timeout = timeout.0;
        let fetch = self.client.fetch(&request).map_err(|error| errors::fetch(&error))?;
        Ok(Fetch(UnderWay::new(fetch, target)))
    }

    /// A paged KV cache in GPU memory of this process, as `shadowserve.describe_pages` describes it. Do it at start.
    #[expect(clippy::needless_pass_by_value, reason = "converted from a dictionary of Python's")]
    fn register_pages(&self, py: Python<'_>, description: PagedDescription) -> PyResult<PagedCache> {
        let kv = description.kv()?;
        let cache = py.detach(|| self.client.register_pages(kv)).map_err(|error| errors::register(&error))?;
        Ok(PagedCache(cache))
    }

    /// A ring in GPU memory of this process, as `shadowserve.describe_ring` describes it. Do it at start.
    #[expect(clippy::needless_pass_by_value, reason = "converted from a dictionary of Python's")]
    fn register_ring(&self, py: Python<'_>, description: RingDescription) -> PyResult<Ring> {
        let config = description.config()?;
        let ring =
            py.detach(|| self.client.register_ring(&config)).map_err(|error| errors::register(&error))?;
        Ok(Ring(ring))
    }

    /// Starts fetching a prefix into pages: its token `t` goes to page `table[t // page_tokens]`. The first `skip` chunks,
    /// which the engine has already, are left out; the table begins with the pages of token 0 all the same.
    #[pyo3(signature = (prefix, cache, table, skip=0, timeout=Seconds::new(5)))]
    fn fetch_pages(
        &self,
        prefix: &Prefix,
        cache: &Bound<'_, PagedCache>,
        table: Vec<u32>,
        skip: usize,
        timeout: Seconds,
    ) -> PyResult<Fetch> {
        let target = cache.clone().into_any().unbind();
        let mut request =
            PagesRequest::suffix(&prefix.0, &cache.get().0, table, skip).map_err(errors::value)?;
        request.timeout = timeout.0;
        let fetch = self.client.fetch_pages(&request).map_err(|error| errors::fetch(&error))?;
        Ok(Fetch(UnderWay::new(fetch, target)))
    }

    /// Starts fetching a whole prefix into a ring, plane by plane, in whatever order planes arrive.
    #[pyo3(signature = (prefix, ring, timeout=Seconds::new(5)))]
    fn fetch_ring(&self, prefix: &Prefix, ring: &Bound<'_, Ring>, timeout: Seconds) -> PyResult<Fetch> {
        let target = ring.clone().into_any().unbind();
        let mut request = RingRequest::prefix(&prefix.0, &ring.get().0).map_err(errors::value)?;
        request.timeout = timeout.0;
        let fetch = self.client.fetch_ring(&request).map_err(|error| errors::fetch(&error))?;
        Ok(Fetch(UnderWay::new(fetch, target)))
    }

    /// Starts saving a sequence out of a region that holds it as `fetch` would have delivered it: all of K and then all of V, each
    /// `[layers, tokens, kv_heads, head_dim]`, `shape` being `(layers, kv_heads, head_dim)` and `dtype` `"bf16"` or `"f16"`. The
    /// first `skip` chunks, which a lookup found stored, are left out. Do not write there before it has ended.
    #[pyo3(signature = (tokens, region, shape, dtype="bf16", skip=0, timeout=Seconds::new(10)))]
    #[expect(clippy::needless_pass_by_value, reason = "converted from a list of Python's")]
    fn save(
        &self,
        tokens: Vec<i32>,
        region: &Bound<'_, Region>,
        shape: (u16, u16, u16),
        dtype: &str,
        skip: usize,
        timeout: Seconds,
    ) -> PyResult<Save> {
        let source = region.clone().into_any().unbind();
        let (layers, kv_heads, head_dim) = shape;
        let shape = Shape { layers, kv_heads, head_dim, dtype: element_type(dtype)? };
        let (keys, codec) = (self.client.keys(&tokens), self.codec()?);
        let mut request = SaveRequest::sequence(&region.get().0, shape, codec, &keys, tokens.len())
            .map_err(errors::value)?;
        leave_out(&mut request.chunks, skip)?;
        request.timeout = timeout.0;
        let save = self.client.save(&request).map_err(|error| errors::save(&error))?;
        Ok(Save(UnderWay::new(save, source)))
    }

    /// Starts saving a sequence out of pages of a KV cache on a GPU: token `t` is in page `table[t // page_tokens]`. Elements must
    /// be bf16 or f16. The first `skip` chunks are left out. Do not write to the pages before it has ended.
    #[pyo3(signature = (tokens, cache, table, skip=0, timeout=Seconds::new(10)))]
    #[expect(clippy::needless_pass_by_value, reason = "converted from a list of Python's")]
    fn save_pages(
        &self,
        tokens: Vec<i32>,
        cache: &Bound<'_, PagedCache>,
        table: Vec<u32>,
        skip: usize,
        timeout: Seconds,
    ) -> PyResult<Save> {
        let source = cache.clone().into_any().unbind();
        let (keys, codec) = (self.client.keys(&tokens), self.codec()?);
        let mut request = SavePagesRequest::sequence(&cache.get().0, codec, &keys, tokens.len(), table)
            .map_err(errors::value)?;
        leave_out(&mut request.chunks, skip)?;
        request.timeout = timeout.0;
        let save = self.client.save_pages(&request).map_err(|error| errors::save(&error))?;
        Ok(Save(UnderWay::new(save, source)))
    }

    /// The data plane's counters and latencies, as JSON.
    fn stats(&self, py: Python<'_>) -> PyResult<String> {
        py.detach(|| self.client.stats()).map_err(|error| errors::Error::new_err(error.to_string()))
    }
}

impl Client {
    /// How what is saved is to be encoded.
    fn codec(&self) -> PyResult<SaveCodec> {
        match &self.profile {
            Some(text) => Ok(SaveCodec::Profile { id: self.codec.clone(), text: text.clone() }),
            None => Ok(SaveCodec::One(self.codec.parse().map_err(errors::value)?)),
        }
    }
}

fn element_type(name: &str) -> PyResult<Dtype> {
    match name {
        "bf16" => Ok(Dtype::Bf16),
        "f16" => Ok(Dtype::F16),
        _ => Err(errors::value(format!("elements of {name} cannot be saved: use bf16 or f16"))),
    }
}

/// Leaves out the first chunks; what is left must be something.
fn leave_out(chunks: &mut Vec<ChunkPlace>, skip: usize) -> PyResult<()> {
    if skip >= chunks.len() {
        let held = chunks.len();
        return Err(errors::value(format!(
            "nothing is left to save: skip is {skip}, the sequence has {held} chunks"
        )));
    }
    chunks.drain(..skip);
    Ok(())
}
