import pytest
import torch

from utils.distributed import DeviceError, Process, choose_devices


@pytest.fixture
def gpus(monkeypatch):
    """As if there were four GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_cpu_and_auto():
    assert choose_devices("cpu") == (torch.device("cpu"),)
    assert choose_devices("auto")[0].type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("gpu", "indices"), [("auto", [0]), ("2", [2]), ("0,1,2,3", [0, 1, 2, 3]), ("3,1", [3, 1])]
)
def test_gpus(gpus, gpu, indices):
    assert choose_devices(gpu) == tuple(torch.device("cuda", index) for index in indices)
    assert gpus == indices[:1]


def test_auto_is_the_local_rank(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert choose_devices("auto") == (torch.device("cuda", 2),)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(DeviceError, match=r"there is no GPU 4, 4 visible; start at most 4 processes"):
        choose_devices("auto")


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        ("99", r"--gpu 99: there is no GPU 99, 4 visible; use --gpu auto or --gpu cpu"),
        ("0,4", r"--gpu 0,4: there is no GPU 4, 4 visible"),
        ("0,1,0", "names a GPU twice"),
        ("0,", "expected auto, cpu, or numbers"),
        ("-1", "expected auto, cpu, or numbers"),
        ("first", "expected auto, cpu, or numbers"),
    ],
)
def test_devices_that_are_not_there(gpus, gpu, message):
    with pytest.raises(DeviceError, match=message):
        choose_devices(gpu)


def test_one_gpu_for_each_process(gpus, monkeypatch):
    monkeypatch.setattr("utils.distributed.world_size", lambda: 2)
    with pytest.raises(DeviceError, match="under torchrun each process takes its own GPU"):
        choose_devices("0,1")


def test_alone_nothing_is_exchanged():
    process = Process((torch.device("cpu"),))
    assert (process.all_gather_object("x"), process.max(3), process.parts) == (["x"], 3, 1)
    value = torch.ones(2)
    assert process.sum(value) is value
    assert process.differentiable_sum(value) is value
    process.raise_if_any_failed()
    with pytest.raises(OSError, match="mine"), process.all_or_none():
        raise OSError("mine")
