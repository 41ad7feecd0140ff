"""The page in a real browser: the fault is seen without scrolling, and its figures are those of the JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refengine.validate.report_html import exponent, to_html
from refengine.validate.report_json import to_json
from refengine.validate.report_text import number
from refengine.validate.run import validate
from tests.chromium import chromium, prefer, texts
from tests.cli_runner import cli
from tests.model_files import ModelFiles
from tests.validate.zoo import FAULTS, capture, load


def report_of(fault_name: str, tiny_model: ModelFiles) -> dict[str, Any]:
    fault = next(f for f in FAULTS if f.name == fault_name)
    path = tiny_model(fault.model)
    broken = load(path, fault.model)
    fault.apply(broken)
    return to_json(validate(load(path, fault.model), capture(broken), model_sha256="ab" * 32))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


def show(browser: Any, page: str, folder: Path) -> None:
    (folder / "report.html").write_text(page, encoding="utf-8")
    browser.get((folder / "report.html").as_uri())


def is_in_view(browser: Any, selector: str) -> bool:
    script = """const r = document.querySelector(arguments[0]).getBoundingClientRect();
        return r.width > 0 && r.top >= 0 && r.left >= 0 && r.bottom <= innerHeight && r.right <= innerWidth;"""
    return bool(browser.execute_script(script, selector))


@pytest.mark.parametrize("fault", ["no bias on Q of layer 1", "one swapped scale nibble in Q4_K", "no sinks"])
def test_the_fault_is_seen_without_scrolling(fault: str, browser: Any, tiny_model: ModelFiles, tmp_path: Path) -> None:
    report = report_of(fault, tiny_model)
    show(browser, to_html(report), tmp_path)
    name = report["first_own_error"]
    assert texts(browser, "h1") == [f"Diverges at {name}"]
    assert browser.execute_script("return scrollY") == 0
    assert is_in_view(browser, "#first")
    assert is_in_view(browser, "#first-nmse")
    framed = "#map-own .own-error a"
    assert is_in_view(browser, framed)
    labels = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.getAttribute('aria-label'));", framed
    )
    wrong = [t["name"] for t in report["tensors"] if t["own_error"]]
    assert sorted(label.partition(":")[0] for label in labels) == sorted(n for n in wrong if "-" in n)
    for cause in report["causes"]:
        assert f"It is what comes out if {cause}." in texts(browser, ".cause")


def test_every_figure_is_that_of_the_json(browser: Any, tiny_model: ModelFiles, tmp_path: Path) -> None:
    report = report_of("gate and up swapped", tiny_model)
    show(browser, to_html(report), tmp_path)
    rows = [row.split("\t") for row in browser.execute_script(
        "return [...document.querySelectorAll('#tensors tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent).join('\\t'));"
    )]  # fmt: skip
    assert len(rows) == len(report["tensors"])
    for cells, t in zip(rows, report["tensors"], strict=True):
        assert cells[0] == t["name"]
        assert cells[1:5] == [number(v) for v in (t["local"]["nmse"], t["floor"], t["threshold"], t["total"]["nmse"])]
        assert [cells[6], cells[7]] == [number(t["local"]["max_abs"]), number(t["local"]["max_rel"])]
        assert json.loads(cells[9]) == t["local"]["worst"]
        assert float(cells[10]) == pytest.approx(t["local"]["worst_value"], rel=1e-6)
    box = "document.querySelector('#tensors').parentElement"
    page, needed, shown = browser.execute_script(f"return [innerWidth, {box}.scrollWidth, {box}.clientWidth];")
    assert page == 1280
    assert needed <= shown, "the last columns are hidden"
    for which, key in (("own", "local"), ("total", "total")):
        maps = f"table.map.{which} td a"
        found = dict(zip(
            browser.execute_script(f"return [...document.querySelectorAll('{maps}')].map(e => e.hash);"),
            texts(browser, maps), strict=True,
        ))  # fmt: skip
        assert found == {f"#t{i}": exponent(t[key]["nmse"]) for i, t in enumerate(report["tensors"])}
    logits = report["logits"]
    for which in ("mean", "p99", "max"):
        assert texts(browser, f"#kl-{which}") == [number(logits[f"kl_{which}"])]
    titles = browser.execute_script("return [...document.querySelectorAll('.bars span')].map(e => e.title);")
    assert titles == [f"position {i}: {number(kl)} nats" for i, kl in enumerate(logits["kl"])]
    assert len(texts(browser, "#flips tbody tr")) == len(logits["flips"])
    assert report["facts"]["model_sha256"] in texts(browser, "dd")


def test_it_can_be_read_by_keyboard_and_in_the_dark(browser: Any, tiny_model: ModelFiles, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    report = report_of("no sinks", tiny_model)
    show(browser, to_html(report), tmp_path)
    body = browser.find_element("tag name", "body")
    body.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == report["first_own_error"]
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    index = [t["name"] for t in report["tensors"]].index(report["first_own_error"])
    # It leads to the row; the browser scrolls there in its own time.
    WebDriverWait(browser, 10).until(lambda _: is_in_view(browser, f"#t{index} td"))
    colour = "return getComputedStyle(document.body).backgroundColor;"
    found = {}
    for scheme in ("light", "dark"):
        prefer(browser, scheme)
        found[scheme] = browser.execute_script(colour)
    assert found == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}


def test_agreement_and_nothing_compared(browser: Any, tiny_model: ModelFiles, tmp_path: Path) -> None:
    from dataclasses import replace

    model = load(tiny_model("llama-q4_0"), "llama-q4_0")
    seen = capture(model)
    show(browser, to_html(to_json(validate(model, seen))), tmp_path)
    assert texts(browser, "h1") == ["Agrees"]
    nothing = replace(seen, tensors={"mine": np.zeros(3)})
    show(browser, to_html(to_json(validate(model, nothing))), tmp_path)
    assert texts(browser, "h1") == ["Nothing compared"]


def test_another_engines_text_is_text(browser: Any, tiny_model: ModelFiles, tmp_path: Path) -> None:
    from dataclasses import replace

    model = load(tiny_model("llama-q4_0"), "llama-q4_0")
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    seen = capture(model)
    seen = replace(seen, engine=evil, numerics=evil, flags={evil: evil}, tensors={**seen.tensors, evil: np.zeros(2)})
    show(browser, to_html(to_json(validate(model, seen))), tmp_path)
    assert "owned" not in browser.title.replace(evil, "")
    assert browser.execute_script("return document.scripts.length + document.images.length;") == 0


def test_nothing_is_fetched(tiny_model: ModelFiles) -> None:
    page = to_html(report_of("no sinks", tiny_model))
    assert not any(word in page for word in ("http:", "https:", "src=", "@import", "url(", "<link"))


def test_the_command_writes_it_beside_the_json(tiny_model: ModelFiles, tmp_path: Path) -> None:
    model, dump = tiny_model("llama-q4_0"), tmp_path / "d.safetensors"
    given = ("--ids", "5,6,7,8", "--model", model, "--numerics", "llamacpp", "--output", dump)
    assert cli("trace", *given).code == 0
    values = load_file(dump)
    values["ffn_up-1"][2, 3] = np.nan
    save_file(values, dump)
    result = cli("validate", "--model", model, "--peer", tmp_path / "d.manifest.json",
                 "--html", tmp_path / "r.html", "--json", tmp_path / "r.json")  # fmt: skip
    assert result.code == 1
    page, report = (tmp_path / "r.html").read_text(), json.loads((tmp_path / "r.json").read_text())
    assert page == to_html(report)
    assert report["first_own_error"] == "ffn_up-1"
    assert "; 1 of " in page
    assert "values are NaN or infinite" in page
    assert "--html x.txt must end in .html" in cli("validate", "--model", model, "--html", "x.txt").error
