"""Forward + backward of the 12B's shapes on one GPU, beside Megatron-Core + Transformer Engine + mamba-ssm.

    python -m tests.benchmarks.bench_one_gpu reduced:bf16 reduced:fp8_blockwise --out results.jsonl [--profile folder]

Parts: `reduced:PRECISION` (11 layers), `full:PRECISION` (62 layers), `ours:PRECISION` (62 layers without the peer), `cores` (the Mamba mixer between its projections,
by chunk size). Both models hold bf16 parameters and share the storage of their
large matrices; weights are quantised anew every step. One round runs each once, in rotating order; medians and extremes
of the rounds are reported. Every part is written to the output as soon as it is done. `--tiny` checks the script
without a GPU, and without the peer.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nanotrain.config.engine import EngineConfig, KernelsConfig, Precision
from nanotrain.config.model import ModelConfig
from nanotrain.engines.precision import apply_precision
from nanotrain.engines.root import TrainingRoot
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import HybridModel
from nanotrain.model.mixers import MambaMixer
from nanotrain.ops.backends import choose_kernels
from nanotrain.ops.linear import WeightCopy
from nanotrain.planning.flops import training_flops_per_token
from tests.benchmarks.gpu_profile import record, summarize, table

FULL = ModelConfig(
    hybrid_layer_pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=20480,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    mamba_num_heads=128,
    mamba_head_dim=80,
    ssm_state_size=128,
    n_groups=8,
)
REDUCED = replace(FULL, hybrid_layer_pattern="M-M-M-M*-M-")
TINY = replace(
    REDUCED, hybrid_layer_pattern="M*-", vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=16, n_groups=2,
)  # fmt: skip
LARGE = 1_000_000
"""Matrices with more values than this lie in the storage that both models share."""


class Shared:
    """One buffer of random bf16 values that the large matrices of several models look into."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer = torch.empty(0, dtype=torch.bfloat16, device=device)

    def give(self, model: nn.Module) -> None:
        """Point the model's large parameters into the buffer; grow it first when it is too small."""
        large = [p for p in model.parameters() if p.numel() > LARGE]
        needed = sum(p.numel() for p in large)
        if needed > self._buffer.numel():
            assert self._buffer.numel() == 0, "give the largest model first"
            self._buffer = torch.empty(needed, dtype=torch.bfloat16, device=self.device)
            for i in range(0, needed, 2**30):
                self._buffer[i : i + 2**30].normal_(0.0, 0.0125)
        start = 0
        for parameter in large:
            parameter.data = self._buffer[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()


def our_model(config: ModelConfig, device: torch.device) -> HybridModel:
    """Return our model with bf16 parameters; large ones are empty until `Shared.give`."""
    with torch.device("meta"):
        model = HybridModel(config).to(torch.bfloat16)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            large = parameter.numel() > LARGE and device.type == "cuda"
            dtype = torch.float32 if name in ("A_log", "D", "dt_bias") else torch.bfloat16
            value = torch.empty(0 if large else parameter.shape, dtype=dtype, device=device)
            if not large:
                value.fill_(1.0) if "norm" in name or parameter.ndim == 1 else value.normal_(0.0, 0.02)
            if name == "dt_bias":
                value.fill_(-4.6)
            filled = nn.Parameter(value)
            if large:
                filled.data = torch.empty(1, dtype=dtype, device=device).expand(parameter.shape)
            setattr(module, name, filled)
    return model.train()


class OurStep:
    """A forward and backward on one batch with its own kernels; several share a model. It calls its argument between the two."""

    def __init__(self, model: HybridModel, config: EngineConfig, batch: MicroBatch, device: torch.device) -> None:
        self._model, self._config, self._batch, self._device = model, config, batch, device
        self._root, self._loss = TrainingRoot(model), CrossEntropy()
        self._copies: list[WeightCopy] = []

    def prepare(self) -> None:
        """Put this form's kernels and precision onto the model, outside the timed part."""
        choose_kernels(self._config.kernels.choices(), self._device)
        self._copies = apply_precision(self._model, self._config, self._device, torch.bfloat16)

    def release(self) -> None:
        """Free the quantised weights, so that the next form finds the memory that it had without this one."""
        for copy in self._copies:
            copy.drop()

    def __call__(self, between: Callable[[], None]) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None
        for copy in self._copies:
            copy.drop()
        with torch.autocast(self._device.type, torch.bfloat16):
            output = self._root(self._batch, self._loss)
        between()
        (output.loss_sum / self._batch.labels.numel()).backward()


def chosen_kernels(choices: list[str]) -> KernelsConfig:
    kernels = KernelsConfig()
    for choice in choices:
        op, _, name = choice.partition("=")
        setattr(kernels, op, type(getattr(kernels, op))(name))
    return kernels


class Clock:
    """Milliseconds of forward, backward and both, by device events (or the host's clock without a device)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[tuple[float, float, float]] = []

    def run(self, step: Callable[[Callable[[], None]], None]) -> None:
        marks: list[torch.cuda.Event | float] = []

        def mark() -> None:
            if self.device.type == "cuda":
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                marks.append(event)
            else:
                marks.append(1e3 * time.perf_counter())

        mark()
        step(mark)
        mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append((_between(*marks[:2]), _between(*marks[1:]), _between(marks[0], marks[2])))

    def summary(self) -> dict[str, float]:
        forward, backward, both = zip(*self.times, strict=True)
        return {
            "forward_ms": statistics.median(forward),
            "backward_ms": statistics.median(backward),
            "step_ms": statistics.median(both),
            "min_ms": min(both),
            "max_ms": max(both),
        }


def _between(a, b) -> float:
    return b - a if isinstance(a, float) else a.elapsed_time(b)


class Report:
    def __init__(self, path: Path | None) -> None:
        self._path = path

    def __call__(self, part: str, **values: object) -> None:
        line = {"part": part, **{k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}}
        print(" ".join(f"{k}={v}" for k, v in line.items()), flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def compare_models(part: str, config: ModelConfig, precision: str, options: argparse.Namespace, report: Report) -> None:
    """Time all forms' steps in rotating order; the gradients of one are freed before the next runs."""
    device, length = options.device, options.length
    ids = torch.randint(0, config.vocab_size, (1, length + 1))
    batch = MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).to(device)  # as the engine brings it over
    bf16_layers = options.bf16_layers if config.num_hidden_layers > 2 * options.bf16_layers else 0
    models: dict[str, nn.Module] = {"nanotrain": our_model(config, device)}
    if device.type == "cuda" and not options.alone and not part.startswith("ours"):
        models["peer"] = options.peer.build(config, precision, bf16_layers, length)
    shared = Shared(device)
    for model in sorted(models.values(), key=lambda model: -sum(p.numel() for p in model.parameters())):
        if device.type == "cuda":
            shared.give(model)
            free()
    steps: dict[str, Callable[[Callable[[], None]], None]] = {}
    if "peer" in models:
        steps["peer"] = options.peer.step_of(models["peer"], batch.input_ids, batch.labels)
    for choices in options.kernels:
        form = EngineConfig(
            precision=Precision(precision), kernels=chosen_kernels(choices.split(",") if choices else [])
        )
        form.fp8_bf16_first_layers = form.fp8_bf16_last_layers = bf16_layers
        if choices and "fp8" in choices and precision != "fp8_blockwise":
            continue
        steps[f"nanotrain {choices}".strip()] = OurStep(models["nanotrain"], form, batch, device)
    clocks, first, peak = time_steps(steps, models, options)
    flops = training_flops_per_token(config, length) * length
    for name, clock in clocks.items():
        summary = clock.summary()
        ratios = [
            theirs[2] / ours[2] for theirs, ours in zip(clocks.get("peer", clock).times, clock.times, strict=True)
        ]
        report(
            part, model=name, precision=precision, bf16_layers=bf16_layers, **summary,
            tokens_per_second=1e3 * length / summary["step_ms"], tflops=flops / summary["step_ms"] / 1e9,
            peak_gib=peak[name], first_step_s=first[name], peer_over_this=statistics.median(ratios),
            ratio_min=min(ratios), ratio_max=max(ratios),
        )  # fmt: skip
    for name, step in steps.items():
        if options.profile and device.type == "cuda":
            if isinstance(step, OurStep):
                step.prepare()
            file = f"{part.replace(':', '_')}_{name.replace(' ', '_').replace('=', '_')}.txt"
            report(f"profile:{part}", model=name, **profile(step, models.values(), options.profile / file))


