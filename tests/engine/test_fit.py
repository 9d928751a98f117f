"""The loop: what it promises about resume, faults, schedules and the best product."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewmask.config import RunSection, StageSection
from fewmask.engine.checkpoint import checkpoints
from fewmask.engine.fit import accelerator_for, synchronise_norms
from fewmask.engine.optim import build_optimiser, learning_rate
from fewmask.engine.run import Run, versions
from fewmask.engine.stage import CLOCKS
from fewmask.models import build_encoder
from fewmask.types import Interrupted, UserError
from tests.engine.tiny import BATCH, TinyObjective, TinyStream, train


class StopsAt(TinyStream):
    """Behaves as if the user had pressed Ctrl-C while a batch was fetched."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.stop = step

    def batch(self, step, rank=0, world=1):
        if step == self.stop:
            signal.raise_signal(signal.SIGTERM)
        return super().batch(step, rank, world)


class DiesAt(TinyStream):
    """Behaves like kill -9: nothing runs after it but what is on disk."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.stop = step

    def batch(self, step, rank=0, world=1):
        if step == self.stop:
            raise MemoryError
        return super().batch(step, rank, world)


def state(objective):
    return {name: value.clone() for name, value in objective.state_dict().items()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_killed_anywhere_and_resumed_equals_the_uninterrupted_run(tmp_path):
    _, _, whole = train(tmp_path / "whole")
    for step in (1, 4, 6, 11):
        folder = tmp_path / f"killed{step}"
        with pytest.raises(MemoryError):
            train(folder, stream=DiesAt(step), every=1e9 if step == 4 else 0.0)
        _, facts, resumed = train(folder)
        assert facts["steps"] == 12
        assert_equal(state(whole), state(resumed))


def test_a_stop_signal_saves_and_the_rest_is_not_repeated(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, stream=StopsAt(5), every=1e9)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"
    stream = TinyStream()
    train(tmp_path, stream=stream)
    assert stream.asked == list(range(6, 12))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_torn_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    _, _, whole = train(tmp_path / "whole")
    with pytest.raises(MemoryError):
        train(tmp_path / "run", stream=DiesAt(8))
    newest, older = checkpoints(tmp_path / "run" / "pretrain" / "checkpoints")
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    stream = TinyStream()
    _, _, resumed = train(tmp_path / "run", stream=stream)
    assert stream.asked[0] == int(older.stem.split("_")[1])
    assert_equal(state(whole), state(resumed))
    log = (tmp_path / "run" / "pretrain" / "log.jsonl").read_text()
    assert "is damaged and was passed over" in log


def test_when_no_checkpoint_can_be_read_nothing_is_retrained_silently(tmp_path):
    with pytest.raises(MemoryError):
        train(tmp_path, stream=DiesAt(8))
    for path in checkpoints(tmp_path / "pretrain" / "checkpoints"):
        path.write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"No checkpoint in .* can be read"):
        train(tmp_path)


def test_a_finished_training_is_not_continued(tmp_path):
    _, _, first = train(tmp_path)
    stream = TinyStream()
    _, _, second = train(tmp_path, stream=stream)
    assert stream.asked == []
    assert_equal(state(first), state(second))


def test_nan_stops_with_the_file_names_and_leaves_a_sound_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"nan at step 8 with the images image7_0, image7_1.*sound"):
        train(tmp_path, stream=TinyStream(poison=7))
    _, _, objective = train(tmp_path, stream=TinyStream())
    assert all(torch.isfinite(value).all() for value in objective.state_dict().values())


def test_the_best_product_is_kept_not_the_last(tmp_path):
    scores = iter([0.3, 0.9, 0.5, 0.1])
    seen = []

    def validate(product):
        seen.append(state(product))
        return {"score": next(scores)}

    product, facts, _ = train(tmp_path, validate=validate)
    assert facts["best_score"] == 0.9
    assert facts["best_step"] == 6
    assert_equal(state(product), seen[1])


def test_the_best_product_survives_a_kill_after_it(tmp_path):
    def validate(product):
        return {"score": -abs(product[0].weight.sum().item())}

    expected, facts, _ = train(tmp_path / "whole", validate=validate)
    with pytest.raises(MemoryError):
        train(tmp_path / "run", stream=DiesAt(10), validate=validate, every=1e9)
    product, resumed, _ = train(tmp_path / "run", validate=validate)
    assert resumed["best_step"] == facts["best_step"]
    assert_equal(state(product), state(expected))


def log_of(folder, kind):
    lines = (folder / "pretrain" / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def test_a_watch_is_logged_at_its_period_and_after_the_last_step_and_chooses_nothing(tmp_path):
    seen = []

    def watch(product):
        product.eval()
        seen.append(state(product))
        return {"height": -float(len(seen))}

    product, facts, _ = train(tmp_path, epochs=5, watch=watch, probe_every=2)
    assert [(line["step"], line["epoch"], line["height"]) for line in log_of(tmp_path, "probe")] == [
        (6, 2.0, -1.0), (12, 4.0, -2.0), (15, 5.0, -3.0),
    ]  # fmt: skip
    assert_equal(state(product), seen[-1])
    assert (facts["best_score"], facts["best_step"]) == (None, None)


def test_without_a_period_nobody_watches(tmp_path):
    train(tmp_path, watch=lambda product: pytest.fail("it was called"), probe_every=0)


def test_a_watch_changes_no_weight_however_often_it_looks_and_whatever_it_draws(tmp_path):
    def watch(product):
        product.eval()
        torch.rand(7)
        return {"height": 0.0}

    _, _, whole = train(tmp_path / "whole")
    _, _, watched = train(tmp_path / "watched", watch=watch, probe_every=1)
    with pytest.raises(MemoryError):
        train(tmp_path / "killed", stream=DiesAt(7), watch=watch, probe_every=2)
    _, _, resumed = train(tmp_path / "killed", watch=watch, probe_every=2)
    assert_equal(state(whole), state(watched))
    assert_equal(state(whole), state(resumed))


class Clocked(TinyStream):
    """Makes every step take a tenth of a second of a clock that only it moves."""

    now = 0.0

    def batch(self, step, rank=0, world=1):
        self.now += 0.1
        return super().batch(step, rank, world)


def test_a_time_budget_ends_the_training_and_the_schedule(tmp_path, monkeypatch):
    stream = Clocked()
    monkeypatch.setitem(CLOCKS, "wall", lambda: stream.now)
    _, facts, _ = train(tmp_path, epochs=10**6, stream=stream, budget=2.05, every=1e9)
    lines = [json.loads(line) for line in (tmp_path / "pretrain" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert facts["steps"] == 21
    assert steps[-1]["progress"] == 1.0
    assert steps[-1]["lr"] < 0.02 * max(line["lr"] for line in steps)


class SlowDisk(Clocked):
    """Saves take long on that clock, so that the time is over in the middle of one."""

    steps_per_epoch = 2

    def note(self, *args, **kwargs):
        self.now += 0.2


def test_time_that_ends_while_saving_is_followed_by_one_more_step_and_its_validation(tmp_path, monkeypatch):
    stream, scored = SlowDisk(), []
    monkeypatch.setitem(CLOCKS, "wall", lambda: stream.now)
    monkeypatch.setattr("fewmask.engine.fit.save_checkpoint", stream.note)

    def validate(product):
        scored.append(len(stream.asked))
        return {"score": 0.0}

    _, facts, _ = train(tmp_path, epochs=10**6, stream=stream, budget=0.8, validate=validate)
    assert scored[-1] == facts["steps"]


def test_the_log_says_what_happened(tmp_path):
    train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "pretrain" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [3, 6, 9, 10, 12]
    for line in steps:
        assert line["twice"] == pytest.approx(2 * line["loss"], rel=1e-5)
        assert line["images_per_s"] > 0
        assert 0 <= line["data_wait"] <= 1


def test_two_seeds_differ_and_one_seed_repeats(tmp_path):
    results = [state(train(tmp_path / str(n), seed=s)[2]) for n, s in enumerate((0, 0, 1))]
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0]["net.0.weight"], results[2]["net.0.weight"])


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    train(tmp_path, epochs=1)
    with pytest.raises(UserError, match=r"holds a run with stage.epochs=1, and you asked for 2"):
        train(tmp_path, epochs=2)


def enter(folder, begun=(), **sections):
    """Enter a run of a chain whose sections have these rates, the stages `begun` having left a checkpoint."""
    rates = {"model": 0, "pretrain": 0, "finetune": 0, "student": 0, "distill": 0} | sections
    with Run(folder, "run", {name: {"lr": rate} for name, rate in rates.items()}):
        for stage in begun:
            (folder / stage / "checkpoints" / "step_1").mkdir(parents=True)


@pytest.mark.parametrize(
    ("begun", "section", "free"),
    [
        ((), "model", True),
        (("pretrain",), "model", False),
        (("pretrain",), "pretrain", False),
        (("pretrain",), "finetune", True),
        (("pretrain",), "student", True),
        (("finetune",), "pretrain", False),  # it was left out, and what was learnt since began without it
        (("finetune",), "distill", True),
        (("finetune", "distill"), "distill", False),
        (("finetune", "distill"), "student", False),
        (("select",), "pretrain", False),  # its candidates were trained as these sections say
        (("select",), "finetune", False),
        (("ensemble",), "finetune", False),
    ],
)
def test_settings_of_a_stage_ahead_may_be_mended(tmp_path, begun, section, free):
    enter(tmp_path, begun)
    if not free:
        with pytest.raises(UserError, match=rf"holds a run with {section}\.lr=0, and you asked for 1"):
            enter(tmp_path, **{section: 1})
        return
    enter(tmp_path, **{section: 1})
    (tmp_path / "metrics.json").touch()  # figures that the new settings would not change
    if begun:
        with pytest.raises(UserError, match=rf"holds a run with {section}\.lr=1, and you asked for 2"):
            enter(tmp_path, **{section: 2})


def begun_run(folder, config, **facts):
    """Leave a run of these settings that has learnt something; return what run.json then holds."""
    with Run(folder, "distill", config) as run:
        (folder / "distill" / "checkpoints" / "step_1").mkdir(parents=True, exist_ok=True)
        run.info.update(facts)
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize(
    ("then", "now", "named"),
    [
        ({"distill": {"unlabelled": True}}, {"distill": {"unlabelled": False}}, r"distill\.unlabelled=True"),
        ({"model": {"encoder_settings": {}}}, {"model": {"encoder_settings": {"drop_path": 0.3}}}, "drop_path=None"),
        ({"run": {"precision": "bf16"}}, {"run": {"precision": "fp32"}}, r"run\.precision=bf16"),
    ],
)
def test_a_setting_that_changes_the_result_is_compared_wherever_it_stands(tmp_path, then, now, named):
    before = begun_run(tmp_path, then)
    with pytest.raises(UserError, match=named):
        begun_run(tmp_path, now)
    assert json.loads((tmp_path / "run.json").read_text()) == before


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"data": {"unlabelled": ["a"]}}, {"data": {"unlabelled": ["b"]}}),  # compared by content
        ({"run": {"time": "5m"}}, {"run": {"time": "9m"}}),
        ({"distill": {"checkpoint_seconds": 1}}, {"distill": {"checkpoint_seconds": 2}}),
        ({"distill": {"epochs": 1}}, {"distill": {"epochs": 1, "new": 2}}),  # an older version had no such setting
        ({"run": {"precision": "auto"}}, {"run": {"precision": "bf16"}}),
    ],
)
def test_a_setting_that_changes_no_result_may_differ(tmp_path, then, now):
    begun_run(tmp_path, then)
    assert begun_run(tmp_path, now)["config"] == now


def test_a_finished_run_stays_what_made_it_and_an_unfinished_one_says_who_went_on(tmp_path):
    begun_run(tmp_path, {}, git="old", versions={"torch": "1"}, command="fewmask distill old")
    again = begun_run(tmp_path, {})
    assert (again["git"], again["versions"], again["command"]) == ("old", {"torch": "1"}, "fewmask distill old")
    (tmp_path / "run.json").write_text(json.dumps({**again, "status": "interrupted"}))
    gone_on = begun_run(tmp_path, {})
    assert gone_on["versions"] == versions()
    assert gone_on["command"] != "fewmask distill old"


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with Run(tmp_path, "test", {}), pytest.raises(UserError, match="Another run works in"):
        train(tmp_path)


def test_a_missing_device_is_a_sentence(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UserError, match=r"run\.device=cuda was asked for"):
        accelerator_for(RunSection(device="cuda"))


@given(st.floats(0, 1), st.floats(0, 0.9), st.floats(0, 1))
def test_the_rate_stays_between_its_ends_and_peaks_after_warm_up(progress, warmup, floor):
    settings = StageSection(method={"name": "x"}, lr=1.0, min_lr=floor, warmup=warmup)
    rate = learning_rate(progress, settings)
    assert 0 < rate <= 1.0 + 1e-9 or (floor == 0 and rate == pytest.approx(0, abs=1e-12))
    assert learning_rate(warmup, settings) == pytest.approx(1.0)
    assert learning_rate(1.0, settings) == pytest.approx(floor if warmup < 1 else 1.0)


def test_cosine_is_half_way_at_half_time():
    settings = StageSection(method={"name": "x"}, lr=2.0, min_lr=1.0, warmup=0.0)
    assert learning_rate(0.5, settings) == pytest.approx(1.5)
    assert learning_rate(0.25, settings) == pytest.approx(1 + 0.5 * (1 + math.cos(math.pi / 4)))


def test_vectors_do_not_decay_and_every_parameter_is_in_one_group():
    objective = TinyObjective()
    optimiser = build_optimiser(objective, StageSection(method={"name": "x"}, weight_decay=0.1))
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    listed = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in objective.parameters())


def test_layer_decay_follows_depth():
    model = torch.nn.ModuleDict(
        {
            "encoder": torch.nn.ModuleDict(
                {"patch_embed": torch.nn.Linear(2, 2), "blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 3)}
            ),
            "head": torch.nn.Linear(2, 2),
        }
    )
    model["encoder"]["blocks"] = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    settings = StageSection(method={"name": "x"}, layer_decay=0.5, encoder_lr_scale=0.8)
    scales = {}
    for group in build_optimiser(model, settings).param_groups:
        for parameter in group["params"]:
            name = next(n for n, p in model.named_parameters() if p is parameter)
            scales[name] = group["lr_scale"]
    assert scales["head.weight"] == 1.0
    assert scales["encoder.blocks.2.weight"] == pytest.approx(0.8 * 0.5)
    assert scales["encoder.blocks.0.weight"] == pytest.approx(0.8 * 0.5**3)
    assert scales["encoder.patch_embed.weight"] == pytest.approx(0.8 * 0.5**4)


def test_batches_are_what_the_log_counts(tmp_path):
    _, facts, _ = train(tmp_path, epochs=2)
    assert facts["batch_size"] == BATCH
    assert facts["epochs"] == 2


def test_two_processes_give_what_one_gives(tmp_path):
    def start(name, *launcher):
        command = [sys.executable, *launcher, "-m", "tests.engine.two_processes", str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True)
        return torch.load(tmp_path / name / "result.pt", weights_only=True)

    one = start("one")
    two = start("two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-5, atol=1e-6)


def test_tensorboard_gets_the_same_figures(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra fewmask[tracking] is not installed")
    train(tmp_path, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "pretrain" / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "pretrain" / "log.jsonl").read_text().splitlines()]
    logged = [(line["step"], line["loss"]) for line in lines if line["kind"] == "step"]
    assert [(e.step, pytest.approx(e.value, rel=1e-4)) for e in events.Scalars("pretrain/step/loss")] == logged


def test_a_finite_loss_with_an_infinite_gradient_leaves_a_sound_checkpoint(tmp_path):
    class Poisoned(TinyObjective):
        def forward(self, batch):
            terms = super().forward(batch)
            if "image7_0" in batch.names:
                terms["loss"] = terms["loss"] + (self.net[0].weight * 0).abs().sqrt().sum()  # 0 with gradient NaN
            return terms

    with pytest.raises(UserError, match=r"The weights became infinite before step 8.*sound"):
        train(tmp_path, objective=Poisoned)
    _, _, objective = train(tmp_path)
    assert all(torch.isfinite(value).all() for value in objective.state_dict().values())


def test_damaged_best_weights_are_chosen_anew(tmp_path):
    def validate(product):
        return {"score": -abs(product[0].weight.sum().item())}

    with pytest.raises(MemoryError):
        train(tmp_path, stream=DiesAt(7), validate=validate)
    for path in (tmp_path / "pretrain" / "checkpoints").glob("best_*"):
        path.write_bytes(b"torn")
    product, facts, _ = train(tmp_path, validate=validate)
    assert facts["best_step"] > 6
    assert validate(product)["score"] == pytest.approx(facts["best_score"])


def test_norms_are_synchronised_with_their_values_names_and_fused_activations():
    torch.manual_seed(0)
    encoder = build_encoder("efficientnet_lite0", size=32)
    model = torch.nn.ModuleDict({"one": encoder, "again": torch.nn.ModuleList([encoder])}).eval()
    plain = sum(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
    image = torch.randn(2, 3, 32, 32)
    before, expected = state(model), [f.detach() for f in encoder(image)]
    synchronise_norms(model)
    synchronised = sum(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    assert plain == synchronised > 20
    assert_equal(before, state(model))
    assert all(map(torch.equal, expected, encoder(image)))


def test_layer_decay_without_blocks_is_refused():
    with pytest.raises(UserError, match="layer_decay needs an encoder made of blocks"):
        build_optimiser(TinyObjective(), StageSection(method={"name": "x"}, layer_decay=0.5))
