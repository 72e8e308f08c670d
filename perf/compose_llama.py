#!/usr/bin/env python3
"""Compose KV in the shape of Llama-3.1-8B out of a smaller model's real channels.

`compose_llama.py --output OUT.safetensors [--input KV.safetensors] [--chunks N] [--seed S]`

Writes 32 layers, 8 KV heads of 128 and N * 256 tokens: 32 MiB a chunk, K and V together. Every channel of every
chunk is a real channel of the input over a real chunk of it, so spread, outliers and course over the tokens are
those of a model, and what a codec makes of one chunk is what it would make of KV like this. Not real: how heads
and layers hang together, and what follows a chunk. So it serves for ratios and speeds, not for judging quality.

How: layer L of the output takes heads from the input's layers around the same depth; two of its heads of 64 make one
of 128, dimension by dimension in turn and RoPE's two halves kept apart, so that frequencies fall along a half as in
Llama. K and V of a head come from the same two heads, and all heads of a token from the same token. Chunks go through
the input's whole chunks in order; each further pass draws other heads. The same input, N and seed give the same file.

Needs numpy. The input is a file with `k`, `v` [layers, tokens, kv_heads, 64] in BF16 or F16; without --input it is the
sample in the repository (4 layers, so depths repeat), otherwise what perf/quality/ writes.
"""
import argparse
import json
import pathlib
import random
import struct

import numpy

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "perf/samples/smollm2-135m-kv-640.safetensors"
LAYERS, HEADS, HEAD_DIM, CHUNK_TOKENS, VOCABULARY = 32, 8, 128, 256, 128_256
# Heads of the input to draw from at one depth: a few more than the 16 that a layer needs.
POOL = 18
# Where RoPE's halves of a head of 64 lie: pairs side by side, as in GGUF's models, unless a file's metadata says `rope:
# halves apart`, as vLLM has them.
HALVES = {"pairs": (slice(0, 64, 2), slice(1, 64, 2)), "halves apart": (slice(0, 32), slice(32, 64))}


def read(path):
    """`k` and `v` as bits, [layers, tokens, heads, 64], their element type, and the file's metadata."""
    with open(path, "rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    sides = []
    for name in ("k", "v"):
        tensor = header[name]
        if tensor["dtype"] not in ("BF16", "F16") or tensor["shape"][3] * 2 != HEAD_DIM:
            raise SystemExit(f"{path}: `{name}` is {tensor['dtype']} {tensor['shape']}; "
                             f"BF16 or F16 [layers, tokens, kv_heads, {HEAD_DIM // 2}] is expected")
        if tensor["shape"][1] < CHUNK_TOKENS:
            raise SystemExit(f"{path}: {tensor['shape'][1]} tokens; at least {CHUNK_TOKENS} are needed")
        offset = 8 + header_bytes + tensor["data_offsets"][0]
        sides.append(numpy.memmap(path, "<u2", "r", offset, tuple(tensor["shape"])))
    return sides, header["k"]["dtype"], header.get("__metadata__", {})


def draw_heads(shape, layer, generator):
    """Two heads of the input, (layer, head) each, for every head of one layer of the output."""
    layers, _, heads, _ = shape
    depth = layer * (layers - 1) / (LAYERS - 1)
    nearest = sorted(range(layers), key=lambda other: abs(other - depth))
    pool = [(other, head) for other in nearest for head in range(heads)][:POOL]
    drawn = []
    while len(drawn) < 2 * HEADS:
        drawn += generator.sample(pool, len(pool))
    return list(zip(drawn[0:2 * HEADS:2], drawn[1:2 * HEADS:2]))


def widen_head(first, second, rope):
    """One head of 128, its halves apart, from two of 64: [tokens, 64] each."""
    halves = [numpy.stack([first[:, half], second[:, half]], axis=2).reshape(len(first), -1) for half in HALVES[rope]]
    return numpy.concatenate(halves, axis=1)


def compose_layer(source, layer, plan):
    """[chunks * 256, 8, 128] of one layer; `plan[pass][layer]` names the heads."""
    chunks, whole = len(plan["chunks"]), source.shape[1] // CHUNK_TOKENS
    out = numpy.empty((chunks, CHUNK_TOKENS, HEADS, HEAD_DIM), "<u2")
    for chunk in range(chunks):
        start = chunk % whole * CHUNK_TOKENS
        rows = slice(start, start + CHUNK_TOKENS)
        for head, pair in enumerate(plan["passes"][chunk // whole][layer]):
            out[chunk, :, head] = widen_head(*(source[at][rows, other] for at, other in pair), plan["rope"])
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=pathlib.Path, default=SAMPLE, help="real KV with heads of 64 [the sample]")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--chunks", type=int, default=4, help="chunks of 256 tokens [4]")
    parser.add_argument("--seed", type=int, default=1, help="of the draw; another seed, other chunks and keys [1]")
    flags = parser.parse_args()
    if flags.chunks < 1:
        parser.error("--chunks: at least 1")
    sides, dtype, metadata = read(flags.input)

    generator = random.Random(flags.seed)
    passes = -(-flags.chunks // (sides[0].shape[1] // CHUNK_TOKENS))
    plan = {"chunks": range(flags.chunks), "rope": metadata.get("rope", "pairs"), "passes": [
        [draw_heads(sides[0].shape, layer, generator) for layer in range(LAYERS)] for _ in range(passes)]}
    tokens = numpy.array([generator.randrange(VOCABULARY) for _ in range(flags.chunks * CHUNK_TOKENS)], "<i4")

    shape = [LAYERS, len(tokens), HEADS, HEAD_DIM]
    side_bytes = 2 * LAYERS * len(tokens) * HEADS * HEAD_DIM
    header = json.dumps({
        "__metadata__": {"composed_from": metadata.get("model", flags.input.name), "seed": str(flags.seed),
                         "layout": "[layers, tokens, kv_heads, head_dim], the shape of Llama-3.1-8B; tokens are drawn"},
        "k": {"dtype": dtype, "shape": shape, "data_offsets": [0, side_bytes]},
        "v": {"dtype": dtype, "shape": shape, "data_offsets": [side_bytes, 2 * side_bytes]},
        "tokens": {"dtype": "I32", "shape": [len(tokens)],
                   "data_offsets": [2 * side_bytes, 2 * side_bytes + tokens.nbytes]},
    }).encode()
    header += b" " * (-len(header) % 8)
    with open(flags.output, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for source in sides:
            for layer in range(LAYERS):
                file.write(compose_layer(source, layer, plan).tobytes())
        file.write(tokens.tobytes())


if __name__ == "__main__":
    main()
