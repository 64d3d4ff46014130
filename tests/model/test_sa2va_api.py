"""The original's names and data dict: the same losses and texts as the package's own paths, and clear refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dual_loop.config import LoopConfig
from dual_loop.errors import PromptError
from dual_loop.loop.captioner import generate_caption_from_mask
from dual_loop.loop.segmentation_loss import compute_segmentation_loss
from dual_loop.model.adapters import group_of, trainable_parameters
from dual_loop.model.decode import Decoder, left_pad
from dual_loop.model.sa2va_api import original_mask_losses
from dual_loop.types import RegionCaption

from small_model import caption_prompts, scene_samples, small_batch, small_model

SEGMENTS = [("Please segment the left thing in this image.", "Sure, [SEG]."), ("And the other?", "It is [SEG].")]
TALK = [("What is in this image?", "A star and a cloud.")]
NAMES = {"loss_mask", "loss_dice", "llm_loss"}


@pytest.fixture(scope="module")
def small():
    """A model whose texts differ from prompt to prompt, its prompter, and a batch of two scenes."""
    model, prompter, config = small_model()
    with torch.no_grad():
        for module in (model.mllm.model.language_model, model.mllm.model.multi_modal_projector):
            for parameter in module.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(6.0)
    return model.double(), prompter, small_batch(config, scene_samples(2))


def padded(turns):
    """Ids, mask, positions and labels of conversations, padded on the right."""
    length = max(len(turn.input_ids) for turn in turns)
    ids = torch.tensor([[*turn.input_ids, *[0] * (length - len(turn.input_ids))] for turn in turns])
    labels = torch.tensor([[*turn.labels, *[-100] * (length - len(turn.labels))] for turn in turns])
    mask = torch.tensor([[k < len(turn.input_ids) for k in range(length)] for turn in turns])
    positions = torch.arange(length).expand(len(turns), -1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def first_region(batch, image):
    return batch.prompt_masks[batch.region_image.tolist().index(image)][None]


def mission_data(small):
    """Two samples of one tile, a region prompt and two [SEG] each, under the names of the original's collate."""
    _, prompter, batch = small
    regions = [first_region(batch, image) for image in range(2)]
    turns = [prompter.conversation(SEGMENTS, 1, [int(region.sum())]) for region in regions]
    return {
        "pixel_values": [batch.pixel_values[:1], batch.pixel_values[1:]],
        "g_pixel_values": list(batch.g_pixel_values),
        **padded(turns),
        "masks": [torch.from_numpy(sample.masks[:2]).float() for sample in scene_samples(2)],
        "prompt_masks": regions,
        "vp_overall_mask": torch.ones(2),
        "frames_per_batch": [1, 1],
    }


def plain_language_loss(model, data):
    """The mean cross-entropy of the tokens with loss, one by one."""
    logits = model.answer_logits(model.hidden_states(data))
    values = [
        F.cross_entropy(logits[row, column - 1], data["labels"][row, column])
        for row, column in (data["labels"] != -100).nonzero().tolist()
    ]
    return torch.stack(values).mean()


def test_the_loss_of_the_missions_example(small):
    model, _, _ = small
    data = mission_data(small)
    with torch.no_grad():
        losses = model(data, mode="loss")
        assert set(losses) == NAMES
        logits = model(data, mode="predict")["segmentation"].mask_logits
        size = (model.mask_size, model.mask_size)
        targets = torch.cat([F.interpolate(masks[:, None], size, mode="nearest")[:, 0] for masks in data["masks"]])
        expected = original_mask_losses(logits, targets, model.loss_config)
        torch.testing.assert_close(losses["llm_loss"], plain_language_loss(model, data))
    assert len(logits) == 4
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_every_form_of_the_images_gives_the_same_losses(small):
    model, _, batch = small
    data = mission_data(small)
    forms = [
        {"pixel_values": batch.pixel_values[:, None]},
        {"pixel_values": batch.pixel_values},
        {"pixel_values": list(batch.pixel_values)},
        {"g_pixel_values": batch.g_pixel_values},
        {"pixel_values": batch.pixel_values[:, None], "g_pixel_values": batch.g_pixel_values.float()},
        {"frames_per_batch": torch.tensor([1, 1])},
        {"masks": tuple(data["masks"])},
        {"prompt_masks": torch.cat(data["prompt_masks"])},
        {"vp_overall_mask": torch.ones(2, 1, dtype=torch.bool)},
    ]
    with torch.no_grad():
        expected = model(data, mode="loss")
        for change in forms:
            losses = model({**data, **change}, mode="loss")
            assert all(torch.equal(losses[name], expected[name]) for name in NAMES), list(change)
        bare = {key: value for key, value in data.items() if key not in ("frames_per_batch", "position_ids")}
        for name, value in model(bare, mode="loss").items():
            torch.testing.assert_close(value, expected[name])


