"""Export: the deliverable as a Hugging Face folder in its final dtype, verified against transformers, with its card."""

import shutil
from pathlib import Path
from typing import Any

import torch

from nanotrain.checkpoint.hf_folder import load_config, load_state_dict, save_state_dict, verify_against_transformers
from nanotrain.checkpoint.lineage import Ancestor, find_evaluations, read_data_manifest, trace_lineage
from nanotrain.checkpoint.model_card import write_model_card
from nanotrain.checkpoint.provenance import Provenance, load_provenance
from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.config.stage import ExportConfig, SaveDtype
from nanotrain.runtime.files import folder_digest, write_json_atomic
from nanotrain.runtime.run import Run
from nanotrain.stages.training_products import PRODUCT, RESULTS, tokenizer_folder

_DTYPES = {SaveDtype.float32: torch.float32, SaveDtype.bfloat16: torch.bfloat16}
_LIMITS = [
    "A language model repeats what its training text says, errors and biases included; check what it writes.",
    "It was measured on the held-out text and the rule-checked tasks named here and on nothing else; no safety training.",
    "The thinking budget is kept by the decoder, not by the model: use `nanotrain chat --thinking-budget N`.",
]


def export(config: ExportConfig, run: Run) -> Path:
    """Write the checkpoint of `init_from` as the final folder and return it.

    Args:
        config: dtype of the weights; `data_from` for a checkpoint without a tokenizer.
        run: inputs `init_from`, and `data_from` if it is set.

    Raises:
        UserError: there is no tokenizer.
        VerificationError: transformers computes other logits from the folder.
    """
    output = run.folder / PRODUCT
    if output.exists():  # of an attempt that was killed before stage.json
        shutil.rmtree(output)
    tokenizer = tokenizer_folder(run.inputs["data_from"]) if "data_from" in run.inputs else None
    verification = export_folder(
        run.inputs["init_from"], output, config.save_dtype.value, tokenizer_from=tokenizer, name=run.name, seed=run.seed
    )
    results = {
        "weight_bytes": sum(file.stat().st_size for file in output.glob("*.safetensors")),
        "dtype": config.save_dtype.value,
        "verification": verification,
    }
    write_json_atomic(run.folder / RESULTS, results)
    return output


def export_folder(
    source: Path,
    output: Path,
    dtype: str,
    *,
    tokenizer_from: Path | None = None,
    name: str = "",
    seed: int | None = None,
) -> dict[str, float | int]:
    """Write a checkpoint as a Hugging Face folder with tokenizer, chat template, card and provenance, and verify it.

    Args:
        source: checkpoint folder.
        output: must not exist.
        dtype: float32 or bfloat16; what the recurrence needs in float32 (A_log, D, dt_bias) stays in it.
        tokenizer_from: tokenizer folder for a source that has none.
        name: of the model, in the card; empty = the output's name.
        seed: of the run, for the provenance.

    Returns:
        max_abs_logit_difference and tokens_checked against transformers, in float32.

    Raises:
        UserError: `source` is no checkpoint, has no tokenizer, or `output` exists.
        VerificationError: transformers computes other logits from the folder.
    """
    source, output = Path(source), Path(output)
    if dtype not in [known.value for known in SaveDtype]:
        raise UserError(f"dtype ({dtype}) must be one of {', '.join(known.value for known in SaveDtype)}.")
    if output.exists():
        raise UserError(f"{output} exists and is not overwritten; give a new folder.")
    config = load_config(source)
    if (source / "tokenizer.json").is_file():
        tokenizer_from = source
    elif tokenizer_from is None:
        raise MissingInputError(f"{source} holds no tokenizer.json; set `stage.data_from` to the data that trained it.")
    save_state_dict(
        load_state_dict(source),
        config,
        output,
        dtype=_DTYPES[SaveDtype(dtype)],
        tokenizer_from=tokenizer_from,
        provenance=_provenance(source, seed),
    )
    verification = verify_against_transformers(output)
    write_model_card(output, title=name or output.resolve().name, facts=_card_facts(source, verification))
    return verification


def _provenance(source: Path, seed: int | None) -> Provenance:
    """Return what made the export: its parent, with the parent's own numbers."""
    parent = load_provenance(source)
    own: dict[str, Any] = {"parent": source.as_posix(), "parent_digest": folder_digest(source)}
    if parent is None:
        return Provenance(stage="export", seed=seed, **own)
    return Provenance(
        stage="export",
        seed=parent.seed if seed is None else seed,
        step=parent.step,
        tokens_seen=parent.tokens_seen,
        metrics=parent.metrics,
        config_changes=parent.config_changes,
        **own,
    )


def _card_facts(source: Path, verification: dict[str, float | int]) -> dict[str, Any]:
    """Return the sections of the card that the run's folders can fill."""
    ancestors = trace_lineage(source)
    facts: dict[str, Any] = {"Training": [_training_row(ancestor) for ancestor in ancestors]}
    evaluations = find_evaluations(ancestors[-1]) if ancestors else []
    if evaluations:
        facts |= _evaluation_sections(evaluations[0])
    manifest = read_data_manifest(ancestors)
    if manifest:
        facts["Data and licences"] = [
            {key: one[key] for key in ("name", "category", "package", "version", "licence", "tokens") if key in one}
            for one in manifest["sources"]
        ]
    facts["Verification"] = {
        "largest difference of logits to transformers (fp32)": float(verification["max_abs_logit_difference"]),
        "positions compared": verification["tokens_checked"],
    }
    facts["Limits"] = _LIMITS
    return facts


def _training_row(ancestor: Ancestor) -> dict[str, Any]:
    results = ancestor.results
    held_out = results.get("held_out") or results.get("held_out_after")
    return {
        "stage": ancestor.entry,
        "parameters": results.get("parameters") or results.get("parameters_after"),
        "steps": results.get("steps"),
        "tokens": results.get("tokens"),
        "final loss": results.get("final_loss"),
        "held-out bits per byte": held_out["average"] if held_out else None,
    }


def _evaluation_sections(results: dict[str, Any]) -> dict[str, Any]:
    """Return held-out quality, accuracy and the budget curve of an evaluation."""
    tasks = {
        f"accuracy on verifiable tasks, {mode.replace('_', ' ')}": f"{100 * one['accuracy']:.1f}%"
        f" ({one['count']} prompts, 95% interval {100 * one['interval'][0]:.0f}-{100 * one['interval'][1]:.0f}%)"
        for mode, one in results["tasks"].items()
    }
    bits = {f"held-out bits per byte, {name}": value for name, value in results["held_out"]["bits_per_byte"].items()}
    curve = [
        {
            "thinking budget": "unlimited" if point["budget"] is None else point["budget"],
            "accuracy": f"{100 * point['accuracy']:.1f}%",
            "well-formed": f"{100 * point['well_formed']:.1f}%",
            "mean answer tokens": round(point["answer_tokens"], 1),
        }
        for point in results["budget_curve"]
    ]
    return {"Evaluation": bits | tasks, "Thinking budget": curve}
