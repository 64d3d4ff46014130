"""The grounded model: vision-language part, mask decoder, prompts, adapters, freeze policy and weight average."""
