"""The command line begins anew, once, to ask for large pages; whoever has a wish of their own is left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fewmask import __main__ as program
from fewmask.cli import app

ASK = (
    "from fewmask.__main__ import ask_for_huge_pages as ask; ask(); import os; print(os.environ.get('GLIBC_TUNABLES'))"
)


class Began(Exception):
    """A new beginning, which no test can survive."""


@pytest.fixture
def system(monkeypatch, tmp_path):
    """A Linux that gives large pages on request; returns what a new beginning would be told."""
    told = []

    def begin(path, words):
        told.append((path, words, os.environ[program.TUNABLES]))
        raise Began

    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(program, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "fewmask", "run", "my folder"])
    monkeypatch.setattr(os, "execv", begin)
    monkeypatch.setenv(program.TUNABLES, "")  # so that what is set here is taken back
    monkeypatch.delenv(program.TUNABLES)
    return told


@pytest.mark.parametrize(("words", "asked"), [(["run", "data"], 1), (["predict", "run"], 0), (["--help"], 0), ([], 0)])
def test_only_what_trains_begins_anew(monkeypatch, words, asked):
    told = []
    monkeypatch.setattr(program, "ask_for_huge_pages", lambda: told.append("asked"))
    monkeypatch.setattr(program, "main", lambda: told.append("main"))
    monkeypatch.setattr(sys, "argv", ["fewmask", *words])
    program.start()
    assert told == ["asked"] * asked + ["main"]
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(program.TRAINING) == verbs - {"check", "evaluate", "export", "predict", "report", "serve"}


def test_it_begins_anew_with_the_same_words(system):
    with pytest.raises(Began):
        program.ask_for_huge_pages()
    words = [sys.executable, "-X", "dev", "-m", "fewmask", "run", "my folder"]
    assert system == [(sys.executable, words, "glibc.malloc.hugetlb=1")]


@pytest.mark.parametrize("state", ["[always] madvise never", "always madvise [never]", None])
def test_where_pages_are_not_given_on_request_nothing_happens(system, state):
    if state is None:
        program.HUGE_PAGES.unlink()
    else:
        program.HUGE_PAGES.write_text(state)
    program.ask_for_huge_pages()
    assert (system, program.TUNABLES in os.environ) == ([], False)


def test_a_wish_of_the_users_own_stands(system, monkeypatch):
    monkeypatch.setenv(program.TUNABLES, "glibc.malloc.check=1")
    program.ask_for_huge_pages()
    assert (system, os.environ[program.TUNABLES]) == ([], "glibc.malloc.check=1")


def test_it_goes_on_where_it_may_not_begin_anew(system, monkeypatch):
    tried = []

    def refuse(path, words):
        tried.append(path)
        raise PermissionError

    monkeypatch.setattr(os, "execv", refuse)
    program.ask_for_huge_pages()
    assert tried == [sys.executable]


def test_a_process_begins_once_and_stays_the_same_one():
    environment = {key: value for key, value in os.environ.items() if key != program.TUNABLES}
    process = subprocess.Popen(
        [sys.executable, "-c", ASK + "; print(os.getpid())"], env=environment, stdout=subprocess.PIPE, text=True
    )
    given = program.HUGE_PAGES.exists() and "[madvise]" in program.HUGE_PAGES.read_text()
    expected = "glibc.malloc.hugetlb=1" if given and sys.platform == "linux" else "None"
    assert process.communicate()[0].split() == [expected, str(process.pid)]
