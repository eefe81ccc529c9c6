"""Head + cross-entropy and head + KL: time against their matrix products, peak memory against full logits.

python -m tests.benchmarks.bench_linear_losses OUT.jsonl [tokens vocabulary width]      (one GPU, about a minute)
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from nanotrain.ops.backends import choose_kernels
from nanotrain.ops.kl_divergence import linear_kl_divergence
from nanotrain.ops.linear_cross_entropy import linear_cross_entropy
from tests.benchmarks.measure import interleaved, peak_extra_gib, write

CHUNKS = (1024, 1664, 2048, 3328, 4096)


def main(out: Path, tokens: int = 8192, vocabulary: int = 131072, width: int = 5120) -> None:
    device = torch.device("cuda")
    choose_kernels(dict.fromkeys(("cross_entropy", "kl_divergence", "gradient_scaling"), "triton"), device)
    torch.manual_seed(0)

    def leaf(rows: int, std: float) -> torch.Tensor:
        return (torch.randn(rows, width, device=device, dtype=torch.bfloat16) * std).requires_grad_()

    hidden, weight = leaf(tokens, 1.0), leaf(vocabulary, 0.02)
    teacher_hidden, teacher_weight = leaf(tokens, 1.0).detach(), leaf(vocabulary, 0.02).detach()
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    mask = torch.ones_like(labels, dtype=torch.bool)
    gradients_gib = (hidden.numel() + weight.numel()) * 2 / 2**30

    def step(loss_of):
        def run():
            hidden.grad = weight.grad = None
            (loss_of() / tokens).backward()

        return run

    def full_cross_entropy():
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    def full_kl():
        student = F.linear(hidden, weight).float().log_softmax(-1)
        teacher = F.linear(teacher_hidden, teacher_weight).float().log_softmax(-1)
        return F.kl_div(student, teacher, log_target=True, reduction="sum")

    logits = torch.empty(tokens, vocabulary, device=device, dtype=torch.bfloat16)
    outputs = torch.empty_like(hidden), torch.empty_like(weight)

    def products(count: int):
        def run():
            with torch.no_grad():
                torch.mm(hidden, weight.t(), out=logits)
                if count == 4:
                    torch.mm(teacher_hidden, teacher_weight.t(), out=logits)
                torch.mm(logits, weight, out=outputs[0])
                torch.mm(logits.t(), hidden, out=outputs[1])

        return run

    def chunked(chunk):
        return step(lambda: linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk))

    def chunked_kl(chunk):
        return step(
            lambda: linear_kl_divergence(hidden, weight, teacher_hidden, teacher_weight, mask, chunk_tokens=chunk)
        )

    errors(out, hidden, weight, labels, chunked)
    torch.cuda.empty_cache()
    for name, kind, full, count in (("cross_entropy", chunked, full_cross_entropy, 3), ("kl", chunked_kl, full_kl, 4)):
        cases = {f"chunk {c}": kind(c) for c in CHUNKS} | {"default": kind(None)}
        torch.mm(hidden.detach(), weight.detach().t(), out=logits)
        times = interleaved({"products": products(count), **cases, "full logits": step(full)}, rounds=8)
        for case, run in ({**cases, "full logits": step(full)}).items():
            hidden.grad = weight.grad = None
            memory = peak_extra_gib(run) - gradients_gib
            ratio = times[case]["median_ms"] / times["products"]["median_ms"]
            write(out, {"loss": name, "case": case, **times[case], "extra_gib": memory, "over_products": ratio})
        write(out, {"loss": name, "case": "products", **times["products"]})


def errors(out: Path, hidden, weight, labels, chunked) -> None:
    """Write the relative errors of the gradients of cross-entropy against fp32 softmax and products."""
    with torch.no_grad():
        grad_logits = F.linear(hidden, weight).float().softmax(-1)
        grad_logits[torch.arange(len(labels)), labels] -= 1.0
        grad_logits /= len(labels)
        exact = grad_logits @ weight.float(), grad_logits.t() @ hidden.float()
        rounded = grad_logits.bfloat16()
        del grad_logits
        once = rounded @ weight, rounded.t() @ hidden
        del rounded

    def relative(pair) -> list[float]:
        return [float((g.float() - e).norm() / e.norm()) for g, e in zip(pair, exact, strict=True)]

    write(out, {"errors": "one bf16 product", "hidden, weight": relative(once)})
    del once
    for chunk in CHUNKS:
        chunked(chunk)()
        write(out, {"errors": f"chunk {chunk}", "hidden, weight": relative((hidden.grad, weight.grad))})


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
