"""The shared command line: words in any order, help that names every key, and exit codes."""

import io
import subprocess
import sys

import pytest

from maxtrain.config import Refused, cli, keys

FLAGS = {"dry-run": "Run no step."}
OPTIONS = {"prompt": "Text to go on from.", "tokens": "How many."}


def parse(*argv, **changes):
    return cli.parse(argv, **{"usage": "python -m x", "flags": FLAGS, "options": OPTIONS} | changes)


def test_words_may_come_in_any_order():
    arguments = parse("train.steps=3", "--prompt", "--a", "c.yml", "--dry-run", "--prompt=", "--tokens=3", "run.name=a=b/c")
    assert arguments.config == "c.yml"
    assert arguments.overrides == ("train.steps=3", "run.name=a=b/c")
    assert arguments.flags["dry-run"] is True
    assert arguments.options == {"prompt": ["--a", ""], "tokens": ["3"]}


def test_nothing_given():
    arguments = parse()
    assert (arguments.config, arguments.overrides, arguments.options) == (None, (), {"prompt": [], "tokens": []})
    assert not any(arguments.flags.values())


def test_a_path_with_an_equals_sign_is_a_path():
    assert parse("runs/lr=3/config.yml").config == "runs/lr=3/config.yml"
    assert parse("lr=3", positional="RUN", overrides=False).config == "lr=3"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dry-rum"], "unknown flag --dry-rum; did you mean --dry-run?"),
        (["--promt", "x"], "unknown flag --promt; did you mean --prompt?"),
        (["-x"], "unknown flag -x; --help names them all"),
        (["--train.steps=5"], "a key of the config is written without dashes, train.steps=value"),
        (["--dry-run=1"], "--dry-run takes no value"),
        (["--prompt"], "--prompt needs a value: Text to go on from."),
        (["a.yml", "train.steps"], "'train.steps' is too much: one CONFIG.yml is read, a value is set by section.key=value"),
    ],
)
def test_words_that_are_not_understood(argv, message):
    with pytest.raises(Refused) as refusal:
        parse(*argv)
    assert message in str(refusal.value)


def test_an_entry_without_config_needs_its_path_and_has_no_config_flags():
    with pytest.raises(Refused, match="no RUN is given\nusage: python -m x"):
        parse(positional="RUN", overrides=False)
    with pytest.raises(Refused, match="unknown flag --print-config"):
        parse("a", "--print-config", positional="RUN", overrides=False)


@pytest.mark.parametrize("columns", [60, 100])
def test_help_names_every_key_flag_and_default(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        parse("--help", "no.yml")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert text.startswith("usage: python -m x\n")
    for word in ("--dry-run", "--prompt VALUE", "--print-config", "--diff", "--help"):
        assert f"\n  {word}\n" in text
    for path, field in keys.walk():
        assert not field.description or f"\n  {path} " in text
    assert "\n  train.steps = 100 [a whole number >= 1]\n      Optimizer steps of the whole run.\n" in text
    assert max(map(len, text.splitlines())) <= columns


def test_help_of_an_entry_without_config_is_short(capsys):
    with pytest.raises(SystemExit):
        parse("-h", overrides=False)
    assert "train.steps" not in capsys.readouterr().out


def test_print_config_and_diff(capsys, tmp_path):
    (tmp_path / "c.yml").write_text("train: {steps: 5}")
    for flag, seed in (("--print-config", True), ("--diff", False)):
        with pytest.raises(SystemExit) as end:
            parse(str(tmp_path / "c.yml"), "run.name=x", flag)
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert "# command line" in text
        assert f"{tmp_path / 'c.yml'}:1" in text
        assert ("seed: 0" in text) is seed


def test_number():
    def number(*argv):
        return cli.number(parse(*argv), "tokens", int, minimum=1)

    assert number() is None
    assert number("--tokens=3") == 3
    with pytest.raises(Refused, match=r"--tokens is given 2 times \(1, 2\): one is read"):
        number("--tokens=1", "--tokens=2")
    for wrong in (["--tokens=0"], ["--tokens=x"], ["--tokens=1.5"]):
        with pytest.raises(Refused, match="write a whole number >= 1"):
            number(*wrong)
    for wrong in ("nan", "inf"):
        with pytest.raises(Refused, match="write a number >= 0"):
            cli.number(parse(f"--tokens={wrong}"), "tokens", float, minimum=0)


def test_the_value_of_an_option_is_a_value_whatever_it_looks_like():
    def read(*words):
        return cli.parse(words, usage="", options={"tokens": ""}, positional="MODEL", overrides=False, assignments=True, positionals=2)

    found = read("--tokens", "self.name=", "models/a.b=c", "--tokens=os.environ=x", "serve.seed=1", "x=y")
    assert found.options["tokens"] == ["self.name=", "os.environ=x"]
    assert (found.words, found.overrides) == (("models/a.b=c", "x=y"), ("serve.seed=1",))
    with pytest.raises(Refused, match=r"'c' is too much: 2 MODEL is read, a value is set by section\.key=value"):
        read("a", "b", "c")
    with pytest.raises(Refused, match="no MODEL is given"):
        read("serve.seed=1")


def test_output_is_opened_before_the_work(tmp_path):
    with cli.open_output(str(tmp_path / "out"), "a") as file:
        file.write("a\ud800")
    assert (tmp_path / "out").read_text() == "a\\ud800"
    for wrong in ("/proc/x", str(tmp_path), "a\0b"):
        with pytest.raises(Refused, match=r"--out .*: cannot be written|--out: a path has no character NUL"):
            cli.open_output(wrong, "a")


def test_streams_that_are_not_there_are_no_terminals():
    closed = io.StringIO()
    closed.close()
    assert not any(map(cli.is_terminal, (None, closed, io.StringIO())))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")])
def test_no_more_memory_is_said_in_words(error, capsys, monkeypatch):
    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("the memory does not suffice: ")


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(None, 0), (0, 0), (75, 75), (Refused("x.yml:1: no"), 2), (KeyboardInterrupt(), 130), (OSError(28, "No space left", "x"), 1)],
)
def test_run_exits_with_the_code(outcome, code, capsys, monkeypatch):
    def main(argv):
        assert argv == ["a", "b"]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(sys, "argv", ["prog", "a", "b"])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == code
    assert capsys.readouterr().err == {1: "x: No space left\n", 2: "x.yml:1: no\n"}.get(code, "")


@pytest.mark.parametrize("flag", ["--help", "--print-config"])
def test_printing_needs_no_jax(flag):
    code = f"""
import sys
import maxtrain
from maxtrain import train
try:
    train.main([{flag!r}])
finally:
    assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "steps" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "from maxtrain.config import cli; input(); cli.run(lambda argv: cli.parse(['--help'], usage='x'))"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
