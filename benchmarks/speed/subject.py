"""What is timed: a random Llama of 12 layers × 768, a prefill of 128 tokens and one decode step on its cache."""

from __future__ import annotations

import time
from typing import Any

import torch

TOKENS = 128
VOCABULARY = 32_000
IDS = tuple((7 * i + 3) % VOCABULARY for i in range(TOKENS + 1))
"""The prompt, and the token of the decode step."""
SEED = 0


def llama(dtype: str = "float32", *, layers: int = 12, hidden: int = 768) -> Any:
    """Return the model with random weights of one seed, in evaluation mode."""
    import transformers

    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        intermediate_size=hidden * 8 // 3, vocab_size=VOCABULARY, max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


class Bare:
    """The model alone, as a script runs it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prompt = torch.tensor([IDS[:TOKENS]])
        self.next = torch.tensor([IDS[TOKENS:]])
        self.position = torch.tensor([[TOKENS]])

    def prefill(self) -> float:
        """Return the seconds of a prefill."""
        return self._prefilled()[0]

    def decode(self) -> float:
        """Return the seconds of the decode step behind a prefill."""
        cache = self._prefilled()[1]
        with torch.no_grad():
            started = time.perf_counter()
            self.model(self.next, position_ids=self.position, past_key_values=cache, use_cache=True)
            return time.perf_counter() - started

    def _prefilled(self) -> tuple[float, Any]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        with torch.no_grad():
            started = time.perf_counter()
            self.model(self.prompt, past_key_values=cache, use_cache=True)
            return time.perf_counter() - started, cache
