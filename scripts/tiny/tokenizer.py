"""The byte-level tokenizer of the tiny model: any text goes in, the words of the demo are single tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dual_loop.model import prompts
from dual_loop.testing.scenes import generate_scene, pool_seed

VOCABULARY = 512


def build(path: Path, seed: int) -> None:
    """Train byte-pair merges on the package's prompts and on captions of a pool of its own; write ``path``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", prompts.IMAGE_START, prompts.IMAGE_END, prompts.IMAGE_CONTEXT, *prompts.NEW_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    captions = [c for i in range(2000) for c in generate_scene(pool_seed(seed, "tiny/tokenizer", i)).captions]
    template = prompts.TEMPLATES["phi3_chat"]
    questions = [q.format(caption=c) for c in captions for q in prompts.SEGMENT_QUESTIONS.values()]
    asks = [*prompts.CAPTION_QUESTIONS.values(), prompts.REGION_LIST.format(region=""), "Sure, .", template.answer_end]
    turns = [template.caption_turn, template.segment_turn]
    tokenizer.train_from_iterator([*captions, *questions, *(asks * 200), *(turns * 200)], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
