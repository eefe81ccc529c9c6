"""A YAML file of values read into its dataclass, as strictly as a recipe: for the files that programs read directly."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanotrain.config.errors import MissingInputError
from nanotrain.config.load_checks import instantiate, read_yaml
from nanotrain.config.load_messages import composition_error, missing_values_error


def load_values(file: Path, schema: type) -> Any:
    """Return the file's values as an instance of the dataclass `schema`.

    Raises:
        MissingInputError: no such file.
        UserError: an unknown key, a wrong type, a missing value; the message names the key path and the file.
    """
    if not file.is_file():
        raise MissingInputError(f"`{file}` is not a file; correct the path.")
    raw = read_yaml(file)
    try:
        composed = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(raw))
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise missing_values_error(missing, file, "")
        OmegaConf.resolve(composed)
    except OmegaConfBaseException as error:
        raise composition_error(error, file, {"defaults": [], **raw}) from error
    return instantiate(composed)
