"""Files of torch.save that torch did not write: torch reads them, and unzip finds nothing wrong."""

import io
import random
import zipfile
import zlib

import pytest
import torch

from titan_core.runtime.torch_archive import Archive, bytes_view, joined_crc


def fill(archive: Archive, tensors: dict[str, torch.Tensor]) -> bytes:
    out, crcs, count = bytearray(archive.size), {}, 0
    for name, tensor in tensors.items():
        data, at = bytes(bytes_view(tensor)), archive.offsets[name]
        out[at : at + len(data)] = data
        crcs[name], count = zlib.crc32(data), count + len(data)
    for at, content in archive.frame(crcs):
        out[at : at + len(content)] = content
        count += len(content)
    assert count == archive.size == len(out)  # every byte is said once
    return bytes(out)


def assert_sound(content: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        assert file.testzip() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint16, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (1, 2, 3)])
def test_one_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    content = fill(Archive({"": (shape, dtype)}, bare=True), {"": tensor})
    assert_sound(content)
    found = torch.load(io.BytesIO(content), weights_only=True)
    assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert bytes(bytes_view(found)) == bytes(bytes_view(tensor))


def test_many_tensors_begin_where_a_mapped_load_wants_them() -> None:
    tensors = {f"layer.{i}": torch.randn(i, 3) for i in range(12)}
    archive = Archive({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    content = fill(archive, tensors)
    assert_sound(content)
    found = torch.load(io.BytesIO(content), weights_only=True)
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(offset % 64 == 0 for offset in archive.offsets.values())


@pytest.mark.parametrize("cut", [0, 1, 7, 500, 999, 1000])
def test_the_crc_of_two_parts(cut: int) -> None:
    data = random.Random(0).randbytes(1000)
    first, second = data[:cut], data[cut:]
    assert joined_crc(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(data)
