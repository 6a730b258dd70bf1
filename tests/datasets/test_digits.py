"""The scanned digits: splits, images, augmentation."""

import numpy as np
import torch

from qbench.datasets.digits import digits, scans, scans_of
from qbench.registry import index


def test_splits_are_disjoint_and_complete() -> None:
    data = digits()
    ids = [set(split.ids) for split in (data.train, data.calibration, data.evaluation)]
    assert [len(part) for part in ids] == [941, 256, 600]
    assert len(set.union(*ids)) == 1797
    assert np.array_equal(np.bincount(data.evaluation.targets).nonzero()[0], np.arange(10))


def test_images_are_the_scans() -> None:
    data = digits()
    image = data.evaluation.load(3)
    assert (image.mode, image.size) == ("L", (32, 32))
    scan, target = scans()[0][scans_of("evaluation")[3]], scans()[1][scans_of("evaluation")[3]]
    small = np.asarray(image.resize((8, 8), 4), dtype=int)
    assert np.abs(small - scan).mean() < 12
    assert data.evaluation.targets[3] == target


def test_it_is_the_same_every_time() -> None:
    assert digits().fingerprint == digits().fingerprint
    assert digits().train.load(0).tobytes() == digits().train.load(0).tobytes()


def test_augmentation_follows_the_generator_and_moves_little() -> None:
    augment = digits().augment
    assert augment is not None
    images = torch.full((16, 1, 32, 32), -1.0)
    images[:, :, 12:20, 12:20] = 1.0
    runs = [augment(images, torch.arange(16), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][0], runs[2][0])
    assert torch.equal(runs[0][1], torch.arange(16))
    column = torch.arange(32.0)
    weight = runs[0][0][:, 0] + 1
    centre = (weight.sum(1) * column).sum(1) / weight.sum((1, 2))
    assert (centre - 15.5).abs().max() < 4.5


def test_the_embedded_datasets_are_registered() -> None:
    assert {"digits", "digit_scenes"} <= set(index("dataset"))
