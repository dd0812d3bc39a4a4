"""Checkpoints: atomic, complete, never executed, refused where they do not fit."""

import io
import json
import lzma
import pickle
import random
import resource
import signal
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from training.snapshots import check_room
from utils.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    model_state,
    random_state,
    save_checkpoint,
    set_random_state,
)


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))


def test_round_trip(tmp_path):
    contents = {
        "model": network().state_dict(),
        "step": 7,
        "settings": {"lr": 0.1, "size": (3, 4), "x": None},
    }
    path = tmp_path / "CS_scenes_7.pth"
    save_checkpoint(contents, path)
    assert [p.name for p in tmp_path.iterdir()] == ["CS_scenes_7.pth"]
    loaded = load_checkpoint(path)
    assert loaded["settings"] == contents["settings"]
    assert all(torch.equal(loaded["model"][n], x) for n, x in contents["model"].items())


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path):
    """A real limit on the size of files: the write stops half-way, as on a full disk."""
    contents = {"model": {"x": torch.zeros(300_000)}}
    path = tmp_path / "run_1.pth"
    save_checkpoint(contents, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        for step in (1, 2):
            with pytest.raises(
                CheckpointError, match=rf"run_{step}.pth: cannot save .*earlier ones are kept"
            ):
                save_checkpoint(contents, tmp_path / f"run_{step}.pth")
        with pytest.raises(CheckpointError, match="cannot write a checkpoint of 1 MiB"):
            check_room(tmp_path, 1_200_000, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["run_1.pth"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("fault", ["truncated", "another step", "a flipped bit"])
def test_what_was_written_is_read_back_before_it_replaces_anything(tmp_path, monkeypatch, fault):
    """A disk that reports success but holds something else."""
    path, contents = tmp_path / "run_2.pth", {"model": network().state_dict(), "step": 2}
    save_checkpoint(contents, path)
    before, write = path.read_bytes(), torch.save

    def damaged(contents, file):
        write(contents | {"step": 1} if fault == "another step" else contents, file)
        if fault == "truncated":
            file.truncate(file.tell() - 100)
        if fault == "a flipped bit":
            weight = contents["model"]["0.weight"].numpy().tobytes()
            file.flush()
            position = Path(file.name).read_bytes().index(weight)
            file.seek(position)
            file.write(bytes([weight[0] ^ 1]))
            file.seek(0, 2)

    monkeypatch.setattr(torch, "save", damaged)
    with pytest.raises(CheckpointError, match=r"run_2.pth: cannot save the checkpoint \(what was written"):
        save_checkpoint(contents, path)
    assert [p.name for p in tmp_path.iterdir()] == ["run_2.pth"]
    assert path.read_bytes() == before


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_pickled_objects_are_refused_not_run(tmp_path, save):
    save({"model": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match=r"bomb.pth: refused, it holds pickled objects"):
        load_checkpoint(tmp_path / "bomb.pth")


@pytest.mark.parametrize("kept", [0, 10, 1000, -100])
def test_truncated_file(tmp_path, kept):
    path = tmp_path / "run_1.pth"
    save_checkpoint({"model": network().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"run_1.pth: not a readable checkpoint, truncated"):
        load_checkpoint(path)


def test_missing_file_and_other_contents(tmp_path):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(
        CheckpointError, match=r"page\.pth: not a readable checkpoint, truncated or of another"
    ):
        load_checkpoint(tmp_path / "page.pth")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="expected a state dict, got list"):
        load_checkpoint(tmp_path / "list.pth")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "step": 3},
        lambda state: {"state_dict": state, "epoch": 1},
        lambda state: {f"module.{name}": x for name, x in state.items()},
        lambda state: {"state_dict": {f"module.{name}": x for name, x in state.items()}},
        lambda state: state | {"0.num_batches_tracked": torch.tensor(5)},
        lambda state: {f"_orig_mod.{name}": x for name, x in state.items()},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {0: torch.ones(1)}}},
        lambda state: {"net": state, "acc": np.float64(0.5), "epoch": np.int64(3)},
        lambda state: {
            "state_dict": {f"model.{name}": x for name, x in state.items()},
            "loss": np.float32(1),
        },
        lambda state: {"model": {"state_dict": {f"module._orig_mod.{n}": x for n, x in state.items()}}},
        lambda state: {f"model.module.{name}": x for name, x in state.items()},
    ],
)
def test_every_usual_wrapping_is_understood(tmp_path, wrap):
    source, target = network(), network()
    torch.save(wrap(dict(source.state_dict())), tmp_path / "x.pth")
    path = tmp_path / "x.pth"
    load_weights(target, model_state(load_checkpoint(path)), path)
    assert all(torch.equal(x, source.state_dict()[n]) for n, x in target.state_dict().items())


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            {"model": network().state_dict(), "net": network().state_dict()},
            "holds weights in model, net; keep",
        ),
        ({"model": {}, "step": 3}, "holds no weights of a network"),
        ({"optimizer": {"state": {0: torch.ones(1)}}}, "holds no weights of a network"),
    ],
)
def test_no_weights_or_too_many(tmp_path, contents, message):
    with pytest.raises(CheckpointError, match=f"x.pth: {message}"):
        model_state(contents, tmp_path / "x.pth")


