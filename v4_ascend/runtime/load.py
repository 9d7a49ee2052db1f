"""From a checkpoint folder to a model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from v4_ascend.checkpoint.reader import Checkpoint
from v4_ascend.errors import CheckpointError, ConfigError
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.transformer import Transformer

Progress = Callable[[int, int], None]


def load_model(
    checkpoint: Checkpoint,
    numerics: Numerics,
    *,
    with_mtp: bool,
    progress: Progress,
    device: torch.device | str = "cpu",
) -> Transformer:
    """Read the model to a device; `progress` sees bytes read and bytes in all.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    checkpoint.require_complete()
    headers = checkpoint.headers.values()
    is_read = [h for h in headers if with_mtp or not h.name.startswith("mtp.")]
    total = sum(h.nbytes for h in is_read)
    done = 0

    def source(name: str) -> torch.Tensor:
        nonlocal done
        tensor = checkpoint.tensor(name)
        done += tensor.nbytes
        progress(done, total)
        return tensor.to(device)

    return Transformer.read(source, checkpoint.config, numerics, with_mtp=with_mtp)


def resolve_checkpoint(reference: str) -> Path:
    """Return the folder of a checkpoint: a path, or ``hf:org/name@revision`` fetched from the hub.

    Raises:
        CheckpointError: the hub does not have it, or cannot be reached.
        ConfigError: what follows ``hf:`` is not a repository's name.
    """
    if not reference.startswith("hf:"):
        return Path(reference)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    repo, _, revision = reference.removeprefix("hf:").partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None))
    except HFValidationError as e:
        raise ConfigError(reference, "must be hf:org/name or hf:org/name@revision") from e
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError) as e:
        raise CheckpointError(f"{reference}: cannot be fetched: {e}") from e
