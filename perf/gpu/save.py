#!/usr/bin/env python3
"""Saves pages of torch tensors through the data plane into a store, and fetches them back into other pages.

`save.py [--chunks N] [--seconds S] [--folder DIR]`; one JSON object on standard output.

First in every layout, bit for bit: what comes back must be what the CPU makes of the same KV, which is what a store that encoded
the file itself delivers, compared with the slow reference decoder; with `raw` and `lossless` it must be the file's own bits. Then
what saving costs fetching: rates and times of fetches at full speed and at half of it, alone and while saves go on as fast as
they can, in alternation.
"""
import argparse
import json
import pathlib
import random
import statistics
import sys
import tempfile
import threading
import time

import shadowserve
import torch
from lib import ROOT, Cache, cluster, compose, machine, tokens_of
from safetensors.torch import load_file

MEMORY = ["--memory-mib", "512", "--pin-loaded"]


def fill(cache, table, k, v):
    """Puts a sequence into the pages of a table."""
    index = torch.arange(k.shape[1], device="cuda")
    pages = torch.tensor(table, device="cuda")[index // cache.page_tokens]
    for layer in range(cache.layers):
        for view, tensor in zip(cache.views(layer), (k, v)):
            view[pages, index % cache.page_tokens] = tensor[layer]
    torch.cuda.synchronize()


def equal(found, expected):
    return all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(found, expected))


