"""The `lccp` command: the one place that composes everything else.

In: a command line. Out: prepared data, a trained and measured model, a report, a verdict. Exit codes: 0 done, 1 failed in
the middle (a second call resumes), 2 the request cannot run as it stands, 130 and 143 stopped by SIGINT and SIGTERM (a
second call resumes); `verdict` has more of its own.
"""

from __future__ import annotations

import argparse
import inspect
import os
import select
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Whatever needs torch or Megatron is imported where it is used: a report and an error message need neither.
from megatron_lccp.config.arguments import OneLineParser, a_count, a_path
from megatron_lccp.config.classes import find_class, package_of, public_path, shipped
from megatron_lccp.config.load import ConfigError, fields_help, parse_config
from megatron_lccp.config.tree import Config, MixtureConfig, Source, StageConfig, StopRule
from megatron_lccp.files import error_text, one_line
from megatron_lccp.processes import leave_with_launcher
from megatron_lccp.schema import Monitor

if TYPE_CHECKING:
    from megatron_lccp.analysis.run import Run

EXAMPLE = "examples/tiny_moe.yaml"
GPU_KINDS = ("H100", "H200", "B200", "H800", "H20")
_IN_THE_MIDDLE = ("TrainingError", "CheckpointError", "MonitorError", "RanksApart")
_HANGING = {"initial_indent": "  ", "subsequent_indent": "    "}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors of the user's making are one line each on stderr."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who called
            setattr(sys, name, open(os.devnull, "w"))
    # Before torch is imported: its warnings of a connection that is closed are traces of C++, one from every rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_left():  # another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        return 141


