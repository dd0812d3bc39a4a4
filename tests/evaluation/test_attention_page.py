"""Attention over R rounds against the product of N×N matrices, and the page in a real browser."""

import base64
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from cc_attention.reference import criss_cross_attention
from dataset import DataError
from evaluation import Predictor, attention_page
from evaluation.attention_page import (
    Round,
    attention_of,
    attention_rounds,
    check_point,
    heat_pictures,
    position_of,
)
from networks import build_model
from utils.arguments import UsageError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    network = build_model(num_classes=3, backbone="resnet18", recurrence=3).eval()
    network.head.cca.gamma.data.fill_(0.7)
    for layer in (network.head.cca.query_conv, network.head.cca.key_conv):
        layer.weight.data.mul_(25)  # attention that is far from even
    return Predictor(network, "cpu", amp="off")


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (65, 105, 3), np.uint8)


def random_rounds(count, channels, *size, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randn(count, 2, channels, *size, generator=generator) * scale
    return [Round(query, key) for query, key in pairs]


def matrix_of(one):
    """The attention as an (N,N) matrix, from the operator: values are the unit vectors."""
    height, width = one.query.shape[-2:]
    units = torch.eye(height * width, dtype=one.query.dtype).reshape(1, -1, height, width)
    out = criss_cross_attention(one.query[None], one.key[None], units)
    return out[0].flatten(1).mT


@pytest.mark.parametrize("size", [(4, 5), (1, 6), (6, 1), (1, 1)])
def test_attention_is_the_product_of_all_rounds(size):
    rounds = [Round(one.query.double(), one.key.double()) for one in random_rounds(3, 6, *size)]
    matrices = [matrix_of(one) for one in rounds]
    products = [matrices[0], matrices[1] @ matrices[0], matrices[2] @ matrices[1] @ matrices[0]]
    y, x = size[0] // 2, size[1] - 1
    maps = attention_of([one.weights() for one in rounds], y, x)
    for attention, product in zip(maps, products, strict=True):
        torch.testing.assert_close(attention.flatten(), product[y * size[1] + x], rtol=1e-12, atol=1e-14)
        assert float(attention.sum()) == pytest.approx(1, abs=1e-12)


def test_rounds_are_those_of_the_network(predictor, image):
    rounds = attention_rounds(predictor, image)
    assert len(rounds) == 3
    assert rounds[0].query.shape == (16, 9, 14)
    # The second round sees what the first one returns.
    seen = []
    layer = predictor.network.head.cca
    hook = layer.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    predictor(image)
    hook.remove()
    with torch.inference_mode():
        query, key = layer.query_conv(seen[0])[0], layer.key_conv(seen[1])[0]
    torch.testing.assert_close(rounds[1].query, query, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rounds[2].key, key, rtol=1e-3, atol=1e-4)


def test_positions():
    assert position_of((0, 0), (65, 105), (9, 14)) == (0, 0)
    assert position_of((64, 104), (65, 105), (9, 14)) == (8, 13)
    assert position_of((27, 52), (65, 105), (9, 14)) == (3, 7)
    assert position_of((0, 3), (1, 7), (1, 1)) == (0, 0)
    for point in ((65, 0), (0, 105), (-1, 0)):
        with pytest.raises(DataError, match=r"outside: there are rows 0 to 64 and columns 0 to 104"):
            check_point(point, (65, 105))


def test_pictures(predictor, image):
    rounds = attention_rounds(predictor, image)
    pictures = heat_pictures(image, rounds, (27, 52))
    assert [picture.shape for picture in pictures] == [image.shape] * 3
    assert not np.array_equal(pictures[0], pictures[1])
    # Off the path of R = 1 there is nothing but the darkened grey picture.
    coloured = [np.ptp(picture.astype(int), axis=2) > 0 for picture in pictures]
    assert not coloured[0][48, 80]
    assert coloured[0].sum() < 0.5 * coloured[1].sum()


def test_networks_without_attention(image):
    network = build_model(num_classes=2, backbone="resnet18", recurrence=0).eval()
    with pytest.raises(UsageError, match=r"no criss-cross attention \(R = 0\)"):
        attention_rounds(Predictor(network, "cpu"), image)


def test_pictures_that_are_too_large(predictor, image, monkeypatch):
    monkeypatch.setattr(predictor, "whole", False)
    with pytest.raises(DataError, match="105x65 pixels are too many"):
        attention_rounds(predictor, image)


def data_of(page):
    return json.loads(re.search(r"const data = (.*);", page)[1])


def test_the_balanced_basis_has_the_same_attention():
    for one in random_rounds(2, 8, 5, 7):
        torch.testing.assert_close(
            attention_page._balance(one).weights(), one.weights(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("room", [10**9, 60_000])
def test_quantised_weights_are_as_near_as_stated(room):
    rounds = random_rounds(2, 16, 30, 41, scale=0.8)
    stored = attention_page._quantise(rounds, room)
    assert len(stored.packed) <= room
    for exact, part in zip(rounds, stored.rounds, strict=True):
        weights = exact.weights()
        error = (part.restored(stored.step).weights() - weights).abs()
        assert float((error.amax(-1) / weights.amax(-1)).max()) <= stored.largest_error + 1e-6
    assert stored.mean_error < (0.002 if room > 60_000 else 0.2)
    assert len(stored.packed) > 0.8 * min(room, 100_000)


def test_the_size_of_a_page():
    """A picture of 1024×2048 with 64 channels of noise, which is the hardest to compress."""
    image = np.random.default_rng(0).integers(0, 256, (1024, 2048, 3), np.uint8)
    page = attention_page.attention_page("x", image, random_rounds(2, 64, 129, 257, scale=0.3))
    assert len(page.encode()) < 3_000_000


def test_a_page_is_one_file(predictor, image):
    page = attention_page.attention_page("</script><b>", image, attention_rounds(predictor, image))
    assert "<b>" not in page
    assert data_of(page)["name"] == "</script><b>"
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(http|//|file)", page)
    assert base64.b64decode(data_of(page)["jpeg"])[:2] == b"\xff\xd8"


@pytest.mark.skipif(BROWSER is None, reason="no chromium in the path (Debian: apt-get install chromium)")
@pytest.mark.parametrize("point", [(0, 0), (27, 52), (64, 90)])
def test_the_weights_that_a_browser_draws(predictor, image, tmp_path, point):
    rounds = attention_rounds(predictor, image)
    path = tmp_path / "page.html"
    path.write_text(attention_page.attention_page("a picture", image, rounds), encoding="utf-8")
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
        f"{path.as_uri()}#{point[0]},{point[1]},numbers",
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    shown = json.loads(html.unescape(re.search(r'<pre id="weights">(.*?)</pre>', dom, re.S)[1]))
    y, x = position_of(point, image.shape[:2], (9, 14))
    assert shown["point"] == list(point)
    assert shown["position"] == [y, x]
    exact = attention_of([one.weights() for one in rounds], y, x)
    assert len(shown["weights"]) == 3
    for weights, attention in zip(shown["weights"], exact, strict=True):
        # The queries and keys of a small page are nearly exact.
        np.testing.assert_allclose(weights, attention.flatten(), atol=0.01 * float(attention.max()))
        assert sum(weights) == pytest.approx(1, abs=1e-6)
    stored = attention_page._quantise(rounds, 10**9)
    restored = [part.restored(stored.step).weights().double() for part in stored.rounds]
    for weights, attention in zip(shown["weights"], attention_of(restored, y, x), strict=True):
        np.testing.assert_allclose(weights, attention.flatten(), rtol=1e-4, atol=1e-7)


def test_what_is_common_to_all_keys_costs_no_precision():
    (one,) = random_rounds(1, 8, 5, 7)
    moved = attention_page.Round(one.query, one.key + 100)
    plain, balanced = (attention_page._balance(x) for x in (one, moved))
    assert balanced.key.abs().max() < 1.01 * plain.key.abs().max()


@pytest.mark.parametrize(("fit", "grid"), [(33, (5, 7)), ((65, 53), (5, 7)), (None, (9, 14))])
def test_pictures_are_scaled_as_for_a_prediction(predictor, image, monkeypatch, fit, grid):
    monkeypatch.setattr(predictor, "fit", fit)
    (first, *_) = attention_rounds(predictor, image)
    assert first.query.shape[1:] == grid
