"""The benchmarks of training, on the smallest sizes: that they run, and measure what they say."""

import json
import sys
from contextlib import nullcontext

import pytest
import torch
from scipy.stats import ttest_rel

from benchmarks import loader, plot_log, study, summarise_runs, train_step
from networks import build_model
from training.criterion import build_criterion
from utils.arguments import UsageError


def run(module, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()
    return capsys.readouterr().out


def test_train_step(monkeypatch, capsys, tmp_path):
    small = ("--backbone", "resnet18", "--size", 33, "--rounds", 1, "--json", tmp_path / "x.json")
    out = run(train_step, monkeypatch, capsys, *small)
    results = json.loads((tmp_path / "x.json").read_text())
    assert list(results) == [train_step.USUAL, *train_step.OURS]
    assert "1.00x" in out
    assert all(row[column] > 0 for row in results.values() for column in train_step.COLUMNS)


def test_the_unfused_code(monkeypatch, capsys):
    """It has the bits of the fused one, and a row of its own."""
    images, results = torch.randn(2, 3, 33, 33), []
    monkeypatch.setattr(train_step, "OURS", {"ours": ("off", False)})
    assert "\nours in parts |" in run(
        train_step,
        monkeypatch,
        capsys,
        *("--compare-unfused", "--backbone", "resnet18", "--size", 33, "--rounds", 1),
    )
    for code in (train_step.unfused_code, nullcontext):
        torch.manual_seed(0)
        model = build_model(backbone="resnet18", num_classes=5).to(memory_format=torch.channels_last)
        with code():
            model(images, torch.arange(2))["out"].square().mean().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_the_cost_of_the_category_loss(monkeypatch, capsys):
    monkeypatch.setattr(train_step, "OURS", {"ours": ("off", False)})
    small = ("--backbone", "resnet18", "--size", 33, "--rounds", 1)
    out = run(train_step, monkeypatch, capsys, "--compare-ccl", *small)
    plain, with_loss = (
        next(x for x in out.splitlines() if x.startswith(name)) for name in ("ours  ", "ours and CCL")
    )
    assert plain.count("1.00x") == 2
    assert "nan" not in with_loss


def test_the_usual_code_computes_the_same():
    torch.manual_seed(0)
    model = build_model(backbone="resnet50", num_classes=5, norm="abn").double()
    model.head.cca.gamma.data.fill_(0.5)
    images, labels, keys = (
        torch.randn(2, 3, 41, 49).double(),
        torch.randint(0, 5, (2, 41, 49)),
        torch.arange(2),
    )
    gradients = []
    for usual in (False, True):
        model.zero_grad()
        with train_step.usual_code() if usual else torch.enable_grad():
            build_criterion()(model(images, keys), labels)["loss"].backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, usual in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, usual, rtol=1e-7, atol=1e-10)


def test_loader(monkeypatch, capsys, demo_data, tmp_path):
    options = ("--data-dir", demo_data, "--crop", 33, "--rounds", 1, "--json", tmp_path / "x.json")
    out = run(loader, monkeypatch, capsys, *options)
    results = json.loads((tmp_path / "x.json").read_text())
    assert f"{results['images_per_second']:.1f} images/s a core" in out
    whole = 1000 / results["images_per_second"]
    assert results["read_ms"] + results["augment_ms"] == pytest.approx(whole, rel=0.8)


def metrics(path, miou, road, bus):
    path.write_text(json.dumps({"mIoU": miou, "pixel_accuracy": 0.9, "IoU": {"road": road, "bus": bus}}))
    return path


def test_summary_of_runs(monkeypatch, capsys, tmp_path):
    files = [metrics(tmp_path / "a", 0.5, 0.8, None), metrics(tmp_path / "b", 0.7, 0.9, 0.25)]
    out = run(summarise_runs, monkeypatch, capsys, *files, "--json", tmp_path / "x.json")
    numbers = json.loads((tmp_path / "x.json").read_text())
    assert numbers["mIoU"] == {"mean": pytest.approx(0.6), "std": pytest.approx(0.02**0.5), "runs": 2}
    assert numbers["bus"]["runs"] == 1
    assert "mIoU             60.00 ± 14.14" in out
    assert "bus              25.00" in out
    (tmp_path / "c").write_text("{}")
    for bad, message in ((tmp_path / "c", "not a metrics.json"), (tmp_path / "d", "cannot be read")):
        with pytest.raises(SystemExit, match=message):
            run(summarise_runs, monkeypatch, capsys, bad)