def test_a_prefix_that_not_all_names_carry_stays():
    names = ("module.0.weight", "0.bias")
    assert tuple(model_state(dict.fromkeys(names, torch.ones(1)))) == names


@pytest.mark.parametrize(
    "value", [np.float64(0.1), np.float32(-2), np.int64(-(2**40)), np.uint8(7), np.bool_(True)]
)
def test_numpy_scalars_become_plain_numbers(tmp_path, value):
    torch.save({"x": value, "y": [value]}, tmp_path / "x.pth")
    loaded = load_checkpoint(tmp_path / "x.pth")
    assert loaded == {"x": value.item(), "y": [value.item()]}
    assert type(loaded["x"]) is type(value.item())


@pytest.mark.parametrize(
    "value",
    [np.zeros(3), np.datetime64("2020-01-01"), np.dtype("O"), np.random.default_rng(0), np.complex64(1)],
)
def test_nothing_else_of_numpy_is_unpickled(tmp_path, value):
    torch.save({"x": value}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth: refused, it holds pickled objects"):
        load_checkpoint(tmp_path / "x.pth")


def test_a_pickle_of_another_protocol_in_a_zip_is_refused(tmp_path):
    torch.save({"model": network().state_dict()}, tmp_path / "x.pth", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"x.pth: refused, it holds pickled objects"):
        load_checkpoint(tmp_path / "x.pth")


def test_a_flipped_bit_is_refused_wherever_it_matters(tmp_path):
    path = tmp_path / "run_1.pth"
    save_checkpoint({"model": network().state_dict(), "step": 1}, path)
    expected, raw = load_checkpoint(path), path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for position in [*range(0, len(raw), 97), *(rng.randrange(len(raw)) for _ in range(40))]:
        damaged = bytearray(raw)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:  # in the padding between entries, or in a date
            assert loaded["step"] == 1
            assert all(torch.equal(x, loaded["model"][name]) for name, x in expected["model"].items())
    assert refused > 10
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entry = next(x for x in archive.infolist() if x.filename.endswith("data/0"))
    position = raw.index(expected["model"]["0.weight"].numpy().tobytes(), entry.header_offset)
    damaged = bytearray(raw)
    damaged[position] ^= 64
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"damaged, the checksum of .*/data/0 does not fit"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4, 3, 1, 1, dtype=torch.complex64), r"1 of another kind: 0\.weight \(complex64\)"),
        (torch.ones(4, 3, 1, 1).to_sparse(), r"1 of another kind: 0\.weight \(sparse_coo\)"),
        (torch.ones(4, 3, 1, 1, dtype=torch.int64), r"1 of another kind: 0\.weight \(int64\)"),
        (torch.full((4, 3, 1, 1), float("nan")), r"1 of its weights are not finite: 0\.weight"),
        (torch.full((4, 3, 1, 1), -float("inf")), r"1 of its weights are not finite: 0\.weight"),
    ],
)
def test_weights_of_another_kind(tmp_path, weight, message):
    model = network()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, {**before, "0.weight": weight}, tmp_path / "x.pth")
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    load_weights(model, {n: x.half() for n, x in before.items()}, tmp_path / "x.pth")  # half types are cast


