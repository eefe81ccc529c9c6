"""The engines and layouts that the fault campaign kills on CPU ranks, by name."""

from dataclasses import dataclass

_FP32 = ("engine.device=cpu", "engine.precision=fp32", "engine.threads=1")


@dataclass(frozen=True)
class RankEngine:
    """One engine and how it divides the work."""

    overrides: tuple[str, ...]
    imports: tuple[str, ...] = ("nanotrain.engines.torch_engine",)
    """Modules that a rank would import late."""
    library: str | None = None
    """What must be installed beside torch."""

    @property
    def is_megatron(self) -> bool:
        return self.library == "megatron"

    def layout(self, size: int) -> str:
        """Return how `size` ranks share the work, in words."""
        words = {"tensor_parallel": "TP", "pipeline_parallel": "PP", "context_parallel": "CP"}
        parts, rest = [], size
        for text in self.overrides:
            key, _, value = text.rpartition("=")
            short = words.get(key.rpartition(".")[2])
            if short:
                parts.append(f"{short}{value}")
                rest //= int(value)
        return " x ".join([*parts, *([f"DP{rest}"] if rest > 1 or not parts else [])])


def _megatron(*options: str) -> RankEngine:
    own = tuple(f"engine.megatron.{option}" for option in options)
    return RankEngine(("engine=megatron_1gpu", *_FP32, *own), ("nanotrain.engines.megatron_engine",), "megatron")


def _zero(name: str) -> RankEngine:
    return RankEngine((f"engine=deepspeed_{name}", *_FP32), ("nanotrain.engines.deepspeed_engine",), "deepspeed")


ENGINES = {
    "ddp": RankEngine(("engine=torch_cpu", "engine.threads=1")),
    "fsdp2": RankEngine(("engine=torch_fsdp2", *_FP32), ("nanotrain.engines.torch_parallel",)),
    "zero1": _zero("zero1"),
    "zero2": _zero("zero2"),
    "zero3": _zero("zero3"),
    "zero3_offload": _zero("zero3_offload"),
    "megatron": _megatron(),
    "megatron_tp2": _megatron("tensor_parallel=2", "sequence_parallel=true"),
    "megatron_pp2": _megatron("pipeline_parallel=2"),
    "megatron_cp2": _megatron("context_parallel=2"),
    "megatron_tp2_pp2": _megatron("tensor_parallel=2", "pipeline_parallel=2"),
}
"""`megatron` alone is data-parallel, with the distributed optimizer. Ranks that a layout leaves over are data-parallel."""
