"""Fetch the KV cache of an LLM prompt's prefix through ShadowServe's data plane, and save what was computed.

    client = shadowserve.Client("/run/shadowserve.sock", model="llama-3.1-8b")
    prefix = client.lookup(tokens)
    region = client.register(prefix.sequence_bytes)
    report = client.fetch(prefix, region).wait()
    k, v = shadowserve.tensors(region, prefix)

or straight into the pages of a KV cache on the GPU:

    cache = client.register_pages(shadowserve.describe_pages([(kv[0], kv[1]) for kv in kv_caches]))
    report = client.fetch_pages(prefix, cache, block_table).wait()

and back into the store, out of pages or out of host memory:

    report = client.save_pages(tokens, cache, block_table).wait()
    shadowserve.place(region, k, v)
    report = client.save(tokens, region, shape).wait()
"""

from ._core import (
    Client,
    DataPlaneLost,
    Error,
    Fetch,
    PagedCache,
    Prefix,
    Refused,
    Region,
    RegionError,
    Report,
    Ring,
    RingEntry,
    Save,
    SaveReport,
)
from ._gpu import describe_pages, describe_ring
from ._tensors import place, tensors

__all__ = [
    "Client",
    "DataPlaneLost",
    "Error",
    "Fetch",
    "PagedCache",
    "Prefix",
    "Refused",
    "Region",
    "RegionError",
    "Report",
    "Ring",
    "RingEntry",
    "Save",
    "SaveReport",
    "describe_pages",
    "describe_ring",
    "place",
    "tensors",
]
