"""Training from the command line: what it writes, what it starts from, how it is evaluated on the way."""

import json
import math
import shutil
from dataclasses import fields

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from libs import ABN
from networks import HEADS, NetworkConfig, build_model
from tests.scripts.conftest import THIN, log_of, same_tensors, scores_of
from training.options import RunOptions
from utils.checkpoint import load_checkpoint


def test_what_a_run_leaves(call, demo_data, tmp_path):
    result = call(
        "train.py", "--data-dir", demo_data, "--snapshot-dir", tmp_path / "run", *THIN,
        "--batch-size", 2, "--num-steps", 12, "--save-pred-every", 5, "--learning-rate", 0.02,
    )  # fmt: skip
    assert result.status == 0, result.error
    folder = tmp_path / "run"
    assert {p.name for p in folder.glob("*.pth")} == {f"CS_scenes_{step}.pth" for step in (5, 10, 12)}
    assert not list(folder.glob("*.tmp"))

    log = log_of(folder)
    assert [line["step"] for line in log] == [5, 10, 12]
    assert log[-1]["learning_rate"] == pytest.approx(0.02 * (1 - 11 / 12) ** 0.9)
    assert all(0 < line["loss"] < 10 for line in log)
    assert all(line["loss"] == pytest.approx(line["loss_head"] + 0.4 * line["loss_aux"]) for line in log)
    assert all(
        line[name] > 0 for line in log for name in ("images_per_second", "gradient_norm", "memory_mib")
    )
    assert all(line["kept_pixels"] == 1 for line in log)  # there are fewer than OHEM keeps

    events = EventAccumulator(str(folder)).Reload()
    for name in log[0].keys() - {"step"}:
        assert [event.step for event in events.Scalars(f"train/{name}")] == [5, 10, 12]
    assert "image, label, prediction/0" in events.Tags()["images"]

    checkpoint = load_checkpoint(folder / "CS_scenes_12.pth")
    assert checkpoint["step"] == 12
    assert checkpoint["recipe"]["input_size"] == (33, 41)
    assert checkpoint["network"] == NetworkConfig(backbone="thin").to_dict()
    assert checkpoint["data"]["dataset"] == "cityscapes"
    assert checkpoint["data"]["names"][:2] == ("road", "sidewalk")
    assert checkpoint["model"].keys() == build_model(backbone="thin").state_dict().keys()
    run = json.loads((folder / "run.json").read_text())
    assert f"train.py --data-dir {demo_data} --snapshot-dir " in run["command"]
    kept = json.loads(json.dumps(checkpoint["network"] | checkpoint["recipe"]))  # tuples become lists
    options = {name: value for name, value in run["settings"].items() if name not in kept}
    assert run["settings"] == kept | options
    assert options.keys() == {option.name for option in fields(RunOptions)}
    assert (options["data_dir"], options["snapshot_dir"]) == (str(demo_data), str(folder))
    assert (options["save_pred_every"], options["num_workers"], options["gpu"]) == (5, 0, "cpu")
    assert run["versions"]["torch"] == torch.__version__
    for line in (
        "data      cityscapes, 4 images",
        "device    CPU; fp32",
        "attention CPU: ",
        "norm      InPlaceABN; ",
    ):
        assert line in result.out
    assert "steps     0 → 12 of 2 images, 6 epochs in all" in result.out
    moved = load_checkpoint(folder / "CS_scenes_5.pth")["model"]
    assert not same_tensors(checkpoint["model"], moved)


def test_resuming_a_finished_run_and_changed_settings(call, demo_data, trained):
    options = ("--data-dir", demo_data, "--snapshot-dir", trained.parent, *THIN, "--resume")
    result = call("train.py", *options, "--batch-size", 2, "--num-steps", 2)
    assert result.status == 0
    assert "the run is complete: 2 steps are done, --num-steps is 2" in result.out
    assert "settings changed" not in result.out
    result = call("train.py", *options, "--batch-size", 4, "--num-steps", 2)
    assert "these settings changed: batch_size 2 → 4" in result.out


def resumed(call, demo_data, trained, folder, *more, **change):
    """Resume a copy of the trained checkpoint, with some of its contents changed, for one more step."""
    folder.mkdir()
    torch.save(load_checkpoint(trained) | change, folder / "CS_scenes_2.pth")
    options = ("--data-dir", demo_data, "--snapshot-dir", folder, *THIN, "--batch-size", 2)
    return call("train.py", *options, "--resume", "--num-steps", 3, *more)


