"""The order and the augmentation depend on the seed and the step, and on nothing else."""

import pytest
import torch

from dataset import (
    DataError,
    EvaluationDataset,
    Pair,
    StepSampler,
    TrainDataset,
    TrainTransform,
    find_source,
    load,
    pairs_of,
)


@pytest.fixture
def dataset(demo_data):
    source = find_source(demo_data)
    pairs = pairs_of(source, demo_data, "train")
    return TrainDataset(pairs, source.table, TrainTransform((33, 41)), seed=5)


def batches(dataset, workers, sampler):
    return list(load(dataset, workers, sampler))


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
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[step][1] for part in parts]))


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
    keys = dataset.keys([3, 4, 10**6])
    assert keys.dtype == torch.int64
    assert ((keys >= 0) & (keys < 2**32)).all()
    assert keys.unique().numel() == 3
    assert torch.equal(dataset.keys([4]), keys[1:2])
    other = TrainDataset(dataset.pairs, dataset.table, dataset.transform, seed=6)
    assert not torch.equal(other.keys([3, 4, 10**6]), keys)


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
    other = TrainDataset(dataset.pairs, dataset.table, dataset.transform, seed=6)
    assert not same(batches(dataset, 0, StepSampler(4, 0, 2)), batches(other, 0, StepSampler(4, 0, 2)))


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


def test_a_mistake_of_ours_in_a_worker_is_not_taken_for_its_death(dataset, monkeypatch):
    def sample(*_):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(TrainDataset, "__getitem__", sample)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.+a mistake"):
        batches(dataset, 1, StepSampler(2, 0, 2))


def test_training_needs_labels(dataset, demo_data):
    image = dataset.pairs[0].image
    with pytest.raises(DataError, match=f"{image}: has no label"):
        TrainDataset([Pair(image, None)], dataset.table, dataset.transform, 0)


def test_evaluation_gives_whole_images_in_order(demo_data):
    source = find_source(demo_data)
    pairs = pairs_of(source, demo_data, "val")
    samples = list(load(EvaluationDataset(pairs, source.table), 2))
    assert [name for _, _, name in samples] == [pair.image.stem for pair in pairs]
    image, label, _ = samples[0]
    assert image.shape == (3, 64, 128)
    assert label.shape == (64, 128)
    assert label.dtype == torch.uint8


def test_equal_names_are_kept_apart(demo_data):
    pair = pairs_of(find_source(demo_data), demo_data, "val")[0]
    names = EvaluationDataset([pair, pair], find_source(demo_data).table).names
    assert names == [f"00000_{pair.image.stem}", f"00001_{pair.image.stem}"]
