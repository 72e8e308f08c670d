"""The module against a real store and data plane."""

import gc
import json

import pytest

import shadowserve


def connect(cluster, **options):
    return shadowserve.Client(cluster.socket, codec=cluster.codec, **options)


def lookup(cluster, client, tokens):
    """The prefix, once the store answers."""
    found = []

    def answered():
        try:
            found.append(client.lookup(tokens, timeout=0.3))
        except shadowserve.Error:
            return False
        return True

    cluster.wait_until("the store answers", answered)
    return found[0]


def test_a_whole_sequence_arrives_bit_for_bit(cluster, kv):
    client = connect(cluster)
    prefix = lookup(cluster, client, kv.tokens)
    layers, tokens, kv_heads, head_dim = kv.shape("k")
    assert prefix and prefix.is_whole
    assert (prefix.tokens, prefix.shape, prefix.dtype) == (tokens, (layers, kv_heads, head_dim), "bf16")
    assert sum(prefix.chunk_tokens) == tokens
    region = client.register(prefix.sequence_bytes)
    report = client.fetch(prefix, region).wait()
    assert report and report.outcome == "done" and report.missing == [] and report.message == ""
    assert report.planes == 2 * layers * len(prefix.chunk_tokens)
    assert report.delivered_bytes == prefix.sequence_bytes
    assert region.read(0, prefix.sequence_bytes) == kv.bytes("k") + kv.bytes("v")
    stats = json.loads(client.stats())
    assert stats["counters"]["planes_delivered"] == report.planes


def test_poll_ends_with_the_report_that_wait_gives(cluster, kv):
    client = connect(cluster)
    prefix = lookup(cluster, client, kv.tokens)
    fetch = client.fetch(prefix, client.register(prefix.sequence_bytes))
    ended = []
    cluster.wait_until("the fetch has ended", lambda: ended.append(fetch.poll()) or ended[-1] is not None)
    assert ended[-1].outcome == "done"
    assert repr(fetch.wait(0)) == repr(ended[-1])


def test_of_a_longer_sequence_the_stored_part_is_found(cluster, kv):
    client = connect(cluster)
    prefix = lookup(cluster, client, kv.tokens[:512] + [1] * 300)
    assert prefix and not prefix.is_whole and prefix.tokens == 512
    assert repr(prefix) == "Prefix(512 tokens, 2 of 4 chunks)"


def test_another_namespace_finds_nothing(cluster, kv):
    client = connect(cluster, salt="another tenant")
    prefix = lookup(cluster, client, kv.tokens)
    assert not prefix and prefix.shape is None and prefix.sequence_bytes == 0
    region = client.register(4096)
    with pytest.raises(ValueError, match="nothing of the sequence is stored"):
        client.fetch(prefix, region)


def test_what_cannot_be_is_refused_with_the_reason(cluster, kv):
    client = connect(cluster)
    prefix = lookup(cluster, client, kv.tokens)
    small = client.register(4096)
    with pytest.raises(IndexError, match="lie outside"):
        small.read(small.nbytes - 1, 2)
    with pytest.raises(ValueError, match="not a time"):
        client.lookup(kv.tokens, timeout=-1)
    other = connect(cluster)
    with pytest.raises(ValueError, match="another client"):
        other.fetch(prefix, client.register(prefix.sequence_bytes))


def test_a_region_that_is_too_small_is_refused(cluster, kv):
    client = connect(cluster)
    prefix = lookup(cluster, client, kv.tokens)
    small = client.register(4096)
    if small.nbytes >= prefix.sequence_bytes:
        pytest.skip("regions lie on hugepages here, and the smallest takes the whole sample")
    with pytest.raises(ValueError, match="register more"):
        client.fetch(prefix, small)


def test_a_fetch_keeps_its_region(cluster, kv):
    client = connect(cluster)
    prefix = lookup(cluster, client, kv.tokens)
    fetch = client.fetch(prefix, client.register(prefix.sequence_bytes))
    gc.collect()
    assert fetch.wait().outcome == "done"


def test_a_killed_store_fails_the_fetch_by_its_deadline_and_names_what_is_missing(cluster, kv):
    client = connect(cluster)
    prefix = lookup(cluster, client, kv.tokens)
    region = client.register(prefix.sequence_bytes)
    cluster.kill("store")
    report = client.fetch(prefix, region, timeout=0.3).wait()
    assert not report and report.outcome == "failed"
    assert [chunk for chunk, _ in report.missing] == list(range(len(prefix.chunk_tokens)))


def test_a_killed_data_plane_is_noticed(cluster, kv):
    client = connect(cluster)
    prefix = lookup(cluster, client, kv.tokens)
    region = client.register(prefix.sequence_bytes)
    assert client.lost is None
    cluster.kill("dataplane")
    with pytest.raises(shadowserve.DataPlaneLost):
        client.fetch(prefix, region).wait()
    assert client.lost


def test_no_data_plane_is_said_with_what_to_do(tmp_path):
    with pytest.raises(shadowserve.DataPlaneLost, match="control.sock"):
        shadowserve.Client(tmp_path / "control.sock")


def test_tensors_lie_in_the_region(cluster, kv):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    client = connect(cluster)
    prefix = lookup(cluster, client, kv.tokens)
    region = client.register(prefix.sequence_bytes)
    assert client.fetch(prefix, region).wait()
    k, v = shadowserve.tensors(region, prefix)
    del region
    gc.collect()
    for name, tensor in (("k", k), ("v", v)):
        assert list(tensor.shape) == kv.shape(name) and tensor.dtype == torch.bfloat16
        assert bytes(tensor.contiguous().view(torch.uint8).numpy()) == kv.bytes(name)
