"""What libraries would send or ask for over the network without being told to. Read by them when they are imported."""

import os

DEFAULTS = {
    "HF_HUB_OFFLINE": "1",  # huggingface_hub, and with it transformers, datasets and trackio
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_ERROR_REPORTING": "false",  # else crash reports go out even in offline mode
}
"""Nothing that the command line does fetches from the hub; the programs of data_prep/ do, and do not come here."""


def stay_offline() -> None:
    """Set what the environment leaves open; whoever sets HF_HUB_OFFLINE=0 has asked for it.

    Comes before the first import of these libraries.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
