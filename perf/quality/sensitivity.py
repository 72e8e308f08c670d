"""How much the model's answers suffer from an error in each layer's K or V: the weights that profiles are made with.

One plane at a time is quantized with eleven codes, the prefix's others stay; the weight is the KL divergence of the
next 256 tokens over the plane's squared error relative to what attention can tell apart (src/make_profile.rs). Takes
the first text of quality.py; writes sensitivity-smollm2.toml. An hour of one core, because it runs the model 60 times.
"""
import argparse
import os
import pathlib

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy

import model
import quality

CODES, CHUNK_TOKENS, CONTINUATION = 11, 256, 256


def quantize(plane, axis):
    """[tokens, kv_heads, head_dim] there and back; scales along `axis`."""
    low, high = plane.min(axis, keepdims=True), plane.max(axis, keepdims=True)
    scale = numpy.maximum((high - low) / (CODES - 1), 1e-30)
    return low + numpy.rint((plane - low) / scale) * scale


def relative_error(side, original, got):
    """Of one chunk's plane."""
    if side == "k":
        return ((got - original) ** 2).sum() / ((original - original.mean(0)) ** 2).sum()
    return (((got - original) ** 2).sum((1, 2)) / (original**2).sum((1, 2))).mean()


def weight(passage, llama, layer, side):
    sides = {"k": passage.k.copy(), "v": passage.v.copy()}
    chunks = numpy.split(sides[side][layer], quality.PREFIX // CHUNK_TOKENS)
    got = [quantize(chunk, 0 if side == "k" else 2) for chunk in chunks]
    error = numpy.mean([relative_error(side, *pair) for pair in zip(chunks, got)])
    sides[side][layer] = numpy.concatenate(got)
    tokens = passage.tokens[quality.PREFIX:][:CONTINUATION]
    hidden, _ = llama.forward(tokens, model.Kv(**sides))
    expected, got = llama.log_probabilities(passage.hidden[:CONTINUATION]), llama.log_probabilities(hidden)
    return float((numpy.exp(expected) * (expected - got)).sum(axis=1).mean() / error)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=pathlib.Path, default=quality.ROOT / "target/quality")
    parser.add_argument("--out", type=pathlib.Path, default=quality.HERE / "sensitivity-smollm2.toml")
    flags = parser.parse_args()
    flags.cache.mkdir(parents=True, exist_ok=True)
    weights = quality.find_weights()
    llama = model.Model(weights)
    passage = quality.Passage(quality.TEXTS[0], llama, weights, flags.cache)
    lines = [f"# KL divergence per relative squared error, by layer: sensitivity.py on {passage.name}."]
    for side in "kv":
        values = ", ".join(f"{weight(passage, llama, layer, side):.2e}" for layer in range(llama.layers))
        lines.append(f"{side} = [{values}]")
    flags.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