def _reader_has_left() -> bool:
    """True if nobody reads what this process prints any more, as after `| head -1`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # of errors it tells unasked
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, and once; of numpy's none, on numbers that are not finite: the verdict has alerts."""
    said = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if (text := str(message)) not in said:
            said.add(text)
            print(f"lccp: {text}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.showwarning = show
        yield


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(
        prog="lccp", description="Long-context continual pre-training on Megatron-Core, measured while it runs."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary.replace("%", "%%"), description=summary, add_help=name in ARGUMENTS
        )
        command.allow_abbrev = False  # `--out` is an option, `--optimizer.weight_decay=0` a field
        for option, settings in OPTIONS.get(name, {}).items():
            command.add_argument(option, **settings)
        for argument, settings in ARGUMENTS.get(name, {}).items():
            command.add_argument(argument, **settings)
        if name not in ARGUMENTS:
            command.add_argument("config", nargs="?", help=f"YAML file, such as {EXAMPLE}")
            command.add_argument("-h", "--help", action="store_true")
    known, rest = parser.parse_known_args(arguments)
    try:
        with _plain_warnings() if known.command in OF_A_RUN else nullcontext():
            return COMMANDS[known.command][0](known, rest)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if known.command in OF_A_RUN or package not in OF_TRAINING:
            raise
        print(f"lccp: {known.command}: needs {package}; pip install 'megatron_lccp[train]'", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError, OSError) as error:
        if lost := _lost_ranks(error):
            if os.environ.get("LOCAL_RANK") in ("0", "1"):  # one that ended may be the first of its node
                print(f"lccp: rank {os.environ.get('RANK')}: {lost}", file=sys.stderr, flush=True)
            return 1
        if isinstance(error, BrokenPipeError) or not _is_written_to_be_read(error):
            raise
        _complain(error, known)
        return 1 if any(kind.__name__ in _IN_THE_MIDDLE for kind in type(error).__mro__) else 2


def _lost_ranks(error: BaseException) -> str | None:
    """The line of an error that says that other ranks are gone. A command of the analysis has none."""
    if "torch" not in sys.modules:
        return None
    from megatron_lccp.parallel.lost import lost_ranks

    return lost_ranks(error)


def _is_written_to_be_read(error: BaseException) -> bool:
    """Ours and the file system's errors say enough in one line; Megatron's and torch's keep their trace."""
    raised_here = Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(Path(__file__).parent)
    return isinstance(error, OSError) or (isinstance(error, (ValueError, *_own())) and raised_here)


def _own() -> tuple[type[BaseException], ...]:
    return tuple(c for c in RuntimeError.__subclasses__() if c.__module__.startswith("megatron_lccp"))


def _complain(error: Exception, known: argparse.Namespace) -> None:
    """One line; from one rank if all of them raise this error, else with the rank that met it."""
    rank, common = os.environ.get("RANK", "0"), type(error).__module__.startswith("megatron_lccp")
    common = common and type(error).__name__ != "RanksApart"  # which one of them met
    if rank == "0" or not common:
        where = _field_of(error.filename, known) if isinstance(error, OSError) else ""
        text = error_text(error) if isinstance(error, ConfigError) else one_line(error_text(error))  # it has many lines
        print(f"lccp: {'' if rank == '0' else f'rank {rank}: '}{where}{text}", file=sys.stderr, flush=True)


def _field_of(path: str | bytes | None, known: argparse.Namespace) -> str:
    """What a line about a file begins with: the option, or the field of the configuration, that led to it."""
    given = {option: getattr(known, option.strip("-"), None) for option in ("--out", "--scores")}
    if config := getattr(known, "parsed", None):
        given |= {"data.tokenizer.path": config.data.tokenizer.path, "data.dir": config.data.dir, "dir": config.dir}
    if not isinstance(path, str):
        return ""
    here = Path(os.path.abspath(path))
    of = {field: Path(os.path.abspath(value)) for field, value in given.items() if value}
    return next((f"{field}: " for field, value in of.items() if value == here or value in here.parents), "")


def _config_of(known: argparse.Namespace, overrides: Sequence[str]) -> Config | None:
    """The configuration a command works on; None after printing help."""
    if known.help:
        published = "lccp measure --hf MODEL ... [options]\n       " * (known.command == "measure")
        print(f"usage: {published}lccp {known.command} CONFIG [--key=value ...]\n")
        print(COMMANDS[known.command][1])
        print(f"CONFIG is a YAML file, such as {EXAMPLE}; --key=value overrides one of these fields, also deep ones:")
        print("  --stages.lccp.lr=1e-5   --monitors.1.init_args.samples=8   --megatron.transformer.num_layers=8\n")
        for option, settings in OPTIONS.get(known.command, {}).items():
            print(f"  {option:<14} {settings['help']}")
        print(f"\nFields of a configuration:\n{fields_help(Config)}")
        _explain_parts()
        return None
    if known.config is None:
        published = ", or published models by --hf" * (known.command == "measure")
        raise ValueError(f"{known.command}: name a configuration, such as {EXAMPLE}{published}")
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()  # before a monitor's class_path imports Megatron-Core
    known.parsed = parse_config(known.config, overrides)
    return known.parsed


def _explain_parts() -> None:
    """Fields of what a configuration holds several of: stages, their mixtures, sources and monitors, ours and those that
    installed packages ship."""
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()
    from megatron_lccp import monitors
    from megatron_lccp.data import sources

    parts = {"stages.NAME": StageConfig, "stages.NAME.mixture.PART": MixtureConfig, "stop_when.N": StopRule}
    for where, kind in parts.items():
        _explain(where, kind)
    for place, base, package in (("data.sources.NAME", Source, sources), ("monitors.N", Monitor, monitors)):
        for kind in (getattr(package, name) for name in package.__all__):
            _explain(f"{place} with class_path {public_path(kind)}", kind)
        for name, points in shipped(base).items():
            where = f"{place} with class_path {name}"
            try:
                kind = find_class(name, base)
            except ValueError as error:
                print(f"\n{where}:\n  {error}")
            else:
                _explain(f"{where}, of the package {package_of(points[0])}", kind)


def _explain(where: str, kind: type) -> None:
    """What a class says of itself, what it measures if it is a monitor, and its fields."""
    paragraphs = [textwrap.indent(inspect.cleandoc(kind.__doc__ or ""), "  ")]
    if issubclass(kind, Monitor) and kind.metrics:
        lines = (f"`{metric.name}`, {metric.unit}: {metric.about}" for metric in kind.metrics)
        paragraphs.append(
            "\n".join(textwrap.fill(x, 100, initial_indent="  ", subsequent_indent="    ") for x in lines)
        )
    print(f"\n{where}:\n" + "\n\n".join([*paragraphs, fields_help(kind)]))


def prepare_command(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """lccp prepare."""
    config = _config_of(known, overrides)
    if config is not None:
        from megatron_lccp.data.prepare import prepare

        prepare(config, say=lambda text: print(text, flush=True), verify=known.verify)
        if "WORLD_SIZE" in os.environ:  # the launcher says how many ranks it is about to start
            from megatron_lccp.parallel.groups import environment_problem
            from megatron_lccp.training.setup import check_everything

            if problem := environment_problem({"WORLD_SIZE": os.environ["WORLD_SIZE"], "RANK": "0", "MASTER_ADDR": ""}):
                raise ValueError(problem)
            check_everything(config, str(known.config))
    return 0


def report_command(known: argparse.Namespace, rest: Sequence[str]) -> int:
    """lccp report."""
    _no_more(known, rest)
    from megatron_lccp.analysis.report.report import write_report
    from megatron_lccp.analysis.verdict.judge import parse_margins

    print(write_report(known.runs, known.out, known.scores, margins=parse_margins(known.margin)))
    return 0


def verdict_command(known: argparse.Namespace, rest: Sequence[str]) -> int:
    """lccp verdict."""
    _no_more(known, rest)
    from megatron_lccp.analysis.verdict.advice import advise
    from megatron_lccp.analysis.verdict.judge import judge, parse_margins
    from megatron_lccp.analysis.verdict.text import verdict_json, verdict_text

    run = _judged_run(known.run, known.scores)
    verdict = judge(run, parse_margins(known.margin))
    advice = advise(run, verdict, known.plan, known.ranks)
    print(verdict_json(verdict, advice) if known.json else verdict_text(verdict, advice))
    return verdict.exit_code


def _judged_run(run_dir: str | None, scores: str | None) -> Run:
    """The run, with benchmark scores of a file; or those scores alone."""
    from megatron_lccp.analysis.measured.benchmarks import scores_alone, with_scores
    from megatron_lccp.analysis.run import load_run

    if run_dir is not None:
        return with_scores([load_run(run_dir)], scores)[0]
    if scores is None:
        raise ValueError("verdict: name a run directory, or --scores with a CSV of benchmark scores")
    return scores_alone(scores)


def compare_command(known: argparse.Namespace, rest: Sequence[str]) -> int:
    """lccp compare."""
    _no_more(known, rest)
    from megatron_lccp.analysis.report.compare import compare

    found = compare(known.a, known.b, known.ranks)
    print(found.to_json() if known.json else found.text())
    return 0


def correlate_command(known: argparse.Namespace, rest: Sequence[str]) -> int:
    """lccp correlate."""
    _no_more(known, rest)
    from megatron_lccp.analysis.report.correlate import as_json, as_text, of_file, of_numbers

    if (known.file is None) == (not known.r):
        raise ValueError("correlate: give either a CSV file, or --r with --n")
    if known.file is not None:
        if known.n is not None:
            raise ValueError("--n: belongs to --r; of a file, the pairs are counted")
        lines = of_file(known.file, known.x or (), known.y or ())
    elif known.n is None:
        raise ValueError("--r: needs --n, the number of pairs that it is of")
    elif known.x or known.y:
        raise ValueError("--x and --y: choose columns of a CSV; --r needs none")
    else:
        lines = of_numbers(known.r, known.n)
    print(as_json(lines) if known.json else as_text(lines))
    return 0


def branch_command(known: argparse.Namespace, rest: Sequence[str]) -> int:
    """lccp branch."""
    _no_more(known, rest)
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()  # before a monitor's class_path imports Megatron-Core
    from megatron_lccp.commands.branch import branch, branch_text

    print(branch_text(branch(known.run, known.at, known.stage, known.dir, known.name)))
    return 0


def watch_command(known: argparse.Namespace, rest: Sequence[str]) -> int:
    """lccp watch."""
    _no_more(known, rest)
    from megatron_lccp.analysis.report.watch import watch
    from megatron_lccp.analysis.verdict.judge import parse_margins

    margins = parse_margins(known.margin)
    watch(known.runs, known.out, known.scores, margins, known.every, say=lambda text: print(text, flush=True))
    return 0


def export_command(known: argparse.Namespace, rest: Sequence[str]) -> int:
    """lccp export."""
    _no_more(known, rest)
    from megatron_lccp.analysis.report.export import export
    from megatron_lccp.analysis.verdict.judge import parse_margins

    for path in export(known.runs, known.out, known.scores, parse_margins(known.margin), known.only or ()):
        print(path, flush=True)
    return 0


def _no_more(known: argparse.Namespace, rest: Sequence[str]) -> None:
    if rest:
        raise ValueError(f"{known.command}: does not know {' '.join(rest)}; see lccp {known.command} --help")


def measure_command(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """lccp measure, on one rank of torchrun's job or alone."""
    leave_with_launcher()
    if not known.help and (known.hf or known.print_suite):
        return _measure_published(known, overrides)
    if not known.help and (wrong := [f"--{name}" for name in OF_PUBLISHED if getattr(known, name)]):
        raise ValueError(f"{wrong[0]}: is for models that --hf names; a configuration says it itself")
    config = _config_of(known, overrides)
    if config is None:
        return 0
    from megatron_lccp.commands.measure import measure, print_plan

    if known.dry_run:
        print_plan(config, str(known.config))
        return 0
    return measure(config, str(known.config), known.checkpoint or [], known.out)


def _measure_published(known: argparse.Namespace, rest: Sequence[str]) -> int:
    """lccp measure --hf."""
    _no_more(known, rest)
    if known.config is not None or known.checkpoint:
        raise ValueError("--hf: takes neither a configuration nor --checkpoint; --suite names a file of monitors")
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()
    try:
        from megatron_lccp.commands.measure_published import measure_published, print_suite
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ValueError("--hf: needs transformers; LCCP_EXTRAS=convert bash tools/setup_env.sh brings it") from error

    texts, lengths = known.text or [], known.lengths or []
    if known.print_suite:
        print_suite(texts, lengths)
        return 0
    how = (known.precision or "auto", known.bos or "auto", known.tensor or 1)
    return measure_published(known.hf, texts, lengths, known.out, known.suite, *how, known.dry_run)


def plan_command(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """lccp plan."""
    config = _config_of(known, overrides)
    if config is not None and known.suggest:
        from megatron_lccp.planning.suggest import print_suggestions

        print_suggestions(config, str(known.config), known.ranks, known.gpu, known.json)
    elif config is not None:
        from megatron_lccp.planning.plan import print_plan

        options = (known.ranks, known.mfu, known.gpu, known.json, known.faults_per_day, known.outage)
        print_plan(config, str(known.config), *options, known.storage_gbps)
    return 0


def init_command(known: argparse.Namespace, rest: Sequence[str]) -> int:
    """lccp init."""
    _no_more(known, rest)
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()  # before a monitor's class_path imports Megatron-Core
    from megatron_lccp.commands.printed import Printed
    from megatron_lccp.commands.starting import Asked, next_commands, start

    folder = Path(known.hf)
    out = Path(known.out or f"{folder.resolve().name}_{known.context}.yaml")
    asked = Asked(folder, tuple(known.text), known.context, known.ranks, known.gpu, out, known.tokens, known.yarn)
    start(asked, lambda text: print(f"lccp init: {text}", file=sys.stderr, flush=True), Printed())
    print(next_commands(out, known.ranks))
    return 0


def train_command(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """lccp train, on one rank of torchrun's job or alone."""
    leave_with_launcher()
    if known.dry_run:
        # A dry run is the same on any machine, so it neither looks for GPUs nor lets Megatron-Core find, before that is
        # imported, what wants one (its optimizer takes Transformer Engine's kernels wherever they can be imported).
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]  # None: it cannot be imported
    elif known.ranks is not None:
        raise ValueError("--ranks: is for --dry-run; a training runs on the ranks that torchrun starts")
    config = _config_of(known, overrides)
    if config is None:
        return 0
    if not known.dry_run:
        from megatron_lccp.commands.train import train

        return train(config, source=str(known.config))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("--dry-run: is one process for all ranks; start it without torchrun, with --ranks")
    from megatron_lccp.planning.dry_run import dry_run

    return dry_run(config, str(known.config), known.ranks)


def doctor_command(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    """lccp doctor, on one process, or on each rank of torchrun's or srun's job."""
    if known.gpu:
        _no_more(known, overrides)
        if known.config is not None or known.json:
            raise ValueError("--gpu: takes neither a configuration nor --json; --out names a folder for its files")
        from megatron_lccp.parallel import compat, cpu

        compat.quiet()
        cpu.install()
        from megatron_lccp.commands.doctor_gpu import doctor_gpu

        return doctor_gpu(known.device, Path(known.out), known.minutes)
    if known.config is None:
        _no_more(known, overrides)
    known.help = False
    config = None if known.config is None else _config_of(known, overrides)
    from megatron_lccp.commands.doctor import doctor

    return doctor(config, known.json)


COMMANDS = {
    "init": (
        init_command,
        "Write a whole training of a published model: convert its weights, choose a layout, a stage.",
    ),
    "prepare": (prepare_command, "Train the tokenizer and tokenize the documents of a configuration; once is enough."),
    "plan": (plan_command, "Say what a configuration takes (memory, FLOPs, GPU-hours); needs no ranks, data or GPU."),
    "doctor": (
        doctor_command,
        "Say what would end or slow a run here: versions, nodes, disks, limits; one line each, exit code 2 for a problem.",
    ),
    "train": (train_command, "Train a configuration on this rank (torchrun starts the ranks) and write its report."),
    "measure": (
        measure_command,
        "Measure published models (--hf FOLDER), or saved checkpoints with a configuration's monitors, without training; "
        "resumable.",
    ),
    "report": (report_command, "Write the report of one or several runs; needs neither torch nor Megatron."),
    "watch": (watch_command, "Write the report of runs again whenever they have measured more, until Ctrl-C."),
    "export": (export_command, "Write figures (PNG, SVG), tables and rows of runs, and head scores, as files."),
    "branch": (
        branch_command,
        "Make a run of its own that trains another stage (a decay, another mixture) from a checkpoint that a run kept.",
    ),
    "compare": (
        compare_command,
        "Say which of two runs is better by which signal, on the same samples, at equal tokens and at equal GPU-hours. "
        "Needs neither torch nor Megatron.",
    ),
    "correlate": (
        correlate_command,
        "Print r, n, p and the 95 % interval of correlations: of r and n, or of the columns of a CSV. Needs neither torch "
        "nor Megatron.",
    ),
    "verdict": (
        verdict_command,
        "Say whether to go on, and of each signal of a run whether it is saturated, improving, undecided or worse; stops "
        "nothing. Exit codes: 0 all are saturated, 10 at least one is improving, 11 undecided, 12 improving while the "
        "needle score is flat (deceptive saturation), 13 at least one got worse, 2 not a run. Needs neither torch nor "
        "Megatron.",
    ),
}
OF_PUBLISHED = ("text", "lengths", "suite", "precision", "bos", "tensor")
"""Options of `lccp measure --hf` alone."""
OF_A_RUN = ("report", "watch", "export", "verdict", "compare", "correlate")
"""Commands that need the analysis alone."""
OF_TRAINING = ("PIL", "megatron", "megatron-core", "psutil", "safetensors", "sentencepiece", "torch", "tqdm", "wandb")
"""What the extra `train` brings, as an import that fails names it."""
_MARGIN = {
    "action": "append",
    "default": [],
    "metavar": "SIGNAL=GAIN",
    "help": "gain per +25%% tokens that is no longer worth them, such as answer_nll=0.02; may be repeated",
}


_SCORES = {
    "type": a_path,
    "help": "CSV of benchmark scores, higher is better: columns tokens, benchmark, score, and run if there are several; "
    "shown and correlated, and judged if --margin names the benchmark: its scale is not known",
}
_RANKS = {"type": int, "help": "GPUs that the steps ran on, where steps.jsonl does not say it (an earlier version's)"}
_RUN = "run directory, or W&B's folder of it (wandb or offline-run-*)"
_RUNS = {
    "type": a_path,
    "nargs": "+",
    "metavar": "RUN",
    "help": "run directory, folder of them, or W&B's folder of one",
}
# What a command takes that takes no configuration.
ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "init": {},
    "report": {"runs": _RUNS},
    "watch": {"runs": _RUNS},
    "export": {"runs": _RUNS},
    "verdict": {"run": {"type": a_path, "nargs": "?", "metavar": "RUN", "help": f"{_RUN}; none: --scores alone"}},
    "compare": {
        "a": {"type": a_path, "metavar": "A", "help": f"{_RUN}, or what lccp measure wrote"},
        "b": {"type": a_path, "metavar": "B", "help": "another, which has measured the same samples"},
    },
    "correlate": {
        "file": {
            "nargs": "?", "metavar": "FILE.csv",
            "help": "a column for each series, a line for each checkpoint; a column tokens adds the noise floor",
        },
    },
    "doctor": {"config": {"nargs": "?", "metavar": "CONFIG", "help": "also look at the folders that this one names"}},
    "branch": {
        "run": {"type": a_path, "metavar": "RUN", "help": "run directory that lccp train wrote"},
        "stage": {
            "metavar": "STAGE.yaml",
            "help": "stages: with a new stage and its tokens (other fields are those of the stage that the checkpoint "
            "stands in), or with the name of that stage, which changes it from there on",
        },
    },
}  # fmt: skip
# What a command takes besides fields of the configuration.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "init": {
        "--hf": {
            "type": a_path,
            "required": True,
            "metavar": "FOLDER",
            "help": "config.json, *.safetensors, tokenizer",
        },
        "--text": {
            "type": a_path,
            "nargs": "+",
            "required": True,
            "metavar": "FILE",
            "help": "what to train on: UTF-8 text, each file a document, or JSON lines with a field `text`, also .gz",
        },
        "--context": {"type": a_count, "default": 65536, "help": "tokens of a training sequence (default: 65536)"},
        "--ranks": {"type": a_count, "default": 8, "help": "GPUs, or CPU ranks, to lay out for (default: 8)"},
        "--gpu": {"choices": list(GPU_KINDS), "default": "H100", "help": "their kind (default: H100)"},
        "--tokens": {"type": a_count, "help": "tokens to train on (default: about as many as the text has)"},
        "--yarn": {
            "action": "store_true",
            "help": "reach a longer context by YaRN rather than by a higher rotary base",
        },
        "--out": {"type": a_path, "help": "YAML file to write (default: by folder and context); weights go beside it"},
    },
    "prepare": {
        "--verify": {"action": "store_true", "help": "read what is prepared, and tokenize again what is not as it was"},
    },
    "plan": {
        "--ranks": {"type": int, "help": "GPUs to plan for (default: the fewest that the layout allows)"},
        "--mfu": {"type": float, "help": "model FLOPs as a share of the GPU's BF16 peak (default: 0.32)"},
        "--gpu": {
            "choices": list(GPU_KINDS),
            "help": "plan for this GPU alone (default: H100, H200, B200; of --suggest: H100)",
        },
        "--suggest": {
            "action": "store_true",
            "help": "name the layouts that fit --ranks GPUs, fastest first by a prediction, with memory and time",
        },
        "--storage-gbps": {
            "type": float,
            "help": "gigabytes a second between the storage and all ranks: prints seconds of save and load",
        },
        "--faults-per-day": {
            "type": float,
            "action": "append",
            "default": [],
            "help": "faults of the whole job, on average: prints the effective time and the best interval of saves; may "
            "be repeated",
        },
        "--outage": {
            "action": "append",
            "default": [],
            "metavar": "NAME=SECONDS",
            "help": "with --faults-per-day: what you measured for detection, requeue, start, load, save or behind (how "
            "long a save beside the training is not yet whole); may be repeated",
        },
        "--json": {"action": "store_true", "help": "print one JSON object"},
    },
    "doctor": {
        "--json": {"action": "store_true", "help": "print one JSON object"},
        "--gpu": {"action": "store_true", "help": "measure parity of kernels and a short bench on one GPU instead"},
        "--device": {"choices": ["cuda", "cpu"], "default": "cuda", "help": "with --gpu: cpu rehearses it"},
        "--out": {"default": "doctor-gpu", "help": "with --gpu: folder for its files (default: doctor-gpu)"},
        "--minutes": {"type": float, "default": 10.0, "help": "with --gpu: time for all of it (default: 10)"},
    },
    "train": {
        "--dry-run": {"action": "store_true", "help": "run one step of the whole layout without weights, and stop"},
        "--ranks": {"type": int, "help": "with --dry-run: GPUs to run (default: the fewest that the layout allows)"},
    },
    "measure": {
        "--checkpoint": {
            "type": a_path,
            "action": "append",
            "help": "a checkpoint, a directory of them, a .safetensors file; may be repeated (default: the run's own)",
        },
        "--out": {
            "type": a_path,
            "help": "run directory for the rows and the report (default: `measured` in the run directory; of published "
            "models runs/NAME)",
        },
        "--dry-run": {"action": "store_true", "help": "print what would be run and what it costs, and stop"},
        "--hf": {
            "nargs": "+",
            "metavar": "MODEL",
            "help": "published models, in place of a configuration: folders with config.json and *.safetensors, .gguf "
            "files, or names of the hub; several make one page",
        },
        "--text": {
            "type": a_path,
            "nargs": "+",
            "metavar": "FILE",
            "help": "with --hf: text or JSON lines to hide needles in and to predict (default: Python's standard library "
            "and generated biographies)",
        },
        "--lengths": {
            "type": a_count,
            "nargs": "+",
            "metavar": "TOKENS",
            "help": "with --hf: lengths of the samples (default: 512 1024 2048)",
        },
        "--precision": {
            "choices": ["auto", "fp32", "bf16"],
            "help": "with --hf: auto is bf16 on a GPU, fp32 elsewhere",
        },
        "--bos": {
            "help": "with --hf: the token that samples begin with: auto (as the tokenizer's files say, else the end token), "
            "none, eod, or a token's text (default: auto)",
        },
        "--tensor": {
            "type": a_count,
            "help": "with --hf under torchrun: ranks that share a model (default: 1, all replicas)",
        },
        "--suite": {
            "type": a_path,
            "metavar": "FILE",
            "help": "with --hf: YAML with a `monitors:` list, in place of ours",
        },
        "--print-suite": {"action": "store_true", "help": "print our suite for --text and --lengths as YAML, and stop"},
    },
    "report": {
        "--out": {
            "type": a_path,
            "help": "where to write the page (default: report.html in the run directory, or beside the first)",
        },
        "--scores": _SCORES,
        "--margin": _MARGIN,
    },
    "watch": {
        "--out": {"type": a_path, "help": "where to write the page (default: as for report)"},
        "--scores": _SCORES,
        "--margin": _MARGIN,
        "--every": {"type": float, "default": 15.0, "help": "seconds between looks at the runs (default: 15)"},
    },
    "export": {
        "--out": {
            "type": a_path,
            "help": "folder for the files (default: `export` in the run directory, or beside the first)",
        },
        "--scores": _SCORES,
        "--margin": _MARGIN,
        "--only": {
            "action": "append",
            "choices": ["figures", "tables", "rows", "heads"],
            "help": "write these alone; may be repeated (default: all)",
        },
    },
    "verdict": {
        "--json": {"action": "store_true", "help": "print one JSON object"},
        "--margin": _MARGIN,
        "--scores": _SCORES,
        "--plan": {
            "metavar": "FILE",
            "help": "GPU-hours by what lccp plan --gpu KIND --json printed (default: measured)",
        },
        "--ranks": _RANKS,
    },
    "compare": {
        "--json": {"action": "store_true", "help": "print one JSON object"},
        "--ranks": _RANKS,
    },
    "correlate": {
        "--r": {"type": float, "action": "append", "help": "a correlation coefficient as published; may be repeated"},
        "--n": {"type": int, "help": "pairs that it is of"},
        "--x": {"action": "append", "metavar": "COLUMN", "help": "take this column of the CSV; may be repeated"},
        "--y": {"action": "append", "metavar": "COLUMN", "help": "correlate with this one; may be repeated"},
        "--json": {"action": "store_true", "help": "print a JSON list"},
    },
    "branch": {
        "--at": {"type": int, "required": True, "metavar": "STEP", "help": "step of a checkpoint that the run keeps"},
        "--dir": {"help": "run directory of the branch (default: RUN with the stage's name behind it)"},
        "--name": {"help": "name of the branch (default: the run's with the stage's name behind it)"},
    },
}

if __name__ == "__main__":
    sys.exit(main())
