"""Runs the command line in this process (a new one costs four seconds) on a tiny checkpoint."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tiny_sarm

from sarm import cli


@dataclass
class Done:
    """What a command left: exit code, stdout and stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def sarm(monkeypatch, capfd):
    """Run `sarm ARGS...` as the console script would."""

    def run(*args):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["sarm", *map(str, args)])
        threads = torch.get_num_threads()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            torch.set_num_threads(threads)
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture
def refused(sarm):
    """The one line of stderr of a command that must exit with 2 and print nothing else."""

    def run(*args):
        done = sarm(*args)
        lines = done.err.splitlines()
        assert done.code == 2, (done.out, done.err)
        assert len(lines) == 1, done.err
        assert lines[0].startswith("sarm: ")
        return lines[0]

    return run


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory):
    return tiny_sarm.save_backbone(tmp_path_factory.mktemp("cli") / "backbone")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Texts and preferences."""
    folder = tmp_path_factory.mktemp("files")
    tiny_sarm.write_jsonl(folder / "text.jsonl", [{"text": t} for t in tiny_sarm.make_texts(60)])
    tiny_sarm.write_jsonl(folder / "train.jsonl", tiny_sarm.make_pairs(60))
    tiny_sarm.write_jsonl(folder / "valid.jsonl", tiny_sarm.make_pairs(20, seed=1))
    rows = [
        {"id": r["id"], "messages": [*r["prompt"], *r[side]]}
        for r in tiny_sarm.make_pairs(20, seed=2)
        for side in ("chosen", "rejected")
    ]
    tiny_sarm.write_jsonl(folder / "in.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def trained(backbone_dir, files, tmp_path_factory):
    """A SARM made by the commands themselves."""
    folder = tmp_path_factory.mktemp("trained")
    commands = [
        ["train-sae", backbone_dir, files / "text.jsonl", "-o", folder / "sae", "--n-latents", 64,
         "-k", 6, "--activations", "turn-end", "--chat", "--batch-size", 32, "--passes", 3],
        ["train-rm", backbone_dir, folder / "sae", files / "train.jsonl", "-o", folder / "rm",
         "--cache", folder / "states.sqlite"],
    ]  # fmt: skip
    for command in commands:
        command = ["--k" if c == "-k" else str(c) for c in command]
        assert cli.app(command, standalone_mode=False) in (0, None)
    return folder
