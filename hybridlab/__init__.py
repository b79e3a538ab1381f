"""hybridlab: hybrid sequence models from interchangeable parts."""

from typing import Any

__all__ = ["load"]


def load(path: Any, device: Any = None, dtype: Any = None, trusted: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """Model and tokenizer (or None) of a run folder or a checkpoint; see `hybridlab.checkpoint.load_model`."""
    from hybridlab.checkpoint import load_model  # torch loads only when asked for

    return load_model(path, device, dtype, trusted)
