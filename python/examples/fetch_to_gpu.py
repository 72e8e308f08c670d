#!/usr/bin/env python3
"""Fetches a file's KV through a running data plane into a paged KV cache on the GPU, and compares every byte.

    shadowserve store --load kv.safetensors --codec int4 ...      # see the README for store and data plane
    shadowserve dataplane --gpu all ...
    shadowserve fetch --tokens-from kv.safetensors --out expected.safetensors
    python/examples/fetch_to_gpu.py --tokens-from kv.safetensors --expect expected.safetensors

The cache is vLLM's, a tensor `[2, pages, page_tokens, kv_heads, head_dim]` per layer; `perf/gpu/verify.py` goes through the other layouts.
`--expect` is what the same data plane gave to host memory; with codec raw or lossless it can be the input itself. Needs torch and safetensors.
"""

import argparse
import random
import sys

import torch
from safetensors.torch import load_file

import shadowserve


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-from", required=True, help=".safetensors file with `tokens`")
    parser.add_argument("--expect", required=True, help=".safetensors file with the `k` and `v` that must arrive")
    parser.add_argument("--socket", default="/run/shadowserve.sock")
    parser.add_argument("--model", default="default")
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--page-tokens", type=int, default=16)
    arguments = parser.parse_args()
    client = shadowserve.Client(arguments.socket, model=arguments.model, codec=arguments.codec)
    prefix = client.lookup(load_file(arguments.tokens_from)["tokens"].tolist())
    if not prefix:
        sys.exit("nothing of these tokens is stored: --model and --codec must be those of the store")

    # At start: the engine's cache, described once.
    layers, heads, dim = prefix.shape
    page_tokens, used = arguments.page_tokens, -(-prefix.tokens // arguments.page_tokens)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[prefix.dtype]
    kv_caches = [torch.zeros(2, 2 * used, page_tokens, heads, dim, dtype=dtype, device="cuda") for _ in range(layers)]
    torch.cuda.synchronize()
    cache = client.register_pages(shadowserve.describe_pages([(kv[0], kv[1]) for kv in kv_caches]))

    # For a request: the pages that the engine's scheduler chose for it.
    block_table = random.Random(7).sample(range(2 * used), used)
    report = client.fetch_pages(prefix, cache, block_table).wait()
    if not report:
        sys.exit(f"{report.outcome}: {report.message}")
    expected, index, wrong = load_file(arguments.expect, device="cuda"), torch.tensor(block_table, device="cuda"), 0
    for layer, kv in enumerate(kv_caches):
        for side, name in enumerate("kv"):
            arrived = kv[side, index].reshape(-1, heads, dim)[: prefix.tokens]
            wrong += not torch.equal(arrived.view(torch.int16), expected[name][layer, : prefix.tokens].view(torch.int16))
    print(f"{prefix.tokens} tokens, {report.delivered_bytes * 8e-9 / report.seconds:.1f} Gbps delivered, "
          + (f"{wrong} of {2 * layers} planes WRONG" if wrong else "every byte right"))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
