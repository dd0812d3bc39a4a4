"""The order and the augmentation depend on the seed and the step, and on nothing else."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dataset import (
    DataError,
    EvaluationDataset,
    Pair,
    StepSampler,
    TrainDataset,
    TrainTransform,
    find_dataset,
    list_samples,
    load_batches,
    load_samples,
)


@pytest.fixture
def dataset(demo_data):
    spec = find_dataset(demo_data)
    pairs = list_samples(spec, demo_data, "train")
    return TrainDataset(pairs, spec.labels, TrainTransform((33, 41)), seed=5)


def batches(dataset, workers, sampler):
    return list(load_batches(dataset, sampler, workers))


def same(left, right):
    return all(torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


def test_workers_do_not_matter(dataset):
    expected = batches(dataset, 0, StepSampler(3, 0, 6))
    assert len(expected) == 6
    assert expected[0][0].shape == (3, 3, 33, 41)
    assert same(expected, batches(dataset, 2, StepSampler(3, 0, 6)))
    assert not same(expected[:1], expected[1:2])


def test_starting_in_the_middle_does_not_matter(dataset):
    assert same(batches(dataset, 0, StepSampler(3, 0, 6))[4:], batches(dataset, 1, StepSampler(3, 4, 6)))


def test_processes_share_each_batch_without_overlap(dataset):
    whole = batches(dataset, 0, StepSampler(4, 0, 3))
    parts = [batches(dataset, 0, StepSampler(4, 0, 3, rank, 2)) for rank in range(2)]
    for step, (images, labels, keys) in enumerate(whole):
        assert torch.equal(images, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[step][1] for part in parts]))
        assert torch.equal(keys, torch.cat([part[step].keys for part in parts]))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parts_of_a_batch_are_shared_one_after_another(world_size):
    """The m-th part of the batch is the same images, whoever has them."""
    samplers = [StepSampler(12, 0, 9, rank, world_size, accumulate=2) for rank in range(world_size)]
    for step in (0, 5):
        shares = [torch.tensor(sampler.positions(step)).chunk(2) for sampler in samplers]
        for part in (0, 1):
            first = 12 * step + 6 * part
            assert torch.cat([share[part] for share in shares]).tolist() == list(range(first, first + 6))


def test_keys_belong_to_positions(dataset):
    drawn = [int(np.random.default_rng([5, position, 2]).integers(2**32)) for position in range(8)]
    first, second = batches(dataset, 1, StepSampler(4, 0, 2))
    assert first.keys.dtype == torch.int64
    assert [*first.keys.tolist(), *second.keys.tolist()] == drawn
    assert dataset[10**6].keys.tolist() == dataset.key(10**6) < 2**32
    other = TrainDataset(dataset.pairs, dataset.labels, dataset.transform, seed=6)
    assert other.key(3) != dataset.key(3)


def test_each_epoch_is_a_new_permutation(dataset):
    number = len(dataset.pairs)
    seen = []

    class Spy(list):
        def __getitem__(self, index):
            seen.append(int(index))
            return super().__getitem__(index)

    dataset.pairs = Spy(dataset.pairs)
    for position in range(6 * number):
        dataset[position]
    epochs = [seen[i : i + number] for i in range(0, len(seen), number)]
    assert all(sorted(epoch) == list(range(number)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_another_seed_is_another_run(dataset):
    other = TrainDataset(dataset.pairs, dataset.labels, dataset.transform, seed=6)
    assert not same(batches(dataset, 0, StepSampler(4, 0, 2)), batches(other, 0, StepSampler(4, 0, 2)))
    positions = range(4 * len(dataset.pairs))
    assert [dataset.sample(position)[0] for position in positions] != [other.sample(p)[0] for p in positions]


def test_loading_leaves_the_runs_random_generators_alone(dataset):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    batches(dataset, 1, StepSampler(2, 0, 2))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_met_by_a_worker_is_one_line_that_names_the_file(dataset, tmp_path, workers):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing more")
    dataset.pairs[1:] = [Pair(tmp_path / "broken.png", dataset.pairs[0].label)]
    with pytest.raises(DataError, match=rf"^{tmp_path}/broken\.png: unreadable") as caught:
        batches(dataset, workers, StepSampler(2, 0, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("Pin memory thread exited unexpectedly"),
    ],
)
def test_all_ways_to_notice_that_a_worker_died(dataset, monkeypatch, error):
    def next_batch(*_):
        raise error

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._next_data", next_batch)
    with pytest.raises(DataError, match=r"^a worker process that reads the data died \(.+\)$"):
        batches(dataset, 1, StepSampler(2, 0, 2))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("Too many open files. Communication with the workers …"),
            "too many open files: .*ulimit",
        ),
        (RuntimeError("received 0 items of ancdata"), "too many open files: .*ulimit"),
        (OSError(24, "Too many open files"), "too many open files: .*--num-workers 0"),
        (
            RuntimeError(
                "unable to open shared memory object </torch_1> in read-write mode: Too many open files"
            ),
            "too many open files: ",
        ),
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm)"
            ),
            "shared memory is full: --num-workers 0, or a larger /dev/shm .*--shm-size",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is …"),
            "shared memory is full",
        ),
        (OSError(28, "No space left on device"), "shared memory is full"),  # semaphores lie there too
        (OSError(12, "Cannot allocate memory"), "not enough memory for the batches"),  # fork
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …"), "not enough memory"),
    ],
)
def test_what_a_machine_lacks_is_told_in_one_line(dataset, monkeypatch, error, message):
    def start(*_):
        raise error

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__init__", start)
    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__del__", lambda _: None)
    with pytest.raises(DataError, match=rf"^{message}") as caught:
        batches(dataset, 1, StepSampler(2, 0, 2))
    assert "\n" not in str(caught.value)


FULL = """
import sys
from pathlib import Path
from dataset import *
root = Path(sys.argv[1])
spec = find_dataset(root)
pairs = list_samples(spec, root, "train")
train = TrainDataset(pairs, spec.labels, TrainTransform((385, 385)), 0)
evaluation = EvaluationDataset([Pair(Path(sys.argv[2]), None)] * 4, spec.labels)
for load in (lambda: load_batches(train, StepSampler(4, 0, 5), 1), lambda: load_samples(evaluation, 1)):
    try:
        print(len(list(load())))
    except DataError as error:
        print(error)
