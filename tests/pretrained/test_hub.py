"""Models by name, where the hub does not answer, and where it does."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny import tiny_model

from ppo_engine.errors import UserError
from ppo_engine.pretrained.loading import load_model_config


class NotFound(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that has no model and does not answer before it is served; its cache is `tmp_path`.
    Whoever waits before asking again fails."""
    server = HTTPServer(("127.0.0.1", 0), NotFound, bind_and_activate=False)
    server.server_bind()  # a port of our own: who connects is refused as long as nobody listens
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("ppo_engine.pretrained.hub._set_offline", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    monkeypatch.chdir(tmp_path)
    yield server
    server.server_close()


def test_a_hub_that_does_not_answer_is_asked_once(hub):
    Path("policy").mkdir()
    with pytest.raises(UserError) as told:
        load_model_config("policyy")
    assert str(told.value).startswith(
        "Could not load a model from 'policyy': there is no such folder, no model of that name in "
        "the cache, and the Hugging Face hub does not answer: "
    )
    assert str(told.value).endswith(". Did you mean 'policy'?")


def test_a_cached_model_does_without_the_hub(hub, tmp_path):
    cached = tmp_path / "models--me--tiny"
    tiny_model().config.save_pretrained(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert load_model_config("me/tiny").num_hidden_layers == 2
    assert constants.HF_HUB_OFFLINE  # or each further file would be asked for, six times


def test_a_hub_that_answers_again_is_asked_for_another_model(hub, tmp_path):
    test_a_cached_model_does_without_the_hub(hub, tmp_path)
    hub.server_activate()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    load_model_config("me/tiny")
    with pytest.raises(UserError, match=r"'me/other' here\): .* not a valid model identifier"):
        load_model_config("me/other")
    assert not constants.HF_HUB_OFFLINE
    load_model_config("me/tiny")
    assert not constants.HF_HUB_OFFLINE
    hub.shutdown()


def test_offline_as_the_user_wants_it_stays(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    test_a_cached_model_does_without_the_hub(hub, tmp_path)
    with pytest.raises(UserError, match="does not answer"):
        load_model_config("me/other")
    assert constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_says_what_is_wrong(hub):
    hub.server_activate()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    with pytest.raises(UserError, match=r"'me/tiny' here\): .* not a valid model identifier"):
        load_model_config("me/tiny")
    hub.shutdown()


@pytest.mark.parametrize("name", ["runs/x/policy", "a b", "policy/"])
def test_a_name_that_no_model_can_have_is_not_asked_for(name, hub):
    with pytest.raises(UserError, match=r"no such folder, and a .* is called NAME or OWNER/NAME\."):
        load_model_config(name)
