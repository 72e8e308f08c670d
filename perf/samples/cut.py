#!/usr/bin/env python3
"""Cut the demo's sample from a larger KV cache: `cut.py FULL.safetensors OUT.safetensors`.

Keeps layers 0, 10, 20 and 29 (first, middle and last layers have different statistics) of the first 640
tokens (two and a half chunks, so that the short last chunk is exercised too). Needs only the standard library.
"""
import json
import struct
import sys

LAYERS = (0, 10, 20, 29)
TOKENS = 640


def main(source: str, target: str) -> None:
    with open(source, "rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
        data = file.read()
    tensors = {}
    for name in ("k", "v"):
        layers, tokens, heads, dim = header[name]["shape"]
        start = header[name]["data_offsets"][0]
        row = heads * dim * 2
        layer = tokens * row
        kept = b"".join(data[start + n * layer : start + n * layer + TOKENS * row] for n in LAYERS)
        tensors[name] = ("BF16", [len(LAYERS), TOKENS, heads, dim], kept)
    start = header["tokens"]["data_offsets"][0]
    tensors["tokens"] = ("I32", [TOKENS], data[start : start + 4 * TOKENS])

    offset, out, body = 0, {"__metadata__": header["__metadata__"] | {"cut": f"layers {LAYERS}, first {TOKENS} tokens"}}, b""
    for name, (dtype, shape, kept) in tensors.items():
        out[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(kept)]}
        offset += len(kept)
        body += kept
    text = json.dumps(out).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + body)


if __name__ == "__main__":
    main(*sys.argv[1:])
