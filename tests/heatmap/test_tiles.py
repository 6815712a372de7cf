"""An image, and beside it one tile an explanation."""

from dataclasses import replace

import torch
from drawn import gallery, grid, on_image, section

from attnlrp_fx.heatmap import PLAIN, Display, Gallery
from attnlrp_fx.heatmap.pictures import Picture, picture
from attnlrp_fx.heatmap.tiles import gallery_tiles, pair


def test_an_image_stands_beside_its_relevance():
    drawn = on_image(grid(3, 4, 5).relevance)
    shown = picture(drawn, 9, 9)
    image, relevance = pair(shown, shown.image)
    assert torch.equal(image.shows, drawn.backdrop.pixels)
    assert relevance.shows.shape == image.shows.shape
    plain = picture(drawn, 9, 9, Display(overlay=False))
    assert pair(plain, plain.image)[1].shows is plain


def test_a_gallery_has_the_image_and_a_tile_a_name():
    names = ("attnlrp", "gradient", "mine")
    ((said, tiles),) = gallery_tiles(gallery(*names), 64, Display(smooth=1.0))
    assert [tile.name for tile in tiles] == ["image", *names]
    assert said == "pixel_values: summed over channels, smoothed with σ=1 pixels, " + (
        "which keeps the sum"
    )
    assert [tile.limit / tiles[1].limit for tile in tiles[1:]] == [1.0, 2.0, 4.0]
    total = grid(3, 6, 6).relevance.sum().item()
    assert tiles[2].lines == ("value +1", f"sum {2 * total:+.4g} ({2 * total:.1%} of it)")


def test_a_gallery_on_no_image():
    ((_, tiles),) = gallery_tiles(gallery("a"), 64, Display(overlay=False))
    assert isinstance(tiles[1].shows, Picture)


def test_targets_are_named_where_they_differ():
    same = gallery("a", "b")
    assert same.heading == "logit 3"
    sections = {**same.sections, "b": replace(same.sections["b"], title="logit 8", row=1)}
    sections["a"] = replace(sections["a"], row=1)
    different = Gallery(sections)
    assert different.heading == "Row 1 · several targets"
    ((_, tiles),) = gallery_tiles(different, 64, PLAIN)
    assert [tile.lines[0] for tile in tiles[1:]] == ["logit 3", "logit 8"]


def test_every_image_of_a_row_has_its_tiles():
    two = [on_image(grid(3, 4, 4).relevance, name) for name in ("left", "right")]
    both = Gallery({"a": section(grids=[*two, grid(4)])})
    assert both.images == ("left", "right")
    assert [said.partition(":")[0] for said, _ in gallery_tiles(both, 64, PLAIN)] == [
        "left",
        "right",
    ]
