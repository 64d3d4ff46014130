"""Region prompts, at the place where the original's code has them; ``model.sa2va`` puts them among the tokens."""

from dual_loop.data.masks import pool_mask_to_grid as pool_mask_to_grid
