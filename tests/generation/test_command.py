"""The command line: text verbatim, what is wrong in one line with exit code 2."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridlab import generate as cli


@pytest.fixture
def call(monkeypatch, capfdbinary):
    """Run a command line in this process -> (exit code, standard output, standard error)."""

    def call(*args: str, stdin: bytes | None = b""):
        source = io.TextIOWrapper(io.BytesIO(stdin or b""))
        source.isatty = lambda: stdin is None
        monkeypatch.setattr(sys, "stdin", source)
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out := io.BytesIO(), encoding="ascii"))
        monkeypatch.setattr(sys, "stderr", err := io.StringIO())
        code = cli.command(cli.generate_text, cli.__doc__, args)
        sys.stdout.flush()
        return code, out.getvalue(), err.getvalue()

    return call


@pytest.mark.parametrize(
    "text",
    ["def ", "", "a=b=c", "1e5", "Hello, world", "${oc.env:HOME}", "[1,2]", "{a: b}", "'quoted'", " lead\ttail \n",
     "été 你好 🙂", "--help", "null", "%s\\n", "prompt=x"],
)  # fmt: skip
def test_a_prompt_is_taken_verbatim(call, run, text):
    code, out, err = call(f"run={run}", f"prompt={text}", "tokens=3", "temperature=0")
    assert code == 0 and out.startswith(text.encode()) and "tokens/s" in err and "bytes for each of 1" in err
    assert call(f"run={run}", "-", "tokens=3", "temperature=0", stdin=text.encode())[1] == out


def test_prompts_come_from_every_source_in_order(call, run, tmp_path):
    (tmp_path / "p").write_bytes(b"from file\r\n\xff\xfe invalid")
    args = [f"run={run}", "prompt=one", f"prompt_file={tmp_path / 'p'}", "prompt_file=-", "prompt=", "tokens=2"]
    code, out, _ = call(*args, stdin=b"piped \xc3")
    text = out.decode()
    assert code == 0
    assert [text.index(f"prompt {i} of 4") for i in (1, 2, 3, 4)] == sorted(
        text.index(f"prompt {i} of 4") for i in (1, 2, 3, 4)
    )
    assert "---\none" in text and "---\nfrom file\r\n\ufffd\ufffd invalid" in text and "---\npiped \ufffd" in text


def test_output_is_utf8_and_the_same_seed_says_the_same(call, run):
    first = call(f"run={run}", "prompt=x", "tokens=60", "temperature=3", "seed=7")[1]
    assert first == call(f"run={run}", "prompt=x", "tokens=60", "temperature=3", "seed=7")[1]
    assert first != call(f"run={run}", "prompt=x", "tokens=60", "temperature=3", "seed=8")[1]
    assert first.decode("utf-8")
    beside = call(f"run={run}", "prompt=longer one", "prompt=x", "tokens=60", "temperature=3", "seed=7")[1]
    assert beside.endswith(b"---\n" + first), "companions change nothing"


@pytest.mark.parametrize(
    "args, said",
    [
        (["temprature=1"], "nearest: temperature"),
        (["prompt"], "KEY=VALUE"),
        (["tokens=0"], "tokens=0"),
        (["tokens=1e3"], "tokens=1e3"),
        (["temperature=hot"], "temperature=hot"),
        (["temperature=-1"], "temperature=-1"),
        (["top_k=0"], "top_k=0"),
        (["top_p=nan"], "top_p=nan"),
        (["min_p=2"], "min_p=2"),
        (["seed=-1"], "seed=-1"),
        (["seed=x"], "seed=x"),
        (["device=abacus"], "device=abacus"),
        (["prompt_file=/does/not/exist"], "/does/not/exist"),
        (["run=/does/not/exist"], "/does/not/exist"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(call, run, args, said):
    code, out, err = call(f"run={run}", *args)
    assert code == 2 and not out and said in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_run_and_a_prompt_are_needed(call, run):
    assert call("prompt=x")[0] == 2
    code, _, err = call(f"run={run}", stdin=None)
    assert code == 2 and "prompt=TEXT" in err
    assert call(f"run={run}", "tokens=1", stdin=b"")[0] == 0, "an empty standard input is an empty prompt"
    assert b"prompt_file" in call("--help")[1]


@pytest.mark.parametrize("fault", ["file", "empty folder", "damaged", "no tokenizer"])
def test_a_broken_or_foreign_run_is_refused_in_one_line(call, run, tmp_path, fault):
    from hybridlab import checkpoint

    path = tmp_path / "given"
    newest = checkpoint.find(run)
    if fault == "file":
        path.write_bytes(b"\x80\x04junk")
    elif fault == "empty folder":
        path.mkdir()
    else:
        checkpoint.save(path, checkpoint.load_state(newest), checkpoint.load_config(newest))
        if fault == "damaged":
            (path / "model.safetensors").write_bytes(b"x")
    code, out, err = call(f"run={path}", "prompt=x")
    assert code == 2 and not out and str(path) in err and err.count("\n") == 1


def test_the_command_runs_as_a_module_and_ends_quietly_when_its_reader_does(run):
    command = [sys.executable, "-m", "hybridlab.generate", f"run={run}", "tokens=60", b"prompt=\xc3\xa9 \xff"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "LC_ALL": "C"}
    made = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=Path(__file__).parents[2]
    )
    assert made.stdout.read(6) == "é \ufffd".encode()
    made.stdout.close()
    assert made.stderr.read() == b"" and made.wait() == 0
