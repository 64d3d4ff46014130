"""After three steps every trained parameter has moved and every frozen one is bitwise what it was."""

from __future__ import annotations

import dataclasses

import torch

from dual_loop.config import TrainConfig
from dual_loop.data.dataset import SkipLedger
from dual_loop.loop.task import DualLoopTask
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.training.trainer import Trainer

from small_model import pair_samples, scene_samples, small_batch, small_config, small_model


class FixedData:
    """The same micro-batches again and again; stands in for the stream."""

    steps_per_epoch = 100
    source_names = ("refcoco", "sav", "sa1b")

    def __init__(self, batches, samples):
        self.window, self.made = batches, samples
        self.ledger = SkipLedger(max_bad_fraction=0.0, max_bad_grace=0)

    def batches(self, first_step):
        while True:
            yield from self.window

    def samples(self, step, images):
        return [self.made[image] for image in images]

    def state_dict(self, step):
        return {}

    def load_state_dict(self, state):
        raise AssertionError


def test_every_trained_parameter_moves_and_no_frozen_one(tmp_path):
    from dual_loop.training.devices import build_accelerator
    from dual_loop.training.run_folder import RunFolder

    config = small_config()
    train = TrainConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        warmup_ratio=0.0,
        device="cpu",
        panel_interval=100,
    )
    loop_config = dataclasses.replace(config.loop, max_new_tokens=3, max_rejected_fraction=1.0)
    config = dataclasses.replace(config, train=train, loop=loop_config)
    model, prompter, _ = small_model(config)
    samples = [*scene_samples(6), *pair_samples(3), *scene_samples(3, source="sa1b", captions=False)]
    data = FixedData([small_batch(config, samples[:6]), small_batch(config, samples[6:])], samples)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    accelerator = build_accelerator(config)
    folder = RunFolder(train.output_dir, True)
    folder.create(config.to_dict(), {}, False)
    task = DualLoopTask(model, prompter, config)
    average = ExponentialMovingAverage(trainable_parameters(model), train.ema_decay)
    picked: set[int] = set()
    original = model.grounding.decode_prompts

    def remember(*args):
        segmentation = original(*args)
        picked.update(segmentation.chosen.tolist())
        return segmentation

    model.grounding.decode_prompts = remember
    trainer = Trainer(config, task, average, data, accelerator, folder, lambda line: None)
    assert trainer.fit().step == 3
    for name, parameter in model.named_parameters():
        same = torch.equal(before[name], parameter.detach())
        if not parameter.requires_grad:
            assert same, f"frozen, but moved: {name}"
        elif not any(f"output_hypernetworks_mlps.{k + 1}." in name for k in range(3) if k not in picked):
            # A candidate that was never the best gets no gradient; with these weights the others are.
            assert not same, f"trained, but did not move: {name}"
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
