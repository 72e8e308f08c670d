#!/usr/bin/env python3
"""What fetching costs the engine: the time of a decode-like step, alone and while KV arrives.

`interference.py [--rates 10,20,40,100] [--steps N] [--chunks N] [--folder DIR] [--plot FILE.png]`; one JSON object on standard output.

The step is that of Llama-3.1-8B at batch 32: every weight read once by a matrix product with 32 rows (16 GB), and an attention-like
read of 30 GB of K and V, in one CUDA graph. Beside it run, in turn:

- nothing;
- store and data plane over memif, at full speed (`end_to_end`): 16 CPUs do not reach every rate;
- the data plane's sink alone, fed from memory (`shadowserve bench gpu --into`), at the delivered rate that belongs to each rate of encoded bits:
  what the GPU has to bear is the same, whatever feeds the sink;
- decompression on the GPU at the same delivered rate: it copies the encoded bytes to the GPU and runs a Triton kernel that makes bf16 out of
  4-bit codes and scatters it to pages, on another stream. It undoes no entropy coding, so a real one costs more.
"""
import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import torch
import triton
import triton.language as tl
from lib import BINARY, Cache, Cuda, cluster, compose, machine, tokens_of

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, DIM, BATCH = 32, 4096, 14336, 32, 8, 128, 32


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
        """Milliseconds of `count` steps, one after the other as an engine runs them."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self.graph.replay()
            mark.record()
        marks[-1].synchronize()
        return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


@triton.jit
def scatter(codes, scales, pages, table, plane_bytes, ELEMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """4-bit codes of one plane to bf16 in its pages: a scale and a zero per head vector of 128."""
    plane, block = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(codes + plane * (ELEMENTS // 2) + at // 2)
    code = ((pair >> ((at % 2) * 4)) & 15).to(tl.float32)
    row = plane * (ELEMENTS // 128) + at // 128
    value = code * tl.load(scales + 2 * row) + tl.load(scales + 2 * row + 1)
    page_elements = 16 * 8 * 128
    page = tl.load(table + plane * (ELEMENTS // page_elements) + at // page_elements).to(tl.int64)
    tl.store(pages + page * page_elements + at % page_elements, value.to(tl.bfloat16))


class OnGpu:
    """Decompression on the GPU at a delivered rate."""

    PLANES, ELEMENTS = 64, 256 * 8 * 128

    def __init__(self, encoded_bytes_per_plane):
        self.codes_host = torch.randint(0, 255, (self.PLANES, self.ELEMENTS // 2), dtype=torch.uint8).pin_memory()
        self.wire_host = self.codes_host.view(-1)[: int(encoded_bytes_per_plane) * self.PLANES]
        self.codes = self.codes_host.cuda()
        self.scales = torch.rand(self.PLANES * self.ELEMENTS // 128 * 2, device="cuda", dtype=torch.float32)
        self.pages = torch.zeros(4096 * 16 * 8 * 128, device="cuda", dtype=torch.bfloat16)
        self.table = torch.randperm(4096, device="cuda")[: self.PLANES * 16].to(torch.int32)
        self.stream = torch.cuda.Stream(priority=0)
        self.stop = False
        self.once()
        torch.cuda.synchronize()

    def once(self):
        with torch.cuda.stream(self.stream):
            self.codes.view(-1)[: self.wire_host.numel()].copy_(self.wire_host, non_blocking=True)
            scatter[(self.PLANES, self.ELEMENTS // 1024)](self.codes, self.scales, self.pages, self.table, 0,
                                                          ELEMENTS=self.ELEMENTS, BLOCK=1024)

    def run(self, delivered_gbps):
        """Keeps to the rate until told to stop; what it delivered, Gbps."""
        bits = self.PLANES * self.ELEMENTS * 16
        begun, done, events = time.perf_counter(), 0, []
        while not self.stop:
            if done * bits > (time.perf_counter() - begun) * delivered_gbps * 1e9:
                time.sleep(2e-5)
                continue
            self.once()
            done += 1
            event = torch.cuda.Event()
            event.record(self.stream)
            events.append(event)
            if len(events) > 8:
                events.pop(0).synchronize()
        self.stream.synchronize()
        self.delivered_gbps = done * bits / (time.perf_counter() - begun) / 1e9


def summary(times):
    ordered = sorted(times)
    return {"p50_ms": statistics.median(ordered), "p99_ms": ordered[int(len(ordered) * 0.99)], "steps": len(ordered)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rates", default="10,20,40,100")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--kv-gbytes", type=float, default=30)
    parser.add_argument("--lcores", default="rx@2-3,dma@4,decode@5-14")
    parser.add_argument("--store-lcores", default="0+1")
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
        pages.write_text(json.dumps({"kv": cache.describe(Cuda()), "table": table}))

        def beside(command, seconds):
            """Step times while a command runs, and what the command reports."""
            process = subprocess.Popen([BINARY, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            time.sleep(0.7)
            times = summary(step.times(options.steps))
            said = process.communicate(timeout=60)
            if process.returncode:
                raise SystemExit(f"{command}: {said[1][-1000:]}")
            return times, json.loads(said[0])

        before = alone()
        duration_ms = int(1000 + options.steps * before["p50_ms"] * 1.3)
        with cluster(file, options.lcores, options.store_lcores, slots=48, mbufs=32768, window=4096) as running:
            ratio = running.ready()["ratio"]
            ours, report = beside(["bench", "pages", "--pages", pages, "--tokens-from", file, "--chunks", 1, "--fetches", 4,
                                   "--duration-ms", duration_ms, "--socket", running.socket], duration_ms / 1000)
        end_to_end = {"encoded_gbps": report["encoded_gbps"], "delivered_gbps": report["delivered_gbps"], "alone": before,
                      "ours": ours, "ours_over_alone_p50": ours["p50_ms"] / before["p50_ms"]}
        for rate in [float(rate) for rate in options.rates.split(",")]:
            before = alone()
            ours, report = beside(["bench", "gpu", "--into", pages, "--delivered-gbps", rate * ratio, "--duration-ms", duration_ms],
                                  duration_ms / 1000)
            between = alone()
            baseline = OnGpu(OnGpu.ELEMENTS * 2 / ratio)
            thread = threading.Thread(target=baseline.run, args=(report["delivered_gbps"],))
            thread.start()
            time.sleep(0.2)
            on_gpu = summary(step.times(options.steps))
            baseline.stop = True
            thread.join()
            after = alone()
            base = {part: statistics.median(run[part] for run in (before, between, after)) for part in ("p50_ms", "p99_ms")}
            results.append({
                "encoded_gbps": rate, "delivered_gbps": report["delivered_gbps"], "alone": [before, between, after], "ours": ours,
                "on_gpu": on_gpu, "on_gpu_delivered_gbps": baseline.delivered_gbps,
                **{f"{name}_over_alone_{part[:3]}": run[part] / base[part]
                   for name, run in (("ours", ours), ("on_gpu", on_gpu)) for part in ("p50_ms", "p99_ms")},
            })
            row = results[-1]
            print(f"{rate:5.0f} encoded, {row['delivered_gbps']:6.1f} delivered: alone {base['p50_ms']:.2f} ms, "
                  f"ours {ours['p50_ms']:.2f} ({row['ours_over_alone_p50']:.3f}), on GPU {on_gpu['p50_ms']:.2f} "
                  f"({row['on_gpu_over_alone_p50']:.3f} at {baseline.delivered_gbps:.0f} delivered)", file=sys.stderr, flush=True)
    if options.plot:
        draw(results, options.plot)
    print(json.dumps({"machine": machine(), "step": {"weights_gbytes": 16, "kv_gbytes": options.kv_gbytes},
                      "end_to_end": end_to_end, "rates": results}))


def draw(results, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(6, 4))
    x = [row["delivered_gbps"] for row in results]
    axis.plot(x, [100 * (row["ours_over_alone_p50"] - 1) for row in results], "o-", label="copy engine, no kernel (ShadowServe)")
    axis.plot([row["on_gpu_delivered_gbps"] for row in results],
              [100 * (row["on_gpu_over_alone_p50"] - 1) for row in results], "s--", label="dequantize and scatter on the GPU")
    axis.set_xlabel("bf16 KV delivered, Gbps")
    axis.set_ylabel("decode step longer than alone, % (p50)")
    axis.axhline(2, color="grey", linewidth=0.5)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
