import pytest
import torch

from utils.distributed import DeviceError, choose_device


def test_cpu_and_auto():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        ("99", r"--gpu 99: no such GPU, \d+ visible"),
        ("0,1", "torchrun --nproc-per-node 2"),
        ("-1", "expected auto, cpu or the number"),
        ("first", "expected auto, cpu or the number"),
    ],
)
def test_devices_that_are_not_there(gpu, message):
    with pytest.raises(DeviceError, match=message):
        choose_device(gpu)
