"""`qscope ...`: parse, call, show. What a command does is in the module it calls.

Nothing heavy is imported before a command needs it, so `qscope --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qscope_trl._version import __version__
from qscope_trl.errors import ConfigError, QScopeError, RuleError

_ABOUT = {
    "sft": "fine-tune with a feature penalty, from one YAML file and flags",
    "grpo": "the same for GRPO, with feature rewards and rollout policies",
    "plan": "the GPU memory such a run needs, from its YAML file, before anything is downloaded",
    "find": "find the features of a behaviour by contrast, and write them to a file",
    "doctor": "whether SAEs fit a model, on your texts",
    "index": "the features of a whole dataset, stored on disk",
    "rules": "rules over features: check, explain, learn, evaluate",
    "curate": "filter, tag, deduplicate and rebalance a dataset by features",
    "synthesize": "generate texts for features that a dataset does not cover",
    "evalmap": "which evaluation sets measure the same thing, by the features of their samples",
    "report": "one page of a run, that needs no account: what was trained on, curves, texts, drift, alarms",
    "audit": "a tuned model against its base: is the behaviour gone, or only the feature silent?",
    "dashboard": "a wandb workspace for the runs of a project",
    "steer": "plain and steered text side by side, calibration, sweeps with controls, exports",
    "demo": "the whole job on a small bundled model: find, fine-tune, compare",
    "build": "compile the kernels ahead of time, instead of on first use",
}

# Commands that differ in nothing but this: module that runs, and description. Settings are in `config/NAME.py`.
_ALIKE = {
    "curate": ("analysis.curation.run", "Curate a dataset by its features."),
    "synthesize": ("analysis.synthesis.run", "Generate texts for features not covered."),
    "evalmap": ("analysis.evalmap.run", "Map evaluation sets by features."),
    "report": ("monitor.report.run", "One page of a run."),
    "audit": ("analysis.audit.run", "Is the behaviour gone, or only the feature silent?"),
    "dashboard": ("monitor.workspace", "A wandb workspace for the runs of a project."),
    "steer": ("steering.run", "Steer a model along SAE features."),
}

_GOES_ON = {
    "index": "The same command goes on from here.",
    "synthesize": "The same command goes on from here with `--resume`.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Command line without the program's name; by default the process's own.

    Returns:
        Exit code: 0 (`doctor` also 1 or 3), 2 after an error that is the user's to mend, or 130 after Ctrl-C.
        `QSCOPE_TRL_DEBUG=1` shows their tracebacks.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except KeyboardInterrupt:
        if os.environ.get("QSCOPE_TRL_DEBUG") == "1":
            raise
        sys.stderr.write(f"\ninterrupted. {_GOES_ON.get(''.join(argv[:1]), '')}".rstrip() + "\n")
        return 130
    # An OSError is a disk that is full, a path that may not be written to, or a server that does not answer.
    except (QScopeError, OSError) as err:
        if os.environ.get("QSCOPE_TRL_DEBUG") == "1":
            raise
        # A rule's error shows the place in a line of its own.
        shown = str(err) if isinstance(err, RuleError) else " ".join(str(err).split())
        sys.stderr.write(f"error: {shown}\n")
        return 2


def _dispatch(argv: list[str]) -> int:
    from qscope_trl.parsing import refuse_unknown_flags, suggestion

    parser = argparse.ArgumentParser(
        prog="qscope",
        description="Fine-tune language models with sparse autoencoders.",
        epilog="commands:\n" + "\n".join(f"  {name:12}{about}" for name, about in _ABOUT.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qscope_trl {__version__}")
    parser.add_argument("command", help=f"one of {', '.join(_ABOUT)}; `qscope COMMAND --help` says more")
    if not argv:
        parser.print_help()
        return 2
    name = argv[0]
    if name.startswith("-"):
        refuse_unknown_flags(argv[:1], parser._option_string_actions)
        parser.parse_args(argv[:1])
    commands: dict[str, Callable[[list[str]], int]] = {
        "sft": _sft,
        "grpo": _grpo,
        "plan": _plan,
        "find": _find,
        "doctor": _doctor,
        "index": _index,
        "rules": _rules,
        "steer": _steer,
        "demo": _demo,
        "build": _build,
    }
    if name not in _ABOUT:
        raise ConfigError(f"Unknown command `{name}`.{suggestion(name, _ABOUT)}")
    if name not in commands:
        return _run_and_tell(name, argv[1:])
    return commands[name](argv[1:])


def _sft(argv: list[str]) -> int:
    from qscope_trl.training import sft

    result = sft.run(sft.parse(argv))
    if result.is_main_process:
        _say_saved(result.output_dir)
    return 0


def _grpo(argv: list[str]) -> int:
    from qscope_trl.training import grpo_run

    result = grpo_run.run(grpo_run.parse(argv))
    if result.is_main_process:
        _say_saved(result.output_dir)
    return 0


def _say_saved(output_dir: str) -> None:
    from qscope_trl.monitor.run_record import RECORD_FOLDER

    sys.stdout.write(f"Model saved to {output_dir}\n")
    if (Path(output_dir) / RECORD_FOLDER).is_dir():
        sys.stdout.write(f"One page of the run: qscope report {shlex.quote(output_dir)}\n")


def _plan(argv: list[str]) -> int:
    from qscope_trl.config.plan import PlanConfig
    from qscope_trl.parsing import add_flags, refuse

    parser = argparse.ArgumentParser(
        prog="qscope plan",
        description="The GPU memory that a training run needs, computed before anything is downloaded.",
        epilog="Any other flag is one of the training command and overrides the file: --max_length 32768.",
        allow_abbrev=False,
    )
    add_flags(parser, PlanConfig)
    parser.error = refuse  # type: ignore[method-assign]
    own, overrides = parser.parse_known_args(argv)
    options = PlanConfig(**vars(own))

    from qscope_trl.planning import run, show, suggestions

    plan = run.run(options, overrides)
    better = suggestions.suggest(plan, options, overrides)
    sys.stdout.write(show.format_plan(plan, better))
    if options.json:
        show.write_json(plan, better, options.json)
    return 0


def _find(argv: list[str]) -> int:
    from qscope_trl.config.find import FindConfig
    from qscope_trl.parsing import parse_flags

    config = parse_flags(argv, FindConfig, prog="qscope find", description="Find the features of a behaviour.")

    from qscope_trl.analysis import find_run

    found = find_run.run(config)
    sys.stdout.write(find_run.format_table(found))
    sys.stdout.write(find_run.format_notes(found))
    what = f"`{found.target_group}`" if found.target_group else "repetition"
    sys.stdout.write(f"{len(found)} features of {what} written to {config.output}\n")
    if config.report:
        sys.stdout.write(f"Report written to {config.report}\n")
    return 0


def _doctor(argv: list[str]) -> int:
    from qscope_trl.config.doctor import DoctorConfig
    from qscope_trl.parsing import parse_flags

    config = parse_flags(argv, DoctorConfig, prog="qscope doctor", description="Whether SAEs fit a model.")

    from qscope_trl.analysis.doctor import run

    result = run.run(config)
    sys.stdout.write(run.format_result(result))
    return result.exit_code


def _index(argv: list[str]) -> int:
    from qscope_trl.config.index import IndexConfig
    from qscope_trl.parsing import parse_flags

    config = parse_flags(argv, IndexConfig, prog="qscope index", description="Store a dataset's features on disk.")

    from qscope_trl.activations import index_run

    result = index_run.run(config)
    if result.is_main_process:
        sys.stdout.write(index_run.format_result(result))
    return 0


def _rules(argv: list[str]) -> int:
    from qscope_trl.analysis.rules.command import main as rules

    return rules(argv)


def _run_and_tell(name: str, argv: list[str]) -> int:
    """A command that parses its settings, runs, and says what came of it."""
    from qscope_trl.parsing import parse_flags

    module, description = _ALIKE[name]
    config_class = getattr(importlib.import_module(f"qscope_trl.config.{name}"), f"{name.capitalize()}Config")
    config = parse_flags(argv, config_class, prog=f"qscope {name}", description=description)
    command = importlib.import_module(f"qscope_trl.{module}")
    sys.stdout.write(command.format_result(command.run(config)))
    return 0


def _steer(argv: list[str]) -> int:
    # argparse takes `-8,-4` for a flag.
    signed = [n for n, word in enumerate(argv[:-1]) if word == "--sweep" and argv[n + 1][:1] == "-"]
    for place in reversed(signed):
        argv[place : place + 2] = [f"--sweep={argv[place + 1]}"]
    return _run_and_tell("steer", argv)


def _demo(argv: list[str]) -> int:
    from qscope_trl.demo.run import main as demo

    return demo(argv)


def _build(argv: list[str]) -> int:
    from qscope_trl.ops import build
    from qscope_trl.parsing import refuse, refuse_unknown_flags

    parser = argparse.ArgumentParser(
        prog="qscope build",
        description="Compile the kernels ahead of time, instead of on first use.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "kernels",
        nargs="*",
        metavar="KERNEL",
        help=f"{' or '.join(build.SOURCES)}; by default each whose compiler is there",
    )
    parser.add_argument(
        "--arch",
        action="append",
        metavar="CAPABILITY",
        help="GPU architecture for nvcc, such as 80 or 90a; may be repeated. By default this machine's GPUs",
    )
    parser.add_argument("--force", action="store_true", help="compile again what is there")
    refuse_unknown_flags(argv, parser._option_string_actions)
    parser.error = refuse  # type: ignore[method-assign]
    options = parser.parse_args(argv)
    unknown = [name for name in options.kernels if name not in build.SOURCES]
    if unknown:
        raise ConfigError(f"Unknown kernel `{unknown[0]}`; there are {', '.join(build.SOURCES)}.")
    chosen = options.kernels or [name for name in build.SOURCES if build.find_compiler(name)] or ["cpu"]
    for name in chosen:
        path = build.build(name, archs=tuple(options.arch or ()), force=options.force)
        sys.stdout.write(f"{name}: {path}\n")
    return 0
