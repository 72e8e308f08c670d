"""Tests of the pieces, without weights: `python -m unittest` in this folder, run by `make quality` first."""
import pathlib
import tempfile
import unittest

import numpy

import kv_file
import model
import quality


class KvFiles(unittest.TestCase):
    def test_what_is_written_comes_back(self):
        generator = numpy.random.default_rng(1)
        k, v = generator.normal(size=(2, 3, 5, 2, 4)).astype(numpy.float32)
        tokens = numpy.arange(5)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "kv.safetensors"
            kv_file.write(path, k, v, tokens, text="a test")
            back = kv_file.read(path)
        for original, got in zip((k, v), back):
            self.assertLessEqual(float(numpy.abs(got / original - 1).max()), 2**-8)
        self.assertEqual(back[2].tolist(), tokens.tolist())

    def test_bfloat16_rounds_to_nearest_even(self):
        values = numpy.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-7], numpy.float32)
        self.assertEqual(kv_file.from_bf16(kv_file.to_bf16(values)).tolist(), [1.0, 1.0, 1 + 2**-6, -1 - 2**-7])


class Attention(unittest.TestCase):
    def test_scores_depend_on_distance_alone(self):
        """RoPE: the product of a query and a key turned by positions that differ by as much is the same."""
        generator = numpy.random.default_rng(2)
        q, k = generator.normal(size=(2, 1, 1, 8)).astype(numpy.float32)

        class Fake(model.Model):
            def __init__(self):
                self.rope_base, self.head_dim = 10_000.0, 8

        turned = lambda rows, at: model.rotate(rows, Fake().rotation(numpy.array([at])))
        near = (turned(q, 7) * turned(k, 4)).sum()
        far = (turned(q, 107) * turned(k, 104)).sum()
        other = (turned(q, 7) * turned(k, 5)).sum()
        self.assertAlmostEqual(float(near), float(far), places=4)
        self.assertNotAlmostEqual(float(near), float(other), places=3)

    def test_halves_are_put_apart(self):
        rows = numpy.arange(8).repeat(2).reshape(8, 2)
        self.assertEqual(model.halves_apart(rows, 2)[:, 0].tolist(), [0, 2, 1, 3, 4, 6, 5, 7])


class Figures(unittest.TestCase):
    def test_equal_answers_differ_in_nothing(self):
        expected = numpy.log(numpy.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
        same = quality.differences(expected, expected, numpy.array([0, 2]))
        self.assertEqual(same, {"perplexity_change": 0.0, "kl_divergence": 0.0, "top1_agreement": 1.0})

    def test_worse_answers_are_seen(self):
        expected = numpy.log(numpy.array([[0.5, 0.25, 0.25]]))
        got = numpy.log(numpy.array([[0.25, 0.5, 0.25]]))
        found = quality.differences(expected, got, numpy.array([0]))
        self.assertAlmostEqual(found["perplexity_change"], 1.0)
        self.assertAlmostEqual(found["kl_divergence"], 0.25 * numpy.log(2))
        self.assertEqual(found["top1_agreement"], 0.0)

    def test_curves_are_compared_at_equal_ratio(self):
        rows = [{"family": family, "ratio": ratio, "kl_divergence": scale * 10**ratio}
                for family, scale in (("cachegen", 3.0), ("profile", 1.0)) for ratio in (2.5, 4.4, 6.5)]
        curves = quality.compare_curves(rows)
        self.assertEqual([at["ratio"] for at in curves], [3 + 0.25 * step for step in range(13)])
        for at in curves:
            self.assertAlmostEqual(at["kl_cachegen_over_profile"], 3.0)


if __name__ == "__main__":
    unittest.main()
