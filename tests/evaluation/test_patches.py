import numpy as np
import pytest
from matplotlib.colors import to_rgb

from pipeline.evaluation.patches import (
    PALETTE,
    Shown,
    code_pictures,
    code_rows,
    patch_grid,
    patch_rows,
    tints,
)
from pipeline.evaluation.pictures import nearest_patches
from pipeline.evaluation.plots import plt, save

CLEAN = np.array([[0, 1, 2], [3, -1, 5]])
NOISY = np.array([[0, 4, 2], [-1, -1, 1]])


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def shown(name, *indices, predicted="cat", channels=3):
    pixels_CHW = np.random.default_rng(0).integers(0, 256, (channels, 8, 12), dtype=np.uint8)
    return Shown(pixels_CHW, name, "cat", predicted, dict(zip((1, 3), indices, strict=False)))


def panels(figure):
    """The axes by (row, column) as they stand in the figure, without the empty lines between images."""
    places = {(axes.get_subplotspec().rowspan.start, axes.get_subplotspec().colspan.start): axes for axes in figure.axes}
    rows = sorted({row for row, _ in places})
    return {(rows.index(row), column): axes for (row, column), axes in places.items()}


def drawn(axes):
    """Places (row, column) of the squares drawn on a panel: framed and hatched."""
    found = {"framed": [], "hatched": []}
    for collection in axes.collections:
        centres = [path.vertices[:4].mean(0)[::-1].round().astype(int).tolist() for path in collection.get_paths()]
        found["hatched" if collection.get_hatch() else "framed"] += centres
    return found


def legend(figure):
    return dict(zip([text.get_text() for text in figure.legends[0].texts], figure.legends[0].get_patches(), strict=True))


def test_a_panel_for_the_picture_and_each_layer_of_every_version():
    images = [shown("clean", CLEAN, CLEAN), shown("fog 3", NOISY, CLEAN, predicted="dog")] * 2
    figure = patch_grid(images, 6, "expert", "Experts")
    axes = panels(figure)
    assert sorted(axes) == [(row, column) for row in range(4) for column in range(3)]
    assert [axes[0, column].get_title() for column in range(3)] == ["picture", "block 1", "block 3"]
    assert axes[1, 0].get_ylabel() == "fog 3\ntrue: cat\npredicted: dog"
    assert axes[0, 0].yaxis.label.get_color() != axes[1, 0].yaxis.label.get_color()
    # An empty line between the two images.
    starts = sorted({one.get_subplotspec().rowspan.start for one in figure.axes})
    assert starts == [0, 1, 3, 4]


