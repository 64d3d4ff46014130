"""SAM 2's memory: equal to transformers' own video model, bounded in memory, strict about weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Sam2VideoConfig, Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from dual_loop.checkpoint.key_rules import HF_SA2VA, ORIGINAL, SAM2, SAM2_NATIVE, memory_name
from dual_loop.errors import CheckpointError
from dual_loop.model import video
from dual_loop.model.video import SHARED, Tracker

from small_model import small_config, small_model

FRAMES, PROMPTED, WIDTH = 19, 2, 128


@pytest.fixture(scope="module")
def model() -> Any:
    """With 128 channels: an object pointer is cut into tokens of the memory's 64."""
    sam2 = {**small_config().model.sam2, "fpn_hidden_size": WIDTH}
    return small_model(small_config(sam2=sam2))[0]


def drawn(model: Any, occlusion: bool = False) -> tuple[Sam2VideoModel, dict[str, Tensor]]:
    """Transformers' video model with the weights of ``model``, the memory drawn; and the memory's weights."""
    torch.manual_seed(3)
    config = Tracker(model, None).config
    config.enable_temporal_pos_encoding_for_object_pointers = config.enable_occlusion_spatial_embedding = occlusion
    plain = Sam2VideoModel(config).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.3 if parameter.dim() < 2 else 2.0 / parameter[0].numel() ** 0.5)
    plain.load_state_dict(model.grounding_encoder.state_dict(), strict=False)
    memory = {name: tensor for name, tensor in plain.state_dict().items() if not name.startswith(SHARED)}
    return plain, memory


def by_transformers(plain: Sam2VideoModel, model: Any, frames: Tensor, prompts: Tensor) -> list[Tensor]:
    """Run the stock model over a whole clip: the language joins the prompt encoder's tokens; all objects appear."""
    said: list[Tensor] = []

    def join(module: Any, inputs: Any, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.cat([found[0], *(one[None, None] for one in said[:1])], dim=2), found[1]

    def appear(module: Any, inputs: Any, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*found[:3], torch.ones_like(found[3]))

    hooks = [plain.prompt_encoder.register_forward_hook(join), plain.mask_decoder.register_forward_hook(appear)]
    pixels = (frames.float() / 255 - model.image_mean) / model.image_std
    masks = []
    for prompt in prompts:
        session = Sam2VideoInferenceSession(video=pixels, dtype=torch.float32)
        session.obj_id_to_idx(0)
        own = []
        for number in range(len(frames)):
            said[:] = [prompt[None]] if number < PROMPTED else []
            session.obj_with_new_inputs = [0] * (number < PROMPTED)
            own.append(plain(session, frame_idx=number).pred_masks[0, 0])
        masks.append(torch.stack(own))
    for hook in hooks:
        hook.remove()
    return list(torch.stack(masks, dim=1))


@pytest.mark.parametrize("occlusion", [False, True], ids=["sam2", "sam2.1"])
def test_a_clip_is_tracked_as_by_transformers(model: Any, occlusion: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, memory = drawn(model, occlusion)
    tracker = Tracker(model, memory)
    assert tracker.num_tensors == len(memory) == (160 if occlusion else 157)
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (FRAMES, 3, 64, 64), dtype=torch.uint8, generator=generator)
    prompts = torch.randn(2, WIDTH, generator=generator)
    expected = by_transformers(plain, model, frames, prompts)
    decode = model.grounding.decode_candidates

    def appearing(*inputs: Any) -> tuple[Tensor, ...]:
        masks, ious, scores, tokens = decode(*inputs)
        return masks, ious, torch.ones_like(scores), tokens

    monkeypatch.setattr(model.grounding, "decode_candidates", appearing)
    found = list(tracker.track(iter(frames), FRAMES, prompts, PROMPTED))
    assert len(found) == FRAMES
    for number, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.allclose(own, other, atol=2e-4), number
    assert not torch.allclose(found[-1][0], found[-1][1], atol=0.05), "the objects differ"
    with torch.no_grad():
        alone = model.decode_masks(prompts, model.encode_grounding(frames[-1:]), torch.zeros(2, dtype=torch.long))
    assert not torch.allclose(found[-1], alone.mask_logits, atol=0.1), "later frames are not prompted"


def test_a_prompted_frame_is_segmented_as_a_single_image(model: Any) -> None:
    frames = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    prompts = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(4))
    found = list(Tracker(model, None).track(frames, 2, prompts, 2))
    for frame, own in zip(frames, found, strict=True):
        with torch.no_grad():
            levels = model.encode_grounding(frame[None])
            alone = model.decode_masks(prompts, levels, torch.zeros(3, dtype=torch.long)).mask_logits
        assert torch.allclose(own, alone, atol=1e-4)


