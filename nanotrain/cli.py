"""The command line: `nanotrain run | submit | plan | report | chat | export`.

Help comes in a blink: PyTorch and Hydra are imported by the command that needs them.
Exit codes: 0 done, 1 our defect (with its traceback), 2 the user can mend it (one sentence), 75 preempted and saved.
"""

import argparse
import re
import signal
import sys
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanotrain.config.errors import UserError
from nanotrain.runtime.distributed import (
    OtherRankFailed,
    ToldMistake,
    current_world,
    is_first_to_say,
    leave_ranks,
    on_first,
    start_ranks,
)
from nanotrain.runtime.offline import stay_offline
from nanotrain.runtime.signals import Preempted, Terminated, terminate

if TYPE_CHECKING:
    from nanotrain.config.load import LoadedRecipe
    from nanotrain.config.stage import StageConfig

EXIT_DEFECT = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130
DEFAULT_CHECK_STEPS = 6

_RUN_EPILOG = """\
overrides are Hydra's: key=value, +key=value, ~key, group=choice, lists [a,b], mappings {a:1}.
  a stage recipe:  stage.training.steps=50   engine=torch_cpu   output_dir=runs/mine
  a pipeline:      pretrain.stage.training.steps=50   (entry first; name, seed, output_dir, engine, tracking, cluster without)

examples:
  nanotrain run recipes/quickstart/pipeline.yaml
  nanotrain run recipes/quickstart/pipeline.yaml pretrain.stage.training.steps=50 output_dir=runs/short
  nanotrain run recipes/quickstart/distill.yaml                     one stage, inside the pipeline's folder
  nanotrain run recipes/quickstart/pipeline.yaml --multirun seed=1,2

Running the same command again does nothing when it is finished, and resumes when it was cut off.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(_flags_first(argv))
    stay_offline()
    code = _exit_code(options)
    leave_ranks()  # not after a defect: its traceback holds the groups, and the others may be anywhere
    return code


def _exit_code(options: argparse.Namespace) -> int:
    try:
        code: int = options.command(options)
    except UserError as error:
        if not isinstance(error, ToldMistake) and is_first_to_say(str(error)):
            print(f"nanotrain: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OtherRankFailed:
        return EXIT_DEFECT
    except KeyboardInterrupt:
        print("nanotrain: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nobody is left to tell
        return EXIT_INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nanotrain", description="Trains small hybrid Mamba-2 reasoning models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    _add_run(commands)
    _add_submit_and_plan(commands)

    report = commands.add_parser("report", help="write report.html and report.json of a run again")
    report.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="output folder of a run, such as runs/quickstart")
    report.set_defaults(command=_report)

    chat = commands.add_parser("chat", help="talk to a model")
    chat.add_argument("folder", metavar="HF_FOLDER", type=Path, help="checkpoint, such as runs/quickstart/export/hf")
    chat.add_argument(
        "--thinking-budget", type=_non_negative, metavar="N", help="tokens of reasoning before the answer is asked for"
    )
    chat.add_argument("--no-think", action="store_true", help="answer without reasoning")
    chat.set_defaults(command=_chat)

    export = commands.add_parser("export", help="write a checkpoint as a verified Hugging Face folder")
    export.add_argument("folder", metavar="HF_FOLDER", type=Path, help="checkpoint to export")
    export.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write; must not exist")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the weights (default: bfloat16)"
    )
    export.set_defaults(command=_export)
    return parser


def _add_submit_and_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    submit = commands.add_parser(
        "submit",
        help="run a recipe on a SLURM cluster: a chain of one job an entry",
        description="Submits a job for each unfinished entry; each starts when the one before it has succeeded.",
        epilog="Nodes, GPUs and time come from `cluster=<choice>` and `<entry>.cluster.<key>=value` (configs/cluster/).",
    )
    submit.add_argument("recipe", metavar="RECIPE", help="as for run")
    submit.add_argument("overrides", nargs="*", metavar="key=value", help="as for run")
    submit.add_argument("--dry-run", action="store_true", help="print the job scripts and submit nothing")
    submit.set_defaults(command=_submit)

    plan = commands.add_parser(
        "plan",
        help="print layout, operations and memory of a recipe's training",
        description="Plans the training entries of a recipe on a number of GPUs; runs nothing, and needs none.",
    )
    plan.add_argument("recipe", metavar="RECIPE", help="as for run")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    plan.add_argument(
        "--ranks", type=_positive, metavar="N", help="GPUs of the run (default: one, or one copy of the model)"
    )
    plan.set_defaults(command=_plan)


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = commands.add_parser(
        "run",
        help="run a recipe: one stage or a whole pipeline",
        description="Runs a stage recipe or a pipeline recipe.",
        epilog=_RUN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("recipe", metavar="RECIPE", help="YAML file; recipes shipped with the package need no checkout")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    run.add_argument(
        "--force",
        nargs="?",
        const="",
        metavar="ENTRY",
        help="make stale products again; with ENTRY, make that one again even if it is up to date",
    )
    run.add_argument(
        "--only", metavar="ENTRY", help="run this entry of a pipeline; what it starts from must be finished"
    )
    run.add_argument(
        "--resume-check",
        nargs="?",
        const=DEFAULT_CHECK_STEPS,
        type=int,
        metavar="STEPS",
        help=f"prove on your own recipe, in a scratch folder, that a training cut in the middle of so many steps"
        f" (default: {DEFAULT_CHECK_STEPS}) and resumed equals one that was not",
    )
    run.add_argument("--cfg", action="store_true", help="print the composed recipe and stop")
    run.add_argument(
        "-m", "--multirun", action="store_true", help="expand a=1,2 range() choice() into runs, one after the other"
    )
    run.set_defaults(command=_run)


def _non_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _flags_first(argv: list[str]) -> list[str]:
    """Let the flags of `run`, `submit` and `plan` stand anywhere between the overrides, which argparse alone does not.

    `--force` takes the word after it only if that can be an entry's name: not an override, a flag or a recipe; `--only`
    takes any, and `--resume-check` a number.
    """
    if not argv or argv[0] not in ("run", "submit", "plan"):
        return argv
    flags, positionals = [], []
    words = iter(argv[1:])
    for word in words:
        if word == "--":
            positionals += list(words)
        elif word in ("--only", "--ranks"):
            flags += [word, *islice(words, 1)]
        elif word == "--force":
            flags.append(word)
        elif flags and flags[-1] == "--resume-check" and word.isdecimal():
            flags[-1] = f"--resume-check={word}"
        elif flags and flags[-1] == "--force" and word is not argv[0] and re.fullmatch(r"[A-Za-z0-9][\w-]*", word):
            flags[-1] = f"--force={word}"
        else:
            (flags if word.startswith("-") and word != "-" else positionals).append(word)
    return [argv[0], *flags, "--", *positionals]


def _run(options: argparse.Namespace) -> int:
    """Run with the signals of a scheduler caught from the first moment: the imports alone take seconds."""
    previous = {number: signal.signal(number, terminate) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        start_ranks()
        return _run_recipes(options)
    except (Preempted, Terminated, KeyboardInterrupt) as stop:
        reason = str(stop) or "stopped; finished work is saved, and the same command continues."
        if current_world().is_first:  # all ranks stop together
            print(f"nanotrain: {reason}", file=sys.stderr)
        return EXIT_PREEMPTED
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run_recipes(options: argparse.Namespace) -> int:
    recipes = on_first(lambda: _load_recipes(options))
    if options.cfg:
        if current_world().is_first:
            print("\n---\n".join(recipe.to_yaml().rstrip() for recipe in recipes))
        return 0
    for recipe in recipes:
        code = _run_one(recipe, options)
        if code:
            return code
    return 0


def _load_recipes(options: argparse.Namespace) -> "list[LoadedRecipe]":
    from nanotrain.config.load import expand_sweeps, load_recipe

    if not options.multirun:
        return [load_recipe(options.recipe, options.overrides)]
    jobs = expand_sweeps(options.overrides)
    return [_with_suffix(load_recipe(options.recipe, job.overrides), options, job) for job in jobs]


def _with_suffix(recipe: "LoadedRecipe", options: argparse.Namespace, job: Any) -> "LoadedRecipe":
    """Load a sweep's job again with a name and an output_dir of its own."""
    from nanotrain.config.load import load_recipe

    name, folder = recipe.name + job.suffix, f"{recipe.output_dir}{job.suffix}"
    quoted = folder.replace("\\", "\\\\").replace("'", "\\'")
    return load_recipe(options.recipe, [*job.overrides, f"name='{name}'", f"output_dir='{quoted}'"])


