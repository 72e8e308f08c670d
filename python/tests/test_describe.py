"""Descriptions of GPU memory, on tensors that only say where they would lie."""

import itertools

import pytest

import shadowserve
from shadowserve import _gpu

MIB = 1 << 20


class Device:
    def __init__(self, kind="cuda"):
        self.type = kind


class Tensor:
    """A view of imagined memory of 2-byte elements."""

    def __init__(self, address, shape, strides=None, device=None):
        self.address, self.shape, self.device, self.dtype = address, tuple(shape), device or GPU, "bfloat16"
        contiguous = [1]
        for size in reversed(self.shape[1:]):
            contiguous.insert(0, contiguous[0] * size)
        self.strides = tuple(strides or contiguous)

    def dim(self):
        return len(self.shape)

    def stride(self, dimension=None):
        return self.strides if dimension is None else self.strides[dimension]

    def element_size(self):
        return 2

    def data_ptr(self):
        return self.address

    def is_contiguous(self):
        return self.strides == Tensor(0, self.shape).strides

    def element_address(self, *index):
        return self.address + 2 * sum(at * stride for at, stride in zip(index, self.strides))


GPU = Device()


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """Allocations of 1 MiB, one at each MiB."""
    monkeypatch.setattr(_gpu, "_range_of", lambda address: (address // MIB * MIB, MIB))
    monkeypatch.setattr(_gpu, "_handle_of", lambda base: base.to_bytes(64, "little"))
    monkeypatch.setattr(_gpu, "_element", lambda dtype: "bf16")
    monkeypatch.setattr(_gpu, "device_uuid", lambda device: list(range(16)))


def hnd(address, pages, tokens, heads, dim):
    """[pages, heads, tokens, dim] seen as [pages, tokens, heads, dim]."""
    return Tensor(address, [pages, tokens, heads, dim], [heads * tokens * dim, dim, tokens * dim, 1])


@pytest.mark.parametrize("view", [lambda at, *shape: Tensor(at, shape), hnd])
def test_a_description_leads_to_every_element(view):
    shape = (5, 16, 3, 8)
    layers = [(view(2 * MIB + 512, *shape), view(2 * MIB + 65536, *shape)), (view(7 * MIB, *shape), view(8 * MIB + 2, *shape))]
    described = shadowserve.describe_pages(layers)
    assert (described["pages"], described["page_tokens"], described["kv_heads"], described["head_dim"]) == shape
    assert [int.from_bytes(handle, "little") for handle, _ in described["allocations"]] == [2 * MIB, 7 * MIB, 8 * MIB]
    for layer, (side, key) in itertools.product(range(2), enumerate(["k_strides", "v_strides"])):
        allocation, offset, scale = described["layers"][layer][side]
        base = int.from_bytes(described["allocations"][allocation][0], "little")
        page, token, head = described[key]
        assert scale == 1
        for index in [(0, 0, 0, 0), (4, 15, 2, 7), (3, 2, 1, 5)]:
            address = base + offset + index[0] * page + index[1] * token + index[2] * head + index[3] * 2
            assert address == layers[layer][side].element_address(*index)


def test_what_cannot_be_described_is_refused_with_the_reason():
    good = Tensor(0, [5, 16, 3, 8])
    for layers, scales, reason in [
        ([], None, "no layers"),
        ([(good, Tensor(0, [5, 16, 3, 8], [384, 24, 8, 2]))], None, "v of layer 0 must be a view"),
        ([(good, Tensor(0, [16, 3, 8]))], None, "v of layer 0 must be a view"),
        ([(good, good), (good, Tensor(0, [6, 16, 3, 8]))], None, "v of layer 1 differs"),
        ([(good, good)], [(1, 1), (1, 1)], "1 layers and scales for 2"),
        ([(Tensor(0, [5, 16, 3, 8], device=Device("cpu")), good)], None, "no GPU memory"),
    ]:
        with pytest.raises(ValueError, match=reason):
            shadowserve.describe_pages(layers, scales)
    with pytest.raises(ValueError, match="contiguous tensor"):
        shadowserve.describe_ring(Tensor(0, [4, 8], [16, 1]))


def test_a_ring_begins_where_its_tensor_does():
    described = shadowserve.describe_ring(Tensor(3 * MIB + 256, [4, 1024]))
    assert (described["offset"], described["entry_bytes"], described["entries"]) == (256, 2048, 4)


def test_without_a_gpu_the_data_plane_refuses_pages_with_the_reason(cluster):
    client = shadowserve.Client(cluster.socket, codec=cluster.codec)
    layers = [(Tensor(0, [5, 16, 3, 8]), Tensor(MIB // 2, [5, 16, 3, 8]))]
    with pytest.raises(shadowserve.Refused, match="GPU"):
        client.register_pages(shadowserve.describe_pages(layers))