def test_compressed_files(tmp_path):
    state = network().state_dict()
    torch.save(state, tmp_path / "x.pth")
    (tmp_path / "x.pth.xz").write_bytes(lzma.compress((tmp_path / "x.pth").read_bytes()))
    assert all(torch.equal(x, load_checkpoint(tmp_path / "x.pth.xz")[n]) for n, x in state.items())
    raw = (tmp_path / "x.pth.xz").read_bytes()
    (tmp_path / "x.pth.xz").write_bytes(raw[:-20])
    with pytest.raises(CheckpointError, match=r"x\.pth\.xz: not a readable checkpoint"):
        load_checkpoint(tmp_path / "x.pth.xz")
    torch.save({"x": Bomb()}, tmp_path / "x.pth")
    (tmp_path / "x.pth.xz").write_bytes(lzma.compress((tmp_path / "x.pth").read_bytes()))
    with pytest.raises(CheckpointError, match=r"x\.pth\.xz: refused"):
        load_checkpoint(tmp_path / "x.pth.xz")


def write_safetensors(state, path):
    """The format by hand: the header's length, the header, the data."""
    header, data = {}, b""
    for name, x in state.items():
        raw = x.numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    state, path = network().state_dict(), tmp_path / "x.safetensors"
    write_safetensors(state, path)
    assert all(torch.equal(x, load_checkpoint(path)[n]) for n, x in state.items())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a readable checkpoint"):
        load_checkpoint(path)


def test_without_the_package_safetensors_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    write_safetensors(network().state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .* pip install safetensors"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_a_file_that_does_not_fit_is_refused_whole(tmp_path):
    model = network()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = {
        "0.weight": torch.zeros(4, 3, 1, 1),
        "1.weight": torch.zeros(9, 4, 1, 1),
        "extra": torch.zeros(1),
    }
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state, tmp_path / "other.pth")
    assert str(caught.value).endswith(
        "other.pth: does not fit this network; 2 missing: 0.bias, 1.bias; 1 unexpected: extra; "
        "1 of another shape: 1.weight (9, 4, 1, 1) instead of (2, 4, 1, 1)"
    )
    assert "\n" not in str(caught.value)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_weights_whose_sum_overflows_are_finite(tmp_path):
    model = network()
    state = {name: torch.full_like(x, 3e38) for name, x in model.state_dict().items()}
    load_weights(model, state, tmp_path)
    assert model[0].weight.eq(3e38).all()


def test_a_backbone_file_may_lack_the_head_and_nothing_else(tmp_path):
    model = network()
    state = {"0.weight": torch.ones(4, 3, 1, 1), "0.bias": torch.ones(4), "fc.weight": torch.ones(2)}
    load_weights(model, state, tmp_path, may_lack=("1.",), skip=("fc.",))
    assert model[0].weight.eq(1).all()
    del state["0.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: 0\.bias"):
        load_weights(model, state, tmp_path, may_lack=("1.",), skip=("fc.",))


def test_entries_that_no_module_takes_are_not_dropped_in_silence(tmp_path):
    model = network()
    model.register_load_state_dict_pre_hook(
        lambda module, state, *_: state.update({"lost": state.pop("0.bias")})
    )
    with pytest.raises(CheckpointError, match="1 of its weights reach no module: lost"):
        load_weights(model, model.state_dict(), tmp_path / "x.pth")


def test_random_states_survive_a_checkpoint(tmp_path):
    path = tmp_path / "run_1.pth"
    save_checkpoint({"random_states": [random_state(torch.device("cpu"))]}, path)

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    expected = draw()
    set_random_state(load_checkpoint(path)["random_states"][0], torch.device("cpu"))
    assert draw() == expected


def test_a_counter_beside_the_weights_is_no_weight():
    weights = {"conv.weight": torch.ones(2), "conv.bias": torch.ones(1)}
    assert model_state({"state_dict": weights, "step": torch.tensor(3)}) == weights
    alone = {"weight": torch.ones(2), "bias": torch.ones(1)}
    assert model_state(alone) == alone
