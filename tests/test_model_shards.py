"""The files of tensors that examples/models reads, and what it says of damaged ones."""

import re

import numpy as np
import pytest

pytest.importorskip("safetensors")

from safetensors.numpy import save_file

from examples.models.shards import open_folder, open_shard


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "model.safetensors"
    arrays = {
        "first": np.arange(6, dtype=np.float32).reshape(2, 3),
        "second": np.ones(500, np.float16),
    }
    save_file(arrays, path)
    return path


def test_tensors_are_read(shard):
    first, second = (open_folder(shard.parent)[name] for name in ("first", "second"))
    assert (first.dtype, first.shape, second.shape) == (np.float32, (2, 3), (500,))
    np.testing.assert_array_equal(first.read(), np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(second.read(), np.ones(500))
    assert first.place < second.place


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-8], r"is cut off: .* so second is not complete \(1 of 2"),
        (lambda data: data[:-1010], r"is cut off: .* so first is not complete \(2 of 2"),
        (lambda data: data[:50], r"is damaged: .*; download it again"),
        (lambda data: b"", "is empty: download it again"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "is a Git LFS"),
        (lambda data: data.replace(b"[2,3]", b"[2,4]"), "is damaged"),
        (lambda data: b"<html>" * 20, "is damaged"),
    ],
)
def test_a_damaged_shard_is_named(shard, damage, message):
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(str(shard)) + " " + message):
        open_folder(shard.parent)


def test_a_type_that_is_not_supported(shard):
    save_file({"packed": np.ones(3, np.int32)}, shard)
    with pytest.raises(ValueError, match=r"model\.safetensors: packed is I32; supported are F32"):
        open_shard(shard)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "must be JSON"),
        ("{}", ValueError, "must be JSON .*'weight_map'"),
        ("[]", ValueError, "must be JSON"),
        ('{"weight_map": []}', ValueError, "must be JSON"),
        ('{"weight_map": {}}', FileNotFoundError, "index.json names no .*safetensors"),
        (
            '{"weight_map": {"first": "lost.safetensors"}}',
            FileNotFoundError,
            "lost.* is missing",
        ),
        ('{"weight_map": {"first": "."}}', ValueError, "cannot be read"),  # a folder
    ],
)
def test_an_index_that_cannot_be_used(shard, text, error, message):
    (shard.parent / "model.safetensors.index.json").write_text(text)
    with pytest.raises(error, match=message):
        open_folder(shard.parent)


def test_a_link_to_a_file_that_is_not_there(shard):
    (shard.parent / "other.safetensors").symlink_to("lost")
    with pytest.raises(FileNotFoundError, match=r"other\.safetensors is missing.* a link"):
        open_folder(shard.parent)