def time_steps(
    steps: dict[str, Callable[[Callable[[], None]], None]], models: dict[str, nn.Module], options: argparse.Namespace
) -> tuple[dict[str, Clock], dict[str, float], dict[str, float]]:
    """Return the clocks, the seconds of the first call and the peak GiB of each step."""
    device = options.device
    clocks, first, peak = {name: Clock(device) for name in steps}, {}, {}
    order = list(steps)
    for round_ in range(options.warmup + options.rounds):
        order = [*order[1:], order[0]]
        for name in order:
            step = steps[name]
            if isinstance(step, OurStep):
                step.prepare()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            clocks[name].run(step)
            first.setdefault(name, time.perf_counter() - start)
            peak[name] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
            if round_ < options.warmup:
                clocks[name].times.clear()
            for model in models.values():
                for parameter in model.parameters():
                    parameter.grad = None
            if isinstance(step, OurStep):
                step.release()
    return clocks, first, peak


def profile(step: Callable[[Callable[[], None]], None], models: Iterable[nn.Module], path: Path) -> dict[str, object]:
    """Write the time of each GPU kernel in one step, the longest first; return it by kind, with the time of no kernel."""

    def one() -> None:
        step(lambda: None)
        for model in models:
            model.zero_grad(set_to_none=True)

    free()
    spans = record(one)
    if isinstance(step, OurStep):
        step.release()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(table(spans))
    return summarize(spans)


