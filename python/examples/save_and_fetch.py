#!/usr/bin/env python3
"""Saves a file's KV from host memory through a running data plane, finds it again, and fetches it back.

    shadowserve store --memory-mib 256 ...                        # see the README for store and data plane
    shadowserve dataplane ...
    python/examples/save_and_fetch.py --input kv.safetensors --codec lossless

What comes back is compared: bit for bit with codec raw or lossless, else by the relative error. Needs NumPy; no torch, no GPU.
"""

import argparse
import json
import struct
import sys

import numpy

import shadowserve


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help=".safetensors file with `k`, `v` [layers, tokens, kv_heads, head_dim] and `tokens`")
    parser.add_argument("--socket", default="/run/shadowserve.sock")
    parser.add_argument("--model", default="default")
    parser.add_argument("--codec", default="int4", help="raw, lossless, int8, ...; or the name of --profile, which the refusal of another one tells")
    parser.add_argument("--profile", help="file of `shadowserve encode --make-profile`")
    arguments = parser.parse_args()
    k, v, tokens, dtype = load(arguments.input)
    client = shadowserve.Client(arguments.socket, model=arguments.model, codec=arguments.codec, profile=arguments.profile)

    # What the store has already need not be encoded.
    stored = len(client.lookup(tokens).chunk_tokens)
    region = client.register(k.nbytes + v.nbytes)
    if stored * 256 < len(tokens):
        shape = shadowserve.place(region, k, v)
        report = client.save(tokens, region, shape, dtype, skip=stored).wait()
        if not report:
            sys.exit(f"{report.outcome}: {report.message}")
        print(f"{report.stored} chunks stored, {report.encoded_bytes} bytes, in {report.seconds:.3f} s; {stored} were there")

    prefix = client.lookup(tokens)
    report = client.fetch(prefix, region).wait()
    if not report:
        sys.exit(f"{report.outcome}: {report.message}")
    found = numpy.frombuffer(region.read(0, prefix.sequence_bytes), dtype="<u2").reshape(2, *k.shape)
    if (found == (k, v)).all():
        print(f"{prefix.tokens} tokens came back bit for bit")
        return
    error = [rms(floats(back, dtype) - floats(sent, dtype)) / rms(floats(sent, dtype)) for back, sent in zip(found, (k, v))]
    print(f"{prefix.tokens} tokens came back; relative error of K {error[0]:.4f}, of V {error[1]:.4f}")
    sys.exit(1 if arguments.codec in ("raw", "lossless") else 0)


def load(path):
    """The bits of K and V, the tokens, and the element type."""
    with open(path, "rb") as file:
        content = file.read()
    (header_bytes,) = struct.unpack_from("<Q", content)
    header, tensors = json.loads(content[8 : 8 + header_bytes]), {}
    for name, element in (("k", "<u2"), ("v", "<u2"), ("tokens", "<i4")):
        begin, end = (8 + header_bytes + offset for offset in header[name]["data_offsets"])
        tensors[name] = numpy.frombuffer(content[begin:end], dtype=element).reshape(header[name]["shape"])
    return tensors["k"], tensors["v"], tensors["tokens"].tolist(), {"BF16": "bf16", "F16": "f16"}[header["k"]["dtype"]]


def floats(bits, dtype):
    return bits.view("<f2").astype(numpy.float32) if dtype == "f16" else (bits.astype("<u4") << 16).view("<f4")


def rms(values):
    return float(numpy.sqrt(numpy.mean(numpy.square(values, dtype=numpy.float64))))


if __name__ == "__main__":
    main()