def test_changed_settings_of_the_optimiser_hold(call, demo_data, trained, tmp_path):
    result = resumed(call, demo_data, trained, tmp_path / "a", "--weight-decay", 0.5, "--momentum", 0.1)
    assert result.status == 0, result.error
    assert "momentum 0.9 → 0.1, weight_decay 0.0001 → 0.5" in result.out
    (group,) = load_checkpoint(tmp_path / "a" / "CS_scenes_3.pth")["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.1, 0.5)
    assert resumed(call, demo_data, trained, tmp_path / "b").status == 0
    left, right = (load_checkpoint(tmp_path / x / "CS_scenes_3.pth")["model"] for x in "ab")
    assert not same_tensors(left, right)


def test_going_on_from_frozen_normalisation(call, demo_data, tmp_path):
    options = ("--data-dir", demo_data, "--snapshot-dir", tmp_path, *THIN, "--batch-size", 2)
    assert call("train.py", *options, "--num-steps", 1, "--freeze-bn").status == 0
    frozen, after = norms_of(tmp_path, 1), {}
    for more in ((), ("--freeze-bn", 0)):
        (tmp_path / "CS_scenes_2.pth").unlink(missing_ok=True)
        result = call("train.py", *options, "--num-steps", 2, "--resume", *more)
        assert result.status == 0, result.error
        after[more] = norms_of(tmp_path, 2)
        # The run's own settings hold until a flag changes them.
        assert ("freeze_bn True → False" in result.out) == bool(more)
    assert same_tensors(after[()], frozen)
    assert not any(torch.equal(value, frozen[name]) for name, value in after["--freeze-bn", 0].items())


def norms_of(folder, step):
    """The statistics of the normalisation in a checkpoint."""
    model = load_checkpoint(folder / f"CS_scenes_{step}.pth")["model"]
    return {name: value for name, value in model.items() if "running_" in name}


@pytest.mark.parametrize(
    ("flag", "asked", "has"),
    [
        ("--backbone", "resnet50", "thin"),
        ("--stem", "plain", "deep"),
        ("--model", "other", "ccnet"),
    ],
)
def test_a_flag_for_another_network_contradicts_the_checkpoint(
    call, demo_data, trained, tmp_path, monkeypatch, flag, asked, has
):
    monkeypatch.setitem(HEADS, "other", HEADS["ccnet"])
    folders = ("--data-dir", demo_data, "--snapshot-dir", tmp_path / "run")
    (tmp_path / "run").mkdir()
    shutil.copy(trained, tmp_path / "run")
    result = call("train.py", *folders, *THIN[2:], "--resume", "--num-steps", 3, flag, asked)
    assert result.status == 2
    path = tmp_path / "run" / "CS_scenes_2.pth"
    assert result.error == f"train.py: error: {flag} {asked} contradicts {path}, which has {has}\n"


def test_another_number_of_classes_contradicts_the_checkpoint(call, list_data, tmp_path):
    options = ("--data-dir", list_data, "--dataset", "list", "--data-list", list_data / "train.lst", *THIN)
    options += ("--snapshot-dir", tmp_path / "run", "--batch-size", 2)
    result = call("train.py", *options, "--num-classes", 3, "--num-steps", 1)
    assert result.status == 0, result.error
    result = call("train.py", *options, "--num-classes", 4, "--num-steps", 2, "--resume")
    assert result.status == 2
    path = tmp_path / "run" / "model_1.pth"
    assert result.error == f"train.py: error: --num-classes 4 contradicts {path}, which has 3\n"
    result = call("train.py", *options, "--num-steps", 2, "--resume")  # needs no flag
    assert result.status == 0, result.error
    assert load_checkpoint(tmp_path / "run" / "model_2.pth")["network"]["num_classes"] == 3


OLD_SETTINGS = (
    "batch_size", "input_size", "learning_rate", "momentum", "weight_decay", "power", "num_steps",
    "ignore_label", "random_mirror", "random_scale", "random_seed", "model", "backbone", "recurrence", "norm",
    "num_classes", "ohem", "ohem_thres", "ohem_keep", "freeze_bn", "amp", "accumulate",
)  # fmt: skip


def in_the_old_format(checkpoint):
    """As checkpoints were before there were recipes: one flat dict of settings, no classes' names."""
    values = checkpoint["network"] | checkpoint["recipe"]
    old = {name: values[name] for name in OLD_SETTINGS}
    old |= {"images": checkpoint["data"]["images"], "dataset": "cityscapes", "split": "train"}
    old |= {"data_dir": "/nowhere", "compile": False, "gpu": "0", "resume": None, "val_every": 0}
    kept = ("model", "optimizer", "scaler", "step", "random_states")
    return {name: checkpoint[name] for name in kept} | {"settings": old}


def test_a_checkpoint_of_the_old_format(call, demo_data, trained, tmp_path):
    """It is evaluated with the same counts, and goes on with the same bits."""
    counts, weights = [], []
    for name in ("new", "old"):
        folder, checkpoint = tmp_path / name, load_checkpoint(trained)
        folder.mkdir()
        torch.save(in_the_old_format(checkpoint) if name == "old" else checkpoint, folder / "CS_scenes_2.pth")
        metrics = scores_of(call, demo_data, folder, tmp_path / f"{name} results")
        assert metrics["settings"]["input_size"] == [33, 41]
        assert metrics["settings"]["backbone"] == "thin"
        counts.append(metrics["confusion_matrix"])
        # All else than where data and checkpoints are is the checkpoint's: backbone, crop, batch …
        plain = ("--data-dir", demo_data, "--snapshot-dir", folder, "--gpu", "cpu", "--num-workers", 0)
        result = call("train.py", *plain, "--resume", "--num-steps", 3)
        assert result.status == 0, result.error
        assert f"resuming {folder / 'CS_scenes_2.pth'} at step 2" in result.out
        changed = [line for line in result.out.splitlines() if "settings changed: " in line]
        assert [line.split("changed: ")[1] for line in changed] == ["num_steps 2 → 3"]
        written = load_checkpoint(folder / "CS_scenes_3.pth")
        assert written["recipe"]["batch_size"] == 2
        assert "settings" not in written
        weights.append(written["model"])
    assert counts[0] == counts[1]
    assert same_tensors(*weights)
    assert not same_tensors(weights[0], load_checkpoint(trained)["model"])


def test_the_checkpoint_before_a_damaged_one_is_named(call, demo_data, trained, tmp_path):
    shutil.copy(trained, tmp_path / "CS_scenes_2.pth")
    (tmp_path / "CS_scenes_4.pth").write_bytes(trained.read_bytes()[:9000])
    options = (
        "--data-dir",
        demo_data,
        *THIN,
        "--batch-size",
        2,
        "--snapshot-dir",
        tmp_path,
        "--num-steps",
        4,
    )
    result = call("train.py", *options, "--resume")
    assert result.status == 1
    assert "CS_scenes_4.pth: not a readable checkpoint" in result.error
    assert "; if you move it away, --resume goes on from CS_scenes_2.pth\n" in result.error


@pytest.mark.parametrize(
    "change",
    [
        {"step": "two"},
        {"recipe": None},
        {"network": []},
        {"data": None},
        {"recipe": {"batch_size": "2"}},
        {"network": {"depth": 101}},
        {"settings": None},  # as it was called before there were recipes
        {"optimizer": {}},
        {"random_states": [{}]},
        {"random_states": None},
    ],
)
def test_a_damaged_checkpoint_is_not_resumed(call, demo_data, trained, tmp_path, change):
    result = resumed(call, demo_data, trained, tmp_path / "run", **change)
    assert result.status == 1
    assert "CS_scenes_2.pth: cannot be resumed, its contents are damaged" in result.error
    assert result.error.count("\n") == 1


def test_other_data_is_another_run(call, demo_data, trained, tmp_path):
    result = resumed(call, demo_data, trained, tmp_path / "run", "--split", "val")
    assert result.status == 1
    assert "CS_scenes_2.pth: was trained on other data (4 images, " in result.error


def test_a_branch_does_not_mix_with_later_checkpoints(call, demo_data, trained, tmp_path):
    (tmp_path / "CS_scenes_9.pth").touch()
    options = ("--data-dir", demo_data, "--snapshot-dir", tmp_path, *THIN, "--resume", trained)
    result = call("train.py", *options, "--batch-size", 2, "--num-steps", 3)
    assert result.status == 1
    assert "holds CS_scenes_9.pth, which is later than step 2" in result.error
    assert result.out == ""


def test_an_earlier_run_is_not_overwritten(call, demo_data, trained):
    result = call("train.py", "--data-dir", demo_data, "--snapshot-dir", trained.parent, *THIN)
    assert result.status == 1
    assert "holds CS_scenes_2.pth of an earlier run; continue it with --resume" in result.error


def start_from(call, demo_data, folder, weights, *more):
    return call(
        "train.py", "--data-dir", demo_data, "--snapshot-dir", folder, *THIN, "--batch-size", 2,
        "--num-steps", 1, "--learning-rate", 1e-30, "--restore-from", weights, *more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["backbone", "checkpoint", "module."])
def test_starting_from_weights(call, demo_data, tmp_path, kind):
    state = build_model(backbone="thin").state_dict()
    if kind == "backbone":  # as MIT's ImageNet file: no heads, but a classifier
        state = {n: x for n, x in state.items() if not n.startswith(("head.", "dsn."))}
        state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    prefix = "module." if kind == "module." else ""
    torch.save({"state_dict": {prefix + n: x for n, x in state.items()}}, tmp_path / "weights.pth")
    result = start_from(call, demo_data, tmp_path / "run", tmp_path / "weights.pth")
    assert result.status == 0, result.error
    weights = load_checkpoint(tmp_path / "run" / "CS_scenes_1.pth")["model"]
    for name in ("conv1.weight", "layer4.1.conv2.weight"):
        torch.testing.assert_close(weights[name], state[name])


def test_the_normalisation_of_a_checkpoint_is_taken_over(call, demo_data, tmp_path):
    """Its weights mean something else with another; a flag still wins."""
    path = tmp_path / "rgb.pth"
    config = NetworkConfig(backbone="thin", channel_order="RGB", std=(58.0, 57.0, 57.0))
    torch.save({"model": build_model(config).state_dict(), "network": config.to_dict()}, path)
    result = start_from(call, demo_data, tmp_path / "a", path)
    assert result.status == 0, result.error
    assert f"starting from {path}, whose network is taken over\n" in result.out
    assert (
        "settings taken over: std (1.0, 1.0, 1.0) → (58.0, 57.0, 57.0), channel_order BGR → RGB" in result.out
    )
    assert load_checkpoint(tmp_path / "a" / "CS_scenes_1.pth")["network"] == config.to_dict()
    result = start_from(call, demo_data, tmp_path / "a", path, "--recipe", "cityscapes", "--resume")
    assert result.status == 0, result.error
    assert "the run is complete" in result.out
    flags = ("--channel-order", "BGR", "--std", "1,1,1")
    result = start_from(call, demo_data, tmp_path / "b", path, *flags)
    assert result.status == 0, result.error
    assert f"starting from {path}\n" in result.out
    assert f"--std 1.0,1.0,1.0 contradicts {path}, which has 58.0,57.0,57.0\n" in result.out
    assert f"--channel-order BGR contradicts {path}, which has RGB\n" in result.out
    assert load_checkpoint(tmp_path / "b" / "CS_scenes_1.pth")["network"]["channel_order"] == "BGR"


def test_another_number_of_classes_needs_not_restore_last(call, demo_data, tmp_path):
    state = build_model(backbone="thin", num_classes=11).state_dict()
    torch.save(state, tmp_path / "camvid.pth")
    result = start_from(call, demo_data, tmp_path / "run", tmp_path / "camvid.pth")
    assert result.status == 1
    assert "4 of another shape: head.bottleneck.3.weight (11, 16, 1, 1) instead of (19" in result.error
    assert result.error.endswith("; --not-restore-last leaves the classifiers out\n")
    result = start_from(call, demo_data, tmp_path / "run", tmp_path / "camvid.pth", "--not-restore-last")
    assert result.status == 0, result.error
    assert f"starting from {tmp_path / 'camvid.pth'}, with new classifiers for 19 classes" in result.out


@pytest.mark.parametrize("flag", ["--freeze-bn", "--ft"])
def test_fine_tuning_keeps_the_normalisation(call, demo_data, tmp_path, flag):
    model = build_model(backbone="thin")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    weights, rate = tmp_path / "weights.pth", ("--learning-rate", 0.01)
    result = start_from(call, demo_data, tmp_path / "run", weights, flag, *rate)
    assert result.status == 0, result.error
    after = load_checkpoint(tmp_path / "run" / "CS_scenes_1.pth")["model"]
    norms = [layer for layer in model.modules() if isinstance(layer, ABN)]
    kept = {id(entry) for layer in norms for entry in layer.state_dict(keep_vars=True).values()}
    for name, value in model.state_dict(keep_vars=True).items():
        assert torch.equal(after[name], value) == (id(value) in kept), name


def test_own_data_with_a_list(call, list_data, tmp_path):
    result = call(
        "train.py", "--data-dir", list_data, "--dataset", "list", "--data-list", list_data / "train.lst",
        "--num-classes", 3, "--snapshot-dir", tmp_path / "run", *THIN, "--batch-size", 2, "--num-steps", 1,
        "--recurrence", 0,
    )  # fmt: skip
    assert result.status == 0, result.error
    assert (tmp_path / "run" / "model_1.pth").exists()


def test_camvid(call, camvid, tmp_path):
    result = call(
        "train.py", "--data-dir", camvid, "--snapshot-dir", tmp_path, *THIN, "--batch-size", 2,
        "--num-steps", 2, "--ohem", "false", "--recurrence", 1,
    )  # fmt: skip
    assert result.status == 0, result.error
    assert (tmp_path / "CamVid_2.pth").exists()


def test_accumulated_parts_are_the_batch_where_the_statistics_are(call, demo_data, trained, tmp_path):
    """With frozen normalisation a batch and its parts differ in the shares of ignored pixels only."""
    logs = []
    for parts in (1, 2):
        folder = tmp_path / str(parts)
        result = call(
            "train.py", "--data-dir", demo_data, "--snapshot-dir", folder, *THIN, "--batch-size", 4,
            "--restore-from", trained, "--freeze-bn", "--random-scale", 0, "--accumulate", parts,
            "--num-steps", 3, "--save-pred-every", 1, "--learning-rate", 1e-3,
        )  # fmt: skip
        assert result.status == 0, result.error
        logs.append(log_of(folder))
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=5e-3)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=2e-2)


