"""The page, in a real browser: a job from the keyboard to the playing video."""

from __future__ import annotations

from datetime import date
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

        # A file that is no image is said at once.
        (tmp_path / "cut.png").write_bytes((tmp_path / "image.png").read_bytes()[:-400])
        tab.give("#image", tmp_path / "cut.png")
        tab.wait("problem.textContent.startsWith('cut.png is no image')")

        # All settings of a video, and its image, for another one.
        tab.look("again.click()")
        tab.wait("image.files.length === 1 && !document.getElementById('preview').hidden")
        assert (
            tab.look("[form.elements.prompt, width, num_frames, seed].map((field) => field.value).join()")
            == "A <b>cup</b>,64,5,7"
        )

        # After a reload it is there as before, with its picture in the history.
        tab.call("Page.reload")
        tab.wait("location.hash && null !== document.querySelector('#history .thumb:not([hidden])')")
        tab.wait("video.currentTime > 0")
        assert str(date.today().year) in tab.look("document.querySelector('#history .note').textContent")

        tab.size(360, 740, dark=True)
        tab.look(
            "document.getElementById('caption-prompt').textContent = 'Rindfleischetikettierungsüberwachung'.repeat(3)"
        )
        assert tab.look("document.documentElement.scrollWidth") <= 360, "nothing sticks out on a phone"
        assert tab.look("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
        tab.picture(tmp_path / "phone.png")
        assert (tmp_path / "phone.png").stat().st_size > 5000

        assert not [each for each in tab.troubles if "400" not in each]

        # A video is deleted only by a second click, which is not where the first one was.
        tab.look("answer = document.getElementById('remove-dialog')")
        ask = "document.querySelector('#history .remove').click()"
        tab.look(ask)
        for key in ("Escape", "Enter"):
            tab.wait("answer.open")
            tab.press(key)
            tab.wait("!answer.open")
            tab.look(ask)
            assert tab.look("document.querySelectorAll('#history li').length") == 1
        # The end of one question is told after the next one has been asked, and is not the answer to that.
        tab.wait("answer.open")
        tab.look(f"answer.close(), {ask}")
        tab.wait("answer.open")
        tab.look("document.getElementById('remove-yes').click()")
        tab.wait("document.querySelectorAll('#history li').length === 0")
        assert not [each for each in tab.troubles if "400" not in each], "nothing is asked of a video that is gone"
