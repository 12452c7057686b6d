"""The page to draw on, in a real browser: its answers are those of Python."""

import base64
import re

import drawings
import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image

from mlp_jax.data.photo import read_digit, to_mnist
from mlp_jax.demo import main as demo_main
from mlp_jax.records.checkpoint import load_committee, predict
from mlp_jax.sweep import main as sweep_main

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium, or Chrome, is installed")

KEYS = {"ArrowDown": 40, "ArrowRight": 39, "ArrowUp": 38, "ArrowLeft": 37, " ": 32}
KEYS |= {"Backspace": 8, "Delete": 46}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    demo_main(["-o", str(path)])
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def opened(browser, page):
    browser.open(page)
    yield browser
    assert browser.errors == []
    # nothing but the page itself was asked for
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "data"}


def draw_by_mouse(browser, strokes):
    """Each stroke is points in the canvas's pixels."""
    box = browser.run("(b => [b.left, b.top, b.width / 400])(paper.getBoundingClientRect())")
    for stroke in strokes:
        kinds = ["mousePressed", *["mouseMoved"] * len(stroke), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [stroke[0], *stroke, stroke[-1]], strict=True):
            where = {"x": box[0] + box[2] * x, "y": box[1] + box[2] * y}
            browser.send("Input.dispatchMouseEvent", type=kind, button="left", buttons=1,
                         clickCount=1, **where)  # fmt: skip
    browser.settle()


def draw_by_finger(browser, strokes):
    box = browser.run("(b => [b.left, b.top, b.width / 400])(paper.getBoundingClientRect())")
    for stroke in strokes:
        points = [{"x": box[0] + box[2] * x, "y": box[1] + box[2] * y} for x, y in stroke]
        browser.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=points[:1])
        for point in points:
            browser.send("Input.dispatchTouchEvent", type="touchMove", touchPoints=[point])
        browser.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.settle()


def press(browser, key, times=1):
    for _ in range(times):
        for kind in ("keyDown", "keyUp"):
            browser.send("Input.dispatchKeyEvent", type=kind, key=key,
                         windowsVirtualKeyCode=KEYS[key])  # fmt: skip
    browser.settle()


def strokes_of(digit, way=0):
    for stroke in drawings.SKELETONS[digit][way]:
        yield [(60 + 180 * x + 40, 60 + 280 * y) for x, y in drawings.smooth(np.array(stroke))[::4]]


def text(browser, id):
    return browser.run(f"document.getElementById('{id}').textContent")


def saved(browser, path):
    """The file that the button saves."""
    data = browser.run("pngUrl()").partition("base64,")[2]
    path.write_bytes(base64.b64decode(data))
    return path


def test_drawings_are_answered_as_by_predict(opened, tmp_path):
    """A dozen: the 28x28 pixels are equal, the logits to 1e-4, and the digits right."""
    committee = load_committee()
    ways = [(digit, way) for digit, ways in drawings.SKELETONS.items() for way in range(len(ways))]
    for digit, way in ways:
        draw_by_mouse(opened, strokes_of(digit, way))
        found = opened.run("(a => ({...a, pixels: [...a.pixels], logits: a.logits.map("
                           "(l => [...l]))}))(answer())")  # fmt: skip
        pixels = read_digit(saved(opened, tmp_path / "digit.png"))
        np.testing.assert_array_equal(np.reshape(found["pixels"], (28, 28)), pixels)
        logits = predict(committee, pixels[None])[:, 0]
        np.testing.assert_allclose(found["logits"], logits, atol=1e-4, rtol=1e-5)
        assert found["votes"] == logits.argmax(-1).tolist()
        assert np.argmax(found["probabilities"]) == digit
        assert text(opened, "digit") == str(digit)
        opened.run("byId('clear').click()")
        opened.settle()


@pytest.mark.network
def test_all_test_images_are_answered_as_by_python(opened, mnist):
    images = mnist.test.images.reshape(-1, 784)
    expected = np.moveaxis(predict(load_committee(), images), 0, 1)
    step, largest = 1000, 0.0
    for start in range(0, len(images), step):
        data = base64.b64encode(images[start : start + step].tobytes()).decode()
        found = opened.run(
            f"(bytes => Array.from({{length: {step}}}, (_, i) => net.seeds.map((_, run) =>"
            " [...logits(bytes.subarray(784 * i, 784 * (i + 1)), run)])))"
            f"(Uint8Array.from(atob('{data}'), c => c.charCodeAt(0)))"
        )
        difference = np.abs(np.array(found) - expected[start : start + step])
        largest = max(largest, difference.max())
    assert 0 < largest < 1e-4


