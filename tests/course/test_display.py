"""Widgets: the live controls change the picture, the page's slider holds every frame, the twin is always drawn."""

import json
import re

import pytest

from klq_edu.core.improvement import boltzmann
from klq_edu.course import display
from klq_edu.course.chapters import c01_one_state


@pytest.fixture
def shown(monkeypatch):
    outputs = []
    monkeypatch.setattr(display, "display", lambda *a, **k: outputs.append((a[0], k)))
    return outputs


def test_live_controls_change_the_picture():
    box = display.live(c01_one_state.BANDIT)
    *controls, picture = box.children
    before = picture.value
    controls[0].value = 0.05
    assert [c.description for c in controls] == ["tau", "prize"] and picture.value != before
    controls[0].value = c01_one_state.BANDIT.twin[0]["tau"]
    assert picture.value == before


def test_page_slider_has_a_frame_for_every_choice():
    widget = c01_one_state.BANDIT
    small = display.Widget(
        widget.name, widget.draw, {"tau": [0.5, 1.0, 5.0], "prize": [3.0, 4.0]}, widget.twin, "", widget.alt
    )
    page = display.slider_page(small)
    data = json.loads(re.search(r'application/json">(.*?)</script>', page, re.DOTALL).group(1))
    assert data["choices"] == [[0.5, 1.0, 5.0], [3.0, 4.0]] and len(set(data["frames"])) == 6
    assert 'value="2"' in page and widget.alt in page


def test_explore_draws_the_twin_and_the_controls(shown, monkeypatch):
    monkeypatch.delenv(display.FRAMES, raising=False)
    display.explore(c01_one_state.BANDIT)
    (twin, settings), (caption, _), (controls, _) = shown
    assert twin["image/png"][:4] == b"\x89PNG" and twin["text/plain"] == c01_one_state.BANDIT.alt
    assert settings["metadata"]["image/png"] == {"alt": c01_one_state.BANDIT.alt, "klq_widget": "01-bandit"}
    assert c01_one_state.BANDIT.caption in caption.data and len(controls.children) == 3


def test_source_is_the_library_without_its_docstring(shown):
    display.source(boltzmann)
    text = shown[0][0].data
    assert "klq_edu/core/improvement.py" in text and "def boltzmann(" in text and "kl_penalised_argmax(q" in text
    assert '"""' not in text
