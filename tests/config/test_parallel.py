from dataclasses import replace

import pytest

from nanotrain.config.engine import EngineConfig, EngineKind
from nanotrain.config.errors import UserError
from nanotrain.config.load import load_recipe
from nanotrain.config.parallel import DataParallel, DeepSpeedConfig, Fsdp2Config

CHOICES = {
    "torch_ddp": EngineConfig(data_parallel=DataParallel.ddp),
    "torch_fsdp2": EngineConfig(data_parallel=DataParallel.fsdp2),
    **{f"deepspeed_zero{n}": EngineConfig(EngineKind.deepspeed, deepspeed=DeepSpeedConfig(n)) for n in (1, 2, 3)},
    "deepspeed_zero3_offload": EngineConfig(EngineKind.deepspeed, deepspeed=DeepSpeedConfig(3, True)),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_shipped_choices_compose(choice):
    recipe = load_recipe("recipes/quickstart/pretrain.yaml", [f"engine={choice}"])
    assert recipe.entries[0].config.engine == CHOICES[choice]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            replace(CHOICES["deepspeed_zero2"], data_parallel=DataParallel.ddp),
            r"engine\.data_parallel.*\(ddp\).*deepspeed",
        ),
        (EngineConfig(fsdp2=Fsdp2Config(False)), r"engine\.fsdp2.*data_parallel.*\(auto\)"),
        (replace(CHOICES["torch_ddp"], fsdp2=Fsdp2Config(True, True)), r"engine\.fsdp2.*data_parallel.*\(ddp\)"),
        (EngineConfig(deepspeed=DeepSpeedConfig(2)), r"engine\.deepspeed.*\(deepspeed\).*torch"),
        (EngineConfig(EngineKind.deepspeed, deepspeed=DeepSpeedConfig(0)), r"zero_stage` \(0\) must be 1, 2 or 3"),
    ],
)
def test_what_would_be_ignored_is_refused(config, sentence):
    with pytest.raises(UserError, match=sentence):
        config.validate("engine")
