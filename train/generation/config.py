"""Options of generation. Nothing here imports torch."""

from dataclasses import dataclass

from visionloom.common.settings import option


@dataclass(frozen=True)
class Budget:
    """Memory of generation, in tokens."""

    pack_tokens: int
    """Of the prompts that enter together; a longer one enters alone."""
    cache_tokens: int
    """Of all sequences that grow together, each counted as long as the longest may become."""


@dataclass
class GenerationConfig:
    """How launch/generate.py draws answers, and how it writes them."""

    temperature: float = option(1.0, "free", least=0.0, most=100.0)
    """Logits are divided by it; 0: always the most likely token."""
    top_k: int = option(0, "free", least=0, most=2**24)
    """Only as many of the most likely tokens are drawn from; 0: all."""
    top_p: float = option(1.0, "free", above=0.0, most=1.0)
    """Only the most likely tokens that together have this probability are drawn from."""
    answers: int = option(1, "free", least=1, most=4096)
    """Answers to each prompt."""
    max_new_tokens: int = option(1024, "free", least=1, most=2**20)
    """Longest answer."""
    stop: list[str] = option(["<|im_end|>", "<|endoftext|>"], "free")
    """Tokens of the tokenizer that end an answer."""
    seed: int = option(0, "free", least=0, most=2**62)
    """Seed of the draws, which depend on nothing else of the run."""
    pack_tokens: int = option(16_384, "free", least=1, most=2**24)
    """Tokens of the prompts that enter together."""
    cache_tokens: int = option(65_536, "free", least=1, most=2**32)
    """Tokens of all answers that are generated together, with their prompts: as many have keys and values in memory."""
    part_prompts: int = option(1000, "free", least=1, most=10**6)
    """Prompts whose answers are written together: what a killed command does again at most, for each data rank."""

    @property
    def budget(self) -> Budget:
        """Return the memory of generation."""
        return Budget(self.pack_tokens, self.cache_tokens)
