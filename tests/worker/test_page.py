"""The worker's page in a real browser, on real workers: what is seen is what the API says."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chromium import chromium, prefer, texts
from tests.worker.server import FAULTY, SCRIPTED, Server, serving, text_of, until, write_talker
from tools.make_model import write_model

SAID = "<img src=x onerror=\"document.title='owned'\"> é🌊 " + "wide" * 40
PARAMETERS: dict[str, Any] = {
    "max_tokens": 40,
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 50,
    "seed": 42,
    "logprobs": 4,
}
KEY = "key-of-this-test"

# `refengine serve` whose steps take as long as an argument says: there is time to look, and to stop it.
SLOW = """
import sys, time
from refengine import model
from refengine.cli import main as cli
seconds, step = float(sys.argv.pop(1)), model.Model.evaluate
def slow(*arguments, **keywords):
    time.sleep(seconds)
    return step(*arguments, **keywords)
model.Model.evaluate = slow
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _at_its_usual_size(request: pytest.FixtureRequest) -> None:
    if "browser" in request.fixturenames:
        browser = request.getfixturevalue("browser")
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.get("about:blank")  # the last page would go on asking its worker, which may have ended
        browser.get_log("browser")  # nothing of the tests before in its console


@pytest.fixture(scope="module")
def haiku() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("page"))


def open_page(browser: Any, server: Server, **fields: object) -> None:
    browser.get(server.url + "/")
    for name, value in fields.items():
        fill(browser, name, value)
    browser.find_element("css selector", "[name=mode][value=plain]").click()


def fill(browser: Any, name: str, value: object) -> None:
    field = browser.find_element("name", name)
    field.clear()
    if max(map(ord, str(value)), default=0) < 0x10000:
        field.send_keys(str(value))
    else:  # Some versions of ChromeDriver cannot type characters beyond the basic multilingual plane.
        setting = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
        browser.execute_script(setting, field, str(value))


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def status(browser: Any) -> str:
    return texts(browser, "#status")[0]


def generate(browser: Any) -> None:
    """Until the answer is there."""
    browser.find_element("id", "run").click()
    until(lambda: status(browser).startswith(("Done", "Stopped", "Failed")), 30)


def answer(browser: Any) -> list[str]:
    """The text of each of its tokens."""
    return list(browser.execute_script("return [...document.querySelectorAll('.token')].map(e => e.textContent);"))


def n_tokens(browser: Any) -> int:
    return int(browser.execute_script("return document.querySelectorAll('.token').length;"))


def alternatives(browser: Any) -> list[list[str]]:
    """Cells of the table, whether its token was drawn included in the second."""
    script = "return [...document.querySelectorAll('#alternatives tr')].map(r => [...r.cells].map(c => c.textContent));"
    return list(browser.execute_script(script))


def shown(probability: float) -> str:
    """As the page writes it."""
    if probability >= 0.001:
        return f"{probability:.4f}"
    mantissa, exponent = f"{probability:.2e}".split("e")
    return f"{mantissa}e−{-int(exponent)}"


