"""The loop: what it promises about resume, faults, schedules and the best product."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fewmask.config import RunSection
from fewmask.engine import fit
from fewmask.engine.checkpoint import checkpoints
from fewmask.engine.device import accelerator_for, resolve_precision
from fewmask.engine.stage import CLOCKS
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


class Held(TinyObjective):
    """Takes the gradient of its first convolution away before each step, and counts how often it had one."""

    seen = 0

    def before_step(self, progress):
        self.seen += self.net[0].weight.grad.abs().sum().item() > 0
        self.net[0].weight.grad = None


def test_what_an_objective_takes_away_before_a_step_is_not_learnt(tmp_path):
    objective = Held()
    began = state(objective)
    train(tmp_path, epochs=2, objective=lambda: objective)
    assert objective.seen == 6
    assert torch.equal(objective.net[0].weight, began["net.0.weight"])
    assert not torch.equal(objective.net[3].weight, began["net.3.weight"])


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


def test_what_is_traced_at_first_uses_up_no_time(tmp_path, monkeypatch):
    stream, steps = Clocked(), []

    def slow_at_first(objective):
        plain = objective.forward

        def forward(batch):
            stream.now += 0 if steps else 300
            steps.append(stream.now)
            return plain(batch)

        objective.forward = forward
        return objective

    monkeypatch.setitem(CLOCKS, "wall", lambda: stream.now)
    monkeypatch.setattr("torch.compile", slow_at_first)
    train(tmp_path / "traced", epochs=10**6, stream=stream, budget=2.05, every=1e9, compile=True)
    assert len(steps) == 1 + 21  # as above, and the first


def test_no_time_for_a_step_is_told(tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setitem(CLOCKS, "wall", lambda: float(next(ticks)))
    with pytest.raises(UserError, match=r"'pretrain' was over before its first step.*raise run\.time"):
        train(tmp_path, epochs=10**6, budget=0.5)
    assert train(tmp_path, epochs=2)[1]["steps"] > 0  # and nothing is in the way of another try


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


@pytest.mark.parametrize(("rounds", "epochs", "told"), [(1.0, 1, False), (6.4, 1, True), (6.4, 0, False)])
def test_an_epoch_that_shows_each_image_often_is_told(tmp_path, capsys, rounds, epochs, told):
    stream = TinyStream()
    stream.rounds = rounds
    train(tmp_path, stream=stream, epochs=epochs)
    words = "an epoch here is 3 steps (pretrain.min_epoch_steps): about 6 times through the images"
    assert (words in capsys.readouterr().err) is told


def test_two_seeds_differ_and_one_seed_repeats(tmp_path):
    results = [state(train(tmp_path / str(n), seed=s)[2]) for n, s in enumerate((0, 0, 1))]
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0]["net.0.weight"], results[2]["net.0.weight"])


def test_a_missing_device_is_a_sentence(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UserError, match=r"run\.device=cuda was asked for"):
        accelerator_for(RunSection(device="cuda"))


def test_precision_auto_is_bf16_only_where_a_gpu_multiplies_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for major, expected in ((7, "fp16"), (8, "bf16")):  # a T4 is 7.5 and emulates bf16, an A100 is 8.0
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, major=major: SimpleNamespace(major=major))
        assert resolve_precision(RunSection()) == expected


def test_a_resumed_training_goes_on_with_its_loss_scale(tmp_path, monkeypatch):
    scalers = []

    def scaled(settings):
        accelerator = accelerator_for(settings)
        scalers.append(torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3))
        accelerator.scaler = scalers[-1]
        return accelerator

    monkeypatch.setattr(fit, "accelerator_for", scaled)
    _, _, whole = train(tmp_path / "whole")
    with pytest.raises(MemoryError):
        train(tmp_path / "killed", stream=DiesAt(7))
    _, _, resumed = train(tmp_path / "killed")
    assert [scaler.get_scale() for scaler in scalers] == [64.0, 16.0, 64.0]  # doubled after each third step
    assert_equal(state(whole), state(resumed))


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
    ends = [(tmp_path / "two" / f"end_{rank}.txt").read_text() for rank in (0, 1)]
    assert ends == ["on its own"] * 2  # else gloo may abort a process at its end


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
