"""The task of benchmarks/reach.py, answered by heads that know it."""

import pytest
import torch
from torch import nn

from benchmarks import reach


class Knows(nn.Module):
    """Finds the mark and says its class at positions that are near it along at least so many axes."""

    def __init__(self, axes):
        super().__init__()
        self.axes = axes

    def forward(self, maps):
        mark = maps[:, 0].flatten(1).argmax(1)
        classes = maps[:, 1 : 1 + reach.CLASSES].flatten(2).amax(2).argmax(1)
        y, x = mark // reach.SIDE, mark % reach.SIDE
        side = torch.arange(reach.SIDE)
        near_y = (side - y[:, None]).abs() <= reach.NEAR
        near_x = (side - x[:, None]).abs() <= reach.NEAR
        says = near_y[:, :, None].int() + near_x[:, None].int() >= self.axes
        answer = torch.where(says, classes[:, None, None], (classes[:, None, None] + 1) % reach.CLASSES)
        return {"out": nn.functional.one_hot(answer, reach.CLASSES).permute(0, 3, 1, 2).float()}


@pytest.mark.parametrize(
    ("axes", "expected"), [(0, [1, 1, 1]), (1, [1, 1, 0]), (2, [1, 0, 0]), (3, [0, 0, 0])]
)
def test_answers_are_counted_where_they_are_given(axes, expected):
    assert reach.accuracy(Knows(axes), batches=2) == expected


def test_nothing_but_the_mark_tells_the_class():
    maps, classes, away = reach.draw(torch.Generator().manual_seed(0))
    assert (maps[:, : 1 + reach.CLASSES] != 0).flatten(1).sum(1).eq(2).all()
    here = (away == 0).all(0)
    assert here.flatten(1).sum(1).eq(1).all()
    assert torch.equal(maps[:, 1 : 1 + reach.CLASSES].movedim(1, -1)[here].argmax(1), classes)


def test_runs(monkeypatch, capsys):
    monkeypatch.setattr(reach, "SETTINGS", {"R = 1": ("ccnet", {"recurrence": 1})})
    monkeypatch.setattr("sys.argv", ["reach.py", "--steps", "3", "--seeds", "1,2"])
    reach.main()
    *_, row = capsys.readouterr().out.splitlines()
    assert row.count("±") == len(reach.PLACES)
