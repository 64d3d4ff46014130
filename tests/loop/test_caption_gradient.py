"""Which signal reaches the captioner, and that it is the same however a step is split."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dual_loop.config import Config, LossConfig, RewardConfig
from dual_loop.loop.dual_loop import DualLoop
from dual_loop.loop.policy import PolicyCaption, add_policy_branches, policy_inputs, relax
from dual_loop.loop.rows import Rows
from dual_loop.loop.segmenter import mask_ious, segmentation_inputs
from dual_loop.loop.teacher import plain_inputs
from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.model.prompts import NEW_TOKENS, REGION_END, REGION_START
from dual_loop.types import WrittenCaption

from small_model import pair_samples, scene_samples, small_batch, small_config, small_model

MASK_TERMS = ("mask_loss", "dice_loss")
GATES_OFF = RewardConfig(gates=(), contrast_weight=1.0)


def setting(gradient: str = "none", **policy) -> Config:
    """New-token rows train, so that the rows of <vp> and </vp> belong to the captioner alone."""
    config = small_config(train_embeddings="new_tokens")
    loop = dataclasses.replace(config.loop, max_new_tokens=4, max_rejected_fraction=1.0)
    policy = {"mask_truncated": False, "captions_per_region": 3, **policy}
    chosen = dataclasses.replace(config.policy, caption_gradient=gradient, **policy)
    return dataclasses.replace(config, loop=loop, policy=chosen, reward=GATES_OFF)


def build(config: Config):
    model, prompter, _ = small_model(config)
    return model, DualLoop(model, prompter, config.loop, config.policy, config.reward)


def masks_only(count: int = 2):
    return [*scene_samples(count, source="sa1b", captions=False), *pair_samples(1)]


def captioner_rows(model) -> torch.Tensor:
    gradient = model.new_token_rows.input_rows.grad
    index = [NEW_TOKENS.index(token) for token in (REGION_START, REGION_END)]
    return torch.zeros(2) if gradient is None else gradient[index].abs().sum(1)


def gradients(config: Config, groups, terms=None):
    model, loop = build(config)
    micros = loop.begin_window([small_batch(config, group) for group in groups], progress=0.5)
    counts = {name: sum(m.inputs.counts[name] for m in micros) for name in micros[0].inputs.counts}
    for micro in micros:
        output = loop.step(model, micro).terms
        chosen = [name for name in output if terms is None or name in terms]
        sum(output[name].total / max(counts[name], 1.0) for name in chosen).backward()
    return model, counts


def test_without_a_signal_the_mask_loss_never_reaches_the_captioner():
    model, counts = gradients(setting("none"), [masks_only()], MASK_TERMS)
    assert torch.equal(captioner_rows(model), torch.zeros(2))
    assert "policy_loss" not in counts


def test_straight_through_captions_carry_the_mask_loss_to_the_captioner():
    model, _ = gradients(setting("gumbel"), [masks_only()], MASK_TERMS)
    assert (captioner_rows(model) > 0).all()


@pytest.mark.parametrize("gradient", ["scst", "grpo", "gumbel+grpo", "gumbel+scst"])
def test_rewards_reach_the_captioner(gradient):
    model, counts = gradients(setting(gradient), [masks_only()], ("policy_loss",))
    assert counts["policy_loss"] > 0
    assert (captioner_rows(model) > 0).all()


@pytest.mark.parametrize("gradient", ["none", "scst", "grpo", "gumbel", "gumbel+grpo"])
def test_split_of_a_window_does_not_change_the_gradient(gradient):
    samples = [*masks_only(2), *scene_samples(1)]
    config = setting(gradient)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, align_weight=0.5))
    whole, counts = gradients(config, [samples])
    split, other = gradients(config, [[sample] for sample in samples])
    assert counts == pytest.approx(other)
    both = zip(whole.parameters(), split.parameters(), strict=True)
    pairs = [(a.grad, b.grad) for a, b in both if a.grad is not None]
    scale = max(float(a.abs().max()) for a, _ in pairs)
    assert max(float((a - b).abs().max()) for a, b in pairs) <= 2e-4 * scale


def test_relaxed_captions_give_the_masks_of_the_discrete_ones():
    model, loop = build(setting("gumbel"))
    (micro,) = loop.begin_window([small_batch(setting(), masks_only())])
    data = micro.inputs.data
    assert len(data["captioning"]["targets"]) > 0
    with torch.no_grad():
        soft = model(data, mode="predict")["segmentation"].mask_logits
        hard = model(plain_inputs(data), mode="predict")["segmentation"].mask_logits
        values = model.soft_captions(data["captioning"])
        ids = data["input_ids"][data["captioning"]["into_rows"], data["captioning"]["into_columns"]]
        looked_up = model.mllm.get_input_embeddings()(ids)
    torch.testing.assert_close(values, looked_up, atol=1e-6, rtol=0)
    torch.testing.assert_close(soft, hard, atol=1e-5, rtol=0)


def test_relaxed_ids_read_as_the_caption():
    _, prompter, _ = small_model()
    ids = prompter.encode(' "red circle".<|end|>')
    caption = WrittenCaption("red circle", tuple(ids), None, False)
    found = relax(prompter, 0, caption)
    assert found is not None
    assert prompter.decode_caption(list(found.reading_ids))[0] == " red circle"
    assert relax(prompter, 0, WrittenCaption("red circle", tuple(prompter.encode("red  circle")), None, False)) is None


def test_log_probabilities_are_those_of_the_tokens_where_they_were_written():
    """The greedy caption is the most likely token at every place: one position off, and this fails."""
    config = setting("scst")
    model, prompter, _ = small_model(config)
    loop = DualLoop(model, prompter, config.loop, config.policy, config.reward)
    batch = small_batch(config, masks_only())
    (micro,) = loop.begin_window([batch])
    features = model.encode_vision(batch.pixel_values)
    captions = [PolicyCaption(n, c.token_ids, 1.0) for n, c in enumerate(micro.rollout.greedy)]
    rows, question = Rows(batch, prompter), config.loop.caption_question
    places = add_policy_branches(rows, captions, question)
    inputs = segmentation_inputs(batch, micro.rollout, features, prompter, config.loop, rows=rows)
    policy = policy_inputs(rows, captions, places, question, config.policy)
    with torch.no_grad():
        hidden = model.hidden_states(inputs.data)
        likely = model.answer_logits(hidden[policy["rows"], policy["columns"]])
        log_probs = model.token_log_probs(hidden, policy)
    assert len(policy["targets"]) == sum(len(c.token_ids) for c in captions) > 20
    assert torch.equal(likely.argmax(-1), policy["targets"])
    torch.testing.assert_close(log_probs, likely.float().log_softmax(-1).amax(-1))


def test_the_divergence_is_zero_while_the_adapter_is():
    config = setting("grpo", kl_weight=1.0)
    model, prompter, _ = small_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.zero_()
    loop = DualLoop(model, prompter, config.loop, config.policy, config.reward)
    (micro,) = loop.begin_window([small_batch(config, masks_only())], audit=True)
    assert float(loop.step(model, micro).terms["kl_loss"].total.detach()) == 0.0
    assert micro.metrics["kl/count"] > 0
    assert micro.metrics["kl/sum"] == 0.0
    assert micro.metrics["own_cycle_iou/sum"] == micro.metrics["frozen_cycle_iou/sum"]


def test_the_divergence_is_not_zero_once_the_adapter_is_not():
    config = setting("none")
    _, loop = build(config)
    (micro,) = loop.begin_window([small_batch(config, masks_only())], audit=True)
    assert micro.metrics["kl/sum"] > 0


def test_a_live_model_and_its_start_are_told_apart():
    config = setting("none")
    model, loop = build(config)
    with torch.no_grad():
        for parameter in model.text_hidden_fcs.parameters():
            parameter.mul_(-1.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (micro,) = loop.begin_window([small_batch(config, masks_only())], audit=True)
    assert micro.metrics["own_cycle_iou/sum"] != micro.metrics["frozen_cycle_iou/sum"]
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_the_teacher_stays_in_eval_without_gradient_and_gates_by_agreement(monkeypatch):
    config = setting("none")
    config = dataclasses.replace(config, loss=LossConfig(num_points=0, distill_weight=0.5, distill_agreement=0.0))
    model, prompter, _ = small_model(config)
    loop = DualLoop(model, prompter, config.loop, config.policy, config.reward)
    average = ExponentialMovingAverage({n: p for n, p in model.named_parameters() if p.requires_grad}, 0.5)
    loop.use_average(average)
    model.train()
    modes = []
    original = type(model).forward

    def watched(self, *arguments, **options):
        modes.append((self.training, torch.is_grad_enabled()))
        return original(self, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", watched)
    (micro,) = loop.begin_window([small_batch(config, masks_only())])
    assert modes == [(False, False)]
    assert model.training
    teacher = micro.inputs.data["teacher"]
    assert not teacher["probabilities"].requires_grad
    assert micro.inputs.counts["distill_loss"] == float(teacher["weights"].sum()) == micro.batch.num_regions
    # The average equals the live weights here: nothing to learn from it, but for dropout's sake in eval mode.
    model.eval()
    term = loop.step(model, micro).terms["distill_loss"]
    assert float(term.total) == pytest.approx(0.0, abs=1e-4)
    strict = dataclasses.replace(config.loss, distill_agreement=1.0)
    loop.teacher.config = strict
    (micro,) = loop.begin_window([small_batch(config, masks_only())])
    assert micro.inputs.counts["distill_loss"] == 0.0


def test_alignment_through_the_projection_leaves_the_language_alone():
    def touched(through):
        config = setting("none")
        config = dataclasses.replace(config, loss=LossConfig(num_points=0, align_weight=1.0, align_through=through))
        model, _ = gradients(config, [masks_only()], ("align_loss",))
        names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        return {"lora": any(".lora_" in name for name in names), "fcs": any("text_hidden_fcs" in n for n in names)}

    assert touched("all") == {"lora": True, "fcs": True}
    assert touched("projection") == {"lora": False, "fcs": True}


def test_the_cycle_filter_weighs_captions():
    config = setting("none")
    loop_config = dataclasses.replace(config.loop, cycle_keep=0.9, cycle_drop=0.0)
    model, prompter, _ = small_model(config)
    loop = DualLoop(model, prompter, loop_config, config.policy, config.reward)
    batch = small_batch(config, [*masks_only(), *scene_samples(1)])
    (micro,) = loop.begin_window([batch])
    weights = micro.inputs.data["region_weights"]
    given = torch.tensor(micro.rollout.from_reference)
    assert torch.equal(weights[given], torch.ones(int(given.sum())))
    with torch.no_grad():
        ious = loop.step(model, micro).segmentation.mask_logits
    expected = (mask_ious(ious, batch.target_masks) / 0.9).clamp(0, 1)
    torch.testing.assert_close(weights[~given], expected[~given])
    assert micro.inputs.counts["mask_loss"] == pytest.approx(float(weights.sum()))


def test_several_seg_in_one_conversation():
    config = setting("none")
    model, prompter, _ = small_model(config)
    sample = scene_samples(1)[0]
    one = dataclasses.replace(
        sample, masks=sample.masks[:1], region_ids=sample.region_ids[:1], captions=sample.captions[:1]
    )

    def run(form, samples):
        loop_config = dataclasses.replace(config.loop, segment_form=form, caption_supervision=False)
        loop = DualLoop(model, prompter, loop_config, config.policy, config.reward)
        (micro,) = loop.begin_window([small_batch(config, samples)])
        with torch.no_grad():
            return micro, loop.step(model, micro)

    # One region: the same row. Several: the same number of masks and counts, the first region's mask unchanged.
    (_, apart), (_, joined) = run("branches", [one]), run("turns", [one])
    torch.testing.assert_close(apart.segmentation.mask_logits, joined.segmentation.mask_logits)
    (first, apart), (second, joined) = run("branches", [sample]), run("turns", [sample])
    assert first.inputs.counts == second.inputs.counts
    torch.testing.assert_close(
        apart.segmentation.mask_logits[0], joined.segmentation.mask_logits[0], atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(apart.segmentation.mask_logits[1], joined.segmentation.mask_logits[1], atol=1e-4)
    expected = prompter.conversation(
        [(f"Please segment {c} in this image.", "Sure, [SEG].") for c in first.batch.captions]
    )
    row = second.inputs.data["input_ids"][0].tolist()
    assert row == list(expected.input_ids)


def test_sampled_special_tokens_are_punished_not_obeyed():
    """A sample that holds [SEG] or an image token must not ask the model for a mask or a feature."""
    config = setting("grpo")
    model, prompter, _ = small_model(config)
    loop = DualLoop(model, prompter, config.loop, config.policy, config.reward)
    word = prompter.encode(" red")[0]
    markers = [prompter.seg_id, prompter.image_context_id, word]

    def generate(batches, images, requests, vision_features):
        return [(request, [word, markers[max(request.draw, 0)], word, word]) for request in requests]

    loop.captioner._generate = generate
    (micro,) = loop.begin_window([small_batch(config, masks_only())])
    gates = [[caption.gate for caption in samples] for samples in micro.rollout.samples]
    assert all(row == ["special_token", "special_token", None] for row in gates)
    assert all(samples[0].token_ids == (word, prompter.seg_id) for samples in micro.rollout.samples)
    assert prompter.seg_id in micro.inputs.data["policy"]["targets"].tolist()
    output = loop.step(model, micro)
    assert len(output.segmentation.mask_logits) == micro.batch.num_regions
    assert micro.metrics["gate/special_token"] >= 2 * micro.batch.num_regions


@pytest.mark.parametrize("listener", ["own", "average", "frozen"])
def test_the_listener_that_is_asked_for_scores(listener):
    config = setting("grpo")
    reward = dataclasses.replace(config.reward, listener=listener, contrast_weight=0.0)
    model, prompter, _ = small_model(config)
    loop = DualLoop(model, prompter, config.loop, config.policy, reward)
    loop.use_average(ExponentialMovingAverage({n: p for n, p in model.named_parameters() if p.requires_grad}, 0.5))
    batch = small_batch(config, masks_only())
    (before,) = loop.begin_window([batch])
    with torch.no_grad():
        for parameter in model.text_hidden_fcs.parameters():
            parameter.mul_(-1.0)
    live = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (after,) = loop.begin_window([batch])
    # Captions do not change, so only the own listener rewards them differently.
    same = after.metrics["reward_cycle/sum"] == pytest.approx(before.metrics["reward_cycle/sum"], abs=1e-6)
    assert same == (listener != "own")
    assert all(torch.equal(live[name], parameter) for name, parameter in model.named_parameters())