def _run_one(recipe: "LoadedRecipe", options: argparse.Namespace) -> int:
    from nanotrain.pipeline.resume_check import check_resume
    from nanotrain.pipeline.run import run_pipeline
    from nanotrain.runtime.logging import set_up_logging

    set_up_logging(rank=current_world().rank)
    if options.resume_check is not None:
        differences = check_resume(recipe, _stages, steps=options.resume_check, only=options.only)
        for line in differences if current_world().is_first else ():
            print(line)
        return EXIT_DEFECT if any(" differ" in line for line in differences) else 0
    force = True if options.force == "" else options.force or False
    run_pipeline(recipe, _stages, report=_build_report, force=force, only=options.only)
    if current_world().is_first:
        print(recipe.output_dir / "report.html")
    return 0


def _submit(options: argparse.Namespace) -> int:
    from nanotrain.config.load import load_recipe
    from nanotrain.pipeline.run import Pipeline
    from nanotrain.pipeline.slurm import build_jobs, submit

    recipe = load_recipe(options.recipe, options.overrides)
    entries = Pipeline(recipe, _stages, _build_report).check(lambda entry: entry.config.cluster.world_size)
    jobs = build_jobs(recipe, entries, options.overrides)
    if options.dry_run:
        for job in jobs:
            print(f"# {job.entry}\n{job.script}")
    else:
        for entry, number in submit(recipe, jobs):
            print(f"{number} {entry}")
    if not jobs:
        print(f"{recipe.output_dir}: every entry is finished, nothing to submit", file=sys.stderr)
    return 0


