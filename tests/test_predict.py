"""Digits in image files: what any format, size, colour and light becomes, and what is answered."""

import io
import json
import sys

import drawings
import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageOps

from mlp_jax.data.photo import read_digit
from mlp_jax.predict import main as predict_main
from mlp_jax.records.checkpoint import load_committee, predict
from mlp_jax.sweep import main as sweep_main


def answers(capsys, *flags):
    predict_main([*map(str, flags), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def picture():
    ink = drawings.draw(7, way=1, offset=(0.6, -0.8))
    return drawings.on_paper(ink)


def coloured():
    """Ink that is as bright as its paper."""
    ink = drawings.draw(7, way=1, offset=(0.6, -0.8))
    return drawings.on_paper(ink, colour=(200, 30, 30), paper=(30, 115, 40))


def transparent():
    ink = Image.fromarray(np.uint8(255 * drawings.draw(7, way=1)))
    empty = Image.new("L", ink.size)
    return Image.merge("RGBA", (empty, empty, empty, ink))


def save(image, path, **options):
    image.save(path, **options)
    return path


def turned(path):
    """Stored on its side, with the tag by which cameras say so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return save(picture().transpose(Image.Transpose.ROTATE_90), path, exif=exif)


FORMATS = {
    "grey.png": lambda path: save(picture().convert("L"), path),
    "palette.gif": lambda path: save(picture().convert("P"), path),
    "16bit.png": lambda path: save(
        Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 250), path
    ),
    "cmyk.jpg": lambda path: save(picture().convert("CMYK"), path),
    "bits.bmp": lambda path: save(picture().convert("1"), path),
    "photo.webp": lambda path: save(picture(), path),
    "phone.heic": lambda path: pillow_heif.from_pillow(picture()).save(path),
    "scan.tiff": lambda path: save(picture(), path),
    "inverted.png": lambda path: save(ImageOps.invert(picture()), path),
    "huge.png": lambda path: save(picture().resize((6000, 4000)), path),
    "small.png": lambda path: save(picture().resize((40, 40)), path),
    "transparent.png": lambda path: save(transparent(), path),
    "turned.jpg": turned,
    "opaque.png": lambda path: save(coloured().convert("RGBA"), path),
    "dark.tiff": lambda path: save(
        Image.fromarray(np.float32(0.05 / 255) * np.asarray(picture().convert("L"))), path
    ),
    "animated.gif": lambda path: save(
        picture(), path, save_all=True, append_images=[Image.new("RGB", (320, 320), "white")]
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(here, capsys, name):
    FORMATS[name](here / name)
    (answer,) = answers(capsys, name)
    assert answer["file"] == name
    assert answer["digit"] == 7
    assert np.sum(answer["probabilities"]) == pytest.approx(1, abs=1e-6)
    assert np.argmax(answer["probabilities"]) == 7
    assert sum(answer["votes"]) == 5


def test_heic_without_its_library_is_a_line_that_names_it(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (here / "phone.heic").write_bytes(b"ftypheic")
    with pytest.raises(SystemExit):
        predict_main(["phone.heic"])
    assert "HEIC needs pip install pillow-heif" in capsys.readouterr().err


UNREADABLE = {
    "blank.png": (lambda path: save(Image.new("RGB", (90, 90), "white"), path), "shows no digit"),
    "noise.png": (
        lambda path: save(drawings.on_paper(np.zeros((200, 200)), grain=0.03,
                                            rng=np.random.default_rng(0)), path),
        "shows no digit",
    ),
    "empty.png": (lambda path: path.write_bytes(b""), "not an image that Pillow knows"),
    "text.jpg": (lambda path: path.write_text("seven"), "not an image that Pillow knows"),
    "cut.png": (
        lambda path: path.write_bytes(save(picture(), path).read_bytes()[:300]),
        "cannot be read",
    ),
    "folder.png": (lambda path: path.mkdir(), "Is a directory"),
    "missing.png": (lambda path: None, "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_a_line_and_the_others_are_answered(here, capsys, name):
    make, reason = UNREADABLE[name]
    make(here / name)
    save(picture(), here / "seven.png")
    with pytest.raises(SystemExit) as left:
        predict_main([name, "seven.png"])
    assert left.value.code == 1
    out, err = capsys.readouterr()
    assert out.startswith("seven.png: 7 (")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: {name} ")
    assert reason in err


def test_a_bomb_is_not_opened(here, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    save(picture(), here / "bomb.png")
    with pytest.raises(SystemExit):
        predict_main(["bomb.png"])
    assert "too many pixels" in capsys.readouterr().err


def test_the_committee_says_how_sure_it_is(here, capsys, committee):
    """Probabilities are the mean of the runs', votes their counts, in text as in JSON."""
    paths = [save(drawings.on_paper(ink), here / f"{i}.png") for i, (_, ink, _) in
             zip(range(6), drawings.cases(), strict=False)]  # fmt: skip
    logits = predict(committee, np.stack([read_digit(path) for path in paths])).astype(float)
    each = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for answer, probabilities, votes in zip(
        answers(capsys, *paths), each.mean(0), logits.argmax(-1).T, strict=True
    ):
        np.testing.assert_allclose(answer["probabilities"], probabilities, atol=1e-6)
        assert answer["votes"] == np.bincount(votes, minlength=10).tolist()
        assert answer["digit"] == probabilities.argmax()
    predict_main([str(paths[0])])
    said = capsys.readouterr().out
    votes = np.bincount(logits.argmax(-1)[:, 0]).max()
    assert said.startswith(f"{paths[0]}: 0 (")
    assert f"%, {votes} of 5 votes)" in said


def test_a_sheet_shows_what_the_network_saw(here, capsys):
    save(picture(), here / "seven.png")
    predict_main(["seven.png", "--sheet", "sheet.png"])
    with Image.open("sheet.png") as sheet:
        assert min(sheet.size) > 100
        shown = np.asarray(sheet.convert("L"))
    assert np.ptp(shown) == 255


def test_runs_of_ones_own_vote(here, small_dir, capsys):
    flags = ["--dataset", "kmnist", "--data-dir", str(small_dir), "--hidden", "16", "8"]
    sweep_main([*flags, "--epochs", "1", "--seeds", "0:3", "--keep-weights", "--quiet",
                "--out", "s"])  # fmt: skip
    save(picture(), here / "seven.png")
    capsys.readouterr()
    (answer,) = answers(capsys, "seven.png", "--run", "s")
    image = read_digit(here / "seven.png")[None]
    logits = np.stack([predict(load_committee("s"), image)]).squeeze()
    assert answer["votes"] == np.bincount(logits.argmax(-1), minlength=len(logits[0])).tolist()
    assert sum(answer["votes"]) == 3


def test_odd_names(here, capsysbinary):
    """A name that is no text does not end the answers."""
    if sys.platform != "linux":
        pytest.skip("needs a file system of bytes")
    path = here / "z\udcff\n.png"
    with open(path, "wb") as file:
        stream = io.BytesIO()
        picture().save(stream, "PNG")
        file.write(stream.getvalue())
    predict_main([str(path), "--json"])
    assert json.loads(capsysbinary.readouterr().out)["digit"] == 7
