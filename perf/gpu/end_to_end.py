#!/usr/bin/env python3
"""Store and data plane over memif, Llama-3.1-8B-shaped KV in int4, into pages of torch tensors in a third process.

`end_to_end.py [--chunks N] [--seconds S] [--decode 1,2,4,8,12] [--compression zstd,sliced,none] [--folder DIR]`; one JSON object on standard output. Every byte is
compared with what arrives in host memory before anything is measured. The limiting stage is the one whose lcores are busy
for the largest part of the time; if none is busy for nine tenths of it, it is what feeds them.
"""
import argparse
import json
import math
import os
import pathlib
import random
import sys
import tempfile

import torch
from lib import Cache, cluster, compose, machine, tokens_of
from safetensors.torch import load_file


# Decode lcores that one queue keeps busy, by what planes are compressed with: what was seen on this page's machine, rounded.
DECODERS_PER_QUEUE = {"zstd": 3, "sliced": 1, "none": 0.75}


def placements(counts, cpus, compression):
    """As many queues as the decode lcores want, and one more, as far as there are CPUs; else as many as there are CPUs for.

    A queue takes two CPUs, one for the store's lcore and one for the rx lcore. The dma lcore and all else have one of their own each, or, if that is
    all that is missing, the dma stage runs on the first decode lcore.
    """
    for count in counts:
        wanted = max(1, math.ceil(count / DECODERS_PER_QUEUE[compression]))
        most = min((cpus - count) // 2, 6)
        if most < 1:
            continue
        for queues in sorted({min(wanted, most), min(wanted + 1, most)}):
            first = 2 * queues
            shared = first + 1 + count > cpus - 1
            decode = first if shared else first + 1
            rx = f"{queues}-{first - 1}" if queues > 1 else "1"
            yield count, queues, "+".join(map(str, range(queues))), f"rx@{rx},dma@{first},decode@{decode}-{decode + count - 1}"


def limit(report):
    """Shares of time that lcores were busy, by what they run, means; and the busiest."""
    lcores = {}
    for lcore in report["lcores"]:
        lcores.setdefault(" and ".join(lcore["stages"]), []).append(lcore["busy"])
    busy = {stages: sum(values) / len(values) for stages, values in lcores.items()}
    busiest = max(busy, key=busy.get)
    return busy, busiest if busy[busiest] >= 0.9 else f"what feeds them (busiest: {busiest})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--decode", default="1,2,4,8,12")
    parser.add_argument("--compression", default="zstd,sliced,none")
    parser.add_argument("--cpus", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", default="/dev/shm")
    options = parser.parse_args()
    file = compose(options.chunks, options.folder)
    (layers, tokens, heads, dim), _ = tokens_of(file)
    torch.zeros(1, device="cuda")
    results = []
    cache = Cache("pages_nhd", layers, 2 * tokens // 16, 16, heads, dim, torch.bfloat16)
    table = random.Random(1).sample(range(cache.pages), tokens // 16)
    equal, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        pages = pathlib.Path(folder) / "pages.json"
        pages.write_text(json.dumps({"kv": cache.describe(), "table": table}))
        for compression in options.compression.split(","):
            for count, queues, store, lcores in placements([int(n) for n in options.decode.split(",")], options.cpus, compression):
                run = {"compression": compression, "decode_lcores": count, "queues": queues, "lcores": lcores}
                try:
                    with cluster(file, lcores, store, slots=2 * count + 16, mbufs=32768, window=max(4096, 2048 * queues),
                                 store_flags=["--compression", compression]) as running:
                        ratio = running.ready().get("ratio")
                        arguments = ["bench", "pages", "--pages", pages, "--tokens-from", file, "--chunks", 2, "--fetches", 4]
                        if compression not in equal:
                            equal[compression] = arrives(running, arguments, file, cache, table)
                        report = running.run(*arguments, "--duration-ms", int(options.seconds * 1000))
                except SystemExit as error:
                    # The others are worth having all the same.
                    failed.append({**run, "error": str(error)})
                    print(error, file=sys.stderr)
                    continue
                run["encoded_gbps"], run["delivered_gbps"] = report["encoded_gbps"], report["delivered_gbps"]
                run["busy"], run["limiting_stage"] = limit(report)
                print(json.dumps(run), flush=True, file=sys.stderr)
                results.append({
                    **run, "fetch_us": report["fetch_us"], "dropped": {k: v for k, v in report["dropped"].items() if v},
                    "decode_p50_ns": report["stages"].get("decode", {}), "gpu": report["gpu"], "ratio": ratio,
                })
    print(json.dumps({"machine": machine(), "equal_bit_for_bit": equal, "tokens": tokens, "runs": results, "failed": failed}))
    raise SystemExit(0 if equal and all(equal.values()) and not failed else 1)


def arrives(running, arguments, file, cache, table):
    """Whether every bit arrives in the pages as it does in host memory."""
    cache.zero()
    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        reference = pathlib.Path(folder) / "reference.safetensors"
        running.run("fetch", "--tokens-from", file, "--out", reference, "--json")
        running.run(*arguments)
        expected = load_file(reference, device="cuda")
    found = cache.gather(table, expected["k"].shape[1])
    return all(torch.equal(a.view(torch.int16), expected[name].view(torch.int16)) for name, a in zip("kv", found))


if __name__ == "__main__":
    main()
