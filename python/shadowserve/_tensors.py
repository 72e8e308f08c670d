"""What a fetch wrote, as tensors that lie in the region itself. torch is imported only when asked for."""

import ctypes


def tensors(region, prefix):
    """K and V of a prefix fetched into `region` by `Client.fetch`, as torch tensors.

    Both are `[layers, tokens, kv_heads, head_dim]` of bfloat16 or float16, and lie in the region: nothing is copied, and
    they keep it alive. A later fetch into the region overwrites them.
    """
    import torch

    if not prefix:
        raise ValueError("the prefix is empty: nothing of the sequence is stored")
    if prefix.sequence_bytes > region.nbytes:
        raise ValueError(f"the prefix has {prefix.sequence_bytes} bytes and the region only {region.nbytes}")
    layers, kv_heads, head_dim = prefix.shape
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[prefix.dtype]
    whole = torch.frombuffer(_buffer(region), dtype=dtype, count=prefix.sequence_bytes // dtype.itemsize)
    return whole.view(2, layers, prefix.tokens, kv_heads, head_dim).unbind(0)


def _buffer(region):
    """The region's bytes as an object with the buffer protocol, which keeps the region alive."""
    buffer = (ctypes.c_char * region.nbytes).from_address(region.data_ptr)
    buffer._region = region
    return buffer
