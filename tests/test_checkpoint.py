# SPDX-License-Identifier: Apache-2.0
"""safetensors files, read and written: the same tensors as the safetensors library's, and broken files that say how."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeshard
from moeshard.checkpoint import INDEX, WEIGHTS, Checkpoint, Writer

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def tensors():
    generator = torch.Generator().manual_seed(0)
    made = {str(dtype): torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in DTYPES}
    return {**made, "none": torch.empty(0, 4), "one": torch.tensor(1.5)}


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_reads_what_the_library_writes(tmp_path):
    save_file(tensors(), tmp_path / WEIGHTS)
    with Checkpoint(tmp_path) as checkpoint:
        assert not checkpoint.problems
        for keep in (False, True):
            assert equal({name: checkpoint.tensor(name, keep=keep) for name in checkpoint.intact()}, tensors())
        checkpoint.forget(list(checkpoint.entries))
        assert equal({name: checkpoint.tensor(name) for name in checkpoint.entries}, tensors())


def test_a_kept_tensor_outlives_the_checkpoint_and_never_reaches_the_file(tmp_path):
    save_file(tensors(), tmp_path / WEIGHTS)
    with Checkpoint(tmp_path) as checkpoint:
        kept = checkpoint.tensor("torch.float32", keep=True)
        kept += 1
        checkpoint.forget(["torch.float32"])
    assert torch.equal(kept, tensors()["torch.float32"] + 1)
    assert equal(load_file(tmp_path / WEIGHTS), tensors())


def write(folder, wanted, files):
    writer = Writer(folder, {n: (t.shape, t.dtype) for n, t in wanted.items()}, files, {"total_size": 7})
    try:
        for name, tensor in reversed(wanted.items()):
            half = tensor.numel() // 2
            writer.write(name, tensor.reshape(-1)[half:], first=half)
            writer.write(name, tensor.reshape(-1)[:half])
        (writer.staging / "config.json").write_text("{}")
        writer.commit()
    finally:
        writer.discard()


def test_the_library_reads_what_is_written_in_pieces(tmp_path):
    wanted = tensors()
    write(tmp_path / "new" / "folder", wanted, {WEIGHTS: list(wanted)})
    assert equal(load_file(tmp_path / "new" / "folder" / WEIGHTS), wanted)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", WEIGHTS]
    assert os.listdir(tmp_path / "new") == ["folder"]


def test_several_files_get_an_index_and_replace_an_older_checkpoint(tmp_path):
    wanted, names = tensors(), list(tensors())
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    save_file(tensors(), tmp_path / WEIGHTS)
    (tmp_path / "tokenizer.json").write_text("kept")
    write(tmp_path, wanted, {shard: names[i::3] for i, shard in enumerate(shards)})
    assert sorted(os.listdir(tmp_path)) == ["config.json", *shards, INDEX, "tokenizer.json"]
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": 7}
    with Checkpoint(tmp_path) as checkpoint:
        assert not checkpoint.problems
        assert equal(
            {name: checkpoint.tensor(name) for name in sorted(checkpoint.entries)}, dict(sorted(wanted.items()))
        )
    write(tmp_path, wanted, {WEIGHTS: names})
    assert sorted(os.listdir(tmp_path)) == ["config.json", WEIGHTS, "tokenizer.json"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    save_file(tensors(), tmp_path / WEIGHTS)
    writer = Writer(tmp_path, {"a": ((2,), torch.float32)}, {WEIGHTS: ["a"]}, {})
    with pytest.raises(moeshard.ArgumentError, match=r"a: expected torch.float32 \[2\], got torch.float64"):
        writer.write("a", torch.zeros(2).double())
    with pytest.raises(moeshard.ArgumentError, match=r"a: expected .* got torch.float32 \[2\]"):
        writer.write("a", torch.zeros(2), first=1)
    writer.discard()
    assert os.listdir(tmp_path) == [WEIGHTS] and os.listdir(tmp_path.parent).count(tmp_path.name) == 1
    assert not [name for name in os.listdir(tmp_path.parent) if "saving" in name]
    assert equal(load_file(tmp_path / WEIGHTS), tensors())


def test_odd_headers_are_read(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - len(header) % 2)  # odd: the data is not aligned
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data)
    with Checkpoint(tmp_path) as checkpoint:
        assert len(header) % 2 and checkpoint.tensor("a").tolist() == [1.5, -2.0]


def header_of(entry):
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "not a safetensors file, or truncated in its header", id="empty"),
        pytest.param(b"\xff" * 100, "not a safetensors file", id="noise"),
        pytest.param((4).to_bytes(8, "little") + b"null", "not an object", id="no-object"),
        pytest.param((4).to_bytes(8, "little") + b"{{{{", "not JSON", id="no-json"),
        pytest.param(header_of(5), "a: its entry in the header of model.safetensors is broken", id="entry"),
        pytest.param(
            header_of({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}), "a: .* broken.*numbers", id="negative"
        ),
        pytest.param(header_of({"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}), "a: dtype F4", id="dtype"),
        pytest.param(
            header_of({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}),
            r"a: F32 \[3\] does not take the 8 bytes",
            id="size",
        ),
        pytest.param(
            header_of({"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}),
            "a: truncated, model.safetensors ends at byte .* but the tensor at byte",
            id="truncated",
        ),
    ],
)
def test_a_broken_file_says_how(tmp_path, content, message):
    import re

    (tmp_path / WEIGHTS).write_bytes(content)
    with Checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.problems) == 1 and re.search(message, checkpoint.problems[0]), checkpoint.problems
        assert not checkpoint.intact()


def test_an_index_that_does_not_fit_says_how(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "two.safetensors")
    names = {"a": "one.safetensors", "b": "one.safetensors", "c": "gone.safetensors", "d": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**names, "e": "../x.safetensors"}}))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.problems == [
            f"{INDEX}: names a file outside the folder, ../x.safetensors",
            "gone.safetensors: missing (it should hold 1 tensors: c)",
            f"b: missing, {INDEX} says it is in one.safetensors",
            "a: twice, in one.safetensors and in two.safetensors",
            f"d: missing, {INDEX} says it is in two.safetensors",
        ]
    (tmp_path / INDEX).write_text("{}")
    assert "cannot be read" in Checkpoint(tmp_path).problems[0]


def test_a_pickle_is_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(
        moeshard.ArgumentError, match="path: .*pytorch_model.bin, a pickle.*never loaded.*save_pretrained"
    ):
        Checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_without_weights_says_so(tmp_path):
    with pytest.raises(moeshard.ArgumentError, match=f"path: no {WEIGHTS} and no {INDEX}"):
        Checkpoint(tmp_path)
