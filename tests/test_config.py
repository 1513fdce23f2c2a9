"""Configuration: strict parsing, merging, and --help (dalle/config.py)."""

import ast
import dataclasses
import errno
import importlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import types
import typing
from io import StringIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from dalle.commands.encode_images import EncodeImagesArgs
from dalle.commands.evaluate import EvaluateArgs
from dalle.commands.quickstart import QuickstartArgs
from dalle.commands.sample import SampleArgs
from dalle.commands.train_clip import TrainCLIPArgs
from dalle.commands.train_dvae import TrainDVAEArgs
from dalle.commands.train_tokenizer import TrainTokenizerArgs
from dalle.commands.train_transformer import TrainTransformerArgs
from dalle.config import ConfigError, cli_errors, from_dict, load, merge, parse, read_yaml, to_dict
from dalle.dvae import DVAEConfig
from dalle.schedules import Schedule

ROOT = Path(__file__).parents[1]
RUNS = {
    "train_tokenizer": TrainTokenizerArgs,
    "train_dvae": TrainDVAEArgs,
    "encode_images": EncodeImagesArgs,
    "train_transformer": TrainTransformerArgs,
    "train_clip": TrainCLIPArgs,
    "sample": SampleArgs,
    "evaluate": EvaluateArgs,
    "quickstart": QuickstartArgs,
}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def flat(text: str) -> str:
    """Words alone: no frames, no line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


class TestValues:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({"stpes": 3}, "no key 'stpes'; did you mean 'steps'?"),
            ({"qqq": 1}, "no key 'qqq' (known here: "),
            ({"model": {"width": [8]}}, "no key 'model.width'; did you mean 'widths'?"),
            (
                {"train": {"optimizer": {"weight-decay": 0.1}}},
                "no key 'train.optimizer.weight-decay'; did you mean 'weight_decay'?",
            ),
            ({"loss": {"tau": {"inital": 1.0}}}, "no key 'loss.tau.inital'; did you mean 'initial'?"),
            ({"steps": "ten"}, "steps: expected a whole number, got 'ten'"),
            ({"steps": 10.0}, "steps: expected a whole number, got 10.0"),
            ({"steps": True}, "steps: expected a whole number, got True"),
            ({"steps": None}, "steps: expected a whole number, got None"),
            ({"steps": {"a": 1}}, "steps: expected a whole number"),
            ({"device": 3}, "device: expected str, got 3"),
            (
                {"train": {"optimizer": {"beta1": "0.9"}}},
                "train.optimizer.beta1: expected a finite number, got '0.9'",
            ),
            (
                {"train": {"optimizer": {"beta1": True}}},
                "train.optimizer.beta1: expected a finite number, got True",
            ),
            ({"model": {"widths": [8, "16"]}}, "model.widths.1: expected a whole number, got '16'"),
            ({"train": {"precision": "fp64"}}, "train.precision: expected one of "),
            ({"resume": "maybe"}, "resume: expected one of "),
            ({"train": 3}, "train: must be a mapping"),
            ({"model": [1, 2]}, "model: must be a mapping"),
            ({"model": None}, "model: must be a mapping"),
            ({"model": {"blocks_per_group": 10**9}}, "model: blocks_per_group must be at most 1024"),
            ({"train": {"batch_size": 10**12}}, "train: batch_size must be at most"),
            ({"loss": {"tau": {"initial": 1.0, "final": 0.1, "decay_steps": 0}}}, "loss.tau: decay_steps"),
        ],
    )
    def test_a_wrong_key_or_value_is_refused_with_its_place_and_what_was_expected(self, data, message):
        with pytest.raises(ConfigError, match=re.escape(message)):
            from_dict(TrainDVAEArgs, data)

    def test_an_int_is_a_float_and_none_is_allowed_where_the_field_says_so(self):
        for eps, norm in ((1, None), (1e-3, 2.0)):
            data = {"train": {"optimizer": {"eps": eps, "max_grad_norm": norm}}}
            optimizer = from_dict(TrainDVAEArgs, data).train.optimizer
            assert type(optimizer.eps) is float
            assert optimizer.max_grad_norm == norm

    def test_all_wrong_and_missing_values_are_reported_with_the_source(self):
        with pytest.raises(ConfigError, match="final: missing"):
            from_dict(Schedule, {"initial": 1.0})
        with pytest.raises(ConfigError, match=r"my\.yaml: steps: .*; seed: "):
            from_dict(TrainDVAEArgs, {"steps": "a", "seed": "b"}, "my.yaml")

    def test_a_section_with_one_value_keeps_the_other_defaults_of_its_stage(self):
        """Not those of the section's class, which are the transformer's."""
        run = from_dict(TrainDVAEArgs, {"train": {"optimizer": {"weight_decay": 0.5}}})
        optimizer = dataclasses.replace(TrainDVAEArgs().train.optimizer, weight_decay=0.5)
        assert run.train == dataclasses.replace(TrainDVAEArgs().train, optimizer=optimizer)
        assert run.train.batch_size != TrainTransformerArgs().train.batch_size

    def test_file_and_command_line_mean_the_same(self, tmp_path):
        text = "train: {optimizer: {lr: {final: 0.5}}, keep_last: 7}\nloss: {tau: {decay_steps: 9}}"
        file = write(tmp_path / "a.yaml", text)
        words = ["--train.optimizer.lr.final", "0.5", "--train.keep-last", "7", "--loss.tau.decay-steps", "9"]
        assert load(TrainDVAEArgs, [file]) == parse(TrainDVAEArgs, words)


class TestYAML:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-4", 1e-4),  # YAML 1.1 readers give a string
            ("1.0e-4", 1e-4),
            ("no", "no"),  # YAML 1.1: False
            ("on", "on"),
            ("012", 12),  # YAML 1.1: octal
            ("1:30", "1:30"),  # YAML 1.1: sixty-one and a half
            ("null", None),
            ("true", True),
        ],
    )
    def test_it_is_version_1_2(self, tmp_path, text, value):
        read = read_yaml(write(tmp_path / "a.yaml", f"x: {text}"))["x"]
        assert (read, type(read)) == (value, type(value))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"- a\n- b", "must be a mapping"),
            (b"a: [1", "not YAML"),
            (b"#" * 2**20, "more than 65536 characters"),
            (b'steps: !!int ""', "not YAML"),
            (b"steps: 1\nsteps: 2", "not YAML"),
            (b"steps: !!bool foo", "not YAML"),
            (b"steps: 2020-02-31", "not YAML"),
            (b"steps: !!python/object:os.system 1", "not YAML"),
            (b"\xff\xfe\x00", "not YAML"),
            (b"stpes: 3", "no key 'stpes'"),
            (b"out: [&a [x, x], *a]", "aliases"),
            (b"out: [" + b"x," * 999 + b"]", "expected Path"),
            (b"out: 0x" + b"f" * 9999, "digits"),
        ],
    )
    def test_an_invalid_file_is_refused_by_name(self, tmp_path, text, message):
        (tmp_path / "a.yaml").write_bytes(text)
        with pytest.raises(ConfigError, match=rf"a\.yaml.*{message}") as error:
            load(TrainDVAEArgs, [tmp_path / "a.yaml"])
        assert len(str(error.value)) < 1000

    def test_a_missing_file_or_a_directory_is_refused_by_name(self, tmp_path):
        with pytest.raises(ConfigError, match=r"no configuration file .*none\.yaml; .* configs/"):
            read_yaml(tmp_path / "none.yaml")
        with pytest.raises(ConfigError, match="cannot read"):
            read_yaml(tmp_path)


class TestMerging:
    def test_later_files_override_and_each_is_checked_by_itself(self, tmp_path):
        a = write(tmp_path / "a.yaml", "steps: 1\ntrain: {batch_size: 2, keep_last: 3}")
        b = write(tmp_path / "b.yaml", "steps: 10\ntrain: {batch_size: 20}")
        run = load(TrainDVAEArgs, [a, b])
        assert (run.steps, run.train.batch_size, run.train.keep_last) == (10, 20, 3)
        assert load(TrainDVAEArgs, [b, a]).steps == 1
        comments = write(tmp_path / "c.yaml", "# nothing\n")
        assert load(TrainDVAEArgs, [comments]) == TrainDVAEArgs()
        c = write(tmp_path / "c.yaml", "steps: ten")
        with pytest.raises(ConfigError, match=r"c\.yaml: steps"):  # even if a later file overrides it
            load(TrainDVAEArgs, [c, b])

    def test_lists_are_replaced_and_neither_side_changes(self):
        base, update = {"a": {"b": 1}, "widths": [1, 2, 3]}, {"a": {"c": 2}, "widths": [4]}
        assert merge(base, update) == {"a": {"b": 1, "c": 2}, "widths": [4]}
        assert (base, update) == ({"a": {"b": 1}, "widths": [1, 2, 3]}, {"a": {"c": 2}, "widths": [4]})


class TestCommandLine:
    @pytest.fixture
    def file(self, tmp_path) -> str:
        return str(write(tmp_path / "a.yaml", "steps: 7\ntrain: {batch_size: 2, keep_last: 3}"))

    @pytest.mark.parametrize("dotted", [["--train.batch-size", "9"], ["--train.batch_size", "9"]])
    def test_flags_win_before_and_after_the_file_and_later_files_win(self, file, tmp_path, dotted):
        other = str(write(tmp_path / "b.yaml", "steps: 8"))
        for words, steps in (
            ([*dotted, "--config", file], 7),
            (["--config", file, *dotted, "--config", other], 8),
            (["--config", other, f"--config={file}", *dotted], 7),
        ):
            run = parse(TrainDVAEArgs, words)
            assert (run.train.batch_size, run.train.keep_last, run.steps) == (9, 3, steps)

    def test_tuples_none_and_paths_can_be_given(self):
        words = ["--model.widths", "8", "16", "--train.optimizer.max-grad-norm", "None", "--out", "somewhere"]
        run = parse(TrainDVAEArgs, [*words, "--model.downsample_factor", "2"])
        assert (run.model.widths, run.out) == ((8, 16), Path("somewhere"))
        assert run.train.optimizer.max_grad_norm is None

    @pytest.mark.parametrize(
        "words", [["--stpes", "3"], ["--steps", "x"], ["--steps", "0"], ["--resume", "maybe"]]
    )
    def test_a_wrong_flag_exits_with_its_name(self, words, capsys):
        with pytest.raises(SystemExit) as caught:
            parse(TrainDVAEArgs, words)
        assert caught.value.code not in (0, None)
        assert words[0].removeprefix("--") in capsys.readouterr().err

    def test_a_wrong_file_exits_with_one_line(self, tmp_path):
        file = write(tmp_path / "a.yaml", "stpes: 3")
        with pytest.raises(SystemExit, match=r"^error: .*a\.yaml: no key 'stpes'"):
            parse(TrainDVAEArgs, ["--config", str(file)])
        with pytest.raises(SystemExit, match="--config needs a file"):
            parse(TrainDVAEArgs, ["--steps", "3", "--config"])
        for value in ("-a red circle", "-red", "--a red"):
            with pytest.raises(SystemExit, match="follows ="):
                parse(TrainDVAEArgs, ["--out", value])
        assert parse(TrainDVAEArgs, ["--out=-a red circle"]).out == Path("-a red circle")

    def test_the_preset_is_for_no_arguments(self, file, capsys):
        assert parse(TrainDVAEArgs, [], preset=file).steps == 7
        assert f"no arguments: using --config {file}" in capsys.readouterr().out
        assert parse(TrainDVAEArgs, ["--seed", "1"], preset=file).steps == TrainDVAEArgs().steps
        assert capsys.readouterr().out == ""

    def test_a_users_mistake_is_one_line_and_a_bug_keeps_its_traceback(self, monkeypatch):
        with pytest.raises(SystemExit, match=r"^error: too small$"), cli_errors():
            raise ValueError("too small")
        with pytest.raises(KeyError), cli_errors():
            raise KeyError("a bug")
        with pytest.raises(SystemExit, match=r"error: .*too long"), cli_errors():
            os.stat("a" * 300)
        with pytest.raises(SystemExit, match="allocate"), cli_errors():
            torch.empty(2**50)
        with pytest.raises(SystemExit, match=r"^error: no file a{300}\.\.\. expected"), cli_errors():
            raise ValueError(f"no file {'a' * 5000}; expected one")
        with pytest.raises(SystemExit, match="No space left on device; free disk space"), cli_errors():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit, match="without torchrun"), cli_errors():
            pass
        with cli_errors(parallel=True):
            pass

    def test_output_that_the_console_cannot_encode_is_escaped(self):
        code = "from dalle.config import cli_errors\nwith cli_errors():\n    print(chr(0x1F600), chr(0xDCFF))"
        env = os.environ | {"PYTHONIOENCODING": "cp1252"}
        assert b"U0001f600" in subprocess.check_output([sys.executable, "-c", code], env=env)

    def test_an_output_that_nothing_reads_any_more_is_one_line(self):
        code = "from dalle.config import cli_errors\nwith cli_errors():\n    print('x' * 10**6, flush=True)"
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, "stopped: the output was closed by its reader\n")


class TestReadingAnotherStagesFile:
    def test_the_tokenizer_takes_its_sections_of_the_transformers_file(self, tmp_path):
        text = "steps: 7\ndata: {path: shapes, resolution: 48}\ntext: {vocab_size: 400}\nmodel: {depth: 2}"
        file = write(tmp_path / "transformer.yaml", text)
        words = ["--config", str(file), "--captions", "5"]
        run = parse(TrainTokenizerArgs, words, schema=TrainTransformerArgs)
        assert (run.text.vocab_size, run.data.path, run.captions) == (400, "shapes", 5)
        with pytest.raises(ConfigError, match="no key 'steps'"):
            load(TrainTokenizerArgs, [file])

    @pytest.mark.parametrize(
        ("text", "message"), [("modell: {depth: 2}", "'modell'"), ("model: {depth: 0}", "depth must")]
    )
    def test_the_other_sections_are_checked_too(self, tmp_path, text, message):
        with pytest.raises(ConfigError, match=message):
            load(TrainTokenizerArgs, [write(tmp_path / "a.yaml", text)], schema=TrainTransformerArgs)


@pytest.mark.parametrize("run", RUNS.values(), ids=lambda cls: cls.__name__)
def test_round_trip_through_json_and_yaml(run, tmp_path):
    assert from_dict(run, json.loads(json.dumps(to_dict(run())))) == run()
    text = StringIO()
    YAML(typ="safe", pure=True).dump(to_dict(run()), text)
    assert load(run, [write(tmp_path / "a.yaml", text.getvalue())]) == run()
    hints = typing.get_type_hints(run).items()
    paths = [name for name, hint in hints if Path in (hint, *typing.get_args(hint))]
    assert paths
    changed = dataclasses.replace(run(), **{name: Path("some") / name for name in paths})
    assert from_dict(run, to_dict(changed)) == changed


def wrong_values(hint: type) -> list:
    """Values that a field of this type must refuse."""
    options = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [value for value in wrong_values(options[0]) if value is not None]
    if typing.get_origin(hint) is tuple:
        length = 1 if ... in options else len(options)
        return ["ab", 3, *([one] * length for one in wrong_values(options[0]))]
    known = {
        int: [math.nan, math.inf, True, np.bool_(True), 3.5, "3", None, 10**30, [1]],
        float: [math.nan, -math.inf, np.float32("inf"), True, "3", None, 10**400],
        bool: [1, 0.0, "yes", None],
        str: [3, True, None],
    }
    return known.get(hint, [3, 3.5, None])


MODULES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in sorted((ROOT / "dalle").rglob("*.py"))
    if "\n@configuration" in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_every_field_of_a_configuration_refuses_other_kinds_and_numbers_that_are_not_finite(module):
    for cls in vars(importlib.import_module(module)).values():
        check = getattr(cls, "__post_init__", None)
        if not inspect.isclass(cls) or inspect.isabstract(cls) or "configuration" not in str(check):
            continue
        needed = {f.name: None for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        for name, hint in typing.get_type_hints(cls).items():
            for value in wrong_values(hint):
                with pytest.raises(ValueError, match=" must be " if needed else f"{name}.* must be "):
                    cls(**needed | {name: value})


def test_a_configuration_takes_whole_numbers_lists_and_paths_of_any_type():
    args = TrainDVAEArgs(steps=np.int64(3), seed=4.0, out="some/where")
    assert (args.steps, args.seed, args.out) == (3, 4, Path("some/where"))
    assert {type(args.steps), type(args.seed)} == {int}
    assert DVAEConfig(widths=[np.int32(8), 16], downsample_factor=2).widths == (8, 16)
    assert type(DVAEConfig(residual_scale=np.float32(0.5)).residual_scale) is float
    with pytest.raises(SystemExit):
        parse(TrainDVAEArgs, ["--model.residual-scale", "inf"])
    with pytest.raises(ConfigError, match=r"model\.min_log_scale: expected a finite number, got nan"):
        from_dict(TrainDVAEArgs, {"model": {"min_log_scale": math.nan}})


def sentences(cls: type) -> dict[str, str]:
    """The docstring under each field, with those of the parent classes."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        body = ast.parse(inspect.getsource(owner)).body[0].body
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = text.value.value
    return found


