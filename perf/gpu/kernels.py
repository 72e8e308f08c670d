#!/usr/bin/env python3
"""Counts the kernels that the data plane launches while it fills pages: there must be none.

`kernels.py [--chunks N] [--folder DIR]`; one JSON object on standard output. Needs a C compiler and CUPTI. As a control, the same
library counts a PyTorch process that launches ten kernels.
"""
import argparse
import glob
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from lib import ROOT, Cache, Cuda, cluster, compose, machine, tokens_of


def find(pattern):
    places = [pathlib.Path(torch.__file__).parent.parent, pathlib.Path("/usr/local"), pathlib.Path("/opt")]
    found = [path for place in places for path in glob.glob(f"{place}/**/{pattern}", recursive=True)]
    if not found:
        raise SystemExit(f"{pattern} is not found under {', '.join(map(str, places))}")
    return pathlib.Path(found[0])


def build(folder):
    header, cuda, library = find("cupti.h"), find("cuda.h"), find("libcupti.so*")
    output = pathlib.Path(folder) / "kernels.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(output), str(ROOT / "perf/gpu/kernels.c"),
                    f"-I{header.parent}", f"-I{cuda.parent}", str(library), f"-Wl,-rpath,{library.parent}"], check=True)
    return output


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--folder", default="/dev/shm")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = build(folder)
        counts = {name: pathlib.Path(folder) / f"{name}.json" for name in ("control", "data_plane")}

        def environment(name):
            return {"CUDA_INJECTION64_PATH": str(library), "SHADOWSERVE_COUNTS": str(counts[name])}

        control = "import torch\nx = torch.zeros(1000, device='cuda')\nfor _ in range(10): x += 1\ntorch.cuda.synchronize()"
        subprocess.run([sys.executable, "-c", control], check=True, env={**os.environ, **environment("control")})
        file = compose(options.chunks, options.folder)
        (layers, tokens, heads, dim), _ = tokens_of(file)
        torch.zeros(1, device="cuda")
        cache = Cache("pages_nhd", layers, tokens // 16, 16, heads, dim, torch.bfloat16)
        pages = pathlib.Path(folder) / "pages.json"
        pages.write_text(json.dumps({"kv": cache.describe(Cuda()), "table": list(range(cache.pages))}))
        with cluster(file, "rx@1,dma@2,decode@3-6", slots=24, mbufs=32768, window=4096,
                     environment=environment("data_plane")) as running:
            running.ready()
            report = running.run("bench", "pages", "--pages", pages, "--tokens-from", file, "--duration-ms", 500)
            running.stop()
        found = {name: json.loads(path.read_text()) for name, path in counts.items()}
    ok = found["data_plane"]["kernels"] == 0 and found["data_plane"]["launch_calls"] == 0 \
        and found["control"]["kernels"] >= 10 and found["data_plane"]["copy_calls"] > 0
    print(json.dumps({"machine": machine(), "ok": ok, "planes": report["planes"], **found}))
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