def expected_rows(token: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rank, id, log-probability and probability of each row but the last."""
    rows = [(str(i + 1), t["id"], t["logprob"]) for i, t in enumerate(token["top"])]
    if token["id"] not in [t["id"] for t in token["top"]]:
        rows.append((f"> {len(token['top'])}", token["id"], token["logprob"]))
    return [(rank, str(i), f"{p:.4f}".replace("-", "−"), shown(math.exp(p))) for rank, i, p in rows]


def problems(browser: Any) -> list[str]:
    """What the console has of errors and warnings."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def fits(browser: Any) -> bool:
    """Nothing is wider than the window."""
    return bool(browser.execute_script("return document.documentElement.scrollWidth <= innerWidth;"))


@pytest.mark.ci
def test_a_click_on_a_token_shows_what_the_api_says_of_it(browser: Any, haiku: Server) -> None:
    prompt = "Write a haiku about rain"
    tokens = [data for event, data in haiku.run(prompt=prompt, **PARAMETERS) if event == "token"]
    open_page(browser, haiku, prompt=prompt, **PARAMETERS)
    generate(browser)
    assert answer(browser) == [token["t"] for token in tokens]
    in_top = [any(t["id"] == token["id"] for t in token["top"]) for token in tokens]
    assert False in in_top, "of this seed no token is below the alternatives: take another"
    for i in (1, 4, in_top.index(False)):
        browser.find_elements("css selector", ".token")[i].click()
        rows = alternatives(browser)
        *seen, rest = [(r[0], r[2], r[3], r[4]) for r in rows]
        assert seen == expected_rows(tokens[i])
        assert [r[2] for r in rows if "drawn" in r[1]] == [str(tokens[i]["id"])]
        everything = sum(math.exp(float(r[2].replace("−", "-"))) for r in seen) + float(rest[3].replace("−", "-"))
        assert everything == pytest.approx(1, abs=1e-3)
        assert rows[-1][1] == "all others"
    assert texts(browser, ".token[aria-selected=true]") == [tokens[i]["t"].strip()]
    assert problems(browser) == []


@pytest.mark.ci
def test_a_chat_goes_through_the_template(browser: Any, haiku: Server) -> None:
    browser.get(haiku.url + "/")
    chosen = "return document.querySelector('[name=mode]:checked').value;"
    assert browser.execute_script(chosen) == "chat"
    for name, value in PARAMETERS.items():
        fill(browser, name, value)
    generate(browser)
    prompt = browser.find_element("id", "prompt").get_attribute("value")
    asked = {key: value for key, value in PARAMETERS.items() if key != "logprobs"}
    asked |= {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": 4}
    choice = httpx.post(haiku.url + "/v1/chat/completions", json=asked, timeout=30).json()["choices"][0]
    assert "".join(answer(browser)) == choice["message"]["content"]
    tokens = choice["logprobs"]["content"]
    assert n_tokens(browser) == len(tokens)
    for i, token in list(enumerate(tokens))[::4]:  # a click takes a browser long
        browser.find_elements("css selector", ".token")[i].click()
        rows = [(row[3], row[4]) for row in alternatives(browser)[:4]]
        probabilities = [t["logprob"] for t in token["top_logprobs"]]
        assert rows == [(f"{p:.4f}".replace("-", "−"), shown(math.exp(p))) for p in probabilities]
        assert texts(browser, "tr.drawn .piece") == [f"{json.dumps(token['token'], ensure_ascii=False)}drawn"]
    fill(browser, "seed", "")
    generate(browser)
    seed = texts(browser, "#result dd")[-1]
    words = answer(browser)
    fill(browser, "seed", seed)
    generate(browser)
    assert answer(browser) == words
    assert problems(browser) == []


@pytest.mark.ci
def test_a_chat_is_stopped_too(browser: Any) -> None:
    with serving(script=(SLOW, 0.5)) as server:
        browser.get(server.url + "/")
        browser.find_element("id", "run").click()
        until(lambda: n_tokens(browser) > 1)
        browser.find_element("id", "stop").click()
        until(lambda: status(browser).startswith("Stopped"))
        assert server.metric("worker_requests_total", outcome="cancelled") == 1
        fill(browser, "top_p", 7)
        generate(browser)
        assert texts(browser, "#error")[0].startswith("400 INVALID_REQUEST top_p: given 7")
        assert browser.switch_to.active_element.get_attribute("name") == "top_p"


@pytest.mark.ci
def test_a_model_without_a_template(browser: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "plain.gguf", "gpt2", "Q8_0")
    with serving("--model", tmp_path / "plain.gguf") as server:
        browser.get(server.url + "/")
        assert not browser.find_element("css selector", "[name=mode][value=chat]").is_enabled()
        fill(browser, "max_tokens", 5)
        fill(browser, "seed", 1)
        generate(browser)
        assert status(browser) == "Done: 5 tokens, ended by length"


def test_alternatives_are_written_as_text_with_their_blanks(browser: Any, haiku: Server) -> None:
    open_page(browser, haiku, temperature=0, seed=1)
    generate(browser)
    index = next(i for i, t in enumerate(answer(browser)) if t.startswith(" "))
    browser.find_elements("css selector", ".token")[index].click()
    drawn = next(row[1] for row in alternatives(browser) if "drawn" in row[1])
    assert drawn == f'"{answer(browser)[index]}"drawn'  # not Ġ, as the vocabulary writes a blank


def test_tokens_are_seen_while_they_come_and_stop_ends_them(browser: Any, talker: Path) -> None:
    with serving("--model", talker, script=(SLOW, 0.02)) as server:
        open_page(browser, server, prompt="go on", max_tokens=2048, seed=5)
        browser.find_element("id", "run").click()
        seen = [0]
        for _ in range(5):
            until(lambda: n_tokens(browser) > seen[-1])
            seen.append(n_tokens(browser))
            assert browser.find_element("id", "stop").is_displayed()
        assert seen[-1] < 1000
        browser.find_element("id", "stop").click()
        until(lambda: status(browser).startswith("Stopped"))
        n = n_tokens(browser)
        assert status(browser) == f"Stopped after {n:,} tokens"
        server.settled()
        assert server.metric("worker_requests_total", outcome="cancelled") == 1
        time.sleep(0.3)
        assert n_tokens(browser) == n
        assert browser.find_element("id", "run").is_displayed()
        assert texts(browser, "#error") == [""]
    until(lambda: texts(browser, "#state") == ["unreachable"])


@pytest.mark.ci
def test_everything_by_keyboard(browser: Any, talker: Path, haiku: Server) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def focused() -> str:
        return str(browser.switch_to.active_element.get_attribute("id"))

    def tab_to(name: str) -> None:
        for _ in range(30):
            if focused() == name:
                return
            press(browser, Keys.TAB)
        raise AssertionError(f"Tab does not lead to {name}")

    browser.get(haiku.url + "/")
    tab_to("prompt")
    width = "return parseFloat(getComputedStyle(document.activeElement).outlineWidth);"
    assert browser.execute_script(width) >= 2
    ActionChains(browser).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).send_keys("A haiku").perform()
    tab_to("seed")
    press(browser, "7")
    tab_to("run")
    press(browser, Keys.ENTER)
    until(lambda: status(browser).startswith("Done"))
    assert focused() == "run"
    for _ in range(30):
        if "token" in str(browser.switch_to.active_element.get_attribute("class")).split():
            break
        press(browser, Keys.TAB)
    assert browser.execute_script(width) >= 2
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert not browser.find_element("id", "token").is_displayed()
    press(browser, Keys.ENTER)
    assert texts(browser, "#token-title")[0].startswith("Token 2: ")
    assert len(alternatives(browser)) >= 6
    press(browser, Keys.ARROW_LEFT)
    assert texts(browser, "#token-title")[0].startswith("Token 1: ")
    press(browser, Keys.END)
    assert texts(browser, "#token-title")[0].startswith(f"Token {n_tokens(browser) - 1}: ")
    press(browser, Keys.ARROW_UP, Keys.HOME)
    assert texts(browser, "#token-title")[0].startswith("Token 0: ")
    press(browser, Keys.TAB)
    assert "token" not in str(browser.switch_to.active_element.get_attribute("class")).split()

    with serving("--model", talker, script=(SLOW, 0.02)) as server:
        open_page(browser, server, seed=5)
        browser.find_element("id", "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
        until(lambda: n_tokens(browser) > 3)
        assert focused() == "prompt"
        press(browser, Keys.ESCAPE)
        until(lambda: status(browser).startswith("Stopped"))


@pytest.mark.ci
def test_a_phone_is_wide_enough(browser: Any, talker: Path) -> None:
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    with serving("--model", talker, script=(SCRIPTED, SAID)) as server:
        open_page(browser, server, max_tokens=500, logprobs=20)
        until(lambda: texts(browser, "#health dd"))
        assert fits(browser)
        generate(browser)
        browser.find_elements("css selector", ".token")[300].click()
        browser.find_element("css selector", "#request summary").click()
        assert fits(browser)
        fill(browser, "temperature", 3)
        browser.find_element("id", "run").click()
        until(lambda: texts(browser, "#error") != [""])
        assert fits(browser)
        script = "return [...document.querySelectorAll('#alternatives td.right')].every(c => c.offsetHeight < 40);"
        assert browser.execute_script(script), "a number is broken into lines"


@pytest.mark.ci
def test_refusals_and_failures_are_shown(browser: Any, talker: Path, tmp_path: Path) -> None:
    flag = tmp_path / "fail"
    with serving("--model", talker, "--max-tokens-out", 100, script=(FAULTY, flag)) as server:
        open_page(browser, server, temperature=3)
        for field, value in {"temperature": 3, "max_tokens": 101, "seed": "many", "top_p": 1.5, "prompt": ""}.items():
            body = {"job_id": "x", "prompt": "go on", field: value}
            refusal = httpx.post(server.url + "/execute", json=body).json()
            open_page(browser, server, **{"prompt": "go on", "max_tokens": 5, field: value})
            generate(browser)
            assert texts(browser, "#error") == [f"400 INVALID_REQUEST {refusal['message']}"]
            focus = browser.switch_to.active_element
            assert (focus.get_attribute("name"), focus.get_attribute("aria-invalid")) == (field, "true")
        open_page(browser, server, max_tokens=20)
        flag.write_text("memory")
        generate(browser)
        (error,) = texts(browser, "#error")
        assert error.startswith("VRAM_OOM ")
        assert "may be tried again" in error
        generate(browser)
        assert status(browser).startswith("Done: 20 tokens")
        assert not browser.find_element("id", "error").is_displayed()
        assert texts(browser, "[aria-invalid]") == []


def test_health_and_metrics_are_those_of_the_worker(browser: Any, haiku: Server) -> None:
    open_page(browser, haiku, seed=3)
    generate(browser)
    n = n_tokens(browser)

    def figures(name: str) -> dict[str, str]:
        return dict(zip(texts(browser, f"#{name} dt"), texts(browser, f"#{name} dd"), strict=True))

    def total() -> float:
        return haiku.metric("worker_tokens_generated_total")

    until(lambda: texts(browser, "#generated") == [f"{total():,.0f} in all"])
    assert total() >= n
    health = httpx.get(haiku.url + "/health").json()
    assert texts(browser, "#state") == [health["status"]] == ["healthy"]
    assert texts(browser, "#model") == [health["model"]]
    seen = figures("health")
    assert seen["device"] == health["device"] == "cpu"
    assert seen["vocabulary"] == f"{health['vocab_size']:,}"
    assert seen["tokenizer"] == health["tokenizer_kind"]
    until(lambda: figures("blocks")["used"] == "0")
    blocks = {name: haiku.metric("worker_kv_blocks", state=name) for name in ("used", "cached", "free")}
    assert {name: float(value) for name, value in figures("blocks").items()} == blocks
    assert figures("requests")["batch size"] == figures("requests")["queue depth"] == "0"
    assert float(figures("requests")["completed"]) == haiku.metric("worker_requests_total", outcome="eos")
    p50, p95 = map(float, figures("latency")["first token"].split(", "))
    assert 0 < p50 <= p95
    assert list(figures("vram")) == ["weights", "KV cache", "workspace"]
    assert texts(browser, "#vram-sum") == ["none on cpu"]
    peak = float(texts(browser, "#peak")[0].removeprefix("peak ").replace(",", ""))
    assert 0 < peak <= total() * 10


@pytest.mark.ci
def test_the_models_text_is_text(browser: Any, talker: Path) -> None:
    with serving("--model", talker, script=(SCRIPTED, SAID)) as server:
        n = len(SAID.encode())
        open_page(browser, server, prompt=SAID, max_tokens=n, temperature=0)
        generate(browser)
        plain = {"prompt": SAID, "max_tokens": n, "temperature": 0}
        assert "".join(answer(browser)) == text_of(server.run(**plain))
        assert "é🌊" in "".join(answer(browser))
        index = answer(browser).index("")  # the first byte of é, which is no text yet
        browser.find_elements("css selector", ".token")[index].click()
        assert "\\xc3" in next(row[1] for row in alternatives(browser) if "drawn" in row[1])
        assert browser.execute_script("return document.images.length;") == 0
        assert browser.title == "refengine worker"
        assert problems(browser) == []


def test_a_seed_is_a_uint64_that_can_be_kept(browser: Any, haiku: Server) -> None:
    largest = 2**64 - 1
    open_page(browser, haiku, seed=largest)
    generate(browser)
    assert dict(zip(texts(browser, "#result dt"), texts(browser, "#result dd"), strict=True))["seed"] == str(largest)
    assert f'"seed":{largest}' in texts(browser, "#curl")[0]
    fill(browser, "seed", "")
    generate(browser)
    drawn, words = texts(browser, "#result dd")[-1], answer(browser)
    browser.find_element("css selector", "#result button").click()
    assert browser.find_element("id", "seed").get_attribute("value") == drawn
    generate(browser)
    assert answer(browser) == words


def test_nothing_comes_from_elsewhere(browser: Any, haiku: Server) -> None:
    for path in ("/", "/docs"):
        headers = httpx.get(haiku.url + path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert "unsafe" not in str(policy)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        browser.get(haiku.url + path)
        until(lambda: texts(browser, "#health dd, .opblock"))
        names = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name);")
        assert names
        assert [name for name in names if not name.startswith((haiku.url, "data:"))] == []
        assert problems(browser) == []
        tried = browser.execute_async_script("""
            const done = arguments[0], image = new Image();
            document.addEventListener("securitypolicyviolation", e => done(e.effectiveDirective));
            image.src = "http://192.0.2.1/a.png"; document.body.append(image);""")
        assert tried == "img-src"
        browser.get_log("browser")


def test_light_and_dark(browser: Any, haiku: Server) -> None:
    open_page(browser, haiku)
    found = {}
    for scheme in ("light", "dark"):
        prefer(browser, scheme)
        found[scheme] = browser.execute_script("return getComputedStyle(document.body).backgroundColor;")
    prefer(browser, "light")
    assert found == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}


def test_every_input_has_a_label(browser: Any, haiku: Server) -> None:
    open_page(browser, haiku)
    script = """return [...document.querySelectorAll("input, textarea, button")]
        .filter(e => !(e.labels?.length || e.textContent.trim())).map(e => e.outerHTML);"""
    assert browser.execute_script(script) == []


@pytest.mark.ci
def test_a_worker_with_a_key(browser: Any) -> None:
    with serving("--api-key", KEY) as server:
        assert httpx.get(server.url + "/").status_code == httpx.get(server.url + "/docs").status_code == 401
        browser.get(server.url.replace("//", f"//x:{KEY}@") + "/")
        until(lambda: texts(browser, "#blocks dd"))
        generate(browser)
        assert status(browser).startswith("Done")