def described(cls: type, prefix: str = "--"):
    """(dotted option, sentence) of each field at any depth; None for a section with options of its own."""
    hints, docs = typing.get_type_hints(cls), sentences(cls)
    for field in dataclasses.fields(cls):
        assert field.name in docs, f"{cls.__name__}.{field.name} has no sentence"
        section, option = hints[field.name], f"{prefix}{field.name}".replace("_", "-")
        if not dataclasses.is_dataclass(section):
            yield option, docs[field.name]
        elif (cls, field.name) == (SampleArgs, "sampling"):  # its options have no prefix
            yield from described(section)
        else:
            if not all(map(dataclasses.is_dataclass, typing.get_type_hints(section).values())):
                yield None, docs[field.name]
            yield from described(section, f"{option}.")


@pytest.mark.parametrize("name", RUNS)
def test_help_explains_every_field(name, monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "120")
    done = script(name, "--help")
    shown = flat(done.out)
    assert done.code == 0
    assert "--config FILE" in shown
    fields = list(described(RUNS[name]))
    assert [option for option, _ in fields if option and not re.search(rf"{option}[ ,]", shown)] == []
    assert [sentence for _, sentence in fields if flat(sentence) not in shown] == []


def test_a_script_runs_from_any_directory(python, tmp_path):
    done = python(["scripts/train_tokenizer.py", "--help"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Train the text tokenizer" in done.stdout


@dataclasses.dataclass(frozen=True)
class Args:
    """A run."""

    name: int = 1
    """A sentence of
    several (three)
    lines."""


def test_help_joins_the_lines_of_a_sentence_but_not_commands(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        parse(Args, ["--help"], description="What it does.\n\npython a.py --x\npython a.py --y\n")
    printed = capsys.readouterr().out
    assert "A sentence of several (three) lines. (default: 1)" in printed
    assert {"python a.py --x", "python a.py --y"} <= set(map(str.strip, printed.splitlines()))


@pytest.mark.parametrize(
    ("typed", "words", "program"),
    [
        (["scripts/benchmark.py", "train", "--help"], ["--help"], "scripts/benchmark.py train"),
        (["dalle plan", "--kind", "dvae", "--help"], ["--help"], "dalle plan --kind dvae"),
        (["dalle sample", "--help"], None, "dalle sample"),
        (["pytest", "-q"], ["--help"], "pytest"),
    ],
)
def test_the_usage_names_what_was_typed(typed, words, program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", typed)
    with pytest.raises(SystemExit):
        parse(Args, words)
    assert capsys.readouterr().out.startswith(f"usage: {program} [-h] ")


def test_a_command_ends_well_without_a_stdout(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    with cli_errors():
        print("a red circle")