def compare_cores(options: argparse.Namespace, report: Report) -> None:
    """Time what lies between the projections of a Mamba-2 layer, for several chunk sizes and kernels."""
    device, config = options.device, TINY if options.tiny else REDUCED
    forms: dict[str, Callable[[Tensor], Tensor]] = {}
    for kernels in options.cores:
        for chunk in options.chunks:
            forms[f"nanotrain {kernels or 'torch'} {chunk}"] = our_core(
                replace(config, chunk_size=chunk), {"mamba_core": kernels}, device
            )
    if device.type == "cuda" and not options.alone:
        peer = options.peer.mamba_core(
            options.peer.build(replace(config, hybrid_layer_pattern="M-"), "bf16", 0, options.length)
        )
        forms["peer 128"] = lambda zxBCdt: peer._ssm_training(zxBCdt.transpose(0, 1)).transpose(0, 1)
    shape = (1, options.length, config.in_proj_size)
    zxBCdt = torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(1, options.length, config.mamba_inner_size, device=device, dtype=torch.bfloat16)
    for name, form in forms.items():

        def step(between: Callable[[], None], form: Callable[[Tensor], Tensor] = form) -> None:
            zxBCdt.grad = None
            y = form(zxBCdt)
            between()
            y.backward(grad)

        clock = Clock(device)
        start = time.perf_counter()
        clock.run(step)
        first = time.perf_counter() - start
        for _ in range(options.warmup):
            clock.run(step)
        clock.times.clear()
        for _ in range(options.rounds):
            clock.run(step)
        report("cores", form=name, **clock.summary(), first_call_s=first)
        free()


def our_core(config: ModelConfig, kernels: dict[str, str], device: torch.device) -> Callable[[Tensor], Tensor]:
    mixer = MambaMixer(replace(config, hidden_size=32), 0).to(device)
    for name, parameter in mixer.named_parameters():
        nn.init.constant_(parameter, -4.6 if name == "dt_bias" else 1.0)
    mixer = mixer.to(torch.bfloat16)
    wanted = KernelsConfig().choices() | kernels

    def run(zxBCdt: Tensor) -> Tensor:
        choose_kernels(wanted, device)
        return mixer.between_projections(zxBCdt, None)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--bf16-layers", type=int, default=0, help="layers at each end that FP8 leaves in bf16")
    parser.add_argument("--chunks", type=int, nargs="*", default=[128])
    parser.add_argument("--cores", nargs="*", default=["auto"], help="values of engine.kernels.mamba_core")
    parser.add_argument(
        "--kernels",
        nargs="*",
        default=[""],
        help="our forms, as fp8_gemm=deep_gemm,mamba_core=torch; '' = the defaults",
    )
    parser.add_argument("--alone", action="store_true", help="without the peer")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.device = torch.device("cpu" if options.tiny else "cuda")
    options.length = 64 if options.tiny else 8192
    if not options.tiny and not options.alone:
        from tests.benchmarks import megatron_peer

        megatron_peer.start()
        options.peer = megatron_peer
    report = Report(options.out)
    torch.manual_seed(1)
    for part in options.parts:
        kind, _, precision = part.partition(":")
        start = time.perf_counter()
        if kind == "cores":
            compare_cores(options, report)
        else:
            config = TINY if options.tiny else {"reduced": REDUCED, "full": FULL, "ours": FULL}[kind]
            compare_models(part, config, precision, options, report)
        free()
        print(f"-- {part}: {time.perf_counter() - start:.0f} s", flush=True)
    if not options.tiny:
        from nanotrain.ops.gpu.tuned_configs import chosen

        report("chosen", **chosen())


if __name__ == "__main__":
    main()
