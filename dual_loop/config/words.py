"""Words that settings choose among, and the titles of ``--help``."""

GATES = (
    *("special_token", "prompt_leak", "coordinates", "script", "unprintable", "gibberish"),
    *("repetition", "truncated", "empty"),
)
"""What makes a caption earn nothing; see ``loop.gates``."""

TEMPLATES = ("phi3_chat", "internlm2_chat", "internvl2_5", "qwen_chat")
CAPTION_QUESTIONS = ("short", "detailed", "refer", "what", "distinct", "any")
SEGMENT_QUESTIONS = ("segment", "segment_bare", "can_you", "can_you_bare", "respond", "output", "mission", "any")
SEGMENT_ANSWERS = ("sure", "it_is", "sure_it_is", "result", "bare", "any")
"""Names in the banks of ``model.prompts``."""

TRAINED = ("lora", "mlp1", "mask_decoder", "text_hidden_fcs")
GROUPS = (*TRAINED, "new_tokens", "embeddings", "language_model", "vision_tower", "sam2_encoder")

LISTENERS = ("own", "average", "frozen")
"""Weights of the run itself that ``reward.listener`` may name."""

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "none")

FIGURES = ("gIoU", "cIoU", "cycle_gIoU", "caption_exact")
"""Of an evaluation, what is printed and what a best checkpoint can be named by."""

# Titles of --help.
HUB = "OWNER/NAME"
"""Ends the unit of settings of weights, which may be in huggingface_hub's cache."""
WEIGHTS, EVALUATION, RUN_FOLDER = "weights", "evaluation", "run folder"
CAPTIONER = "captioner (what the loop teaches step 1)"
SEGMENTER = "segmenter (what else the loop teaches step 2)"
