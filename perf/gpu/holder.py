#!/usr/bin/env python3
"""A serving process that only has GPU memory: makes a cache, writes its description to FILE, and waits to be told or killed.

`holder.py FILE --shape LAYERS,TOKENS,HEADS,DIM`; on a line of its input it compares what arrived with the reference file named there.
"""
import argparse
import json
import pathlib
import random
import sys

import torch
from lib import Cache
from safetensors.torch import load_file


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--shape", required=True)
    options = parser.parse_args()
    layers, tokens, heads, dim = map(int, options.shape.split(","))
    torch.zeros(1, device="cuda")
    used = -(-tokens // 16)
    cache = Cache("pages_nhd", layers, 2 * used, 16, heads, dim, torch.bfloat16)
    table = random.Random(3).sample(range(cache.pages), used)
    text = json.dumps({"kv": cache.describe(), "table": table})
    pathlib.Path(options.file).write_text(text)
    print("ready", flush=True)
    for line in sys.stdin:
        expected = load_file(line.strip(), device="cuda")
        equal = all(torch.equal(found.view(torch.int16), expected[name].view(torch.int16))
                    for name, found in zip("kv", cache.gather(table, tokens)))
        print("equal" if equal else "different", flush=True)


if __name__ == "__main__":
    main()
