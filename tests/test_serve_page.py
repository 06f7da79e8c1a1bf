"""The page, in a real browser: a job from the keyboard to the playing video."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CHROMIUM, browser
from pipelines import picture
from servers import Server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def test_from_the_keyboard_to_the_playing_video(server: Server, tmp_path: Path) -> None:
    picture(height=90, width=160).save(tmp_path / "image.png")
    with browser(tmp_path / "profile") as tab:
        tab.size(1280, 860)
        tab.go(server.address)
        tab.wait("document.getElementById('num_frames').step === '4'")
        tab.give("#image", tmp_path / "image.png")
        tab.look("document.getElementById('prompt').focus()")
        for words in ("A <b>cup</b>", "64", "64", "5", "3", "7"):
            tab.type(words)
            tab.press("Tab")
        tab.press("Enter")  # In the field after them.
        tab.wait("document.getElementById('video').currentTime > 0")
        assert tab.look("[video.videoWidth, video.videoHeight].join()") == "64,64"
        assert tab.look("document.getElementById('facts').textContent").startswith(
            "64\u00d764 \u00b7 5 frames \u00b7 3 steps \u00b7 seed 7"
        )
        assert tab.look("document.querySelector('#history .words').textContent") == "A <b>cup</b>"

        # A wrong size is said by the server, and the page says it.
        tab.look("form.noValidate = true, width.value = 65, form.requestSubmit()")
        tab.wait("problem.textContent.startsWith('width 65 is not a multiple of 16')")

        tab.size(360, 740, dark=True)
        assert tab.look("document.documentElement.scrollWidth") <= 360, "nothing sticks out on a phone"
        assert tab.look("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
        tab.picture(tmp_path / "phone.png")
        assert (tmp_path / "phone.png").stat().st_size > 5000

        tab.look("document.querySelector('#history .remove').click()")
        tab.wait("!document.querySelector('#history li')")
        complaints = [each for each in tab.troubles if "400" not in each]
        assert not complaints