def test_frames_are_streamed_and_forgotten(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions: list[Sam2VideoInferenceSession] = []

    def watched(**options: Any) -> Sam2VideoInferenceSession:
        sessions.append(Sam2VideoInferenceSession(**options))
        return sessions[-1]

    monkeypatch.setattr(video, "Sam2VideoInferenceSession", watched)
    read: list[int] = []

    def frames() -> Any:
        for number in range(24):
            read.append(number)
            yield torch.full((3, 64, 64), number, dtype=torch.uint8)

    for number, _ in enumerate(Tracker(model, None).track(frames(), 24, torch.randn(1, WIDTH), PROMPTED)):
        assert read == list(range(number + 1)), "a frame is read when it is asked for"
        kept = sessions[0].output_dict_per_obj[0]
        assert len(kept["cond_frame_outputs"]) <= PROMPTED
        assert len(kept["non_cond_frame_outputs"]) <= 17
        assert sum("high_res_masks" in one for part in kept.values() for one in part.values()) <= 1
        assert len(sessions[0].cache._vision_features) == 1


def test_the_model_itself_gets_nothing(model: Any) -> None:
    before = sorted(model.state_dict())
    Tracker(model, None)
    assert sorted(model.state_dict()) == before
    assert all(not name.startswith("_models") for name, _ in Tracker(model, None).named_parameters())


def test_weights_that_do_not_fit_are_listed(model: Any) -> None:
    _, memory = drawn(model)
    del memory["no_object_pointer"]
    memory["mask_downsample.bias"] = torch.zeros(2)
    memory["strange"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        Tracker(model, memory)
    for part in ("missing no_object_pointer", "unknown strange", "mask_downsample.bias: (2,), expected (1,)", "157"):
        assert part in str(caught.value)


def test_every_key_of_the_real_size_has_its_place(golden: Any) -> None:
    """The 157 keys that an import drops are those of Sam2VideoModel's memory, name by name and shape by shape."""
    keys = json.loads((golden / "sa2va_4b_keys.json").read_text())["keys"]
    with torch.device("meta"):
        off = dict.fromkeys(("occlusion_spatial_embedding", "temporal_pos_encoding_for_object_pointers"), False)
        own = Sam2VideoModel(Sam2VideoConfig(**{f"enable_{name}": value for name, value in off.items()})).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items() if not name.startswith(SHARED)}
    named = {memory_name(name, ORIGINAL): tuple(key["shape"]) for name, key in keys.items()}
    found = {name: shape for name, shape in named.items() if name is not None}
    assert found == expected
    assert len(found) == 157


def test_names_of_other_layouts() -> None:
    fuser = "memory_encoder.memory_fuser.layers.1.scale"
    assert memory_name("grounding_encoder.sam2_model.memory_encoder.fuser.layers.1.g_weight", HF_SA2VA) == fuser
    assert memory_name("memory_encoder.fuser.layers.1.gamma", SAM2) == fuser
    assert memory_name(fuser, SAM2_NATIVE) == fuser
    assert memory_name("obj_ptr_tpos_proj.weight", SAM2) == video.TIME + "weight"
    assert memory_name("sam_mask_decoder.iou_token.weight", SAM2) is None


@pytest.mark.parametrize("occlusion", [False, True], ids=["sam2", "sam2.1"])
def test_in_bf16_autocast_masks_are_the_same_to_rounding(model: Any, occlusion: bool) -> None:
    _, memory = drawn(model, occlusion)
    tracker, generator = Tracker(model, memory), torch.Generator().manual_seed(6)
    frames = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=generator)
    prompts = torch.randn(2, WIDTH, generator=generator)
    exact = torch.stack(list(tracker.track(frames, 5, prompts, PROMPTED)))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = torch.stack(list(tracker.track(frames, 5, prompts, PROMPTED)))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.05 * exact.std()
