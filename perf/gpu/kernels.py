#!/usr/bin/env python3
"""Counts the kernels that the data plane launches while it fills pages, and reads them to be saved: there must be none.

`kernels.py [--chunks N] [--folder DIR]`; one JSON object on standard output. Needs a C compiler and CUPTI.

The count is worth something only if it sees all that the data plane does. So its copies are counted with the same library, and must be all
bytes that were delivered and read; and a control, a PyTorch process that launches ten kernels and copies one batch, must be counted
right. The program must not contain the name of a function that launches either.
"""
import argparse
import glob
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import shadowserve
import torch
from lib import BINARY, ROOT, Cache, cluster, compose, machine, tokens_of
from safetensors.torch import load_file

PIECES, PIECE_BYTES = 64, 32768
# Ten kernels, and 64 pieces in one call of the function that the data plane uses, of the same version.
CONTROL = f"""
import ctypes, torch
x = torch.zeros(1000, device="cuda")
for _ in range(10): x += 1
source = torch.ones({PIECES}, {PIECE_BYTES}, dtype=torch.uint8).pin_memory()
target = torch.zeros({PIECES}, {PIECE_BYTES}, dtype=torch.uint8, device="cuda")
cuda, function = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
assert cuda.cuGetProcAddress_v2(b"cuMemcpyBatchAsync", ctypes.byref(function), 13000, ctypes.c_uint64(0), None) == 0
numbers = lambda values: (ctypes.c_uint64 * {PIECES})(*values)
stream = torch.cuda.Stream()
attributes, first = (ctypes.c_uint32 * 6)(1), ctypes.c_size_t(0)
torch.cuda.synchronize()
code = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_size_t, *[ctypes.c_void_p] * 2, ctypes.c_size_t, ctypes.c_void_p)(function.value)(
    numbers(row.data_ptr() for row in target), numbers(row.data_ptr() for row in source), numbers([{PIECE_BYTES}] * {PIECES}),
    {PIECES}, attributes, ctypes.byref(first), 1, stream.cuda_stream)
assert code == 0, code
stream.synchronize()
assert torch.equal(target.cpu(), source)
"""
LAUNCHES = ("cuLaunch", "cuGraphLaunch", "cuModule", "cuLibrary", "cuKernel", "cuFunc", "cuMemset")


def everywhere(pattern):
    places = [pathlib.Path(torch.__file__).parent.parent, pathlib.Path("/usr/local"), pathlib.Path("/opt")]
    return sorted({os.path.realpath(path) for place in places for path in glob.glob(f"{place}/**/{pattern}", recursive=True)})


def defined(header, name):
    """The number that a header gives a name, or 0."""
    with open(header, errors="replace") as file:
        found = re.search(rf"#define\s+{name}\s+(\d+)", file.read())
    return int(found[1]) if found else 0


def newest_cupti():
    """CUPTI's library of the newest version, and headers that are not newer: an older one does not know the newest calls."""
    ask = "import ctypes, sys; v = ctypes.c_uint32(); ctypes.CDLL(sys.argv[1]).cuptiGetVersion(ctypes.byref(v)); print(v.value)"
    libraries = []
    for path in everywhere("libcupti.so*"):
        said = subprocess.run([sys.executable, "-c", ask, path], capture_output=True, text=True)
        if said.returncode == 0:
            libraries.append((int(said.stdout), path))
    headers = [(defined(path, "CUPTI_API_VERSION"), path) for path in everywhere("cupti_version.h")]
    print(f"CUPTI: libraries {libraries}, headers {headers}", file=sys.stderr)
    if not libraries:
        raise SystemExit("there is no libcupti.so")
    version, library = max(libraries)
    headers = [header for header in headers if header[0] <= version]
    if not headers:
        raise SystemExit(f"there are no headers for CUPTI {version}")
    return library, os.path.dirname(max(headers)[1])


def build(folder):
    library, include = newest_cupti()
    _, cuda = max((defined(path, "CUDA_VERSION"), path) for path in everywhere("cuda.h"))
    more = [os.path.dirname(os.path.dirname(path)) for path in everywhere("crt/host_defines.h")]
    output = pathlib.Path(folder) / "kernels.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(output), str(ROOT / "perf/gpu/kernels.c"), f"-I{include}",
                    f"-I{os.path.dirname(cuda)}", *[f"-I{path}" for path in more], library, f"-Wl,-rpath,{os.path.dirname(library)}"], check=True)
    return output


def launches(counted):
    return {name: count for name, count in counted["calls"].items() if name.startswith(LAUNCHES)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--folder", default="/dev/shm")
    options = parser.parse_args()
    file = compose(options.chunks, options.folder)
    (layers, tokens, heads, dim), _ = tokens_of(file)
    delivered, names = 0, load_file(file)["tokens"].tolist()
    torch.zeros(1, device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        library = build(folder)
        counts = {name: pathlib.Path(folder) / f"{name}.json" for name in ("control", "data_plane")}

        def environment(name):
            return {"CUDA_INJECTION64_PATH": str(library), "SHADOWSERVE_COUNTS": str(counts[name])}

        subprocess.run([sys.executable, "-c", CONTROL], check=True, env={**os.environ, **environment("control")})
        with cluster(file, "rx@1,dma@2,decode@3-6", slots=24, mbufs=32768, window=4096,
                     environment=environment("data_plane"), store_flags=["--memory-mib", "256"]) as running:
            running.ready()
            # Whole pages in batches, then short pieces as strided copies.
            for order in ("pages_nhd", "interleaved"):
                cache = Cache(order, layers, tokens // 16, 16, heads, dim, torch.bfloat16)
                pages = pathlib.Path(folder) / f"{order}.json"
                pages.write_text(json.dumps({"kv": cache.describe(), "table": list(range(cache.pages))}))
                report = running.run("bench", "pages", "--pages", pages, "--tokens-from", file, "--duration-ms", 500)
                delivered += report["planes"] * 256 * heads * dim * 2
                client = shadowserve.Client(running.socket, salt=order)
                saved = client.save_pages(names, client.register_pages(cache.description()), list(range(cache.pages)), timeout=20).wait()
                assert saved, saved.message
                delivered += 2 * layers * tokens * heads * dim * 2
                del client
            running.stop()
        found = {name: json.loads(path.read_text()) for name, path in counts.items()}
    control, plane = found["control"], found["data_plane"]
    with open(BINARY, "rb") as program:
        named = [name for name in re.findall(rb"cu(?:Launch|GraphLaunch|ModuleLoad|LibraryLoad|Memset)\w*", program.read())]
    checks = {
        "nothing refused": not control["errors"] and not plane["errors"] and not plane["dropped_records"],
        "control: kernels": control["kernels"] >= 10 and bool(launches(control)),
        "control: the batch as called": control["batch_pieces"] == PIECES and control["batch_bytes"] == PIECES * PIECE_BYTES,
        "control: the batch as run": control["copied_bytes"] >= PIECES * PIECE_BYTES,
        "data plane: every byte delivered or read was copied": plane["copied_bytes"] == delivered > 0,
        "data plane: no kernel": plane["kernels"] == 0 and plane["memsets"] == 0,
        "data plane: no call that launches": not launches(plane),
        "program: names no function that launches": not named,
    }
    ok = all(checks.values())
    print(json.dumps({"machine": machine(), "ok": ok, "checks": checks, "copied_bytes_expected": delivered, **found}))
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
