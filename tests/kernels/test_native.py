"""Compiled code: from nothing, from the cache, from a damaged cache, from two processes at once, and not at all."""

import logging
import os
import stat
import subprocess
import sys
import tempfile

import pytest

from hybridlab.kernels import native
from hybridlab.kernels.selective_scan import cpp, selective_scan

SOURCE = 'extern "C" int answer() { return ANSWER; }\n'
RACE = """
import sys
from pathlib import Path
from hybridlab.kernels import native
print(native.library(Path(sys.argv[1]), "-DANSWER=42").answer())
"""


@pytest.fixture(autouse=True)
def compiler():
    if os.environ.get("CXX") is None and native.missing(cpp.SOURCE, "-DCHUNK=32"):
        pytest.skip("no compiler here")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source of ours with an empty cache, and a process that has not tried yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "tiny.cpp"
    path.write_text(SOURCE)
    native._load.cache_clear()
    yield path
    native._load.cache_clear()


def cached(source):
    return sorted((source.parent / "cache" / "hybridlab" / "native").iterdir())


def test_a_source_is_compiled_into_a_private_cache_and_then_taken_from_it(source, monkeypatch):
    assert native.library(source, "-DANSWER=7").answer() == 7
    (made,) = cached(source)
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    native._load.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *args: pytest.fail("compiled again"))
    assert native.library(source, "-DANSWER=7").answer() == 7


def test_other_flags_and_another_source_make_another_library(source):
    assert native.library(source, "-DANSWER=1").answer() == 1
    assert native.library(source, "-DANSWER=2").answer() == 2
    source.write_text(SOURCE.replace("ANSWER;", "ANSWER + 1;"))
    native._load.cache_clear()
    assert native.library(source, "-DANSWER=2").answer() == 3
    assert len(cached(source)) == 3


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_damaged_library_is_compiled_again(source, keep):
    native.library(source, "-DANSWER=7")
    (made,) = cached(source)
    damaged = made.read_bytes()[:keep]
    made.unlink()  # the loaded one stays whole
    made.write_bytes(damaged)
    native._load.cache_clear()
    assert native.library(source, "-DANSWER=7").answer() == 7
    (again,) = cached(source)
    assert again.stat().st_size > keep


def test_processes_that_compile_at_once_both_succeed(source):
    command = [sys.executable, "-c", RACE, str(source)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate(timeout=120)[0] for run in runs] == ["42\n", "42\n"]
    assert all(path.suffix == ".so" for path in cached(source))
    assert native.library(source, "-DANSWER=42").answer() == 42


def test_without_a_compiler_it_says_why_once(source, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(3):
        assert native.missing(source) == "no C++ compiler: none of c++, g++, clang++"
    with pytest.raises(native.Missing, match="no C"):
        native.library(source)
    assert len(caplog.records) == 1
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    native._load.cache_clear()
    assert native.missing(source) == "CXX='no-such-compiler -m64' is not a command"


def test_a_broken_compiler_is_quoted_once_and_not_tried_again(source, monkeypatch, caplog, tmp_path):
    broken, calls = tmp_path / "broken", tmp_path / "calls"
    broken.write_text(
        f'#!/bin/sh\necho called >> {calls}\n[ "$1" = --version ] || {{ echo "no space" >&2; exit 3; }}\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    for _ in range(3):
        assert native.missing(source) == f"{broken} failed on tiny.cpp with status 3: no space"
    assert calls.read_text().split() == ["called"] * 2  # its version, and one attempt
    assert len(caplog.records) == 1 and "no space" in caplog.text and cached(source) == []


def test_a_source_that_does_not_compile_names_the_line(source):
    assert "ANSWER" in native.missing(source) and "tiny.cpp:1" in native.missing(source)


def test_the_environment_turns_it_off(source, monkeypatch):
    monkeypatch.setenv(native.VARIABLE, "0")
    assert native.missing(source, "-DANSWER=7") == "HYBRIDLAB_NATIVE=0"
    monkeypatch.delenv(native.VARIABLE)
    assert native.library(source, "-DANSWER=7").answer() == 7


def test_a_cache_that_others_may_write_is_refused(source):
    native.library(source, "-DANSWER=7")
    cached(source)[0].parent.chmod(0o777)
    native._load.cache_clear()
    assert "chmod 700" in native.missing(source, "-DANSWER=7")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_library_of_another_user_is_refused(source):
    native.library(source, "-DANSWER=7")
    (made,) = cached(source)
    os.chown(made, 12345, -1)
    native._load.cache_clear()
    assert native.missing(source, "-DANSWER=7") == f"{made} belongs to user 12345, not to 0; remove it"


def test_where_no_cache_can_be_written_it_compiles_and_leaves_nothing(source, monkeypatch, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file, not a folder
    assert native.library(source, "-DANSWER=7").answer() == 7
    assert list(scratch.iterdir()) == []


def test_without_compiled_code_auto_takes_the_next_version_and_says_so(lab, monkeypatch, caplog):
    from hybridlab.kernels import op as module

    caplog.set_level(logging.INFO, "hybridlab.kernels")
    monkeypatch.setattr(module, "_said", set())
    monkeypatch.setenv(native.VARIABLE, "0")
    for _ in range(2):
        selective_scan(**lab.make(selective_scan, selective_scan.cases["tiny"]) | {})
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == ["selective_scan runs as 'chunked'"]


def test_nothing_is_compiled_or_loaded_by_an_import(tmp_path):
    code = "import hybridlab.kernels.ops; from hybridlab.kernels import native; print(native._load.cache_info().misses)"
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "0\n"
    assert not (tmp_path / "cache").exists()
