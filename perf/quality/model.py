"""SmolLM2-135M-Instruct in numpy: weights and tokenizer out of its GGUF file, a Llama forward pass over given KV.

float32 throughout, one sequence, many tokens at a time. K is kept after RoPE with a head's two halves apart, which is
how Hugging Face's Llama and vLLM's cache have it; GGUF files interleave the halves, so weights are turned back here.
"""
import dataclasses
import pathlib

import gguf
import numpy
import tokenizers


@dataclasses.dataclass
class Kv:
    """The KV of a prefix: [layers, tokens, kv_heads, head_dim] each, float32."""

    k: numpy.ndarray
    v: numpy.ndarray


class Model:
    """Weights of a Llama, and its forward pass."""

    def __init__(self, path: pathlib.Path):
        reader = gguf.GGUFReader(path)
        field = lambda name: reader.fields[name].contents()
        self.layers = field("llama.block_count")
        self.heads = field("llama.attention.head_count")
        self.kv_heads = field("llama.attention.head_count_kv")
        self.head_dim = field("llama.rope.dimension_count")
        self.epsilon = field("llama.attention.layer_norm_rms_epsilon")
        self.rope_base = field("llama.rope.freq_base")
        self.tokenizer = tokenizer(field)
        self.weights = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
                        for tensor in reader.tensors}
        for layer in range(self.layers):
            for name, heads in (("q", self.heads), ("k", self.kv_heads)):
                key = f"blk.{layer}.attn_{name}.weight"
                self.weights[key] = halves_apart(self.weights[key], heads)

    def forward(self, tokens: numpy.ndarray, prefix: Kv | None = None) -> tuple[numpy.ndarray, Kv]:
        """Last hidden states [tokens, width] of `tokens` after `prefix`, and the KV of `tokens` alone."""
        count, past = len(tokens), 0 if prefix is None else prefix.k.shape[1]
        hidden = self.weights["token_embd.weight"][tokens]
        rotation = self.rotation(numpy.arange(past, past + count))
        hidden_future = numpy.triu(numpy.full((count, count), -numpy.inf, numpy.float32), 1)
        own = Kv(*(numpy.empty((self.layers, count, self.kv_heads, self.head_dim), numpy.float32) for _ in "kv"))
        for layer in range(self.layers):
            weight = lambda name: self.weights[f"blk.{layer}.{name}.weight"].T
            normed = self.normalize(hidden, weight("attn_norm"))
            q = rotate((normed @ weight("attn_q")).reshape(count, self.heads, self.head_dim), rotation)
            own.k[layer] = rotate((normed @ weight("attn_k")).reshape(count, self.kv_heads, self.head_dim), rotation)
            own.v[layer] = (normed @ weight("attn_v")).reshape(count, self.kv_heads, self.head_dim)
            k, v = own.k[layer], own.v[layer]
            if prefix is not None:
                k, v = numpy.concatenate([prefix.k[layer], k]), numpy.concatenate([prefix.v[layer], v])
            hidden = hidden + self.attention(q, k, v, hidden_future) @ weight("attn_output")
            normed = self.normalize(hidden, weight("ffn_norm"))
            gate = normed @ weight("ffn_gate")
            gate /= 1 + numpy.exp(-gate)
            hidden = hidden + (gate * (normed @ weight("ffn_up"))) @ weight("ffn_down")
        return self.normalize(hidden, self.weights["output_norm.weight"]), own

    def log_probabilities(self, hidden: numpy.ndarray) -> numpy.ndarray:
        """Logarithms of the next token's probabilities, [tokens, vocabulary]; the embedding is the output matrix."""
        logits = hidden @ self.weights["token_embd.weight"].T
        logits -= logits.max(axis=1, keepdims=True)
        logits -= numpy.log(numpy.exp(logits).sum(axis=1, keepdims=True))
        return logits

    def attention(self, q, k, v, hidden_future):
        """[tokens, heads * head_dim]: every query head over the K and V of the head that it shares."""
        count, past = len(q), len(k) - len(q)
        shared = self.heads // self.kv_heads
        out = numpy.empty((count, self.heads, self.head_dim), numpy.float32)
        for head in range(self.heads):
            scores = q[:, head] @ k[:, head // shared].T * numpy.float32(self.head_dim**-0.5)
            scores[:, past:] += hidden_future
            scores -= scores.max(axis=1, keepdims=True)
            numpy.exp(scores, out=scores)
            out[:, head] = scores @ v[:, head // shared] / scores.sum(axis=1, keepdims=True)
        return out.reshape(count, -1)

    def normalize(self, hidden, weight):
        """RMSNorm."""
        return hidden / numpy.sqrt((hidden**2).mean(axis=1, keepdims=True) + self.epsilon) * weight

    def rotation(self, positions):
        """Cosines and sines of RoPE, [tokens, 1, head_dim / 2] each."""
        frequencies = self.rope_base ** -(numpy.arange(0, self.head_dim, 2) / self.head_dim)
        angles = positions[:, None, None] * frequencies
        return numpy.cos(angles).astype(numpy.float32), numpy.sin(angles).astype(numpy.float32)


def rotate(rows, rotation):
    """RoPE on [tokens, heads, head_dim]: dimension j turns with j + head_dim / 2."""
    (cos, sin), (first, second) = rotation, numpy.split(rows, 2, axis=2)
    return numpy.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2)


def halves_apart(weight, heads):
    """Rows of a Q or K matrix from GGUF's order (pairs side by side) to halves apart."""
    rows, width = weight.shape
    return numpy.ascontiguousarray(weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width))


def tokenizer(field) -> tokenizers.Tokenizer:
    """The byte-level BPE tokenizer that the GGUF file describes (pre-tokenizer `smollm`: digits stand alone)."""
    vocabulary = {token: number for number, token in enumerate(field("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return bpe
