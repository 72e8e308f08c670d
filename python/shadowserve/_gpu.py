"""Torch tensors in GPU memory, described for the data plane: handles, offsets, strides. torch is imported only here."""

import ctypes
import functools

from ._core import RegionError


def describe_pages(layers, scales=None):
    """A paged KV cache for `Client.register_pages`.

    `layers` has a pair of tensors for each layer, K and V, each a view `[pages, page_tokens, kv_heads, head_dim]` of the
    engine's own memory with whatever strides that has, as long as a head's vector is contiguous:

        vLLM, [2, pages, page_tokens, heads, dim]:    (kv[0], kv[1])
        vLLM, [pages, 2, page_tokens, heads, dim]:    (kv[:, 0], kv[:, 1])
        HND,  [pages, 2, heads, page_tokens, dim]:    (kv[:, 0].transpose(1, 2), kv[:, 1].transpose(1, 2))

    Elements are bfloat16, float16 or float8_e4m3fn; for the last `scales` has each layer's K and V scale.
    """
    if not layers:
        raise ValueError("no layers: give a pair of tensors, K and V, for each")
    first = layers[0][0]
    allocations = _Allocations(first.device)
    scales = scales or [(1.0, 1.0)] * len(layers)
    if len(scales) != len(layers):
        raise ValueError(f"{len(layers)} layers and scales for {len(scales)}")
    for layer, pair in enumerate(layers):
        for side, tensor, model in zip("kv", pair, layers[0]):
            _check_view(f"{side} of layer {layer}", tensor, model)
    places = [
        tuple(allocations.place(tensor) + (float(scale),) for tensor, scale in zip(pair, pair_scales))
        for pair, pair_scales in zip(layers, scales)
    ]
    pages, page_tokens, kv_heads, head_dim = first.shape
    return {
        "device": device_uuid(first.device),
        "allocations": allocations.list,
        "element": _element(first.dtype),
        "page_tokens": page_tokens,
        "pages": pages,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "k_strides": _byte_strides(layers[0][0]),
        "v_strides": _byte_strides(layers[0][1]),
        "layers": places,
    }


def describe_ring(tensor):
    """A ring for `Client.register_ring`: `tensor` is `[entries, elements]`, contiguous, an entry a decoded plane or more."""
    if tensor.dim() != 2 or not tensor.is_contiguous():
        raise ValueError(f"a ring is a contiguous tensor [entries, elements], not {list(tensor.shape)}")
    allocations = _Allocations(tensor.device)
    _, offset = allocations.place(tensor)
    return {
        "device": device_uuid(tensor.device),
        "allocation": allocations.list[0],
        "offset": offset,
        "entry_bytes": tensor.stride(0) * tensor.element_size(),
        "entries": tensor.shape[0],
        "element": _element(tensor.dtype),
    }


def device_uuid(device):
    """The 16 bytes by which CUDA names a GPU in every process."""
    import torch

    return list(bytes.fromhex(str(torch.cuda.get_device_properties(device).uuid).replace("-", "")))


def _element(dtype):
    import torch

    names = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float8_e4m3fn: "fp8_e4m3"}
    if dtype not in names:
        raise ValueError(f"elements of {dtype} cannot be delivered: use {', '.join(str(known) for known in names)}")
    return names[dtype]


def _byte_strides(tensor):
    return tuple(stride * tensor.element_size() for stride in tensor.stride()[:3])


def _check_view(name, tensor, model):
    if tensor.dim() != 4 or tensor.stride(3) != 1:
        raise ValueError(f"{name} must be a view [pages, page_tokens, kv_heads, head_dim] whose last dimension is contiguous")
    if (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) != (model.shape, model.stride(), model.dtype, model.device):
        raise ValueError(f"{name} differs from layer 0 in shape, strides, type or device: all layers must be alike")


class _Allocations:
    """The GPU allocations that tensors lie in, each named once, with the driver's handle for other processes."""

    def __init__(self, device):
        if device.type != "cuda":
            raise ValueError(f"a tensor on {device} is no GPU memory: use Client.register for host memory")
        self.list = []
        self._index = {}

    def place(self, tensor):
        """Index of the allocation, and the tensor's offset in it."""
        base, nbytes = _range_of(tensor.data_ptr())
        if base not in self._index:
            self._index[base] = len(self.list)
            self.list.append((_handle_of(base), nbytes))
        return self._index[base], tensor.data_ptr() - base


@functools.cache
def _driver():
    return ctypes.CDLL("libcuda.so.1")


def _call(name, *arguments):
    error = getattr(_driver(), name)(*arguments)
    if error:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(error, ctypes.byref(text))
        raise RegionError(
            f"{name}: {(text.value or b'unknown error').decode()}. Memory from cudaMallocAsync, virtual memory calls or PyTorch's "
            "expandable segments cannot be exported: allocate the KV cache with plain cudaMalloc"
        )


def _range_of(address):
    """First byte and size of the allocation that an address lies in."""
    base, nbytes = ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(nbytes), ctypes.c_uint64(address))
    return base.value, nbytes.value


def _handle_of(base):
    handle = ctypes.create_string_buffer(64)
    _call("cuIpcGetMemHandle", handle, ctypes.c_uint64(base))
    return handle.raw
