#!/usr/bin/env python3
"""Fetches a file's KV through a running data plane into paged torch tensors on the GPU, and compares every byte.

    shadowserve store --load kv.safetensors --codec int4 ...      # see the README for store and data plane
    shadowserve dataplane --gpu all ...
    shadowserve fetch --tokens-from kv.safetensors --out expected.safetensors
    python/examples/fetch_to_gpu.py --tokens-from kv.safetensors --expect expected.safetensors

`--expect` is what the same data plane gave to host memory; with codec raw or lossless it can be the input itself. Pages are
taken in random order from a cache twice as large, which must be untouched everywhere else.
"""

import argparse
import json
import random
import struct
import sys

import torch

import shadowserve

# How each layout's memory is allocated, and K and V of a layer as views [pages, page_tokens, heads, dim] of it.
LAYOUTS = {
    "two-tensors": (
        lambda layers, pages, page, heads, dim: [layers, 2, pages, page, heads, dim],
        lambda memory, layer: (memory[layer, 0], memory[layer, 1]),
    ),
    "interleaved": (
        lambda layers, pages, page, heads, dim: [layers, pages, 2, page, heads, dim],
        lambda memory, layer: (memory[layer, :, 0], memory[layer, :, 1]),
    ),
    "hnd": (
        lambda layers, pages, page, heads, dim: [layers, pages, 2, heads, page, dim],
        lambda memory, layer: tuple(memory[layer, :, side].transpose(1, 2) for side in range(2)),
    ),
    "cross-layer": (
        lambda layers, pages, page, heads, dim: [pages, layers, 2, page, heads, dim],
        lambda memory, layer: (memory[:, layer, 0], memory[:, layer, 1]),
    ),
}
UNTOUCHED = -77.0


def main():
    arguments = parse_arguments()
    client = shadowserve.Client(arguments.socket, model=arguments.model, codec=arguments.codec, spin=0.001)
    tokens = load(arguments.tokens_from, ["tokens"])["tokens"].tolist()
    prefix = client.lookup(tokens)
    if not prefix:
        sys.exit("nothing of these tokens is stored: --model and --codec must be those of the store")
    expected = load(arguments.expect, ["k", "v"])
    failures = 0
    for layout in arguments.layouts.split(","):
        for page_tokens in map(int, arguments.page_tokens.split(",")):
            failures += not fetch_and_check(client, prefix, expected, layout, page_tokens, arguments)
    sys.exit(1 if failures else 0)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-from", required=True, help=".safetensors file with `tokens`")
    parser.add_argument("--expect", required=True, help=".safetensors file with the `k` and `v` that must arrive")
    parser.add_argument("--socket", default="/run/shadowserve.sock")
    parser.add_argument("--model", default="default")
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="some of: " + ", ".join(LAYOUTS))
    parser.add_argument("--page-tokens", default="16,32,256", help="tokens of a page, one or several")
    parser.add_argument("--repeat", type=int, default=1, help="fetches of each")
    return parser.parse_args()


def load(path, names):
    """Some tensors of a .safetensors file, on the CPU."""
    content = open(path, "rb").read()
    (header_bytes,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + header_bytes])
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32}
    tensors = {}
    for name in names:
        begin, end = (8 + header_bytes + offset for offset in header[name]["data_offsets"])
        raw = torch.frombuffer(bytearray(content[begin:end]), dtype=dtypes[header[name]["dtype"]])
        tensors[name] = raw.view(header[name]["shape"])
    return tensors


def fetch_and_check(client, prefix, expected, layout, page_tokens, arguments):
    layers, heads, dim = prefix.shape
    used = -(-prefix.tokens // page_tokens)
    dimensions, views = LAYOUTS[layout]
    dtype = expected["k"].dtype
    memory = torch.full(dimensions(layers, 2 * used, page_tokens, heads, dim), UNTOUCHED, dtype=dtype, device=arguments.device)
    torch.cuda.synchronize()
    kv = [views(memory, layer) for layer in range(layers)]
    cache = client.register_pages(shadowserve.describe_pages(kv))
    table = random.Random(7).sample(range(2 * used), used)
    seconds = []
    for _ in range(arguments.repeat):
        report = client.fetch_pages(prefix, cache, table, timeout=30).wait()
        if not report:
            print(f"{layout}, pages of {page_tokens}: {report.outcome}: {report.message}")
            return False
        seconds.append(report.seconds)
    wrong = sum(
        not page_matches(tensor, table, expected[side][layer, : prefix.tokens])
        for layer, pair in enumerate(kv)
        for side, tensor in zip("kv", pair)
    )
    gbps = report.delivered_bytes * 8e-9 / sorted(seconds)[len(seconds) // 2]
    verdict = "every byte right" if not wrong else f"{wrong} of {2 * layers} tensors WRONG"
    print(f"{layout}, pages of {page_tokens} tokens: {prefix.tokens} tokens, {gbps:.1f} Gbps delivered, {verdict}")
    return not wrong


def page_matches(tensor, table, expected):
    """Whether a layer's K or V holds the tokens in the table's pages, and nothing anywhere else."""
    pages, page_tokens = tensor.shape[:2]
    arrived = tensor.cpu()
    filled = arrived[torch.tensor(table)].reshape(-1, *tensor.shape[2:])
    others = torch.ones(pages, dtype=torch.bool)
    others[torch.tensor(table)] = False
    same = torch.equal(filled[: len(expected)].view(torch.int16), expected.contiguous().view(torch.int16))
    return same and bool((filled[len(expected) :] == UNTOUCHED).all()) and bool((arrived[others] == UNTOUCHED).all())


if __name__ == "__main__":
    main()