@pytest.mark.network
def test_test_images_are_prepared_as_by_python(opened, mnist):
    """As if each were a drawing: the same pixels, to the last."""
    for image in mnist.test.images[:200].reshape(-1, 28, 28):
        ink = image / 255
        found = opened.run(f"[...toMnist({{height: 28, width: 28, data: {ink.ravel().tolist()}}})]")
        np.testing.assert_array_equal(np.reshape(found, (28, 28)), to_mnist(ink))


def test_an_empty_canvas_predicts_nothing(opened):
    assert opened.run("answer()") is None
    assert text(opened, "digit") == ""
    assert text(opened, "words").startswith("Nothing is drawn yet")
    assert opened.run("['undo', 'clear', 'save'].map(id => byId(id).disabled)") == [True] * 3


def test_undo_and_clear(opened):
    draw_by_mouse(opened, strokes_of(1))
    one = opened.run("answer().probabilities")
    draw_by_mouse(opened, [[(60, 60), (340, 60)]])
    assert opened.run("answer().probabilities") != one
    opened.run("byId('undo').click()")
    opened.settle()
    assert opened.run("answer().probabilities") == one
    opened.run("byId('clear').click()")
    opened.settle()
    assert opened.run("answer()") is None
    opened.run("byId('undo').click()")  # of the clearing, too
    opened.settle()
    assert opened.run("answer().probabilities") == one


def test_a_keyboard_is_enough(opened):
    opened.run("paper.focus()")
    press(opened, " ")
    press(opened, "ArrowDown", 50)
    press(opened, " ")
    assert text(opened, "digit") == "1"
    bars = opened.run("[...byId('bars').children].map(bar => parseFloat(bar.innerText.slice(2)))")
    assert len(bars) == 10
    press(opened, "ArrowRight", 5)  # the pen is up
    assert opened.run("strokes.length") == 1
    press(opened, "Delete")
    assert text(opened, "digit") == ""
    press(opened, "Backspace")
    assert text(opened, "digit") == "1"


@pytest.mark.parametrize(
    ("width", "height", "dark"),
    [(390, 844, False), (390, 844, True), (390, 664, False), (320, 568, True), (844, 390, False)],
)
def test_on_a_phone(browser, page, width, height, dark):
    """By finger; all fits its width, and paper, buttons and answer are seen without scrolling."""
    browser.open(page, width=width, height=height, dark=dark)
    draw_by_finger(browser, strokes_of(3))
    assert text(browser, "digit") == "3"
    assert browser.run("document.documentElement.scrollWidth") <= width
    for name in ("paper", "clear", "bars"):
        assert browser.run(f"byId('{name}').getBoundingClientRect().bottom") <= height
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    brightness = np.mean([int(n) for n in re.findall(r"\d+", background)[:3]])
    assert (brightness < 100) == dark
    # drawn in the colour of the text, so it is seen
    colour = browser.run("[...context.getImageData(0, 0, 400, 400).data].filter((v, k, all) =>"
                         " k % 4 < 3 && all[k - k % 4 + 3] == 255)[0]")  # fmt: skip
    assert abs(colour - brightness) > 100


def test_seeds_that_disagree_are_shown(opened):
    """What the page says is what the networks say."""
    opened.run("put([[[100, 100], [300, 100], [200, 220], [300, 330], [90, 330], [100, 240]]])")
    opened.settle()
    votes = opened.run("answer().votes")
    shown = opened.run("[...byId('votes').children].map(v => +v.querySelector('b').textContent)")
    assert shown == votes
    said = text(opened, "words")
    assert ("disagree" in said) == (len(set(votes)) > 1)
    assert [vote != int(text(opened, "digit")) for vote in votes] == opened.run(
        "[...byId('votes').children].map(v => v.classList.contains('other'))"
    )


def test_a_run_of_ones_own(browser, here, small_dir):
    """One network, of any shape: no votes are shown."""
    flags = ["--dataset", "kmnist", "--data-dir", str(small_dir), "--hidden", "16", "8", "--quiet"]
    sweep_main([*flags, "--epochs", "1", "--seeds", "0:1", "--keep-weights", "--out", "s"])
    demo_main(["-o", "page.html", "--run", "s"])
    browser.open(here / "page.html")
    draw_by_mouse(browser, strokes_of(2))
    (logits,) = browser.run("answer().logits.map(l => [...l])")
    image = np.reshape(browser.run("[...answer().pixels]"), (1, 28, 28)).astype(np.uint8)
    expected = predict(load_committee("s"), image)[0, 0]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert browser.run("byId('votes').hidden")
    with Image.open(saved(browser, here / "digit.png")) as image:
        assert image.size == (400, 400)