@pytest.fixture
def plain_again():
    """--deterministic sets PyTorch for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "way",
    [
        "--amp bf16",
        "--amp fp16",
        "--accumulate 2",
        "--checkpoint-activations --amp bf16",
        "--deterministic",
        "--norm abn",
    ],
)
def test_ways_to_compute_resume_exactly(call, demo_data, tmp_path, plain_again, way):
    """A third step gives the same bits after a resumption, the scaler of fp16 included."""
    options = (*way.split(), "--data-dir", demo_data, *THIN, "--batch-size", 2, "--num-steps", 3)
    result = call("train.py", *options, "--snapshot-dir", tmp_path / "a", "--save-pred-every", 2)
    assert result.status == 0, result.error
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "CS_scenes_2.pth").rename(tmp_path / "b" / "CS_scenes_2.pth")
    result = call("train.py", *options, "--snapshot-dir", tmp_path / "b", "--resume")
    assert result.status == 0, result.error
    assert "settings changed" not in result.out
    left, right = (load_checkpoint(tmp_path / x / "CS_scenes_3.pth") for x in "ab")
    assert same_tensors(left["model"], right["model"])
    assert left["scaler"] == right["scaler"]
    assert bool(left["scaler"]) == ("fp16" in way)
    assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path / "a"))


def test_compiled(call, demo_data, tmp_path, monkeypatch):
    """Captured as one graph; what a backend makes of it is PyTorch's affair."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compile_module(self, backend="eager", fullgraph=True)
    )
    options = ("--data-dir", demo_data, *THIN, "--batch-size", 2, "--num-steps", 1, "--save-pred-every", 1)
    assert call("train.py", *options, "--snapshot-dir", tmp_path / "a", "--compile").status == 0
    assert call("train.py", *options, "--snapshot-dir", tmp_path / "b").status == 0
    (compiled,), (eager,) = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-5)
