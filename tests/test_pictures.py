"""Contact sheets: which images changed most, and what is drawn."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qbench.errors import UserError
from qbench.pictures import LINE, MARGIN, WIDTH, change, draw, pictures

RESULTS = Path(__file__).parents[1] / "results"


def found(*rows: tuple[float, ...]) -> dict[str, np.ndarray]:
    columns = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return {"xyxy": columns[:, :4], "score": columns[:, 4], "label": columns[:, 5].astype(int)}


BOX = (10, 10, 60, 60)


def test_boxes_that_only_one_finds_count_by_their_scores() -> None:
    assert change(found((*BOX, 0.9, 1)), found((*BOX, 0.5, 1))) == 0
    assert change(found((*BOX, 0.9, 1)), found()) == pytest.approx(0.9)
    assert change(found((*BOX, 0.9, 1)), found((*BOX, 0.5, 2))) == pytest.approx(1.4)
    assert change(found((*BOX, 0.9, 1)), found((50, 50, 90, 90, 0.4, 1))) == pytest.approx(1.3)
    assert change(found(), found()) == 0


def test_a_sheet_has_boxes_of_both() -> None:
    image = Image.new("RGB", (240, 120), (200, 200, 200))
    sheet = draw([image, image], [(found((*BOX, 0.9, 1)), found())] * 2, ["a", "b"], ["cat", "dog"], ("float", "rtn"))
    height = WIDTH // 2
    assert sheet.size == (2 * WIDTH + 3 * MARGIN, LINE + 2 * (height + LINE + MARGIN))
    pixels = np.asarray(sheet).astype(int)
    for row in (0, 1):
        top = 2 * LINE + row * (height + LINE + MARGIN)
        left, right = (pixels[top : top + height, x : x + WIDTH] for x in (MARGIN, 2 * MARGIN + WIDTH))
        assert (right == 200).all()
        edge = left[110, 20:120]
        assert (edge[0] != 200).any()
        assert (edge[40] == 200).all()


def test_a_run_without_boxes_is_refused(tmp_path: Path) -> None:
    key = next((RESULTS / "imagenet_small").glob("*.json")).stem
    with pytest.raises(UserError, match="has no boxes to draw"):
        pictures(key, RESULTS, tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())
