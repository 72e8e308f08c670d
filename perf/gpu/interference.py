#!/usr/bin/env python3
"""What fetching costs the engine: the time of a decode-like step, alone and while KV arrives.

`interference.py [--rates 10,20,40,100] [--steps N] [--chunks N] [--folder DIR] [--plot FILE.png]`; one JSON object on standard output.

The step is that of Llama-3.1-8B at batch 32: every weight read once by a matrix product with 32 rows (16 GB), and an attention-like
read of 30 GB of K and V, in one CUDA graph. Beside it run, in turn:

- nothing;
- store and data plane over memif, at full speed (`end_to_end`): 16 CPUs do not reach every rate;
- the data plane's sink alone, fed from memory (`shadowserve bench gpu --into`), at the delivered rate that belongs to each rate of encoded bits:
  what the GPU has to bear is the same, whatever feeds the sink;
- decompression on the GPU at the same delivered rate (`on_gpu.py`): the same encoded chunks are copied to the GPU, nvCOMP decompresses
  them, and a Triton kernel dequantizes and scatters, on streams beside that of the step: once of the same priority, once of a higher one.
"""
import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import torch
from end_to_end import placements
from lib import BINARY, Cache, cluster, compose, machine, tokens_of
from on_gpu import OnGpu, encode

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, DIM, BATCH = 32, 4096, 14336, 32, 8, 128, 32


# The baseline on streams of the step's own priority, and on such as go before it.
# Decode lcores of the whole data planes, on less than 24 CPUs and on more.
DECODE_LCORES = {"zstd": (10, 12), "sliced": (4, 6), "none": (3, 5)}
PARTS = ("p50_ms", "mean_ms", "p99_ms")
BASELINES = {"on_gpu": 0, "on_gpu_first": -1}


