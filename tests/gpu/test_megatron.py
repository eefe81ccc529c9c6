"""The Megatron engine's stock layers (Transformer Engine, mamba-ssm) against the torch engine, alone and as two ranks with a GPU each."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanotrain.config.engine import EngineConfig, EngineKind, Precision
from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import OptimizerConfig, TrainingConfig
from nanotrain.engines.base import Engine
from nanotrain.engines.megatron_batch import SequenceSplit
from nanotrain.engines.megatron_documents import attend_chunks, chunk_documents
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import build_meta_model
from tests.ranks import run_ranks

for package in ("megatron.core", "transformer_engine", "mamba_ssm", "causal_conv1d"):
    pytest.importorskip(package, reason=f"{package} is not installed")

MODEL = ModelConfig(
    hybrid_layer_pattern="M-*M-",
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    mamba_num_heads=128,
    mamba_head_dim=80,
    ssm_state_size=128,
    n_groups=8,
)
LENGTH, NUM_STEPS = 1024, 4
LEARNING_RATE = 2e-4
"""At 1e-3 the loss falls by a third in four steps, and rounding grows to the size of the tolerance in any engine."""
LAYOUTS = {
    "tp2": MegatronConfig(tensor_parallel=2),
    "tp2_sp": MegatronConfig(tensor_parallel=2, sequence_parallel=True),
    "cp2": MegatronConfig(context_parallel=2),
    "cp2_plain": MegatronConfig(context_parallel=2),
    "dp2": MegatronConfig(),
}
PLAIN = ("one", "cp2_plain")
"""Layouts that train on rows of one document; the others on packed rows."""
TOLERANCE = {Precision.bf16: (2e-3, 2e-2), Precision.fp8_blockwise: (5e-3, 5e-2)}
"""Relative, of loss and gradient norm: bf16 keeps 8 bits, E4M3 4, and Megatron's residual stream is bf16, ours fp32."""


def config(precision: Precision, megatron: MegatronConfig | None) -> EngineConfig:
    base = EngineConfig(precision=precision)
    if precision is Precision.fp8_blockwise:
        base = replace(base, fp8_bf16_first_layers=1, fp8_bf16_last_layers=1)
    return base if megatron is None else replace(base, kind=EngineKind.megatron, megatron=megatron)


def steps(engine: Engine, *, packed: bool) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of a few steps on two micro-batches of two rows."""
    found = []
    for step in range(NUM_STEPS):
        generator = torch.Generator().manual_seed(step % 2)
        batches = []
        for _ in range(2):
            ids = torch.randint(0, MODEL.vocab_size, (2, LENGTH + 1), generator=generator)
            border = torch.randint(1, LENGTH, (2, 1), generator=generator)
            documents = (torch.arange(LENGTH) >= border).int() if packed else None
            batches.append(MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents))
        each = len(batches) // engine.dp_size
        result = engine.train_step(batches[engine.dp_rank * each :][:each], CrossEntropy(), LEARNING_RATE)
        assert not result.skipped
        found.append((result.loss, result.grad_norm))
    return found


def build(precision: Precision, megatron: MegatronConfig | None) -> Engine:
    from nanotrain.engines.torch_engine import TorchEngine

    training = TrainingConfig(
        steps=NUM_STEPS, global_batch_size=4, micro_batch_size=2, sequence_length=LENGTH, learning_rate=LEARNING_RATE,
        optimizer=OptimizerConfig(),
    )  # fmt: skip
    if megatron is None:
        engine: Engine = TorchEngine(config(precision, None), build_meta_model(MODEL), training)
    else:
        from nanotrain.engines.megatron_engine import MegatronEngine

        engine = MegatronEngine(config(precision, megatron), build_meta_model(MODEL), training)
    engine.init_weights(1)
    return engine


def run_layouts(precision: Precision, layouts: dict[str, MegatronConfig]):
    """Return layout -> steps, on one rank."""
    from megatron.core import parallel_state

    found = {}
    for name, layout in layouts.items():
        found[name] = steps(build(precision, layout), packed=name not in PLAIN)
        parallel_state.destroy_model_parallel()
    return found


def compare(found, expected, precision: Precision) -> None:
    loss, grad_norm = TOLERANCE[precision]
    for name, values in found.items():
        print(name, precision.value, values)
        for got, wanted in zip(values, expected[name], strict=True):
            assert got[0] == pytest.approx(wanted[0], rel=loss), name
            assert got[1] == pytest.approx(wanted[1], rel=grad_norm), name


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp8_blockwise])
def test_stock_layers_train_like_the_torch_engine(precision):
    layouts = {"one": MegatronConfig(), "packed": MegatronConfig()}
    expected = {name: steps(build(precision, None), packed=name not in PLAIN) for name in layouts}
    print("torch engine", precision.value, expected)
    compare(run_layouts(precision, layouts), expected, precision)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: Megatron's ranks cannot share one")
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp8_blockwise])
def test_two_ranks_train_like_the_torch_engine(precision):
    plain, packed = (steps(build(precision, None), packed=flag) for flag in (False, True))
    expected = {name: plain if name in PLAIN else packed for name in LAYOUTS}
    for found in run_ranks(run_layouts, 2, precision, LAYOUTS):
        compare(found, expected, precision)


@pytest.fixture(scope="module")
def row_attention():
    """The stock attention as the engine builds it for context parallelism, in one process: its ranks are played one by one."""
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    from nanotrain.engines.megatron_layers import DocumentAttention

    engine = build(Precision.bf16, MegatronConfig())
    yield type("RowAttention", (DocumentAttention, TEDotProductAttention), {})(
        config=engine._config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"]),
    )
    parallel_state.destroy_model_parallel()


def random_row(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [S, 8, 128], keys and values of 4 heads one after another [S, 8, 128], and a gradient [S, 8 x 128]."""
    generator = torch.Generator("cuda").manual_seed(length)
    shapes = ((length, 8, 128), (length, 8, 128), (length, 1024))
    query, keys_values, upstream = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for shape in shapes
    )
    return query.requires_grad_(), keys_values.requires_grad_(), upstream


