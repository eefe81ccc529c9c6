"""Resolve a blend or curriculum against prepared shards: shares, epochs, caps; then a data folder for `data_from`.

    python -m data_prep.build_blend --curriculum FILE --shards FOLDER --tokenizer FOLDER --output FOLDER --tokens N [--dry-run]
    python -m data_prep.build_blend --curriculum FILE --epochs [--tokens N]      the table of a run from published sizes

Shards are links, so nothing is copied. A source that the run would repeat beyond its cap is refused here, before training.
"""

import argparse
import sys
from pathlib import Path

from data_prep.program import run
from nanotrain.config.blend import Curriculum, load_blend, load_curriculum
from nanotrain.config.errors import UserError
from nanotrain.data.blend_folder import build_blend_folder, plan_blend
from nanotrain.planning.repetition import check_epochs, curriculum_caps, plan_repetition


def curriculum_of(options: argparse.Namespace) -> Curriculum:
    """Return the curriculum asked for; a single blend is a curriculum of one phase."""
    if bool(options.curriculum) == bool(options.blend):
        raise UserError("name either `--curriculum FILE` or `--blend FILE`.")
    if options.curriculum:
        return load_curriculum(options.curriculum)
    return Curriculum(0, [(1.0, load_blend(options.blend))], {})


def epochs_table(curriculum: Curriculum, total_tokens: int) -> list[str]:
    """Return a Markdown table of what a run draws from each source, from published sizes.

    Raises:
        UserError: a source would be repeated beyond its cap.
    """
    heads = [f"phase {number} %" for number in range(1, len(curriculum.phases) + 1)]
    lines = ["| source | " + " | ".join(heads) + " | drawn (B) | available (B) | epochs | cap |"]
    lines.append("|---" * (len(heads) + 5) + "|")
    planned = plan_repetition(curriculum, total_tokens)
    for one in planned:
        shares = " | ".join(f"{100 * share:.1f}" for share in one.shares)
        shared = len(curriculum.pools[one.pool].sources) > 1 if one.pool else False
        size = f"{one.pool_tokens / 1e9:,.1f}" + (" together" if shared else "") if one.pool else "not known"
        epochs = f"{one.epochs:.2f}" if one.pool else "-"
        lines.append(f"| {one.name} | {shares} | {one.tokens / 1e9:,.0f} | {size} | {epochs} | {one.max_epochs:g} |")
    check_epochs(
        {one.name: one.epochs for one in planned if one.pool},
        curriculum_caps(curriculum.recipe_phases()),
        f"{total_tokens or curriculum.total_tokens:,} tokens of this curriculum",
        "lower the weight or the tokens, or raise `max_epochs`",
    )
    return lines


def build(options: argparse.Namespace) -> str:
    """Do what the options ask for; return what is printed."""
    curriculum = curriculum_of(options)
    total = options.tokens or curriculum.total_tokens
    if total < 1:
        raise UserError(f"`--tokens` ({options.tokens}) must be at least 1: it is the length of the run.")
    if options.epochs:
        return "\n".join(epochs_table(curriculum, total))
    if options.shards is None:
        raise UserError("`--shards` is missing; it names the folder with one folder of token shards a source.")
    rows = plan_blend(curriculum, options.shards, total)
    lines = []
    for row in rows:
        shares = " ".join(f"{100 * share:6.2f}%" for share in row["shares"])
        lines.append(
            f"{row['name']:<32} {shares} {row['train_tokens']:>18,} tokens {row['drawn_tokens']:>18,} drawn"
            f" {row['epochs']:8.3f} epochs in {len(row['part_tokens'])} shards"
        )
    if options.dry_run:
        return "\n".join(
            [*lines, f"would link {sum(len(row['part_tokens']) for row in rows)} shards into {options.output}"]
        )
    if options.output is None or options.tokenizer is None:
        raise UserError("`--output` and `--tokenizer` are needed to build; `--dry-run` only shows the table.")
    build_blend_folder(rows, curriculum, options.tokenizer, options.output)
    return "\n".join([*lines, f"blend of {len(rows)} sources in {options.output}"])


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return the exit code: 0 done, 2 a mistake that one sentence explains."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.build_blend", description="Resolve a blend of shards.")
    parser.add_argument("--curriculum", help="file or name in configs/data/blends")
    parser.add_argument("--blend", help="a single blend instead")
    parser.add_argument("--shards", type=Path, help="folder with the shards of each source")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer that made the shards")
    parser.add_argument("--output", type=Path, help="the blend's data folder")
    parser.add_argument("--tokens", type=int, default=0, help="length of the run; default: the curriculum's")
    parser.add_argument(
        "--epochs", action="store_true", help="print the table of epochs from published sizes, and stop"
    )
    parser.add_argument("--dry-run", action="store_true", help="print shares, tokens and epochs, and stop")
    options = parser.parse_args(arguments)
    return run(lambda: build(options))


if __name__ == "__main__":
    sys.exit(main())