class Step:
    """One decode step in a CUDA graph."""

    def __init__(self, kv_gbytes):
        def weight(rows, columns):
            return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02

        shapes = [(HIDDEN + 2 * KV_HEADS * DIM, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
        self.weights = [[weight(*shape) for shape in shapes] for _ in range(LAYERS)]
        self.head = weight(128_256, HIDDEN)
        tokens = int(kv_gbytes * 1e9 / (LAYERS * 2 * BATCH * KV_HEADS * DIM * 2))
        self.kv = [torch.randn(2, BATCH * KV_HEADS, tokens, DIM, device="cuda", dtype=torch.bfloat16)
                   for _ in range(LAYERS)]
        self.x = torch.randn(BATCH, HIDDEN, device="cuda", dtype=torch.bfloat16)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()

    def run(self):
        x = self.x
        for (qkv, out, up, down), (k, v) in zip(self.weights, self.kv):
            q = torch.nn.functional.linear(x, qkv)[:, :HIDDEN].reshape(BATCH * KV_HEADS, HEADS // KV_HEADS, DIM)
            scores = torch.softmax(torch.bmm(q, k.transpose(1, 2)).float(), -1).to(torch.bfloat16)
            x = torch.nn.functional.linear(torch.bmm(scores, v).reshape(BATCH, HIDDEN), out)
            gate, value = torch.nn.functional.linear(x, up).chunk(2, -1)
            x = torch.nn.functional.linear(torch.nn.functional.silu(gate) * value, down)
        return torch.nn.functional.linear(x, self.head)

    def times(self, count):
        """Milliseconds of `count` steps, one after the other as an engine runs them: the next is launched while one runs.

        With more of them in the queue a launch would wait, and hold Python's lock, which the baseline's thread needs, meanwhile.
        """
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for before, mark in zip([None, *marks], marks[1:]):
            if before:
                before.synchronize()
            self.graph.replay()
            mark.record()
        marks[-1].synchronize()
        return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


def summary(times):
    ordered = sorted(times)
    return {"p50_ms": statistics.median(ordered), "mean_ms": statistics.mean(ordered), "p99_ms": ordered[int(len(ordered) * 0.99)], "steps": len(ordered)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rates", default="10,20,40,100")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--batch-chunks", type=int, default=8, help="chunks that the baseline decompresses at once")
    parser.add_argument("--kv-gbytes", type=float, default=30)
    parser.add_argument("--compression", default="sliced,zstd", help="of the whole data planes; the last one's ratio is that of the rates")
    parser.add_argument("--cpus", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", default="/dev/shm")
    parser.add_argument("--plot")
    options = parser.parse_args()
    file = compose(options.chunks, options.folder)
    (layers, tokens, heads, dim), _ = tokens_of(file)
    cache = Cache("pages_nhd", layers, 2 * tokens // 16, 16, heads, dim, torch.bfloat16)
    table = random.Random(1).sample(range(cache.pages), tokens // 16)
    step = Step(options.kv_gbytes)
    step.times(20)
    results = []

    def alone():
        return summary(step.times(options.steps))

    with tempfile.TemporaryDirectory() as folder:
        pages = pathlib.Path(folder) / "pages.json"
        pages.write_text(json.dumps({"kv": cache.describe(), "table": table}))

        def beside(command, seconds):
            """Step times while a command runs, and what the command reports."""
            process = subprocess.Popen([BINARY, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            time.sleep(0.7)
            times = summary(step.times(options.steps))
            said = process.communicate(timeout=60)
            if process.returncode:
                raise SystemExit(f"{command}: {said[1][-1000:]}")
            return times, json.loads(said[0])

        def beside_baseline(priority, delivered_gbps):
            """Step times while chunks are decompressed on the GPU, and how much was delivered."""
            baseline.stop, reached = False, []
            thread = threading.Thread(target=lambda: reached.append(baseline.run(delivered_gbps, priority=priority)))
            thread.start()
            time.sleep(0.2)
            times = summary(step.times(options.steps))
            baseline.stop = True
            thread.join()
            return times, reached[0]

        before = alone()
        duration_ms = int(1000 + options.steps * before["p50_ms"] * 1.3)
        end_to_end = []
        for compression in options.compression.split(","):
            # Two CPUs are for the engine and what feeds it.
            count = DECODE_LCORES[compression][options.cpus >= 24]
            _, queues, store_lcores, lcores = next(placements([count], options.cpus - 2, compression))
            before = alone()
            with cluster(file, lcores, store_lcores, slots=2 * count + 16, mbufs=32768, window=max(4096, 2048 * queues),
                         store_flags=["--compression", compression]) as running:
                ratio = running.ready()["ratio"]
                ours, report = beside(["bench", "pages", "--pages", pages, "--tokens-from", file, "--chunks", 1, "--fetches", 4,
                                       "--duration-ms", duration_ms, "--socket", running.socket], duration_ms / 1000)
            end_to_end.append({
                "compression": compression, "lcores": lcores, "encoded_gbps": report["encoded_gbps"],
                "delivered_gbps": report["delivered_gbps"], "alone": before, "ours": ours,
                "ours_over_alone_p50": ours["p50_ms"] / before["p50_ms"], "ours_over_alone_p99": ours["p99_ms"] / before["p99_ms"],
            })
            print(f"end to end, {compression}: {report['encoded_gbps']:.1f} encoded, {report['delivered_gbps']:.1f} delivered, p50 "
                  f"{end_to_end[-1]['ours_over_alone_p50']:.3f}, p99 {end_to_end[-1]['ours_over_alone_p99']:.3f}", file=sys.stderr, flush=True)
        encode(file, pathlib.Path(folder) / "chunks")
        baseline = OnGpu(pathlib.Path(folder) / "chunks", options.batch_chunks)
        for rate in [float(rate) for rate in options.rates.split(",")]:
            before = alone()
            ours, report = beside(["bench", "gpu", "--into", pages, "--delivered-gbps", rate * ratio, "--duration-ms", duration_ms],
                                  duration_ms / 1000)
            between = alone()
            decompressed, reached = {}, {}
            for name, priority in BASELINES.items():
                decompressed[name], reached[name] = beside_baseline(priority, report["delivered_gbps"])
            after = alone()
            base = {part: statistics.median(run[part] for run in (before, between, after)) for part in PARTS}
            results.append({
                "encoded_gbps": rate, "delivered_gbps": report["delivered_gbps"], "alone": [before, between, after], "ours": ours,
                **decompressed, **{f"{name}_delivered_gbps": gbps for name, gbps in reached.items()},
                **{f"{name}_over_alone_{part[:-3]}": run[part] / base[part]
                   for name, run in (("ours", ours), *decompressed.items()) for part in PARTS},
            })
            row = results[-1]
            print(f"{rate:5.0f} encoded, alone {base['p50_ms']:.2f} ms; p50, mean and p99 over that: " + "; ".join(
                f"{name} at {row[prefix + 'delivered_gbps']:.0f} delivered " + " ".join(f"{row[f'{name}_over_alone_{part[:-3]}']:.3f}" for part in PARTS)
                for name, prefix in (("ours", ""), *((name, name + "_") for name in BASELINES))), file=sys.stderr, flush=True)
    if options.plot:
        draw(results, options.plot)
    print(json.dumps({"machine": machine(), "step": {"weights_gbytes": 16, "kv_gbytes": options.kv_gbytes},
                      "end_to_end": end_to_end, "rates": results}))


def draw(results, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    lines = [("ours", "delivered_gbps", "o-", "copy engine, no kernel (ShadowServe)"),
             ("on_gpu", "on_gpu_delivered_gbps", "s--", "decompression on the GPU (nvCOMP)"),
             ("on_gpu_first", "on_gpu_first_delivered_gbps", "^:", "the same, of higher priority than the step")]
    for axis, part in zip(axes, ("p50", "p99")):
        for name, x, style, label in lines:
            axis.plot([row[x] for row in results], [100 * (row[f"{name}_over_alone_{part}"] - 1) for row in results], style, label=label)
        axis.set_xlabel("bf16 KV delivered, Gbps")
        axis.set_title(f"decode step longer than alone, % ({part})")
        axis.axhline(2, color="grey", linewidth=0.5)
        axis.set_yscale("symlog", linthresh=2)
        axis.set_yticks([0, 1, 2, 5, 10, 20, 50, 100], ["0", "1", "2", "5", "10", "20", "50", "100"])
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
