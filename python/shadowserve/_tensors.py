"""Tensors in a region: what a fetch wrote, and what is to be saved. torch is imported only when asked for."""

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


def place(region, k, v):
    """Copies K and V into a region, so that `Client.save` finds them there.

    Both are `[layers, tokens, kv_heads, head_dim]`, torch tensors on any device or contiguous NumPy arrays, of 16-bit elements (NumPy
    has no bfloat16: give its bits as uint16). Gives the `shape` that `Client.save` wants.
    """
    k, v = _array(k), _array(v)
    if k.shape != v.shape or len(k.shape) != 4:
        raise ValueError(f"K and V must be [layers, tokens, kv_heads, head_dim], both alike, not {k.shape} and {v.shape}")
    if k.nbytes + v.nbytes > region.nbytes:
        raise ValueError(f"K and V have {k.nbytes + v.nbytes} bytes and the region only {region.nbytes}: register more")
    target = memoryview(_buffer(region)).cast("B")
    target[: k.nbytes] = k.cast("B")
    target[k.nbytes : k.nbytes + v.nbytes] = v.cast("B")
    layers, _, kv_heads, head_dim = k.shape
    return layers, kv_heads, head_dim


def _array(tensor):
    """A view of its elements, 16 bits each."""
    if hasattr(tensor, "detach"):
        import torch

        tensor = tensor.detach().cpu().contiguous().view(torch.int16).numpy()
    view = memoryview(tensor)
    if view.itemsize != 2 or not view.c_contiguous:
        raise ValueError(f"elements must have 16 bits and lie one after the other, not {view.itemsize * 8} bits in {view.strides}")
    return view


def _buffer(region):
    """The region's bytes as an object with the buffer protocol, which keeps the region alive."""
    buffer = (ctypes.c_char * region.nbytes).from_address(region.data_ptr)
    buffer._region = region
    return buffer
