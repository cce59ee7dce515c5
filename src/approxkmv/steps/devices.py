"""Whether a study can run on the devices it asks for."""

from __future__ import annotations

from approxkmv.config import Study
from approxkmv.errors import ConfigError


def check_device(study: Study) -> None:
    """Raise ConfigError if the study asks for a CUDA device and there is none. Imports torch only if it asks."""
    asked = [study.device, *(part.device for part in (study.sweep, study.perplexity) if part)]
    if any(device.startswith("cuda") for device in asked):
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(f"study {study.name} asks for device cuda, but there is none here: set device to cpu")
