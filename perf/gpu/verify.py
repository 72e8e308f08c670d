#!/usr/bin/env python3
"""Fetches real KV into the pages of torch tensors, in every layout, and compares every bit.

`verify.py [--file KV.safetensors]`; one JSON object on standard output. The reference is what `shadowserve fetch --verify`
delivers to host memory, which it compares with the slow reference decoder.
"""
import argparse
import json
import pathlib
import random
import tempfile

import shadowserve
import torch
from lib import ROOT, Cache, cluster, machine, tokens_of
from safetensors.torch import load_file

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--file", default=ROOT / "perf/samples/smollm2-135m-kv-640.safetensors")
    options = parser.parse_args()
    (layers, tokens, heads, dim), dtype = tokens_of(options.file)
    results = []
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    for codec in ("int4", "raw"):
        with cluster(options.file, "rx@1,decode@2-4,dma@5", codec=codec) as running, tempfile.TemporaryDirectory() as folder:
            running.ready()
            reference = pathlib.Path(folder) / "reference.safetensors"
            checked = running.run("fetch", "--tokens-from", options.file, "--codec", codec, "--verify", "--out", reference,
                                  "--json")
            expected = load_file(reference, device="cuda")
            client = shadowserve.Client(running.socket, codec=codec)
            prefix = client.lookup(load_file(options.file)["tokens"].tolist())
            cases = [(order, size, DTYPES[dtype], 1.0) for order in Cache.ORDERS for size in (16, 48, 256)]
            if codec != "raw":
                cases.append(("pages_hnd", 16, torch.float8_e4m3fn, 0.25))
                cases.append(("two_nhd", 32, torch.float16, 1.0))
            for order, page_tokens, element, scale in cases:
                used = -(-tokens // page_tokens)
                cache = Cache(order, layers, 2 * used + 3, page_tokens, heads, dim, element, scale)
                table = random.Random(7).sample(range(cache.pages), used)
                torch.cuda.synchronize()
                report = client.fetch_pages(prefix, client.register_pages(cache.description()), table, timeout=20).wait()
                k, v = cache.gather(table, tokens)
                equal = bool(report) and compare(k, expected["k"], scale) and compare(v, expected["v"], scale)
                others = untouched(cache, table, tokens)
                results.append({"codec": codec, "order": order, "page_tokens": page_tokens, "element": str(element),
                                "fetched": repr(report), "equal": equal, "others_untouched": others})
                del cache, k, v
    ok = all(result["equal"] and result["others_untouched"] for result in results)
    print(json.dumps({"machine": machine(), "host_reference": checked.get("verified"), "ok": ok, "cases": results}))
    raise SystemExit(0 if ok else 1)


def compare(found, expected, scale):
    """Bit for bit where types agree; to a rounding of the narrower type where the data plane converts."""
    if found.dtype == expected.dtype:
        return torch.equal(found.view(torch.int16), expected.view(torch.int16))
    difference = (found.float() * scale - expected.float()).abs()
    step = 2 ** -4 if found.dtype == torch.float8_e4m3fn else 2 ** -8
    return bool((difference <= step * expected.float().abs() + scale * 2 ** -9).all())


def untouched(cache, table, tokens):
    """Whether pages that were not named, and the end of the last page, are as they were."""
    left = sorted(set(range(cache.pages)) - set(table))
    within = tokens % cache.page_tokens
    for layer in range(cache.layers):
        for view in cache.views(layer):
            if view[left].float().abs().sum() != 0:
                return False
            if within and view[table[-1], within:].float().abs().sum() != 0:
                return False
    return True


if __name__ == "__main__":
    main()
