"""KV caches as .safetensors files: `k` and `v` [layers, tokens, kv_heads, head_dim] in BF16, `tokens` in I32."""
import json
import pathlib
import struct

import numpy


def to_bf16(values: numpy.ndarray) -> numpy.ndarray:
    """Bits of the nearest bfloat16, ties to even; the values are finite."""
    bits = numpy.ascontiguousarray(values, numpy.float32).view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def from_bf16(bits: numpy.ndarray) -> numpy.ndarray:
    return (bits.astype("<u4") << 16).view(numpy.float32)


def write(path: pathlib.Path, k: numpy.ndarray, v: numpy.ndarray, tokens: numpy.ndarray, **metadata: str) -> None:
    """`k` and `v` in float32."""
    tensors = {"k": ("BF16", to_bf16(k)), "v": ("BF16", to_bf16(v)), "tokens": ("I32", tokens.astype("<i4"))}
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [offset, offset + data.nbytes]}
        offset += data.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(data.tobytes() for _, data in tensors.values()))


def read(path: pathlib.Path) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """K and V in float32, and the tokens."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()

    def tensor(name, dtype):
        start, end = header[name]["data_offsets"]
        return numpy.frombuffer(data[start:end], dtype).reshape(header[name]["shape"])

    return from_bf16(tensor("k", "<u2")), from_bf16(tensor("v", "<u2")), tensor("tokens", "<i4")
