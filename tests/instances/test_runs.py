"""Runs of the two scripts on synthetic images: training, exact resume, evaluation, several processes."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from instances import evaluate, train
from instances.coco import CocoError, read_split
from utils.checkpoint import CheckpointError, load_checkpoint

try:
    import torchvision  # noqa: F401
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except (ImportError, RuntimeError) as missing:
    pytest.skip(f"torchvision and pycocotools: {missing}", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
NETWORK = ["--backbone", "resnet18", "--weights", "none", "--norm", "frozen", "--min-size", "48",
           "--max-size", "64", "--anchor-size", "8", "--roi-samples", "8", "--proposals", "16"]  # fmt: skip
RECIPE = ["--batch-size", "2", "--num-steps", "3", "--warm-up", "0", "--learning-rate", "0.001",
          "--gpu", "cpu", "--num-workers", "0", "--save-every", "2", "--keep-last", "0",
          "--log-every", "1"]  # fmt: skip


def run_train(root, folder, *options):
    train.main(
        train.parse_args(
            ["--data-dir", str(root), "--snapshot-dir", str(folder), *NETWORK, *RECIPE, *options]
        )
    )


@pytest.fixture(scope="module")
def trained(shapes_root, tmp_path_factory):
    """The folder of a run of three steps, with checkpoints after the second and the third."""
    folder = tmp_path_factory.mktemp("run")
    run_train(shapes_root, folder)
    return folder


@pytest.fixture(autouse=True)
def signals():
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_run_leaves_checkpoints_log_and_events(trained):
    assert [path.name for path in train.checkpoints(trained)] == [
        "instances_000002.pth",
        "instances_000003.pth",
    ]
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    parts = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    for line in lines:
        assert sum(line[name] for name in parts) == pytest.approx(line["loss"], rel=1e-5)
    assert list(trained.glob("events.out.tfevents.*"))
    assert json.loads((trained / "run.json").read_text())["config"]["recurrence"] == 2


def test_gamma_is_trained_from_the_first_step(trained):
    state = load_checkpoint(trained / "instances_000003.pth")["model"]
    assert state["backbone.body.layer3.attention.gamma"].item() != 0


def test_a_resumed_run_is_the_uninterrupted_one(trained, shapes_root, tmp_path, capsys):
    shutil.copy(trained / "instances_000002.pth", tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n{"step": 3}\n{"st')  # a kill came after the third step
    torch.rand(17)  # whatever state the generator is in
    run_train(shapes_root, tmp_path, "--resume", "--num-workers", "1")
    expected, found = (load_checkpoint(x / "instances_000003.pth") for x in (trained, tmp_path))
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
    for key, entry in expected["optimizer"]["state"].items():
        assert torch.equal(found["optimizer"]["state"][key]["momentum_buffer"], entry["momentum_buffer"])
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [2, 3]
    run_train(shapes_root, tmp_path, "--resume")
    assert "the run is complete: 3 steps are done" in capsys.readouterr().out


def test_another_recipe_or_network_is_not_resumed(trained, shapes_root):
    with pytest.raises(CheckpointError, match=r"trained with learning_rate 0.001, now it is 0.5; an exact"):
        run_train(shapes_root, trained, "--resume", "--learning-rate", "0.5")
    with pytest.raises(CheckpointError, match=r"trained with recurrence 2, now it is 1"):
        run_train(shapes_root, trained, "--resume", "--recurrence", "1")
    with pytest.raises(CheckpointError, match=r"trained with images \[6, "):
        run_train(shapes_root, trained, "--resume", "--split", "val2017")
    with pytest.raises(train.TrainingError, match="holds checkpoints of another run"):
        run_train(shapes_root, trained)


def test_a_signal_stops_after_the_step_with_a_checkpoint(shapes_root, tmp_path, monkeypatch):
    step = train.train_step

    def interrupted(*args):  # as torchrun does: the workers get the signal too
        workers = multiprocessing.active_children()
        assert workers
        numbers = [*(str(worker.pid) for worker in workers), str(os.getpid())]
        subprocess.run(["kill", "-TERM", *numbers], check=True)  # PyTorch forgives what comes from a parent
        time.sleep(1)
        return step(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run_train(shapes_root, tmp_path, "--num-workers", "1")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [path.name for path in train.checkpoints(tmp_path)] == ["instances_000001.pth"]


def test_a_loss_that_is_not_finite_ends_the_run(shapes_root, tmp_path):
    with pytest.raises(train.TrainingError, match=r"step \d: the loss is (nan|inf); lower --learning-rate"):
        run_train(shapes_root, tmp_path, "--learning-rate", "1e30", "--save-every", "9")
    assert not train.checkpoints(tmp_path)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_is_named_from_workers_too(trained, own_root, tmp_path, workers):
    root, _ = own_root
    for path in (root / "train2017").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(CocoError, match=r"^/.*\.png: cannot be read as an image$"):
        run_train(root, tmp_path / "run", "--num-workers", workers)
    with pytest.raises(CocoError, match=r"^/.*\.png: cannot be read as an image$"):
        run_evaluate(root, trained, tmp_path, "--split", "train2017", "--num-workers", workers)


def almost_right(contents, seed=0):
    """Detections made from the annotations: boxes and masks moved a little, some with another category."""
    from pycocotools import mask as mask_utils

    rng = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in contents["images"]}
    found = []
    for entry in contents["annotations"]:
        for _ in range(3):
            shift = rng.integers(-3, 4, 2)
            corners = np.array(entry["segmentation"][0]).reshape(-1, 2) + shift
            size = sizes[entry["image_id"]]
            lengths = mask_utils.frPyObjects([corners.clip(0).flatten().tolist()], *size)[0]
            x, y, width, height = entry["bbox"]
            found.append(
                {
                    "image_id": entry["image_id"],
                    "category_id": int(rng.choice([entry["category_id"], 1, 2, 4], p=[0.7, 0.1, 0.1, 0.1])),
                    "bbox": [float(x + shift[0]), float(y + shift[1]), width, height],
                    "score": float(rng.random()),
                    "segmentation": lengths | {"counts": lengths["counts"].decode()},
                }
            )
    return found


def by_hand(file, results, kind):
    """pycocotools as its own demonstration runs it on files."""
    truth = COCO(str(file))
    run = COCOeval(truth, truth.loadRes(str(results)), kind)
    run.evaluate()
    run.accumulate()
    run.summarize()
    return [value if value >= 0 else None for value in run.stats[:6].tolist()]


def test_scores_are_those_of_pycocotools_by_hand(shapes_root, tmp_path):
    data = read_split(shapes_root, "train2017")
    scores = {}
    for kind, entries in evaluate.result_files(almost_right(data.contents)).items():
        (tmp_path / f"{kind}.json").write_text(json.dumps(entries))
        scores[kind] = evaluate.score(data.contents, entries, kind)
        assert list(scores[kind].values()) == by_hand(data.file, tmp_path / f"{kind}.json", kind)
        assert 0.05 < scores[kind]["AP"] < 0.95
        assert scores[kind]["AP50"] > scores[kind]["AP75"]
    assert scores["bbox"] != scores["segm"]
    assert scores["segm"]["APl"] is None  # no object is that large


def test_perfect_and_no_detections(shapes_root):
    data = read_split(shapes_root, "val2017")
    truth = [
        {name: entry[name] for name in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for entry in data.contents["annotations"]
    ]
    assert evaluate.score(data.contents, truth, "bbox")["AP"] == pytest.approx(1)
    assert evaluate.score(data.contents, [], "segm")["AP"] == 0
    # Annotations of one's own: numbered from 0, which pycocotools takes for no match, and without crowds.
    for number, entry in enumerate(data.contents["annotations"]):
        entry["id"] = number
        del entry["iscrowd"]
    assert evaluate.score(data.contents, truth, "bbox")["AP"] == pytest.approx(1)


def run_evaluate(root, trained, folder, *options):
    paths = ["--data-dir", str(root), "--restore-from", str(trained), "--output-dir", str(folder)]
    rest = ["--gpu", "cpu", "--num-workers", "0", "--score", "0.2"]
    evaluate.main(evaluate.parse_args([*paths, *rest, *options]))


@pytest.fixture(scope="module")
def evaluated(trained, shapes_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    run_evaluate(shapes_root, trained, folder, "--pictures", "2")
    return folder


def test_evaluation_writes_metrics_detections_and_pictures(evaluated, shapes_root):
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert metrics["step"] == 3
    assert metrics["images"] == 4
    boxes = json.loads((evaluated / "detections_bbox.json").read_text())
    masks = json.loads((evaluated / "detections_segm.json").read_text())
    assert metrics["detections"] == len(boxes) == len(masks) > 0
    assert set(boxes[0]) == {"image_id", "category_id", "score", "bbox"}
    assert set(masks[0]) == {"image_id", "category_id", "score", "segmentation"}
    file = shapes_root / "annotations/instances_val2017.json"
    for kind in ("bbox", "segm"):
        assert list(metrics[kind].values()) == by_hand(file, evaluated / f"detections_{kind}.json", kind)
    pictures = sorted((evaluated / "pictures").iterdir())
    assert [path.name for path in pictures] == ["000001.jpg", "000002.jpg"]
    assert cv2.imread(str(pictures[0])).shape == (48, 3 * 64 + 16, 3)


def test_masks_lie_within_their_boxes(evaluated):
    from pycocotools import mask as mask_utils

    boxes = json.loads((evaluated / "detections_bbox.json").read_text())
    masks = json.loads((evaluated / "detections_segm.json").read_text())
    seen = 0
    for box, mask in zip(boxes, masks, strict=True):
        left, top, width, height = mask_utils.toBbox(mask["segmentation"])
        if width == 0:
            continue
        seen += 1
        x, y, box_width, box_height = box["bbox"]
        assert left >= x - 2
        assert top >= y - 2
        assert left + width <= x + box_width + 2
        assert top + height <= y + box_height + 2
    assert seen


def test_evaluation_wants_a_checkpoint_and_the_same_categories(trained, own_root, tmp_path):
    root, change = own_root
    with pytest.raises(evaluate.InstancesError, match=r"holds no instances_\*.pth"):
        run_evaluate(root, tmp_path, tmp_path / "out")

    def rename(contents):
        contents["categories"][1]["name"] = "cube"

    change(rename)
    with pytest.raises(CocoError, match=r"category 2 is 'cube', for .* it is 'square'"):
        run_evaluate(root, trained, tmp_path / "out", "--split", "train2017")


def test_pictures_name_what_the_data_lists_and_number_the_rest(trained, own_root, tmp_path):
    root, change = own_root

    def keep_discs_in_folders(contents):
        contents["categories"] = contents["categories"][:1]
        contents["annotations"] = [x for x in contents["annotations"] if x["category_id"] == 1]
        for index, image in enumerate(contents["images"]):
            path = root / "train2017" / f"part{index}" / "street.png"
            path.parent.mkdir()
            (root / "train2017" / image["file_name"]).rename(path)
            image["file_name"] = f"part{index}/street.png"

    change(keep_discs_in_folders)
    run_evaluate(root, trained, tmp_path / "out", "--split", "train2017", "--score", "0")
    found = json.loads((tmp_path / "out/detections_bbox.json").read_text())
    assert {entry["category_id"] for entry in found} - {1}
    pictures = sorted(path.name for path in (tmp_path / "out/pictures").iterdir())
    assert pictures == ["part0_street.jpg", "part1_street.jpg", "part2_street.jpg"]


def torchrun(module, *options):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, module, *map(str, options)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train_together_and_share_an_evaluation(trained, evaluated, shapes_root, tmp_path):
    run = tmp_path / "run"
    torchrun("instances.train", "--data-dir", shapes_root, "--snapshot-dir", run, *NETWORK, *RECIPE)
    state = load_checkpoint(run / "instances_000003.pth")
    assert state["step"] == 3
    alone = load_checkpoint(trained / "instances_000003.pth")["model"]
    # The same images in the same order; the sampled boxes are each process's own, so not the same bits.
    name = "rpn.head.conv.0.0.weight"
    torch.testing.assert_close(state["model"][name], alone[name], rtol=0.1, atol=1e-3)
    assert not torch.equal(state["model"][name], alone[name])

    results = tmp_path / "results"
    torchrun(
        "instances.evaluate", "--data-dir", shapes_root, "--restore-from", trained, "--output-dir", results,
        "--gpu", "cpu", "--num-workers", "0", "--pictures", "0",
    )  # fmt: skip
    for kind in ("bbox", "segm"):
        one, two = (json.loads((x / f"detections_{kind}.json").read_text()) for x in (evaluated, results))
        assert two == one
