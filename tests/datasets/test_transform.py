"""Preparing images as timm does, and mapping boxes there and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval

from qbench.datasets.images import ImageArray
from qbench.datasets.transform import prepare, to_image, to_network
from qbench.models.base import Preprocess


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("size", [(300, 301), (101, 83), (64, 200), (40, 40)])
def test_crop_is_timms_pixel_for_pixel(size: tuple[int, int], crop_pct: float, interpolation: str) -> None:
    reference = transforms_imagenet_eval(64, crop_pct=crop_pct, interpolation=interpolation, normalize=False)
    own = Preprocess((64, 64), resize=int(64 / crop_pct), interpolation=interpolation)
    expected = reference(picture(*size)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(prepare(picture(*size), own), expected)


@pytest.mark.parametrize("size", [(300, 301), (50, 83)])
def test_squash_is_timms_pixel_for_pixel(size: tuple[int, int]) -> None:
    reference = transforms_imagenet_eval((64, 48), crop_pct=1.0, crop_mode="squash", normalize=False)
    own = Preprocess((64, 48), mode="squash", interpolation="bilinear")
    np.testing.assert_array_equal(prepare(picture(*size), own), reference(picture(*size)).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", [(300, 200), (33, 64), (64, 33)])
def test_letterbox_is_timms_border_pixel_for_pixel(size: tuple[int, int]) -> None:
    mean = (0.4, 0.5, 0.6)
    reference = transforms_imagenet_eval(64, crop_pct=1.0, crop_mode="border", mean=mean, normalize=False)
    own = Preprocess((64, 64), mode="letterbox", interpolation="bilinear", mean=mean)
    np.testing.assert_array_equal(prepare(picture(*size), own), reference(picture(*size)).permute(1, 2, 0).numpy())


def test_normalised_values_are_timms_exactly() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    own = Preprocess((64, 64), resize=73, mean=mean, std=std)
    pixels = prepare(picture(100, 80), own)[None]
    index = {"positions": [0], "sizes": [[100, 80]], "unreadable": []}
    batch = ImageArray(pixels, None, index, own).batch([0])  # type: ignore[arg-type]
    reference = transforms_imagenet_eval(64, crop_pct=64 / 73, interpolation="bicubic", mean=mean, std=std)
    assert torch.equal(batch[0], reference(picture(100, 80)))


def test_images_that_were_resized_are_only_cropped() -> None:
    image = picture(70, 70)
    own = Preprocess((64, 64), resize=80)
    np.testing.assert_array_equal(prepare(image, own, resized=True), np.asarray(image)[3:67, 3:67])
    small = picture(40, 40)
    np.testing.assert_array_equal(prepare(small, own, resized=True), prepare(small, own))


def test_grey_networks_get_one_channel() -> None:
    assert prepare(picture(20, 10), Preprocess((8, 8), resize=8, mean=(0.5,), std=(0.5,))).shape == (8, 8, 1)


preprocessings = st.builds(
    Preprocess,
    size=st.tuples(st.integers(8, 300), st.integers(8, 300)),
    resize=st.none() | st.integers(8, 400),
    mode=st.sampled_from(["crop", "squash", "letterbox"]),
)


@settings(max_examples=200, deadline=None)
@given(
    own=preprocessings,
    size=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    corners=st.lists(st.floats(-0.5, 1.5), min_size=4, max_size=4),
    resized=st.booleans(),
)
def test_boxes_come_back(own: Preprocess, size: tuple[int, int], corners: list[float], resized: bool) -> None:
    xyxy = np.array([corners]) * np.tile(size, 2)
    there = to_network(xyxy, size, own, resized)
    np.testing.assert_allclose(to_image(there, size, own, resized), xyxy, rtol=0, atol=1e-4)


@settings(max_examples=200, deadline=None)
@given(
    mode=st.sampled_from(["crop", "squash", "letterbox"]),
    size=st.tuples(st.integers(200, 640), st.integers(200, 640)),
    corners=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
)
def test_boxes_of_detectors_come_back_in_single_precision(mode, size: tuple[int, int], corners: list[float]) -> None:
    own = Preprocess((300, 300), resize=300 if mode == "crop" else None, mode=mode)
    xyxy = (np.array([corners]) * np.tile(size, 2)).astype(np.float32)
    back = to_image(to_network(xyxy, size, own), size, own)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, xyxy, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("own", "size", "expected"),
    [
        (Preprocess((300, 300), mode="squash"), (640, 480), (0, 0, 300, 300)),
        (Preprocess((300, 300), mode="squash"), (1, 1), (0, 0, 300, 300)),
        (Preprocess((300, 300), mode="letterbox"), (600, 300), (0, 75, 300, 225)),
        (Preprocess((300, 300), mode="letterbox"), (301, 300), (0, 0, 300, 299)),
        (Preprocess((300, 300), mode="letterbox"), (2000, 1), (0, 149, 300, 150)),
        (Preprocess((300, 300), resize=300), (400, 300), (-50, 0, 350, 300)),
        (Preprocess((300, 300), resize=300), (1, 3), (0, -300, 300, 600)),
        (Preprocess((300, 300), resize=256), (256, 256), (22, 22, 278, 278)),
    ],
)
def test_where_the_whole_image_lands(own: Preprocess, size: tuple[int, int], expected: tuple[int, ...]) -> None:
    whole = np.array([[0, 0, *size]], dtype=np.float64)
    np.testing.assert_array_equal(to_network(whole, size, own), [expected])
    np.testing.assert_allclose(to_image(np.array([expected], dtype=np.float64), size, own), whole, atol=1e-9)


@pytest.mark.parametrize("mode", ["crop", "squash", "letterbox"])
def test_a_box_stays_on_its_object(mode: str) -> None:
    pixels = np.zeros((120, 200, 3), dtype=np.uint8)
    pixels[40:80, 70:130] = 255
    own = Preprocess((90, 90), resize=None if mode != "crop" else 96, mode=mode)  # type: ignore[arg-type]
    prepared = prepare(Image.fromarray(pixels), own)[:, :, 0] > 191
    rows, columns = np.where(prepared.any(1))[0], np.where(prepared.any(0))[0]
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(to_network(np.array([[70, 40, 130, 80]]), (200, 120), own)[0], seen, atol=1)
