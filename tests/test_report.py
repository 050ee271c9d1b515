"""The report page: right numbers, well-formed, self-contained, and safe against what the files hold."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from maxtrain import report
from maxtrain.config.errors import Refused
from maxtrain.data import integrity
from maxtrain.training.plot import Series, downsample, figure, short, smooth, ticks

EVIL = "<script>alert('x')</script><img src=https://evil.example/a.png onerror=alert(1)>\" onload=\"alert(2)"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Asserts that every element is closed in order; collects elements, visible text and what scripts and styles hold."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words, self.code = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.code += data
        else:
            self.words.append(data)

    def titles(self):
        return [attrs["aria-label"] for tag, attrs in self.elements if tag == "svg"]


def row(step, **more):
    base = {"step": step, "loss": 5.0 - step / 100, "tokens": 512 * step, "lr": 1e-3, "grad_norm": 1.0, "param_norm": 9.0, "skipped": 0}
    speed = {"tokens_per_second": 1000.0 + step, "tflops_per_second": 0.05, "mfu": 0.4, "goodput": 0.9, "memory_peak_bytes": 2**30}
    time = {"step_seconds": 0.5, "data_seconds": 0.1, "compute_seconds": 0.4, "checkpoint_seconds": 0.0}
    return base | speed | time | more


def write_lines(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture
def run(tmp_path):
    """A complete run of 200 steps with two sources, two evaluations, two skipped steps and an event."""
    rows = [row(step, **{"loss/web": 4.0, "loss/code": 3.0, "tokens/web": 384, "tokens/code": 128}) for step in range(1, 201)]
    rows[0]["compile_seconds"] = 75.0
    rows[174] |= {"loss": None, "skipped": 1, "grad_norm": 500.0}
    rows[189] |= {"loss": 900.0, "skipped": 1}
    rows.insert(100, {"step": 100, "eval/heldout/loss": 4.2, "eval/heldout/perplexity": 66.7, "eval/heldout/bits_per_byte": 1.91})
    rows.append({"step": 200, "eval/heldout/loss": 4.4, "eval/heldout/perplexity": 81.5, "eval/heldout/bits_per_byte": 1.95})
    rows.append({"step": 200, "event": f"rolled back {EVIL}"})
    write_lines(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "config.yml").write_text("run:\n  name: my <b>run</b>\ntrain:\n  steps: 400\n")
    manifest = {"parameters": 12603776, "versions": {"jax": "0.10.2"}, "command": ["train", EVIL], EVIL: {"nested": {"deep": [1, None]}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    scores = {"bits_per_byte": 1.5, "loss": 4.2, "gzip": 3.0, "xz": 2.25, "num_bytes": 12345, "num_documents": 7}
    (tmp_path / "evaluation.json").write_text(json.dumps({"heldout": scores, EVIL: scores}))
    write_lines(
        tmp_path / "samples.jsonl", [{"step": 200, "prompt": "def ", "text": EVIL}, {"step": 100, "prompt": "\ud800", "text": "old"}]
    )
    return tmp_path


def make(folder, *more):
    assert report.main([str(folder), *more]) == 0
    return Page((folder / "report.html").read_text() if not more else open(more[0]).read())


def test_numbers(run):
    page = make(run)
    for text in (
        "Step 200 of 400",
        "Training loss 3.0000 3.2582 over the last 50 steps",  # skipped steps are left out
        "Best eval 1.9100 heldout, bits per byte, step 100",
        "Tokens 102k 102,400",
        "Parameters 12.6M 12,603,776",
        "Tokens per second 1,100 median; 0.05 TFLOP/s",
        "MFU 40.0%",
        "Time 1 min 40 s steps and checkpoints; 1 min 15 s compiling",
        "Peak memory 1.00 GiB one device",
        "Skipped steps 2 the last one 190",
        "web (75% of tokens)",
        "heldout 7 documents, 12,345 bytes model 1.500 xz 2.250 gzip 3.000",
        "versions jax 0.10.2",
        "nested.deep 1 None",
        "name: my <b>run</b>",
    ):
        assert text in page.text
    assert page.titles()[:2] == ["Loss", "Evaluation"]
    assert "Time of a step" in page.titles()
    assert "Loss by source" in page.titles()
    widths = [attrs["style"] for tag, attrs in page.elements if tag == "i" and "--w" in attrs.get("style", "")]
    assert widths[:3] == ["--w:0.5000", "--w:0.7500", "--w:1.0000"]
    assert page.text.index("Step 200 def") < page.text.index("Step 100")  # the newest samples first


def test_curves_hold_the_data(run):
    found = [attrs for tag, attrs in make(run).elements if tag == "path"]
    paths = {(attrs["class"].strip(), attrs.get("data-label")): attrs["d"] for attrs in found}
    raw = paths["faint", "training"]
    assert raw.startswith("M1 4.99L2 4.98L")
    assert raw.endswith("L200 3")
    assert "L174 3.26L176 3.24L" in raw
    assert "L190 900L" in raw
    assert {"M100 4.2L200 4.4", "M100 1.91L200 1.95"} <= {attrs["d"] for attrs in found}
    assert paths["skip", None] == "M87.5 100v-4M95 100v-4"
    areas = [paths["area", part] for part in ("data", "compute", "checkpoint")]
    assert [area.split("L")[1].split()[1] for area in areas] == ["0.1", "0.5", "0.5"]  # stacked


def test_is_self_contained_and_escaped(run):
    page = make(run)
    assert not [tag for tag, _ in page.elements if tag in ("img", "link", "iframe", "object", "embed")]
    for tag, attrs in page.elements:
        assert not {"src", "href", "srcset", "data", "xlink:href"} & attrs.keys()
        assert not [key for key in attrs if key.startswith("on")], tag
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not re.search(r"https?:|url\(|@import|fetch\(", page.code)
    assert "alert" not in page.code
    assert page.text.count("<script>alert('x')</script>") == 5  # event, title of a card, sample, command, name of an evaluation set
    policy = [attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0].startswith("default-src 'none'")


def test_optional_parts_may_be_missing(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.5}])
    page = make(tmp_path)
    assert page.titles() == ["Loss"]
    assert "2.5000" in page.text
    for absent in ("Config", "Environment", "Samples", "Against", "Best eval", "MFU", "Events", "Skipped"):
        assert absent not in page.text


@pytest.mark.parametrize("key", sorted(row(1).keys() - {"step"}))
def test_any_key_may_be_missing(tmp_path, key):
    write_lines(tmp_path / "metrics.jsonl", [{name: value for name, value in row(step).items() if name != key} for step in (1, 2, 3)])
    assert make(tmp_path).titles()


def test_a_run_that_is_still_writing(run):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 201, "loss": 1.0, "tex')
    assert "Step 200 of 400" in make(run).text


def test_output_path(run, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("out") / "page.html"
    assert make(run, str(out)).titles()
    assert not (run / "report.html").exists()
    assert capsys.readouterr().out == f"{out}\n"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "metrics.jsonl"),
        (b"", "no row yet"),
        (b'{"step": 1, "lo', "no row yet"),
        (b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n', r"metrics.jsonl:2: not JSON"),
        (b'{"step": 1, "loss": 2.0}\n[1]\n', r"metrics.jsonl:2: not an object"),
        (b'{"loss": 2.0}\n', r"metrics.jsonl:1: .*step"),
        (b'{"step": 1, "event": "\xff"}\n', r"metrics.jsonl:1: not JSON"),
    ],
)
def test_refuses_bad_metrics(tmp_path, lines, message):
    if lines is not None:
        (tmp_path / "metrics.jsonl").write_bytes(lines)
    with pytest.raises(Refused, match=message):
        report.main([str(tmp_path)])
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("manifest.json", "{"), ("manifest.json", "[]"), ("evaluation.json", "3"), ("config.yml", "a: [1"), ("samples.jsonl", "{}\n")],
)
def test_refuses_other_bad_files(run, name, content):
    (run / name).write_text(content)
    with pytest.raises(Refused, match=name):
        report.main([str(run)])


def test_refuses_bad_arguments(run):
    for argv in ([], [str(run / "absent")], [str(run), "a", "b"], [str(run), "--fast"], [str(run), str(run / "absent" / "page.html")]):
        with pytest.raises(Refused):
            report.main(argv)


def test_looking_changes_nothing_but_the_page(run):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()}
    make(run)
    (run / "report.html").unlink()
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()} == before


def test_what_cannot_be_written_is_printed(run, capsys, monkeypatch):
    def refused(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(report.os, "open", refused)
    assert report.main([str(run)]) == 0
    printed = capsys.readouterr()
    assert "Step 200 of 400" in Page(printed.out).text
    assert "report.html: cannot be written (Read-only file system)" in printed.err
    with pytest.raises(Refused, match="Read-only file system"):
        report.main([str(run), "page.html"])


def test_a_page_that_cannot_be_made_leaves_the_one_before(run):
    make(run)
    before = (run / "report.html").read_text()
    (run / "metrics.jsonl").write_text("{\n")
    with pytest.raises(Refused):
        report.main([str(run)])
    assert (run / "report.html").read_text() == before


@pytest.mark.parametrize("name", ["config.yml", "manifest.json"])
def test_a_changed_file_is_refused(run, name):
    contents = {name: (run / name).read_bytes() for name in ("config.yml", "manifest.json")}
    integrity.rewrite(run, contents, integrity.RUN_MANIFEST)
    make(run)
    (run / name).write_bytes(contents[name].replace(b"0", b"1"))
    with pytest.raises(Refused, match=f"{name} has changed"):
        report.main([str(run)])


def test_a_long_run_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(3, 0.1, 20_000), rng.lognormal(0, 1, 20_000)
    losses[12_345] = 77.5
    rows = [row(step, loss=loss, grad_norm=norm) for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    page = make(tmp_path)
    curves = [attrs["d"] for tag, attrs in page.elements if tag == "path" and "data-label" in attrs]
    assert max(curve.count("L") for curve in curves) <= 1000
    assert "L12346 77.5" in curves[0]
    assert "peak 77.5 outside the frame" in page.text
    assert (tmp_path / "report.html").stat().st_size < 300_000


def test_downsample_keeps_extremes_and_order():
    x = np.arange(100_003.0)
    y = np.sin(x / 1000)
    y[[7, 50_000, 100_002]] = 40.0, -30.0, 20.0
    few_x, few_y = downsample(x, y)
    assert len(few_x) <= 1000
    assert (np.diff(few_x) > 0).all()
    assert (y[few_x.astype(int)] == few_y).all()
    assert {7.0, 50_000.0, 100_002.0} <= set(few_x)
    assert len(downsample(x[:1000], y[:1000])[0]) == 1000


def test_smooth():
    assert smooth(np.array([5.0])) == pytest.approx([5.0])
    assert smooth(np.full(300, 2.0)) == pytest.approx(np.full(300, 2.0))
    y = np.random.default_rng(1).normal(size=1000)
    assert smooth(y)[0] == pytest.approx(y[0])
    assert smooth(y)[500] == pytest.approx(y[490:511].mean())


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 3000, ["0", "1,000", "2,000", "3,000"]), (0, 3e-4, ["0", "1e-4", "2e-4", "3e-4"]), (2.01, 2.9, ["2.2", "2.4", "2.6", "2.8"])],
)
def test_ticks(low, high, expected):
    assert [short(at) for at in ticks(low, high)] == expected


def test_log_ticks():
    assert [short(10**at) for at in ticks(-1.2, 2.3, log=True)] == ["0.1", "1", "10", "100"]


def test_short():
    expected = {0: "0", 0.125: "0.125", -3: "-3", 9400: "9,400", 12603776: "12.6M", 1e4: "10k", 2.5e9: "2.5B", 1e12: "1T", 3e-5: "3e-5"}
    assert {value: short(value) for value in expected} == expected


def test_log_scale_only_for_decades():
    x = np.arange(3.0)
    assert "data-log" in figure("t", [Series("a", x, np.array([0.1, 1.0, 100.0]))], 3, scale="log")
    assert "data-log" not in figure("t", [Series("a", x, np.array([0.1, 1.0, 2.0]))], 3, scale="log")
    assert "data-log" not in figure("t", [Series("a", x, np.array([0.0, 1.0, 100.0]))], 3, scale="log")