"""


def test_shared_memory_that_is_too_small(demo_data, tmp_path):
    """In a mount namespace of its own, with 4 MiB; today's evaluation would wait for ever there."""
    small = ["unshare", "-mr", "sh", "-c", 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare with mounts")
    Image.new("RGB", (800, 800)).save(tmp_path / "x.png")
    command = [*small, sys.executable, "-c", FULL, str(demo_data), str(tmp_path / "x.png")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    line = "shared memory is full: --num-workers 0, or a larger /dev/shm (docker run --shm-size 8g)\n"
    assert (run.stdout, run.stderr) == (2 * line, "")


@pytest.mark.parametrize("error", [MemoryError(), cv2.error("no memory")])
def test_want_of_memory_names_the_file(dataset, monkeypatch, error):
    def transform(*_):
        raise error

    monkeypatch.setattr(TrainTransform, "__call__", transform)
    if isinstance(error, cv2.error):
        error.code = -215  # a mistake of ours
        with pytest.raises(cv2.error):
            dataset[0]
        error.code = -4
    with pytest.raises(DataError, match=rf"^{dataset.sample(0).image}: not enough memory"):
        dataset[0]


def test_data_sets_travel_to_workers_that_do_not_fork(dataset):
    """macOS and Windows start workers afresh and send them the data set."""
    again = pickle.loads(pickle.dumps(dataset))
    assert same([again[3]], [dataset[3]])
    evaluation = EvaluationDataset(dataset.pairs, dataset.labels)
    assert torch.equal(pickle.loads(pickle.dumps(evaluation))[1].image, evaluation[1].image)


def test_a_mistake_of_ours_in_a_worker_is_not_taken_for_its_death(dataset, monkeypatch):
    def sample(*_):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(TrainDataset, "__getitem__", sample)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.+a mistake"):
        batches(dataset, 1, StepSampler(2, 0, 2))


def test_training_needs_labels(dataset, demo_data):
    image = dataset.pairs[0].image
    with pytest.raises(DataError, match=f"{image}: has no label"):
        TrainDataset([Pair(image, None)], dataset.labels, dataset.transform, 0)


def test_evaluation_gives_whole_images_in_order(demo_data):
    spec = find_dataset(demo_data)
    pairs = list_samples(spec, demo_data, "val")
    samples = list(load_samples(EvaluationDataset(pairs, spec.labels), 2))
    assert [sample.name for sample in samples] == [pair.image.stem for pair in pairs]
    image, label, *_ = samples[0]
    assert image.shape == (3, 64, 128)
    assert label.shape == (64, 128)
    assert label.dtype == torch.uint8


def test_equal_names_are_kept_apart(demo_data):
    pair = list_samples(find_dataset(demo_data), demo_data, "val")[0]
    names = EvaluationDataset([pair, pair], find_dataset(demo_data).labels).names
    assert names == [f"00000_{pair.image.stem}", f"00001_{pair.image.stem}"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_name_of_two_lines_is_told_whole(demo_data, workers):
    spec = find_dataset(demo_data)
    missing = [Pair(Path("first\nsecond.png"), None)]
    evaluation = EvaluationDataset(missing, spec.labels)
    with pytest.raises(DataError, match=r"^first\nsecond\.png: no such image$"):
        list(load_samples(evaluation, workers))
