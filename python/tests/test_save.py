"""Saving from Python, against a real store and data plane: what is saved is what another client finds."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, SAMPLE

import shadowserve

EXAMPLE = ROOT / "python/examples/save_and_fetch.py"


@pytest.fixture
def saving(tmp_path, new_cluster):
    return new_cluster(store=["--memory-mib", "64"])


def connect(cluster, **options):
    return shadowserve.Client(cluster.socket, codec=cluster.codec, **options)


def placed(client, kv):
    """A region with the sample's K and V, without NumPy."""
    k, v = kv.bytes("k"), kv.bytes("v")
    region = client.register(len(k) + len(v))
    shape = kv.shape("k")
    view = [memoryview(data).cast("H").cast("B").cast("H", shape) for data in (k, v)]
    assert shadowserve.place(region, *view) == (shape[0], shape[2], shape[3])
    return region, (shape[0], shape[2], shape[3])


def save_all(cluster, client, kv):
    """Once the store answers: a save of the whole sample."""
    region, shape = placed(client, kv)
    ended = []

    def done():
        ended.append(client.save(kv.tokens, region, shape, timeout=5).wait())
        return bool(ended[-1])

    cluster.wait_until("the sample is saved", done)
    return ended[-1]


def test_what_is_saved_is_what_another_client_fetches(saving, kv):
    client = connect(saving)
    report = save_all(saving, client, kv)
    chunks = -(-len(kv.tokens) // 256)
    assert report.outcome == "done" and report.not_saved == [] and report.fewer_copies == [] and report.message == ""
    assert report.stored + report.already_stored == chunks and report.encoded_bytes >= 0
    other = connect(saving)
    prefix = other.lookup(kv.tokens)
    assert prefix.is_whole and prefix.dtype == "bf16"
    region = other.register(prefix.sequence_bytes)
    assert other.fetch(prefix, region).wait()
    assert region.read(0, prefix.sequence_bytes) == kv.bytes("k") + kv.bytes("v")


def test_a_second_save_finds_everything_stored(saving, kv):
    client = connect(saving)
    save_all(saving, client, kv)
    region, shape = placed(client, kv)
    report = client.save(kv.tokens, region, shape, skip=1).wait()
    assert (report.stored, report.already_stored) == (0, len(kv.tokens) // 256)
    assert repr(report).startswith("SaveReport(done, 0 chunks stored, 2 before")


def test_poll_ends_with_the_report_that_wait_gives(saving, kv):
    client = connect(saving)
    region, shape = placed(client, kv)
    save, ended = client.save(kv.tokens, region, shape), []
    saving.wait_until("the save has ended", lambda: ended.append(save.poll()) or ended[-1] is not None)
    assert repr(save.wait(0)) == repr(ended[-1])


def test_a_store_that_takes_nothing_is_named(cluster, kv):
    client = connect(cluster, salt="not stored yet")
    cluster.wait_until("the store answers", lambda: answers(client, kv))
    region, shape = placed(client, kv)
    report = client.save(kv.tokens, region, shape, timeout=5).wait()
    assert not report and report.outcome == "failed" and "--memory-mib" in report.message
    assert [chunk for chunk, _ in report.not_saved] == [0, 1, 2]


def answers(client, kv):
    try:
        client.lookup(kv.tokens, timeout=0.3)
    except shadowserve.Error:
        return False
    return True


def test_what_cannot_be_saved_is_refused_with_the_reason(cluster, kv):
    client = connect(cluster)
    region, shape = placed(client, kv)
    for arguments, reason in [
        (([], region, shape), "no tokens"),
        ((kv.tokens, client.register(4096), (64, 8, 128)), "register more"),
        ((kv.tokens, region, shape, "fp8_e4m3"), "bf16 or f16"),
        ((kv.tokens, region, shape, "bf16", 3), "nothing is left to save"),
    ]:
        with pytest.raises(ValueError, match=reason):
            client.save(*arguments)
    with pytest.raises(ValueError, match="another client"):
        connect(cluster).save(kv.tokens, region, shape)
    profiled = shadowserve.Client(cluster.socket, codec="profile-00")
    with pytest.raises(ValueError, match="no codec"):
        profiled.save(kv.tokens, profiled.register(region.nbytes), shape)


def test_a_profile_says_how_each_plane_is_encoded(saving, kv, tmp_path):
    layers, _, heads, dim = kv.shape("k")
    text = f"layers = {layers}\nkv_heads = {heads}\nhead_dim = {dim}\n[k]\n\"0-{layers - 1}\" = \"raw\"\n[v]\n\"0-{layers - 1}\" = \"int8\"\n"
    path = tmp_path / "profile.toml"
    path.write_text("# K as it is.\n" + text)
    wrong = shadowserve.Client(saving.socket, codec="int4", profile=path)
    region, shape = placed(wrong, kv)
    with pytest.raises(shadowserve.Refused) as refused:
        wrong.save(kv.tokens, region, shape).wait()
    # The refusal names the codec to use.
    name = re.search(r"profile-[0-9a-f]{32}", str(refused.value))[0]
    client = shadowserve.Client(saving.socket, codec=name, profile=path)
    report = save_all(saving, client, kv)
    assert report.outcome == "done", report.message
    other = shadowserve.Client(saving.socket, codec=name)
    prefix = other.lookup(kv.tokens)
    assert prefix.is_whole
    region = other.register(prefix.sequence_bytes)
    assert other.fetch(prefix, region).wait()
    k, v = kv.bytes("k"), kv.bytes("v")
    assert region.read(0, len(k)) == k
    assert region.read(len(k), len(v)) != v


def test_what_cannot_be_placed_is_refused_with_the_reason(cluster, kv):
    region = connect(cluster).register(4096)
    numpy = pytest.importorskip("numpy", reason="NumPy is not installed")
    good = numpy.zeros((1, 2, 1, 4), numpy.uint16)
    for k, v, reason in [
        (good, good[:, :1], "both alike"),
        (good[0], good[0], "both alike"),
        (good.astype(numpy.float32), good, "32 bits"),
        (good[:, :, :, ::2], good, "one after the other"),
    ]:
        with pytest.raises(ValueError, match=reason):
            shadowserve.place(region, k, v)
    large = numpy.zeros((1, 1, 1, region.nbytes), numpy.uint16)
    with pytest.raises(ValueError, match="register more"):
        shadowserve.place(region, large, large)
    k, v = numpy.arange(8, dtype=numpy.uint16).reshape(good.shape), numpy.arange(8, 16, dtype=numpy.uint16).reshape(good.shape)
    assert shadowserve.place(region, k, v) == (1, 1, 4)
    assert region.read(0, 32) == numpy.arange(16, dtype="<u2").tobytes()


def test_the_example_saves_and_fetches(saving):
    pytest.importorskip("numpy", reason="NumPy is not installed")
    command = [sys.executable, str(EXAMPLE), "--input", str(SAMPLE), "--socket", str(saving.socket)]
    exact = subprocess.run([*command, "--codec", "lossless"], capture_output=True, text=True, timeout=60)
    assert exact.returncode == 0, exact.stderr
    assert "3 chunks stored" in exact.stdout and "640 tokens came back bit for bit" in exact.stdout
    again = subprocess.run([*command, "--codec", "lossless"], capture_output=True, text=True, timeout=60)
    assert again.stdout == "640 tokens came back bit for bit\n"
    rounded = subprocess.run([*command, "--codec", "int8"], capture_output=True, text=True, timeout=60)
    assert rounded.returncode == 0 and "relative error of K 0.00" in rounded.stdout, rounded.stderr