def line(setting, seed, val, test, steps=9, weights="resnet18.pth", amp="bf16"):
    kind = {"steps": steps, "protocol": "--whole", "weights": weights, "flags": f"--ohem 0 --amp {amp}"}
    return {"setting": setting, "seed": seed, **kind, "val": {"mIoU": val}, "test": {"mIoU": test}}


def test_summary_of_a_study(monkeypatch, capsys, tmp_path):
    """The interval is scipy's of a paired test; other kinds and seeds without a partner do not enter it."""
    base, ours = (0.50, 0.54, 0.51), (0.53, 0.55, 0.57)
    lines = [line("r0", seed, 0.6, score) for seed, score in enumerate(base)]
    lines += [line("r2", seed, 0.6, score) for seed, score in enumerate((*ours, 0.9))]
    lines += [
        line("fcn", 0, 0.6, 0.5),
        line("r2", 0, 0.1, 0.1, steps=5),
        line("r2", 0, 0.1, 0.1, weights="x"),
        line("r2", 0, 0.1, 0.1, amp="off"),
    ]
    (tmp_path / "study.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    out = run(summarise_runs, monkeypatch, capsys, tmp_path / "study.jsonl", "--plot", tmp_path / "x.png")
    interval = ttest_rel(ours, base).confidence_interval(0.95)
    half = 50 * (interval.high - interval.low)
    assert f"| r2 | 4 | 60.00 ± 0.00 | 63.75 ± 17.58 | +0.00 ± 0.00 | +3.33 ± {half:.2f} |" in out
    assert "| fcn | 1 | 60.00 | 50.00 | - | - |" in out
    assert "3 runs of another length, protocol, weights or precision are left out" in out
    short = run(summarise_runs, monkeypatch, capsys, tmp_path / "study.jsonl", "--steps", 5, "--base", "r2")
    assert "| r2 | 1 | 10.00 | 10.00 | - | - |" in short
    assert (tmp_path / "x.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        run(summarise_runs, monkeypatch, capsys, tmp_path / "study.jsonl", "--base", "r9")
    assert "--base r9: expected one of r0, r2, fcn" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="not the lines of"):
        run(summarise_runs, monkeypatch, capsys, tmp_path / "bad.jsonl")


def test_a_curve_with_evaluations(monkeypatch, capsys, tmp_path):
    lines = [{"step": s, "loss": 1 / s, "learning_rate": 0.1} for s in range(1, 9)] + [
        {"step": 8, "mIoU": 0.5}
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(plot_log, monkeypatch, capsys, tmp_path / "log.jsonl", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_weights_of_a_study_are_torchvisions(tmp_path):
    weights = {"conv1.weight": torch.ones(2, 3, 7, 7), "fc.weight": torch.ones(2, 7)}
    torch.save(weights, tmp_path / "resnet.pth")
    assert study.load_backbone(tmp_path / "resnet.pth").keys() == weights.keys()
    torch.save({"conv1.weight": torch.ones(2, 3, 7, 7), "head.x": torch.ones(1)}, tmp_path / "network.pth")
    with pytest.raises(UsageError, match="expected torchvision's weights"):
        study.load_backbone(tmp_path / "network.pth")


def test_scaled_convolutions_compute_the_same():
    """With the size of He's initialisation, the statistics of the normalisation after them alike."""
    generator = torch.Generator().manual_seed(0)
    weights, pairs = (
        {"fc.weight": torch.ones(2, 7)},
        {"conv1": "bn1", "layer2.0.downsample.0": "layer2.0.downsample.1"},
    )
    for conv, norm in pairs.items():
        weights[f"{conv}.weight"] = torch.randn(7, 4, 3, 3, generator=generator).half()
        weights[f"{norm}.running_mean"] = torch.randn(7, generator=generator)
        weights[f"{norm}.running_var"] = torch.rand(7, generator=generator)
    scaled = study.scale_convolutions(weights)
    assert torch.equal(scaled["fc.weight"], weights["fc.weight"])
    x = torch.randn(2, 4, 9, 9, generator=generator)
    for conv, norm in pairs.items():
        assert scaled[f"{conv}.weight"].square().mean().item() == pytest.approx(2 / (7 * 9), rel=1e-5)
        before, after = (
            torch.nn.functional.batch_norm(
                torch.nn.functional.conv2d(x, of[f"{conv}.weight"].float()),
                of[f"{norm}.running_mean"],
                of[f"{norm}.running_var"],
            )
            for of in (weights, scaled)
        )
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
