"""Models and adapters in other software's formats, and the check that they compute the same there."""

from mor_jax.export.hf import export_hf
from mor_jax.export.peft import ExportError, export_peft, peft_config, read_peft
from mor_jax.export.verify import (
    Verification,
    live_logits,
    probe_tokens,
    torch_installed,
    verify_adapter,
    verify_export,
    verify_peft,
)

__all__ = [
    "ExportError",
    "Verification",
    "export_hf",
    "export_peft",
    "live_logits",
    "peft_config",
    "probe_tokens",
    "read_peft",
    "torch_installed",
    "verify_adapter",
    "verify_export",
    "verify_peft",
]
