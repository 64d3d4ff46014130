"""The likelihood of captions: that of each alone, and largest for what greedy decoding wrote."""

from __future__ import annotations

import pytest
import torch

from dual_loop.loop.packing import pack_turns
from dual_loop.loop.spoken import log_likelihoods, spoken_turns

from loop_settings import masks_only, setting
from small_model import small_batch, small_model

pytestmark = pytest.mark.usefixtures("precision")
QUESTION = "short"


@pytest.fixture
def parts(precision):
    model, prompter, config = small_model(setting())
    batch = small_batch(config, masks_only(2))
    return model, prompter, batch, model.see(batch)


def test_each_caption_has_the_probability_of_its_tokens_one_after_the_other(parts, precision):
    model, prompter, batch, seen = parts
    end = prompter.template.answer_end
    spoken = [(0, prompter.encode(f"the red star{end}")), (3, prompter.encode(f"a{end}")), (0, prompter.encode("blue"))]
    found = log_likelihoods(model, prompter, batch, seen, spoken, QUESTION)
    expected = []
    for region, ids in spoken:
        [turn] = spoken_turns(batch, [(region, ids)], prompter, QUESTION)
        packed = pack_turns(batch, [], [turn], prompter, vision=seen.vision, segments=False)
        with torch.no_grad():
            logits = model.answer_logits(model.read(model.embed(packed), packed)[0]).float().log_softmax(-1)
        first = packed.row_lengths[0] - len(ids)
        expected.append(sum(float(logits[first + k, token]) for k, token in enumerate(ids)) / len(ids))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4 if precision == "float32" else 2e-2, rtol=0)
    assert (found < 0).all()
    assert log_likelihoods(model, prompter, batch, seen, [], QUESTION).shape == (0,)
