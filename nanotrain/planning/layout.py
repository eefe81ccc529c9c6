"""Which ways of spreading a model over ranks Megatron-Core can build; refused ones are answered with the nearest that work."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nanotrain.config.engine import FP8_PRECISIONS, EngineConfig, EngineKind
from nanotrain.config.errors import UserError
from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.model import ATTENTION, MAMBA, MLP, ModelConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.planning.pipeline_stages import layers_per_stage, padded_vocab_size

_KEY = "engine.megatron"
_FP8_MULTIPLE = 16
"""Transformer Engine's FP8 products need both sides of every matrix to be multiples of it."""
_MOST_TENSOR, _MOST_CONTEXT = 64, 1024
"""How far the search for layouts goes; no model has that many groups or that long a sequence."""
_PROPOSALS = 2


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups of ranks."""

    tensor: int
    pipeline: int
    context: int
    data: int

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tensor * self.pipeline * self.context * self.data


@dataclass(frozen=True)
class _Problem:
    text: str
    other_way: str = ""
    """Beside another layout."""


def data_parallel_size(megatron: MegatronConfig, world_size: int) -> int:
    """Return what is left of the ranks for data parallelism (0 when they are fewer than one model needs)."""
    return world_size // (megatron.tensor_parallel * megatron.pipeline_parallel * megatron.context_parallel)


def check_ranks(
    models: Sequence[ModelConfig],
    training: TrainingConfig,
    engine: EngineConfig,
    world_size: int,
    *,
    training_path: str = "stage.training",
) -> None:
    """Say whether so many ranks can share a training, by any engine: its batch and, on Megatron-Core, its models.

    All phases of a curriculum have the same batch, so one answer is for the whole training.

    Args:
        models: that are trained or teach, as far as they are known.
        training: batch sizes and sequence length.
        engine: its kind decides how ranks share the work.
        world_size: ranks that the launcher starts.
        training_path: key of `training`, for the message.

    Raises:
        UserError: they cannot; with the nearest values that work.
    """
    if engine.kind is not EngineKind.megatron:
        training.validate_batch(training_path, world_size)
        return
    for model in models:
        check_layout(model, training, engine, world_size, training_path=training_path)
    if not models:
        problem = _ranks_problem(engine.megatron, world_size)
        if problem is not None:
            raise UserError(f"{problem.text}; {problem.other_way}.")
        training.validate_batch(training_path, data_parallel_size(engine.megatron, world_size))


def check_layout(
    model: ModelConfig,
    training: TrainingConfig,
    engine: EngineConfig,
    world_size: int,
    *,
    training_path: str = "stage.training",
) -> Layout:
    """Return the layout of a run on Megatron-Core, or say why there is none and which ones work.

    Args:
        model: the architecture.
        training: batch sizes and sequence length.
        engine: kind megatron.
        world_size: ranks that the launcher starts.
        training_path: key of `training`, for the message.

    Raises:
        UserError: the layout cannot be built.
    """
    problem = next(_problems(model, training, engine, world_size, training_path), None)
    if problem is not None:
        ways = [_proposals(model, training, engine, world_size), problem.other_way]
        raise UserError(f"{problem.text}; {', or '.join(way for way in ways if way)}.")
    megatron = engine.megatron
    sizes = (megatron.tensor_parallel, megatron.pipeline_parallel, megatron.context_parallel)
    return Layout(*sizes, data_parallel_size(megatron, world_size))


def _problems(
    model: ModelConfig, training: TrainingConfig, engine: EngineConfig, world_size: int, path: str
) -> Iterator[_Problem]:
    megatron = engine.megatron
    if model.tie_word_embeddings:
        yield _Problem(
            "`engine.kind` (megatron) splits input and output embeddings over different ranks, and the model's"
            " `tie_word_embeddings` is true",
            "train it with engine=torch, or untie the embeddings",
        )
    yield from _tensor_problems(model, engine)
    yield from _context_problems(model, training, engine, path)
    yield from _pipeline_problems(model, megatron)
    problem = _ranks_problem(megatron, world_size)
    if problem is not None:
        yield replace(problem, other_way="")  # layouts are proposed instead
        return
    yield from _batch_problems(training, data_parallel_size(megatron, world_size), path)


def _ranks_problem(megatron: MegatronConfig, world_size: int) -> _Problem | None:
    model_ranks = megatron.tensor_parallel * megatron.pipeline_parallel * megatron.context_parallel
    if world_size % model_ranks == 0:
        return None
    below = world_size // model_ranks * model_ranks
    return _Problem(
        f"`{_KEY}.tensor_parallel` ({megatron.tensor_parallel}) x `pipeline_parallel`"
        f" ({megatron.pipeline_parallel}) x `context_parallel` ({megatron.context_parallel}) = {model_ranks} must"
        f" divide the number of ranks ({world_size})",
        f"start {f'{below} or ' if below else ''}{below + model_ranks} ranks",
    )


def _tensor_problems(model: ModelConfig, engine: EngineConfig) -> Iterator[_Problem]:
    size = engine.megatron.tensor_parallel
    kinds = set(model.hybrid_layer_pattern)
    divided = {
        MAMBA: {"n_groups": "Mamba-2's groups", "mamba_num_heads": "Mamba-2's heads"},
        ATTENTION: {"num_key_value_heads": "key and value heads", "num_attention_heads": "attention heads"},
        MLP: {"intermediate_size": "rows of the MLP"},
    }
    for kind in (MAMBA, ATTENTION, MLP):
        for name, words in divided[kind].items() if kind in kinds else ():
            value = getattr(model, name)
            if value % size:
                yield _Problem(
                    f"`{_KEY}.tensor_parallel` ({size}) must divide the model's `{name}` ({value}), because each rank"
                    f" holds whole {words}"
                )
    if padded_vocab_size(model.vocab_size, size) // size * (size - 1) >= model.vocab_size:
        yield _Problem(
            f"`{_KEY}.tensor_parallel` ({size}) must leave each rank a part of the model's `vocab_size`"
            f" ({model.vocab_size})"
        )
    yield from _fp8_problems(model, engine)


def fp8_layers(model: ModelConfig, engine: EngineConfig) -> range:
    """Return the layers whose matrix products run in FP8."""
    if engine.precision not in FP8_PRECISIONS:
        return range(0)
    return range(engine.fp8_bf16_first_layers, model.num_hidden_layers - engine.fp8_bf16_last_layers)


def _fp8_problems(model: ModelConfig, engine: EngineConfig) -> Iterator[_Problem]:
    size = engine.megatron.tensor_parallel
    layers = fp8_layers(model, engine)
    kinds = {model.hybrid_layer_pattern[layer] for layer in layers}
    query, key_value = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    sides = {
        MAMBA: {"in_proj's rows": model.in_proj_size, "`mamba_num_heads` x `mamba_head_dim`": model.mamba_inner_size},
        ATTENTION: {
            "query, key and value rows": query + 2 * key_value,
            "`num_attention_heads` x `head_dim`": query,
        },
        MLP: {"`intermediate_size`": model.intermediate_size},
    }
    way = "set `engine.precision` to bf16"
    if kinds and model.hidden_size % _FP8_MULTIPLE:
        yield _Problem(
            f"`engine.precision` ({engine.precision.value}) needs a multiple of {_FP8_MULTIPLE} as the model's"
            f" `hidden_size` ({model.hidden_size})",
            way,
        )
    for kind in (MAMBA, ATTENTION, MLP):
        for words, value in sides[kind].items() if kind in kinds else ():
            if value % size == 0 and value // size % _FP8_MULTIPLE:
                yield _Problem(
                    f"`{_KEY}.tensor_parallel` ({size}) leaves each rank {value // size} of the model's {words}"
                    f" ({value}), and `engine.precision` ({engine.precision.value}) needs a multiple of"
                    f" {_FP8_MULTIPLE} on every rank",
                    way,
                )


def _context_problems(
    model: ModelConfig, training: TrainingConfig, engine: EngineConfig, path: str
) -> Iterator[_Problem]:
    megatron = engine.megatron
    tensor, context, sequence = megatron.tensor_parallel, megatron.context_parallel, training.sequence_length
    if MAMBA in model.hybrid_layer_pattern:
        if model.mamba_num_heads % (tensor * context):
            yield _Problem(
                f"`{_KEY}.context_parallel` ({context}) x `tensor_parallel` ({tensor}) must divide the model's"
                f" `mamba_num_heads` ({model.mamba_num_heads}), because context-parallel ranks share Mamba-2's heads"
            )
        groups = max(model.n_groups // tensor, 1)
        if max(groups, context) % min(groups, context):
            yield _Problem(
                f"`{_KEY}.context_parallel` ({context}) must divide, or be a multiple of, the {groups} of the model's"
                f" `n_groups` ({model.n_groups}) that a tensor-parallel rank holds"
            )
    # attention gives each rank one part from the front and one from the back, so that causal work is even
    unit = (2 * context if context > 1 else 1) * (tensor if megatron.sequence_parallel else 1)
    if engine.precision in FP8_PRECISIONS:
        rows = math.lcm(unit, context * _FP8_MULTIPLE // math.gcd(training.micro_batch_size, _FP8_MULTIPLE))
        reason = f" for `engine.precision` ({engine.precision.value})" if rows != unit else ""
        unit = rows
    else:
        reason = ""
    if sequence % unit:
        below, above = sequence // unit * unit, -(-sequence // unit) * unit
        lengths = f"{above}" if below == 0 else f"{below} or {above}"
        yield _Problem(
            f"`{path}.sequence_length` ({sequence}) must be a multiple of {unit}{reason}, so that"
            f" `{_KEY}.context_parallel` ({context}) and `tensor_parallel` ({tensor}) ranks hold equal parts of it",
            f"set `{path}.sequence_length` to {lengths}",
        )


def _pipeline_problems(model: ModelConfig, megatron: MegatronConfig) -> Iterator[_Problem]:
    layers, stages = model.num_hidden_layers, megatron.pipeline_parallel
    if stages > layers:
        yield _Problem(
            f"`{_KEY}.pipeline_parallel` ({stages}) must not exceed the model's layers ({layers}), because every stage"
            " needs one"
        )
        return
    lengths = megatron.pipeline_layers
    if lengths and (sum(lengths) != layers or min(lengths) < 1):
        even = layers_per_stage(layers, replace(megatron, pipeline_layers=[]))
        yield _Problem(
            f"`{_KEY}.pipeline_layers` ({lengths}) must be at least 1 each and sum to the model's layers ({layers}), and"
            f" the sum is {sum(lengths)}",
            f"leave it empty for {even}",
        )


def _batch_problems(training: TrainingConfig, data: int, path: str) -> Iterator[_Problem]:
    unit = data * training.micro_batch_size
    if training.global_batch_size % unit:
        yield _Problem(
            f"`{path}.global_batch_size` ({training.global_batch_size}) must be divisible by `micro_batch_size`"
            f" ({training.micro_batch_size}) x {data} data-parallel ranks",
            f"set `{path}.global_batch_size` to {training.nearest_batch_sizes(unit)}",
        )


def workable_layouts(model: ModelConfig, training: TrainingConfig, engine: EngineConfig) -> list[Layout]:
    """Return every layout that can be built and splits the batch, for any number of ranks.

    Sequence parallelism stays as configured (off where there is one tensor-parallel rank); pipeline stages are even.
    """
    if model.tie_word_embeddings or training.global_batch_size % training.micro_batch_size:
        return []
    units = training.global_batch_size // training.micro_batch_size
    data_sizes = [size for size in range(1, units + 1) if units % size == 0]
    found = []
    for tensor in range(1, _MOST_TENSOR + 1):
        if next(_tensor_problems(model, with_layout(model, engine, Layout(tensor, 1, 1, 1))), None):
            continue
        for context in range(1, _MOST_CONTEXT + 1):
            if training.sequence_length % context:
                continue
            tried = with_layout(model, engine, Layout(tensor, 1, context, 1))
            if next(_context_problems(model, training, tried, ""), None) is None:
                found += [
                    Layout(tensor, pipeline, context, data)
                    for pipeline in range(1, model.num_hidden_layers + 1)
                    for data in data_sizes
                ]
    return found


def with_layout(model: ModelConfig, engine: EngineConfig, layout: Layout) -> EngineConfig:
    """Return the engine's settings with another layout; configured lengths of the stages are kept where they fit."""
    megatron = engine.megatron
    changed = replace(
        megatron,
        tensor_parallel=layout.tensor,
        pipeline_parallel=layout.pipeline,
        context_parallel=layout.context,
        sequence_parallel=megatron.sequence_parallel and layout.tensor > 1,
        pipeline_layers=megatron.pipeline_layers if layout.pipeline == megatron.pipeline_parallel else [],
    )
    if next(_pipeline_problems(model, changed), None) is not None:
        changed = replace(changed, pipeline_layers=[])
    return replace(engine, megatron=changed)


