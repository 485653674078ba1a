"""The ranking page's server: what it answers, and whom it refuses."""

from __future__ import annotations

import json

import pytest
from ranking import candidates, read_rows

pytest.importorskip("starlette", reason="pip install 'ppo-engine[pages]'")

from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from ppo_engine.pages.guard import LARGEST_BODY, Guard, is_own_name, new_token
from ppo_engine.pages.ranking.app import RankingPage
from ppo_engine.pages.ranking.plan import Task, plan
from ppo_engine.pages.ranking.work import Work

TOKEN = "t" * 32
HOST = "http://127.0.0.1:8000"
OWN = {"Origin": HOST}


@pytest.fixture
def work(tmp_path):
    work = Work(candidates(3), tmp_path / "r.jsonl", 0)
    yield work
    work.close()


@pytest.fixture
def client(work):
    page = RankingPage(work, guidelines="# Be kind")
    return TestClient(Guard(page.app(TOKEN), TOKEN, "127.0.0.1"), base_url=HOST)


def post(client, path, body, **headers):
    return client.post(f"/{TOKEN}/{path}", json=body, headers=OWN | headers)


def get(client, path):
    return client.get(f"/{TOKEN}/{path}")


def decide(client, said):
    """Sends a decision, with what the page is shown of its task."""
    shown = get(client, f"task?annotator={said['annotator']}&place={said['place']}").json()["shown"]
    return post(client, "decision", said | {"shown": shown})


def test_a_decision_from_the_first_look_to_undo(client, work, tmp_path):
    assert get(client, "session").json() == {
        "annotator": "",
        "people": [],
        "guidelines": "# Be kind",
    }
    task = get(client, "task?annotator=ada").json()
    assert task["prompt"] == [{"role": "user", "text": "Question 0?"}]
    assert (task["place"], task["done"], task["previous"], task["following"]) == (0, 0, None, 1)
    assert task["decision"] is None and task["secondsLeft"] is None
    assert sorted(card["text"] for card in task["cards"]) == work.candidates[0].row["responses"]
    assert [c["finished"] for c in task["cards"]] == [
        "Answer D" not in c["text"] for c in task["cards"]
    ]
    said = {"annotator": "ada", "place": 0, "ranks": [2, 0, None, 2], "seconds": 3.14}
    following = decide(client, said).json()
    assert (following["place"], following["done"], following["secondsLeft"]) == (1, 1, 3.1 * 2)
    [row] = read_rows(tmp_path / "r.jsonl")
    by_card = [row["ranks"][number] for number in row["order"]]
    assert by_card == [1, 0, None, 1]
    texts = [row["responses"][number] for number in row["order"]]
    assert texts == [card["text"] for card in task["cards"]]
    assert get(client, "task?annotator=ada&place=0").json()["decision"] == {
        "ranks": by_card,
        "mark": "",
    }
    assert get(client, "earlier?annotator=ada").json() == [
        {"place": 0, "text": "Question 0?", "mark": ""}
    ]
    assert get(client, "session").json()["people"] == ["ada"]
    undone = post(client, "undo", {"annotator": "ada"}).json()
    assert (undone["place"], undone["done"], undone["decision"]) == (0, 0, None)
    assert post(client, "undo", {"annotator": "ada"}).status_code == 400


def test_at_the_end_it_says_so(client):
    for place in range(3):
        mark = {"annotator": "ada", "place": place, "mark": "skipped", "seconds": 1}
        last = decide(client, mark).json()
    assert "place" not in last and last["done"] == last["total"] == 3 and last["previous"] == 2
    assert "Nothing was ranked a second time yet" in last["agreement"]
    assert get(client, "agreement?annotator=ada").json() == last["agreement"]


def test_whom_the_command_names_is_the_one(work, tmp_path):
    page = RankingPage(work, annotator="Ada")
    client = TestClient(Guard(page.app(TOKEN), TOKEN, "127.0.0.1"), base_url=HOST)
    assert get(client, "session").json()["annotator"] == "Ada"
    decide(client, {"annotator": "eve", "place": 0, "mark": "all_bad", "seconds": 1})
    assert read_rows(tmp_path / "r.jsonl")[0]["annotator"] == "Ada"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ([], "no JSON object"),
        ({}, "A name must have"),
        ({"annotator": "a"}, "A place is a whole number"),
        ({"annotator": "a", "place": 99}, "There is no place 99"),
        ({"annotator": "a", "place": 0}, "4 whole numbers"),
        ({"annotator": "a", "place": 0, "ranks": {"0": 1}}, "4 whole numbers"),
        ({"annotator": "a", "place": 0, "mark": ["x"]}, "The mark must be one of"),
        ({"annotator": "a" * 100, "place": 0}, "A name must have"),
    ],
)
def test_a_mistake_is_told_in_words(client, body, problem):
    found = get(client, "task?annotator=a&place=0").json()
    answer = post(client, "decision", body and body | {"shown": found["shown"]})
    assert answer.status_code == 400 and problem in answer.json()["error"]


def test_what_is_not_kept_is_told(client, work):
    work.out.write_text("another program's\n")
    said = {"annotator": "ada", "place": 0, "ranks": [0, 1, 2, 3], "seconds": 1}
    answer = decide(client, said)
    assert answer.status_code == 400 and "another program" in answer.json()["error"]
    assert get(client, "task?annotator=ada").json()["done"] == 0


