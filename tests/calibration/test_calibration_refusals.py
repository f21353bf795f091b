"""Where the hub has no such data set, may not be asked or cannot be reached, calibration says so in words."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import pytest

from bivlm.calibration.frozen import freeze_samples
from bivlm.errors import InputError
from bivlm.recipe.calibration import CalibrationSettings


def freeze(tmp_path, name, **others):
    return freeze_samples(CalibrationSettings(source=f"hf:{name}", **others), tmp_path / "frozen")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "flickr30k"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(tmp_path, name):
    with pytest.raises(InputError, match=r"calibration.source: found .*, no such folder"):
        freeze(tmp_path, name)


def test_a_name_that_the_hub_does_not_allow_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"calibration.source: found 'hf:maker/an image', expected hf:OWNER/NAME"):
        freeze(tmp_path, "maker/an image")


def test_offline_the_hub_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"hub may not be asked for lmms-lab/flickr30k, .*HF_HUB_OFFLINE is set"):
        freeze(tmp_path, "lmms-lab/flickr30k")


def test_a_hub_that_cannot_be_reached_is_trouble_that_may_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"cannot be reached for the data set maker/images at revision abc"):
        freeze(tmp_path, "maker/images", revision="abc")


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        *((status, InputError, "no folder maker/none, and the hub gives no data set") for status in (401, 403, 404)),
        (501, ConnectionError, "the hub cannot be reached for the data set maker/none at revision abc"),
    ],
)
def test_what_the_hub_refuses_is_bad_input_and_its_troubles_are_not(tmp_path, monkeypatch, status, error, message):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(error, match=message):
            freeze(tmp_path, "maker/none", revision="abc")
        server.shutdown()
