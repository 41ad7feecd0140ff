"""One file per architecture: its tensors and its whole forward pass, top to bottom."""

from types import ModuleType

from refengine.models import gpt2, gpt_oss, llama, phi3, qwen2, qwen3

BY_ARCHITECTURE: dict[str, ModuleType] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "phi3": phi3,
    "gpt-oss": gpt_oss,
    "gpt2": gpt2,
}
