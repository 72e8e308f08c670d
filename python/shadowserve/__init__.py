"""Fetch the KV cache of an LLM prompt's prefix through ShadowServe's data plane.

    client = shadowserve.Client("/run/shadowserve.sock", model="llama-3.1-8b")
    prefix = client.lookup(tokens)
    region = client.register(prefix.sequence_bytes)
    report = client.fetch(prefix, region).wait()
    k, v = shadowserve.tensors(region, prefix)
"""

from ._core import Client, DataPlaneLost, Error, Fetch, Prefix, Refused, Region, RegionError, Report
from ._tensors import tensors

__all__ = [
    "Client",
    "DataPlaneLost",
    "Error",
    "Fetch",
    "Prefix",
    "Refused",
    "Region",
    "RegionError",
    "Report",
    "tensors",
]
