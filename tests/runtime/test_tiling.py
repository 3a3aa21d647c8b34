"""Decoding in tiles: weights, exactness where a decoder is local, seams where it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.runtime.errors import InvalidInput
from lehr.runtime.tiling import AUTOMATIC_ABOVE, TILE, tile_size, tiled

FACTOR = 4
TAEF2 = Path(__file__).resolve().parents[3] / "shared" / "models" / "taef2_vae"


def nearest(latent: np.ndarray) -> np.ndarray:
    return latent.repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)


def blurred(latent: np.ndarray) -> np.ndarray:
    """Each pixel sees one cell to every side."""
    padded = np.pad(latent, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    h, w = latent.shape[2:]
    return nearest(sum(padded[:, :, y : y + h, x : x + w] for y in range(3) for x in range(3)) / 9)


def normalised(latent: np.ndarray) -> np.ndarray:
    """As group normalisation does, a pixel sees the whole tile through its mean and deviation."""
    mean, deviation = latent.mean(axis=(2, 3), keepdims=True), latent.std(axis=(2, 3), keepdims=True)
    return nearest((latent - mean) / (deviation + 0.5))


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    tile=st.integers(8, 40),
)
def test_a_decoder_whose_pixels_see_one_cell_is_reproduced_at_every_size(height, width, tile):
    latent = np.random.default_rng(height * 71 + width).normal(size=(2, 3, height, width)).astype(np.float32)
    assert np.allclose(tiled(nearest, latent, tile=tile, factor=FACTOR), nearest(latent), atol=1e-5)


def test_no_tile_is_larger_than_asked_for():
    seen = []

    def watched(latent):
        seen.append(latent.shape)
        return nearest(latent)

    tiled(watched, np.zeros((1, 3, 50, 21), np.float32), tile=16, factor=FACTOR)
    assert max(max(shape[2:]) for shape in seen) == 16
    assert len(seen) == 4 * 2


def test_a_decoder_that_reaches_less_than_the_overlap_differs_only_near_seams():
    latent = np.random.default_rng(0).normal(size=(1, 3, 40, 40)).astype(np.float32)
    difference = np.abs(tiled(blurred, latent, tile=16, factor=FACTOR) - blurred(latent))[0].max(axis=0)
    assert difference.max() < 0.3 * np.abs(blurred(latent)).max()
    assert np.mean(difference > 1e-5) < 0.25


def test_seams_are_no_steeper_than_the_picture_itself():
    """Tiles that come out darker or brighter, which hard edges would show as lines."""
    y, x = np.mgrid[0:60, 0:60] / 60
    latent = np.stack([np.sin(3 * y) + x, x * y, np.cos(2 * x) - y])[None].astype(np.float32)
    whole, blended = normalised(latent), tiled(normalised, latent, tile=20, factor=FACTOR)
    hard = np.concatenate(
        [
            np.concatenate([normalised(latent[:, :, a : a + 20, b : b + 20]) for b in (0, 20, 40)], axis=3)
            for a in (0, 20, 40)
        ],
        axis=2,
    )

    def steepest(picture: np.ndarray) -> float:
        return max(float(np.abs(np.diff(picture, axis=axis)).max()) for axis in (2, 3))

    assert steepest(hard) > 8 * steepest(whole)
    assert steepest(blended) < 3 * steepest(whole)


def test_an_autoencoders_seams_are_no_steeper_than_its_picture():
    """With attention and group normalisation over random weights, which make tiles as different as they can be."""
    torch = pytest.importorskip("torch")
    tiny = pytest.importorskip("tiny_pipelines", exc_type=ImportError)
    torch.manual_seed(0)
    vae = tiny.autoencoder()

    def decode(latent: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return vae.decode(torch.from_numpy(np.ascontiguousarray(latent))).sample.numpy()

    y, x = np.mgrid[0:32, 0:32] / 32
    latent = np.stack([np.sin(6 * y), np.cos(5 * x), x * y, y - x])[None].astype(np.float32)
    whole, blended = decode(latent), tiled(decode, latent, tile=16, factor=FACTOR)
    step = max(float(np.abs(np.diff(whole, axis=axis)).max()) for axis in (2, 3))
    seams = max(float(np.abs(np.diff(blended, axis=axis)).max()) for axis in (2, 3))
    assert seams < 1.2 * step
    assert not np.allclose(whole, blended, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "asked_for", "sparing", "expected"),
    [
        ((128, 128), None, False, None),
        ((128, 192), None, False, TILE),
        ((64, 64), None, True, None),
        ((64, 80), None, True, TILE),
        ((512, 512), 0, True, None),
        ((40, 20), 32, False, 32),
        ((20, 20), 32, False, None),
    ],
)
def test_tiles_are_used_for_large_latents_or_as_asked(size, asked_for, sparing, expected):
    assert AUTOMATIC_ABOVE == 128 * 128
    assert tile_size(*size, asked_for, sparing=sparing) == expected


def test_a_decoder_with_another_factor_is_refused():
    with pytest.raises(InvalidInput, match="expected \\(32, 32\\)"):
        tiled(lambda latent: latent, np.zeros((1, 3, 20, 20), np.float32), tile=8, factor=FACTOR)


@pytest.mark.skipif(not TAEF2.is_dir(), reason="needs a trained autoencoder that is not part of the repository")
def test_a_trained_decoder_draws_the_same_photograph_in_tiles():
    """Its group normalisation sees a tile where it saw the whole; measured on this photograph: 33.1 dB."""
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    from PIL import Image

    from lehr.export.autoencoders import tiny
    from lehr.export.autoencoders.folder import open_autoencoder
    from lehr.runtime.pipeline_spec import LatentSpec

    found = open_autoencoder(TAEF2 / "taef2_decoder.safetensors", LatentSpec(channels=32, factor=8, scaling_factor=1.0))
    encoder = tiny.TinyEncoder(tiny.Params(latent_channels=32, pooled=True)).eval()
    stored = safetensors.load_file(TAEF2 / "taef2_encoder.safetensors")
    encoder.load_state_dict({f"encoder.layers.{key}": tensor.float() for key, tensor in stored.items()})
    decoder = found.decoder.runnable()
    with Image.open(TAEF2 / "check.png") as image:
        pixels = np.asarray(image.convert("RGB"), np.float32)[1:257, 1:257]
    with torch.inference_mode():
        latent = encoder(torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()) / 127.5 - 1).numpy()

        def decode(part: np.ndarray) -> np.ndarray:
            return decoder(torch.from_numpy(np.ascontiguousarray(part))).numpy()

        whole, blended = decode(latent), tiled(decode, latent, tile=16, factor=8)
    assert 10 * np.log10(4 / np.mean((whole - blended) ** 2)) > 30