def test_masks_of_the_adapter_are_those_of_the_packed_rows(small):
    model, prompter, batch = small
    batch = batch.images(0, 1)
    turn = prompter.segment_turn(batch.captions[0], "segment")
    ids = torch.tensor([[*prompter.image_prefix(1), *turn.input_ids]])
    data = {
        "pixel_values": [batch.pixel_values],
        "g_pixel_values": batch.g_pixel_values,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1])[None],
        "labels": torch.tensor([[-100] * len(prompter.image_prefix(1)) + list(turn.labels)]),
        "masks": [torch.from_numpy(scene_samples(2)[0].masks[:1]).float()],
        "prompt_masks": [],
        "vp_overall_mask": torch.zeros(1),
        "frames_per_batch": [1],
    }
    assert set(model(data, mode="loss")) == NAMES
    captions = [RegionCaption(caption, is_reference=True) for caption in batch.captions]
    packed = compute_segmentation_loss(model, batch, captions, prompter, LoopConfig(caption_supervision=False))
    seen = model(data, mode="predict")["segmentation"].mask_logits[0]
    torch.testing.assert_close(seen, packed.masks.mask_logits[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(PromptError, match=r"every \[SEG\] needs one mask"):
        model({**data, "masks": [torch.zeros(2, 8, 8)]}, mode="loss")


def test_generate_of_the_missions_example_writes_what_the_captioner_writes(small):
    model, prompter, batch = small
    loop = LoopConfig(max_new_tokens=6, max_rejected_fraction=1.0, max_rejected_grace=10_000)
    own = generate_caption_from_mask(model, prompter, batch, loop)
    prompts, prefix = caption_prompts(prompter, batch, loop.caption_question), prompter.image_prefix(1)
    questions, images = [one.question for one in prompts], [one.image for one in prompts]
    with torch.no_grad():
        features = model.project_vision(model.encode_vision(batch.pixel_values))
    decoded = Decoder(model, prompter, prompts, features[:, None], 6).write(range(len(questions)))
    assert len({tuple(ids) for ids in decoded}) > 2
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": prompter.tokenizer.eos_token_id}
    for number, (caption, ids) in enumerate(zip(own, decoded, strict=True)):
        new = model.generate(
            pixel_values=batch.pixel_values[images[number]][None, None],
            input_ids=torch.tensor([[*prefix, *questions[number]]]),
            prompt_masks=[batch.prompt_masks[number][None]],
            vp_overall_mask=torch.ones(1),
            **options,
        )[0].tolist()
        assert new[: len(ids)] == ids
        assert tuple(new[: len(caption.token_ids)]) == caption.token_ids
    rows = [[*prefix, *question] for question in questions]
    padded_ids, mask = left_pad(rows, prompter.tokenizer.pad_token_id)
    together = model.generate(
        pixel_values=[batch.pixel_values[image][None] for image in images],
        input_ids=padded_ids,
        attention_mask=mask,
        prompt_masks=[region[None] for region in batch.prompt_masks],
        vp_overall_mask=torch.ones(len(rows)),
        pad_token_id=prompter.tokenizer.pad_token_id,
        **options,
    )
    assert [row[: len(ids)] for row, ids in zip(together.tolist(), decoded, strict=True)] == decoded


def gradients(model, losses):
    model.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    found = {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_a_batch_of_language_alone_has_a_text_loss_and_zeros_that_reach_the_mask_decoder(small):
    model, prompter, batch = small
    data = {"pixel_values": batch.pixel_values, **padded([prompter.conversation(TALK, 1) for _ in range(2)])}
    losses = model(data, mode="loss")
    assert set(losses) == NAMES
    assert float(losses["loss_mask"].detach()) == float(losses["loss_dice"].detach()) == 0.0
    with torch.no_grad():
        torch.testing.assert_close(losses["llm_loss"].detach(), plain_language_loss(model, data))
    found, usual = gradients(model, losses), gradients(model, model(mission_data(small), mode="loss"))
    # Every rank has the same gradients, whatever its batch holds.
    assert found.keys() == usual.keys() == trainable_parameters(model).keys()
    for name, gradient in found.items():
        if group_of(name) in ("mask_decoder", "text_hidden_fcs"):
            assert not gradient.any(), name
    assert any(gradient.any() for name, gradient in found.items() if group_of(name) == "lora")


def test_a_batch_without_any_image_is_text(small):
    model, prompter, _ = small
    ids = torch.tensor([prompter.encode("<|user|>\nHello<|end|>\n<|assistant|>\nHello<|end|>")])
    with torch.no_grad():
        losses = model({"input_ids": ids, "labels": ids}, mode="loss")
        # Nothing predicts the first token.
        logits = model.answer_logits(model.hidden_states({"input_ids": ids}))[0, :-1]
    assert float(losses["loss_mask"]) == float(losses["loss_dice"]) == 0.0
    torch.testing.assert_close(losses["llm_loss"], F.cross_entropy(logits, ids[0, 1:]))


def test_the_tile_of_zeros_of_a_text_only_sample_is_left_out(small):
    model, prompter, batch = small
    text = prompter.encode("<|user|>\nHello<|end|>\n<|assistant|>\nHello<|end|>")
    region = first_region(batch, 1)
    turns = [prompter.conversation(SEGMENTS, 1, [int(region.sum())])]
    alone = {
        **padded(turns),
        "pixel_values": [batch.pixel_values[1:]],
        "g_pixel_values": [batch.g_pixel_values[1]],
        "masks": [torch.from_numpy(scene_samples(2)[1].masks[:2]).float()],
        "prompt_masks": [region],
        "vp_overall_mask": torch.ones(1),
        "frames_per_batch": [1],
    }
    both = dict(alone)
    for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", False)):
        row = torch.full_like(alone[name], fill)
        row[0, : len(text)] = torch.tensor(text) if name == "input_ids" else fill or name == "attention_mask"
        both[name] = torch.cat([row, alone[name]])
    both["labels"][0] = -100
    both["position_ids"] = alone["position_ids"].expand(2, -1)
    both["pixel_values"] = [torch.zeros_like(batch.pixel_values[1:]), batch.pixel_values[1:]]
    both["vp_overall_mask"] = torch.tensor([0.0, 1.0])
    seen = []
    hook = model.mllm.model.vision_tower.register_forward_pre_hook(
        lambda _module, _args, options: seen.append(len(options["pixel_values"])), with_kwargs=True
    )
    with torch.no_grad():
        losses, expected = model(both, mode="loss"), model(alone, mode="loss")
    hook.remove()
    assert seen == [1, 1]
    for name in NAMES:
        torch.testing.assert_close(losses[name], expected[name])


def video(small):
    """One sample of three frames with two [SEG]: data, and the same as three samples of one frame."""
    _, prompter, batch = small
    frames = torch.stack([batch.g_pixel_values[0], batch.g_pixel_values[1], batch.g_pixel_values[0].flip(-1)])
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, 3, 40, 50, generator=generator) > 0.5).float()  # object, frame
    base = {"pixel_values": [batch.pixel_values[:1]], **padded([prompter.conversation(SEGMENTS, 1)])}
    whole = {**base, "g_pixel_values": list(frames), "masks": [masks.flatten(0, 1)], "frames_per_batch": [3]}
    single = [
        {**base, "g_pixel_values": frames[k][None], "masks": [masks[:, k]], "frames_per_batch": [1]} for k in range(3)
    ]
    return whole, single, masks


def test_frames_of_a_sample_count_like_samples_of_one_frame(small):
    model, _, _ = small
    whole, single, masks = video(small)
    with torch.no_grad():
        losses, parts = model(whole, mode="loss"), [model(data, mode="loss") for data in single]
        logits = model(whole, mode="predict")["segmentation"].mask_logits
        alone = [model(data, mode="predict")["segmentation"].mask_logits for data in single]
        frame_by_frame = model({**whole, "masks": [masks.transpose(0, 1).flatten(0, 1)]}, mode="loss")
    for name in NAMES:
        torch.testing.assert_close(losses[name], torch.stack([part[name] for part in parts]).mean())
    # Object by object, and frame by frame inside an object.
    for index in range(6):
        torch.testing.assert_close(logits[index], alone[index % 3][index // 3])
    assert float(frame_by_frame["loss_mask"]) != pytest.approx(float(losses["loss_mask"]), rel=1e-6)


@pytest.mark.parametrize("frames", [[2], [4], [3, 1], [1, 2], [], [0], [-3], [1, 1, 1]])
def test_contradictory_frames_are_refused(small, frames):
    model, _, _ = small
    whole, _, _ = video(small)
    with pytest.raises(PromptError, match=r"frames and images do not fit.*frames_per_batch"):
        model({**whole, "frames_per_batch": frames}, mode="loss")


def test_a_mask_too_few_for_the_frames_is_refused(small):
    model, _, _ = small
    whole, _, _ = video(small)
    with pytest.raises(PromptError, match=r"every \[SEG\] needs one mask a frame.*expected: 6"):
        model({**whole, "masks": [whole["masks"][0][:5]]}, mode="loss")


ABSENT = object()
WRONG = {
    "no ids": ("input_ids", ABSENT, "input_ids"),
    "ids as a list": ("input_ids", [[1, 2, 3]], "input_ids"),
    "ids of one dimension": ("input_ids", torch.zeros(3, dtype=torch.long), "input_ids"),
    "ids with a fraction": ("input_ids", torch.zeros(2, 3), "input_ids"),
    "no token": ("input_ids", torch.zeros(2, 0, dtype=torch.long), "input_ids"),
    "an id too large": ("input_ids", torch.full((2, 3), 10**6), "outside of the vocabulary"),
    "a negative id": ("input_ids", torch.full((2, 3), -1), "outside of the vocabulary"),
    "no labels": ("labels", ABSENT, "labels"),
    "labels of another length": ("labels", torch.zeros(2, 3, dtype=torch.long), "labels does not fit"),
    "a label too large": ("labels", lambda data: torch.full_like(data["labels"], 10**6), "outside of the vocabulary"),
    "labels with a fraction": ("labels", lambda data: data["labels"].float(), "labels"),
    "mask as a list": ("attention_mask", [[1, 1]], "attention_mask"),
    "mask of another shape": ("attention_mask", torch.ones(2, 3), "attention_mask does not fit"),
    "positions of another shape": ("position_ids", torch.arange(3), "position_ids does not fit"),
    "no image": ("pixel_values", None, "vp_overall_mask does not fit|there is no image"),
    "an image as text": ("pixel_values", "photo.jpg", "pixel_values"),
    "tiles as a number": ("pixel_values", 3, "pixel_values"),
    "tiles of one dimension": ("pixel_values", torch.ones(7), "wrong size"),
    "tiles of another size": ("pixel_values", torch.ones(2, 3, 32, 32), "wrong size"),
    "tiles of one channel": ("pixel_values", torch.ones(2, 1, 64, 64), "wrong size"),
    "tiles too few": ("pixel_values", torch.ones(1, 3, 64, 64), "vp_overall_mask does not fit"),
    "no grounding image": ("g_pixel_values", ABSENT, "no image to segment"),
    "grounding images of another size": ("g_pixel_values", torch.zeros(2, 3, 9, 9), "wrong size"),
    "grounding images that differ": ("g_pixel_values", [torch.zeros(3, 64, 64), torch.zeros(3, 9, 9)], "wrong size"),
    "no grounding image in the list": ("g_pixel_values", [], "g_pixel_values"),
    "grounding images as numbers": ("g_pixel_values", [1, 2], "g_pixel_values"),
    "masks of two dimensions": ("masks", [torch.zeros(8, 8)] * 4, "target masks"),
    "masks as a number": ("masks", 1, "masks"),
    "no masks in the list": ("masks", [], "every .SEG. needs one mask"),
    "prompts of another grid": ("prompt_masks", [torch.ones(1, 3, 3)] * 2, "prompt_masks"),
    "prompts as text": ("prompt_masks", ["a", "b"], "prompt_masks"),
    "prompts too few": ("prompt_masks", [torch.ones(1, 8, 8)], "vp_overall_mask and prompt_masks differ"),
    "prompts without dimension": ("prompt_masks", torch.tensor(1), "prompt_masks"),
    "prompts of other cells": ("prompt_masks", [torch.ones(1, 8, 8)] * 2, "differ in number"),
    "no tiles named": ("vp_overall_mask", ABSENT, "vp_overall_mask"),
    "tiles named by a list": ("vp_overall_mask", [1, 1], "vp_overall_mask"),
    "frames as a number": ("frames_per_batch", 2, "frames_per_batch"),
    "frames as text": ("frames_per_batch", ["1", "1"], "frames_per_batch"),
    "frames as a scalar": ("frames_per_batch", torch.tensor(2), "frames_per_batch"),
    "seeds too few": ("region_seeds", torch.zeros(1).long(), "region_seeds"),
    "an object that is not there": ("object_order", torch.tensor([0, 99]), "object_order"),
    "seeds with a fraction": ("region_seeds", torch.zeros(4), "region_seeds"),
    "objects with a fraction": ("object_order", torch.zeros(4), "object_order"),
    "points of another number": ("point_coords", torch.zeros(1, 5, 2), "point_coords"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_said_clearly(small, case):
    model, _, _ = small
    name, value, said = WRONG[case]
    data = mission_data(small)
    data[name] = value(data) if callable(value) else value
    if value is ABSENT:
        del data[name]
    with torch.no_grad(), pytest.raises(PromptError, match=said):
        model(data, mode="loss")


def test_data_that_is_no_dict_and_a_mode_that_is_none_are_refused(small):
    model, _, _ = small
    for data in (None, [], torch.zeros(1)):
        with pytest.raises(PromptError, match="takes a dict"):
            model(data, mode="loss")
    with pytest.raises(PromptError, match="unknown forward mode"):
        model(mission_data(small), mode="terms")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_ids": None}, "input_ids"),
        ({"input_ids": "Hello"}, "input_ids"),
        ({"attention_mask": [[1]]}, "attention_mask"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask does not fit"),
        ({"pixel_values": None}, "vp_overall_mask does not fit"),
        ({"prompt_masks": 3}, "prompt_masks"),
        ({"vp_overall_mask": None}, "vp_overall_mask"),
    ],
)
def test_generate_says_what_is_wrong(small, change, said):
    model, prompter, batch = small
    region = first_region(batch, 0)
    ids = torch.tensor([[*prompter.image_prefix(1), *prompter.caption_question(int(region.sum()), "short")]])
    given = {"pixel_values": batch.pixel_values[:1], "input_ids": ids, "prompt_masks": [region]}
    given["vp_overall_mask"] = torch.ones(1)
    with pytest.raises(PromptError, match=said):
        model.generate(**{**given, **change}, max_new_tokens=2)