def test_ranks_are_kept_of_the_cards_that_were_shown(tmp_path):
    """What comes again is shuffled otherwise than it was ranked first, so that a page that shows it
    before that, in another tab, shows it otherwise."""
    work = Work(candidates(20), tmp_path / "r.jsonl", 0)
    page = RankingPage(work, annotator="ada")
    client = TestClient(Guard(page.app(TOKEN), TOKEN, "127.0.0.1"), base_url=HOST)
    tasks = plan(20, 0, "ada")
    [again] = [place for place, task in enumerate(tasks) if task.again]
    first = tasks.index(Task(tasks[again].candidate))
    ranked = {"ranks": [0, 1, 2, 3], "seconds": 1}
    before = get(client, f"task?place={again}").json()
    decide(client, ranked | {"annotator": "ada", "place": first})
    after = get(client, f"task?place={again}").json()
    assert before["shown"] != after["shown"] and before["cards"] != after["cards"]
    late = post(client, "decision", ranked | {"place": again, "shown": before["shown"]})
    assert late.status_code == 400 and "Load this page again" in late.json()["error"]
    assert not work.repeats.path.exists()
    post(client, "decision", ranked | {"place": again, "shown": after["shown"]})
    [kept] = read_rows(work.repeats.path)
    best = kept["responses"][kept["ranks"].index(0)]
    assert best == after["cards"][0]["text"]
    work.close()


def test_its_files_and_nothing_else(client):
    for name, kind in (
        ("", "text/html"),
        ("ranking.css", "text/css"),
        ("ranking.js", "javascript"),
        ("markdown.js", "javascript"),
    ):
        answer = get(client, name)
        assert answer.status_code == 200 and kind in answer.headers["content-type"]
    for path in ("../app.py", "%2e%2e/app.py", "nothing.js", "decision", "undo"):
        assert get(client, path).status_code in (404, 405)


def test_the_page_has_no_script_or_style_within_it(client):
    page = get(client, "").text
    for word in ("<style", " style=", " onclick", "javascript:", "<script>", "http://", "https://"):
        assert word not in page
    policy = get(client, "").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy
    assert "unsafe" not in policy and "img-src 'none'" in policy


def test_every_answer_has_the_headers(client):
    wrong = client.get("/wrong/", headers={"Host": "evil.example"})
    for answer in (get(client, ""), get(client, "session"), client.get("/wrong/"), wrong):
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


WITHOUT = ["/", "/task", "/T/", f"/{TOKEN[1:]}/", f"/{TOKEN}x/", "//"]


@pytest.mark.parametrize("path", WITHOUT)
def test_without_the_token_no_app_is_asked(path):
    """Whatever that would answer."""
    client = TestClient(Guard(PlainTextResponse("mine"), TOKEN, "127.0.0.1"), base_url=HOST)
    assert client.get(f"/{TOKEN}/").text == "mine"
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("path", WITHOUT)
def test_without_the_token_nothing_is_there(client, path):
    answer = client.get(path)
    assert answer.status_code == 404 and "Question" not in answer.text
    assert "session" not in answer.text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "0.0.0.0", "", "[::1"]
)
def test_another_sites_name_is_refused(client, host):
    answer = client.get(f"/{TOKEN}/session", headers={"Host": host})
    assert answer.status_code == 421 and "guidelines" not in answer.text


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "127.0.0.1:1", "[::1]:8000"])
def test_a_tunnels_port_is_none_of_our_business(client, host):
    assert client.get(f"/{TOKEN}/session", headers={"Host": host}).status_code == 200
    answer = client.post(
        f"/{TOKEN}/undo",
        json={"annotator": "a"},
        headers={"Host": host, "Origin": f"http://{host}"},
    )
    assert answer.status_code == 400  # nothing to take back: it was asked


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "https://127.0.0.1:8000", "http://127.0.0.1"]
)
def test_another_sites_page_changes_nothing(client, work, origin):
    said = {"annotator": "ada", "place": 0, "ranks": [0, 1, 2, 3], "seconds": 1}
    headers = {} if origin is None else {"Origin": origin}
    answer = client.post(f"/{TOKEN}/decision", json=said, headers=headers)
    assert answer.status_code == 403 and not work.out.exists()


def test_long_bodies_are_not_read(client, work):
    def parts():
        yield json.dumps({"annotator": "ada"}).encode()

    url = f"/{TOKEN}/decision"
    assert client.post(url, content=b"x" * (LARGEST_BODY + 1), headers=OWN).status_code == 413
    assert client.post(url, content=parts(), headers=OWN).status_code == 413


def test_names_of_a_server_for_others():
    for host in ("10.1.2.3", "10.1.2.3:80", "[fe80::1]:80", "localhost"):
        assert is_own_name(host, "0.0.0.0") and is_own_name(host, "::")
    assert not is_own_name("evil.example", "0.0.0.0")
    assert is_own_name("box.lan:1", "Box.lan") and not is_own_name("10.1.2.3", "box.lan")
    assert not is_own_name("10.1.2.3", "127.0.0.1")


def test_tokens_are_long_and_new():
    assert len({new_token() for _ in range(100)}) == 100 and len(new_token()) >= 32