def borders_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attend_rank(module, row: tuple[Tensor, Tensor], lengths: list[int], split: SequenceSplit) -> Tensor:
    """Return what one rank's queries come to, of gathered keys and values."""
    query, keys_values = row
    chunks = [chunk_documents(borders_of(lengths), chunk).to(query.device) for chunk in split.chunks(len(query))]
    return attend_chunks(split.take(query[None])[0], keys_values, chunks, module._attend)


def masked(row: tuple[Tensor, Tensor], lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same for all queries in fp32 under a mask of all pairs, and the leaves that it was computed of."""
    q, kv = (tensor.detach().float().requires_grad_() for tensor in row)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
    mask = (ids[:, None] == ids[None, :]).tril()
    k, v = kv.repeat_interleave(2, dim=1).chunk(2, dim=1)
    y = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), attn_mask=mask)
    return y[0].transpose(0, 1).flatten(1), q, kv


DOCUMENTS = {
    "one document": [4096],
    "over borders": [1, 700, 65, 1, 1400, 333, 2, 1594],
    "one token each": [1] * 256 + [3840],
    "on borders": [256] * 8 + [2048],
}


@pytest.mark.parametrize("context_parallel", [2, 16])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_documents_of_split_rows_against_a_mask(row_attention, documents, context_parallel):
    from transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention import _attention_backends

    lengths = DOCUMENTS[documents]
    query, keys_values, upstream = random_row(sum(lengths))
    splits = [SequenceSplit(context_parallel, rank) for rank in range(context_parallel)]
    outputs = []
    for split in splits:
        outputs.append(attend_rank(row_attention, (query, keys_values), lengths, split)[None])
        assert _attention_backends["use_fused_attention"], "Transformer Engine chose a kernel with a mask in memory"
    joined = splits[0].join(outputs)[0]
    joined.backward(upstream)
    expected, q, kv = masked((query, keys_values), lengths)
    expected.backward(upstream.float())
    for name, got, wanted in (
        ("output", joined, expected),
        ("query", query.grad, q.grad),
        ("keys and values", keys_values.grad, kv.grad),
    ):
        error = float(((got.detach().float() - wanted).norm() / wanted.norm()).detach())
        print(documents, context_parallel, name, f"relative error {error:.1e}")
        assert error < 2e-2, name  # bf16 products and, over ranks, sums


def test_a_long_row_needs_no_mask_in_memory(row_attention):
    """131,072 tokens on the last two chunks' rank of 16; scores alone would be 4,096 x 131,072 x 8 heads = 8 GiB in bf16."""
    query, keys_values, upstream = random_row(131072)
    split = SequenceSplit(16, 0)
    for lengths in ([131072], [40000, 30000, 61072], [4096] * 32, [131072]):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        output = attend_rank(row_attention, (query, keys_values), lengths, split)
        output.backward(upstream[: len(output)])
        end.record()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        print(f"{len(lengths)} documents: {start.elapsed_time(end):.1f} ms, peak {peak:.2f} GiB")
        assert peak < 4


def test_mamba_ssm_starts_with_the_shipped_launch_parameters():
    """Megatron's mixer calls mamba-ssm itself; untuned, its first step on a fresh machine times variants for over a minute."""
    from megatron.core import parallel_state

    from nanotrain.ops.gpu.tuned_configs import tuners

    build(Precision.bf16, MegatronConfig())
    parallel_state.destroy_model_parallel()
    left = {name: len(tuner.configs) for name, tuner in tuners().items()}
    assert left["_chunk_scan_fwd_kernel"] == left["_chunk_state_fwd_kernel"] == 1, left