def every_layout(file):
    """For each codec and layout: out of pages in that layout, back into pages in another."""
    (layers, tokens, heads, dim), _ = tokens_of(file)
    content, results = load_file(file, device="cuda"), []
    names, kv = content["tokens"].tolist(), (content["k"], content["v"])
    for codec in ("int4", "int8", "raw", "lossless"):
        with cluster(file, "rx@1,decode@2-4,dma@5", codec=codec, store_flags=MEMORY) as running, \
                tempfile.TemporaryDirectory() as folder:
            running.ready()
            reference = pathlib.Path(folder) / "reference.safetensors"
            running.run("fetch", "--tokens-from", file, "--codec", codec, "--verify", "--out", reference, "--json")
            expected = load_file(reference, device="cuda")
            expected = (expected["k"], expected["v"])
            exact = codec in ("raw", "lossless")
            for number, order in enumerate(Cache.ORDERS):
                for size in (16, 48, 256) if codec == "int4" else (16,):
                    used = -(-tokens // size)
                    table, other = (random.Random(seed).sample(range(2 * used), used) for seed in (1, 2))
                    source = Cache(order, layers, 2 * used, size, heads, dim, kv[0].dtype)
                    target = Cache(Cache.ORDERS[number - 1], layers, 2 * used, size, heads, dim, kv[0].dtype)
                    fill(source, table, *kv)
                    client = shadowserve.Client(running.socket, codec=codec, salt=f"{order} {size}")
                    saved = client.save_pages(names, client.register_pages(source.description()), table, timeout=20).wait()
                    prefix = client.lookup(names)
                    into = client.register_pages(target.description())
                    fetched = client.fetch_pages(prefix, into, other, timeout=20).wait() if prefix.is_whole else None
                    found = target.gather(other, tokens)
                    results.append({
                        "codec": codec, "order": order, "page_tokens": size, "saved": repr(saved), "message": saved.message,
                        "fetched": repr(fetched), "equal_to_reference": equal(found, expected),
                        "equal_to_source": equal(found, kv), "must_equal_source": exact,
                        "source_untouched": equal(source.gather(table, tokens), kv),
                        "ok": bool(saved) and bool(fetched) and equal(found, expected) and (not exact or equal(found, kv)),
                    })
                    print(json.dumps(results[-1]), file=sys.stderr, flush=True)
                    del into, client
    return results


class Saver:
    """Saves sequences as fast as they are taken, none twice, until told to stop."""

    def __init__(self, socket, cache, table, tokens, under_way=2):
        self.client = shadowserve.Client(socket, salt="saver")
        self.cache = self.client.register_pages(cache.description())
        self.table, self.tokens, self.under_way = table, list(tokens), under_way
        self.stored, self.encoded_bytes, self.failed, self.reasons, self.number = 0, 0, 0, set(), 0

    def run(self, seconds=None, stop=None):
        """Chunks stored and encoded bits sent per second."""
        begun, chunks, sent, saves = time.monotonic(), self.stored, self.encoded_bytes, []
        while saves or not self.over(begun, seconds, stop):
            while len(saves) < self.under_way and not self.over(begun, seconds, stop):
                self.number += 1
                self.tokens[0] = self.number
                saves.append(self.client.save_pages(self.tokens, self.cache, self.table, timeout=2))
            report = saves.pop(0).wait()
            self.stored += report.stored
            self.encoded_bytes += report.encoded_bytes
            self.failed += len(report.not_saved)
            self.reasons.update(reason for _, reason in report.not_saved)
        elapsed = time.monotonic() - begun
        return (self.stored - chunks) / elapsed, (self.encoded_bytes - sent) * 8 / elapsed

    @staticmethod
    def over(begun, seconds, stop):
        return stop.is_set() if stop else time.monotonic() - begun > seconds


def interference(file, seconds, lcores):
    """Fetches alone and beside saves."""
    (layers, tokens, heads, dim), _ = tokens_of(file)
    content = load_file(file, device="cuda")
    chunk_bits = 2 * layers * 256 * heads * dim * 16
    with cluster(file, lcores, "0+1", slots=48, mbufs=32768, window=4096, store_flags=MEMORY) as running, \
            tempfile.TemporaryDirectory() as folder:
        running.ready()
        caches = [Cache("pages_nhd", layers, 2 * tokens // 16, 16, heads, dim, torch.bfloat16) for _ in range(2)]
        table = random.Random(1).sample(range(caches[0].pages), tokens // 16)
        fill(caches[1], table, content["k"], content["v"])
        pages = pathlib.Path(folder) / "pages.json"
        pages.write_text(json.dumps({"kv": caches[0].describe(), "table": table}))

        def fetch(rate=0):
            return running.run("bench", "pages", "--pages", pages, "--tokens-from", file, "--chunks", 2, "--fetches", 4,
                               "--duration-ms", int(seconds * 1000), "--rate-gbps", rate)

        # One chunk a save: the codes of a sequence are made anew each time, and its keys follow from the first token.
        saver = Saver(running.socket, caches[1], table[:16], content["tokens"][:256].tolist(), under_way=4)
        alone = saver.run(seconds=seconds)
        fetch()
        full = fetch()["encoded_gbps"]
        rows = []
        for name, rate in (("full speed", 0), ("half", full / 2)):
            for _ in range(3):
                for beside in (False, True):
                    stop, rates = threading.Event(), []
                    thread = threading.Thread(target=lambda: rates.append(saver.run(stop=stop)))
                    if beside:
                        thread.start()
                        time.sleep(0.2)
                    report = fetch(rate)
                    if beside:
                        stop.set()
                        thread.join()
                    rows.append({
                        "fetches": name, "saves": beside, "encoded_gbps": report["encoded_gbps"],
                        "delivered_gbps": report["delivered_gbps"], "fetch_us": report["fetch_us"], "lcores": report["lcores"],
                        "saved_gbps": rates[0][0] * chunk_bits / 1e9 if rates else 0,
                        "saved_encoded_gbps": rates[0][1] / 1e9 if rates else 0,
                    })
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

        def median(name, beside, value):
            return statistics.median(value(row) for row in rows if (row["fetches"], row["saves"]) == (name, beside))

        summary = {}
        for name in ("full speed", "half"):
            for key, value in (("encoded_gbps", lambda row: row["encoded_gbps"]), ("fetch_p50_us", lambda row: row["fetch_us"]["p50"]),
                               ("fetch_p99_us", lambda row: row["fetch_us"]["p99"]), ("saved_gbps", lambda row: row["saved_gbps"]),
                               ("saved_encoded_gbps", lambda row: row["saved_encoded_gbps"])):
                without, beside = median(name, False, value), median(name, True, value)
                summary.setdefault(name, {})[key] = {"without_saves": without, "beside_saves": beside,
                                                     "ratio": beside / without if without else None}
        return {"lcores": lcores, "saves_alone_gbps": alone[0] * chunk_bits / 1e9, "summary": summary, "rows": rows,
                "saver": {"stored": saver.stored, "failed": saver.failed, "reasons": sorted(saver.reasons)}}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--file", default=ROOT / "perf/samples/smollm2-135m-kv-640.safetensors")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--lcores", default="rx@2-3,dma@4,decode@5-12")
    parser.add_argument("--folder", default="/dev/shm")
    options = parser.parse_args()
    torch.zeros(1, device="cuda")
    cases = every_layout(options.file)
    beside = interference(compose(options.chunks, options.folder), options.seconds, options.lcores)
    ok = all(case["ok"] for case in cases)
    print(json.dumps({"machine": machine(), "ok": ok, "cases": cases, "beside_fetches": beside}))
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
