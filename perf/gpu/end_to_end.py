#!/usr/bin/env python3
"""Store and data plane over memif, Llama-3.1-8B-shaped KV, int4 and zstd, into pages of torch tensors in a third process.

`end_to_end.py [--chunks N] [--seconds S] [--decode 1,2,4,8,12] [--folder DIR]`; one JSON object on standard output. Every byte is
compared with what arrives in host memory before anything is measured. The limiting stage is the one whose lcores are busy
for the largest part of the time; if none is busy for nine tenths of it, it is what feeds them.
"""
import argparse
import json
import pathlib
import random
import tempfile

import torch
from lib import Cache, cluster, compose, machine, tokens_of
from safetensors.torch import load_file


def placements(counts, cpus):
    """As many queues as CPUs are left for, 1 to 4; every lcore on a CPU of its own, and one CPU for all else."""
    for count in counts:
        for queues in (1, 2, 3, 4):
            if (queues == 1 or count >= 2 * queues) and 2 * queues + 1 + count <= cpus - (queues > 1):
                first = 2 * queues
                rx = f"{queues}-{first - 1}" if queues > 1 else "1"
                yield count, queues, "+".join(map(str, range(queues))), f"rx@{rx},dma@{first},decode@{first + 1}-{first + count}"


def limit(report):
    stages = {}
    for lcore in report["lcores"]:
        for stage in lcore["stages"]:
            stages.setdefault(stage, []).append(lcore["busy"])
    busy = {stage: sum(values) / len(values) for stage, values in stages.items()}
    busiest = max(busy, key=busy.get)
    return busy, busiest if busy[busiest] >= 0.9 else f"what feeds them (busiest: {busiest})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--decode", default="1,2,4,8,12")
    parser.add_argument("--cpus", type=int, default=16)
    parser.add_argument("--folder", default="/dev/shm")
    options = parser.parse_args()
    file = compose(options.chunks, options.folder)
    (layers, tokens, heads, dim), _ = tokens_of(file)
    torch.zeros(1, device="cuda")
    results = []
    cache = Cache("pages_nhd", layers, 2 * tokens // 16, 16, heads, dim, torch.bfloat16)
    table = random.Random(1).sample(range(cache.pages), tokens // 16)
    equal = None
    for count, queues, store, lcores in placements([int(n) for n in options.decode.split(",")], options.cpus):
        with cluster(file, lcores, store, slots=2 * count + 16, mbufs=32768, window=4096) as running, \
                tempfile.TemporaryDirectory() as folder:
            ready = running.ready()
            pages = pathlib.Path(folder) / "pages.json"
            pages.write_text(json.dumps({"kv": cache.describe(), "table": table}))
            arguments = ["bench", "pages", "--pages", pages, "--tokens-from", file, "--chunks", 2, "--fetches", 4]
            if equal is None:
                reference = pathlib.Path(folder) / "reference.safetensors"
                running.run("fetch", "--tokens-from", file, "--out", reference, "--json")
                running.run(*arguments)
                expected = load_file(reference, device="cuda")
                equal = all(torch.equal(found.view(torch.int16), expected[name].view(torch.int16))
                            for name, found in zip("kv", cache.gather(table, tokens)))
                del expected
            report = running.run(*arguments, "--duration-ms", int(options.seconds * 1000))
            busy, limiting = limit(report)
            results.append({
                "decode_lcores": count, "queues": queues, "lcores": lcores, "encoded_gbps": report["encoded_gbps"],
                "delivered_gbps": report["delivered_gbps"], "busy": busy, "limiting_stage": limiting,
                "fetch_us": report["fetch_us"], "dropped": {k: v for k, v in report["dropped"].items() if v},
                "decode_p50_ns": report["stages"].get("decode", {}), "gpu": report["gpu"],
                "ratio": ready.get("ratio"),
            })
            print(json.dumps({key: results[-1][key] for key in
                              ("decode_lcores", "queues", "encoded_gbps", "delivered_gbps", "limiting_stage", "busy")}),
                  flush=True, file=__import__("sys").stderr)
    print(json.dumps({"machine": machine(), "equal_bit_for_bit": equal, "tokens": tokens, "runs": results}))
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