def _stages() -> Mapping[type["StageConfig"], Callable[..., Path]]:
    from nanotrain.stages import STAGES

    return STAGES


def _build_report(output_dir: Path) -> None:
    from nanotrain.report.build import build_report

    build_report(output_dir)


def _plan(options: argparse.Namespace) -> int:
    from nanotrain.config.load import load_recipe
    from nanotrain.pipeline.plan import plan_recipe

    print("\n".join(plan_recipe(load_recipe(options.recipe, options.overrides), options.ranks)))
    return 0


def _report(options: argparse.Namespace) -> int:
    _build_report(options.run_dir)
    print(options.run_dir / "report.html")
    return 0


def _chat(options: argparse.Namespace) -> int:
    if options.no_think and options.thinking_budget is not None:
        raise UserError("`--no-think` and `--thinking-budget` exclude each other; give one of them.")
    from nanotrain.generation.chat import ChatSession

    thinking = False if options.no_think else None  # None leaves the choice to /think and /no_think
    session = ChatSession(options.folder, thinking_budget=options.thinking_budget, thinking=thinking)
    print("Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        if text:
            for piece in session.reply(text):
                print(piece, end="", flush=True)
            print()


def _export(options: argparse.Namespace) -> int:
    from nanotrain.stages.export import export_folder

    verification = export_folder(options.folder, options.output, options.dtype)
    difference = verification["max_abs_logit_difference"]
    print(f"{options.output}: logits equal transformers' within {difference:.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