@pytest.mark.parametrize("channels", (1, 3))
def test_the_picture_is_shown_as_it_is_and_in_grey_under_the_tints(channels):
    one = shown("clean", CLEAN, channels=channels)
    axes = panels(patch_grid([one], 6, "expert", ""))
    rgb_HW3 = one.pixels_CHW.transpose(1, 2, 0).repeat(3 // channels, 2)
    assert np.allclose(axes[0, 0].images[0].get_array(), rgb_HW3 / 255)
    grey, tint = axes[0, 1].images
    assert np.allclose(grey.get_array(), rgb_HW3 @ (0.299, 0.587, 0.114))
    # Both cover the same, a patch being a unit.
    assert grey.get_extent() == tint.get_extent() == [-0.5, 2.5, 1.5, -0.5]


@pytest.mark.parametrize("experts", (6, 16))
def test_tints_are_those_of_the_legend(experts):
    figure = patch_grid([shown("clean", CLEAN)], experts, "expert", "")
    tint_RK4 = panels(figure)[0, 1].images[1].get_array()
    entries = legend(figure)
    assert list(entries) == [*map(str, range(experts)), "no expert"]
    for (row, column), expert in np.ndenumerate(CLEAN):
        if expert < 0:
            assert tint_RK4[row, column, 3] == 0
        else:
            assert 0.4 < tint_RK4[row, column, 3] < 0.9
            assert np.allclose(tint_RK4[row, column, :3], entries[str(expert)].get_facecolor()[:3])
    assert len({patch.get_facecolor() for name, patch in entries.items() if name != "no expert"}) == experts


def test_patches_that_went_elsewhere_are_framed_and_those_without_an_expert_hatched():
    other = np.array([[5, 5, 5], [5, 5, 5]])
    images = [shown("clean", CLEAN), shown("fog 3", NOISY), shown("clean", other), shown("fog 3", other)]
    figure = patch_grid(images, 6, "expert", "")
    clean, noisy, _, same = (panels(figure)[row, 1] for row in range(4))
    assert drawn(clean) == {"framed": [], "hatched": [[1, 1]]}
    assert drawn(noisy) == {"framed": [[0, 1], [1, 0], [1, 2]], "hatched": [[1, 0], [1, 1]]}
    # Each is compared with its own clean version.
    assert drawn(same) == {"framed": [], "hatched": []}
    assert [one.get_xlabel() for one in (clean, noisy, same)] == ["", "50 % the same", "100 % the same"]
    assert list(legend(figure))[-2:] == ["changed", "no expert"]
    only_clean = patch_grid([shown("clean", other)] * 2, 6, "expert", "")
    assert list(legend(only_clean)) == list("012345")
    assert legend(patch_grid([shown("clean", other)], 6, "code", "")) == {}


def test_an_image_without_its_clean_version_is_refused():
    with pytest.raises(AssertionError, match="fog 3 before clean"):
        patch_grid([shown("fog 3", CLEAN)], 6, "expert", "")


def test_many_experts_have_numbers_where_patches_have_room():
    def numbers(index_RK, experts, what="expert"):
        return [text.get_text() for text in panels(patch_grid([shown("clean", index_RK)], experts, what, ""))[0, 1].texts]

    assert numbers(CLEAN, 9) == ["0", "1", "2", "3", "5"]
    assert numbers(CLEAN, 8) == numbers(CLEAN, 9, "code") == numbers(np.zeros((16, 16), int), 9) == []


def test_a_code_has_its_experts_hue_and_a_lightness_of_its_own():
    colours_C3 = tints(np.arange(64), 8, "code")
    assert len({tuple(colour) for colour in colours_C3.round(2)}) == 64
    # Oklab's lightness and hue, back from the colours that sRGB has without clipping.
    inside_C = ((colours_C3 > 1e-6) & (colours_C3 < 1 - 1e-6)).all(1)
    assert inside_C.sum() > 32
    light_C, hue_C = oklch(colours_C3)
    turned_C = (hue_C - 2 * np.pi * (np.arange(64) % 8) / 8 + np.pi) % (2 * np.pi) - np.pi
    assert np.abs(turned_C[inside_C]).max() < 1e-5
    for expert in range(8):
        own = np.sort(light_C[expert::8][inside_C[expert::8]])
        assert np.diff(own).min() > 0.02
    figure = patch_grid([shown("clean", CLEAN), shown("fog 1", CLEAN)], 2, "code", "")
    tint_RK4 = panels(figure)[0, 1].images[1].get_array()
    assert np.allclose(tint_RK4[1, 2, :3], tints(np.array(5), 2, "code"))
    assert list(legend(figure)) == ["changed", "no code"]


def oklch(rgb_N3):
    """Lightness and hue (N,) by Ottosson's matrices from sRGB, the other way round."""
    linear_N3 = np.where(rgb_N3 <= 0.04045, rgb_N3 / 12.92, ((rgb_N3 + 0.055) / 1.055) ** 2.4)
    lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    lab = np.array(
        [
            [0.2104542553, 0.793617785, -0.0040720468],
            [1.9779984951, -2.428592205, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.808675766],
        ]
    )
    light_N, a_N, b_N = lab @ np.cbrt(lms @ linear_N3.T)
    return light_N, np.arctan2(b_N, a_N)


def test_neighbours_among_many_experts_differ_in_lightness():
    light_E, _ = oklch(tints(np.arange(16), 16, "expert"))
    assert np.abs(np.diff(light_E)).min() > 0.1


def test_up_to_eight_experts_have_the_colours_of_a_palette():
    assert len(set(PALETTE)) == len(PALETTE) == 8
    assert tints(np.array([[7, 0]]), 8, "expert").tolist() == [[list(to_rgb(PALETTE[7])), list(to_rgb(PALETTE[0]))]]
    with pytest.raises(IndexError):
        tints(np.array([4]), 4, "expert")


def test_rows_name_every_patch():
    rows = patch_rows([shown("clean", CLEAN), shown("clean", CLEAN, NOISY), shown("fog 3", NOISY)], "code")
    assert len(rows) == 4 * 6
    assert rows[5] == {"image": 0, "condition": "clean", "block": 1, "row": 1, "column": 2, "code": 5}
    assert rows[12] == {"image": 1, "condition": "clean", "block": 3, "row": 0, "column": 0, "code": 0}
    assert rows[21] == {"image": 1, "condition": "fog 3", "block": 1, "row": 1, "column": 0, "code": -1}
    assert list(patch_rows([shown("clean", CLEAN)], "expert")[0]) == ["image", "condition", "block", "row", "column", "expert"]


def coded(channels, count=3):
    """Patches of 2 x 2 in five images of 4 x 6, of codes 0 to 3 of which 3 has none, some patches dropped."""
    rng = np.random.default_rng(1)
    pixels_NCHW = rng.integers(0, 256, (5, channels, 4, 6), dtype=np.uint8)
    code_NP, distance_NP = rng.integers(-1, 3, (5, 6)), rng.integers(0, 6, (5, 6)) / 4
    # Fewer patches than asked for.
    code_NP[code_NP == 2] = 1
    code_NP[4, 1] = code_NP[0, 5] = 2
    return pixels_NCHW, code_NP, distance_NP, nearest_patches(pixels_NCHW, code_NP, distance_NP, 2, 4, count)


@pytest.mark.parametrize("channels", (1, 3))
def test_nearest_patches_are_those_of_a_loop(channels):
    pixels_NCHW, code_NP, distance_NP, found = coded(channels)
    assert list(found) == [0, 1, 2, 3]
    assert sorted(code_NP.ravel().tolist())[0] == -1
    for code in range(4):
        own = []
        for image in range(5):
            for place in range(6):
                row, column = 2 * (place // 3), 2 * (place % 3)
                if code_NP[image, place] == code:
                    own.append((distance_NP[image, place], pixels_NCHW[image, :, row : row + 2, column : column + 2]))
        # Python's sort keeps the order of equals.
        nearest = [patch.tolist() for _, patch in sorted(own, key=lambda pair: pair[0])[:3]]
        share, mean_CSS, nearest_MCSS = found[code]
        assert share == len(own) / 30
        assert nearest_MCSS.tolist() == nearest
        assert nearest_MCSS.shape[1:] == mean_CSS.shape == (channels, 2, 2)
        if own:
            assert np.allclose(mean_CSS, sum(patch.astype(float) for _, patch in own) / len(own))
    assert [len(one.nearest_MCSS) for one in found.values()] == [3, 3, 2, 0]
    assert np.isnan(found[3].mean_CSS).all()


@pytest.mark.parametrize("channels", (1, 3))
def test_a_cell_per_code_with_its_mean_and_its_nearest_patches(channels):
    *_, codes = coded(channels)
    figure = code_pictures(codes, 2, "Codes")
    cells = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in cells] == [
        f"code {code}, expert {code % 2}: {100 * one.share:.3g} %" for code, one in codes.items()
    ]
    assert [len(axes.images) for axes in cells] == [4, 4, 3, 0]
    mean, first, second, third = cells[1].images
    assert np.allclose(255 * mean.get_array(), codes[1].mean_CSS.transpose(1, 2, 0).repeat(3 // channels, 2))
    assert np.allclose(255 * second.get_array(), codes[1].nearest_MCSS[1].transpose(1, 2, 0).repeat(3 // channels, 2))
    # The nearest in a line beside the mean, then in the next; nothing lies on anything.
    boxes = [image.get_extent() for image in (mean, first, second, third)]
    assert boxes[0] == [0, 2, 2, 0]
    assert boxes[0][1] < boxes[1][0] < boxes[1][1] < boxes[2][0] and boxes[1][2] < boxes[3][3] and boxes[3][0] == boxes[1][0]
    # A frame in the code's colour; of an empty code the frame is hatched.
    for code, axes in enumerate(cells):
        assert np.allclose(axes.patches[-1].get_edgecolor()[:3], tints(np.array(code), 2, "code"))
        assert any(patch.get_hatch() for patch in axes.patches) == (code == 3)
        assert axes.get_xlim() == cells[0].get_xlim() and axes.get_ylim() == cells[0].get_ylim()


def test_rows_of_codes_have_no_brightness_where_there_is_no_patch():
    pixels_N1HW = np.array([[[[10, 30, 0, 0], [10, 30, 0, 0]]]], dtype=np.uint8)
    rows = code_rows(nearest_patches(pixels_N1HW, np.array([[1, -1]]), np.zeros((1, 2)), 2, 2, 1))
    assert rows[0] == {"code": 0, "share": 0, "brightness": None, "contrast": None}
    assert rows[1] == {"code": 1, "share": 0.5, "brightness": pytest.approx(20), "contrast": pytest.approx(10)}


def test_the_same_data_gives_the_same_bytes_and_a_dollar_is_a_dollar(tmp_path):
    for name in "ab":
        images = [shown("clean", CLEAN), shown("$a$ 3", NOISY)]
        save(patch_grid(images, 16, "expert", "$"), tmp_path / f"grid-{name}.png", 60)
        save(code_pictures(coded(3)[3], 2, "$"), tmp_path / f"codes-{name}.png", 60)
    for figure in ("grid", "codes"):
        first, second = (tmp_path / f"{figure}-{name}.png" for name in "ab")
        assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 1000


def test_nothing_reaches_beyond_the_figure():
    """Rows of the longest labels, and legends of few and of many experts, in the narrowest figure."""
    for experts in (8, 32):
        images = [shown("clean", CLEAN), shown("gaussian_noise 3", NOISY, predicted="a_class_with_a_long_name")]
        figure = patch_grid(images, experts, "expert", "")
        figure.canvas.draw()
        for artist in (figure.legends[0], *(axes.yaxis.label for axes in figure.axes)):
            box = artist.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1
        # Nor do long labels take the panels' room.
        assert min(axes.get_window_extent().width for axes in figure.axes) > 1.3 * figure.dpi