def nearest_layouts(
    model: ModelConfig, training: TrainingConfig, engine: EngineConfig, world_size: int
) -> list[Layout]:
    """Return the workable layouts nearest to the configured one: for this number of ranks, else for fewer and for more.

    Distance counts doublings and halvings of each size, and of the number of ranks.
    """
    megatron = engine.megatron
    wanted = (megatron.tensor_parallel, megatron.pipeline_parallel, megatron.context_parallel)

    def distance(layout: Layout) -> float:
        sizes = (layout.tensor, layout.pipeline, layout.context)
        return sum(abs(math.log2(size / want)) for size, want in zip(sizes, wanted, strict=True))

    layouts = workable_layouts(model, training, engine)
    here = [layout for layout in layouts if layout.world_size == world_size]
    if here:
        return sorted(here, key=distance)[:_PROPOSALS]

    def cost(layout: Layout) -> float:
        return 2 * abs(math.log2(layout.world_size / world_size)) + distance(layout)

    fewer = [layout for layout in layouts if layout.world_size < world_size]
    more = [layout for layout in layouts if layout.world_size > world_size]
    return [min(side, key=cost) for side in (fewer, more) if side]


def _proposals(model: ModelConfig, training: TrainingConfig, engine: EngineConfig, world_size: int) -> str:
    texts = [
        f"{layout.world_size} {'rank' if layout.world_size == 1 else 'ranks'} with {_described(model, engine, layout)}"
        for layout in nearest_layouts(model, training, engine, world_size)
    ]
    return f"what works: {' or '.join(texts)}" if texts else ""


def _described(model: ModelConfig, engine: EngineConfig, layout: Layout) -> str:
    """Name the settings of a layout, those of `engine.megatron` that must change with them included."""
    megatron, changed = engine.megatron, with_layout(model, engine, layout).megatron
    words = f"tensor_parallel={layout.tensor} pipeline_parallel={layout.pipeline} context_parallel={layout.context}"
    if changed.sequence_parallel != megatron.sequence_parallel:
        words += " sequence_parallel=false"
    if changed.pipeline_layers != megatron.pipeline_layers:
        words += " pipeline_layers=[]"
    return f"{words} (data-parallel {layout.data})"
